"""Pascal5i and Coco20i: one class asked of one query image, with S support images that show it; for evaluation only.

Sources: Pascal-5i is Shaban et al. 2017 in the form of PFENet (Tian et al. 2020), COCO-20i is Nguyen and Todorovic 2019 in
the form of HSNet (Min et al. 2021), both as CLIPSeg's code uses them (papers.md 3.7 and 3.8).
An item has K = 1 prompt, labels (H, W) of 0 (other), 1 (the class) and 255 (ignore), prompt_masks, phrase_class (1,),
phrase_kind "small", "medium" or "large", and support_image (1, S, 3, s, s), support_mask (1, S, s, s) and support_valid (1, S)
with s = image_size.
"""

from pathlib import Path

import numpy as np
import torch

from pmpseg.data.base import SegmentationData, SegmentationDataset
from pmpseg.data.episodes import MIN_PIXELS, CocoEpisodes, Source, VocEpisodes
from pmpseg.data.items import chw, stack_supports
from pmpseg.data.phrase_parts import SIZES, size_word
from pmpseg.data.removal import PASCAL_FOLDS
from pmpseg.data.sources import read_instances
from pmpseg.data.transforms import eval_transform, square_transform
from pmpseg.data.voc import VOC_NAMES, VocImages
from pmpseg.errors import InputError
from pmpseg.vocabulary import Vocabulary

FOLDS = 4


class OneShot(SegmentationData):
    """What both have in common: ``fold`` 0..3, ``shots`` (S) supports a query, ``episodes`` and how images are resized.

    Everything drawn comes from (seed, index of the episode): the same episodes in every run, for any number of workers. A
    support is never the query, nor is an image twice a support of one query; where there are too few, support_valid is False
    and the image zeros. ``template`` makes the prompt of the class's name, as in "a photo of a {label}.".

    ``square`` gives images of ``image_size`` x ``image_size``: squashed, or with ``pad`` padded with black below or to the
    right, then with labels padded with 255; False keeps the aspect, ``image_size`` being the short side. Answers are scored at
    the size of the labels: the image's own unless ``resize_labels``. Supports are squashed where queries are, else padded.
    """

    class_list = False  # the classes are not asked together: there is one prompt an image
    ignore_labels = True  # where labels are 255, phrases are not scored
    paper_metrics = "clipseg"
    phrase_kinds = SIZES
    in_order = True  # queries one after the other, else each drawn by its class

    def __init__(
        self,
        vocabulary: Vocabulary,
        source: Source,
        shots: int,
        episodes: int | None,
        template: str,
        image_size: int,
        square: bool,
        pad: bool,
        resize_labels: bool,
        eval_batch_size: int,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__(image_size, 1, eval_batch_size=eval_batch_size, num_workers=num_workers, seed=seed)
        if shots < 0 or (episodes is not None and episodes < 1):
            raise InputError(f"got {shots} shots and {episodes} episodes: want 0 or more shots, 1 or more episodes")
        if "{label}" not in template:
            raise InputError(f"template: got {template!r}, want {{label}} in it, as in 'a photo of a {{label}}.'")
        self.vocabulary, self.source, self.shots, self.template = vocabulary, source, shots, template
        self.episodes = len(source.queries) if episodes is None else episodes
        self.phrase_classes = len(vocabulary)
        if square:
            self.transform = square_transform(image_size, pad, resize_labels)
        else:
            self.transform = eval_transform(image_size, resize_labels)
        self.support_transform = square_transform(image_size, pad or not square, resize_labels=True)

    def dataset(self, split: str) -> "Episodes":
        if split != "test":
            raise InputError(f"{type(self).__name__} is for evaluation only: it has the split test, got {split}")
        return Episodes(self)


class Pascal5i(OneShot):
    """VOC 2012's val list in four folds of five classes: 1..5, 6..10, 11..15, 16..20; phrase_class is one less than these.

    Queries are all images with at least ``min_pixels`` of a class of the fold, each once (``episodes`` None) or round and round.
    The class is drawn among those of the fold in the image, supports among the other images with as many pixels of it. ``images``
    is "val", any list in ImageSets/Segmentation, or the path of PFENet's or HSNet's list file; with HSNet's, which name a class
    for each query, these are the queries whatever their pixels, and ``episodes: 1000`` is its protocol.

    What PFENet's code, as CLIPSeg's calls it, does otherwise:

    - it draws anew in every run, unseeded
    - it draws the query's class among all of the fold's in the image, also those of too few pixels (``small_targets: true``)
    - it pads, as we do here by default (``square`` and ``pad``), but shrinks only, to a multiple of 8, and its labels are scored
      at the image's own size, as ours
    - it reads masks where its list says; here they are found by name in ``masks``, by default SegmentationClassAug/ if there

    The paper's numbers are means over the four folds. The file with the names that it asks for is not in its repository; these
    are VOC's, as words.
    """

    def __init__(
        self,
        root: str,
        fold: int = 0,
        shots: int = 1,
        episodes: int | None = None,
        template: str = "a photo of a {label}.",
        images: str = "val",
        masks: str | None = None,
        min_pixels: int = MIN_PIXELS,
        small_targets: bool = False,
        image_size: int = 352,
        square: bool = True,
        pad: bool = True,
        resize_labels: bool = False,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        seed: int = 0,
    ) -> None:
        classes = [VOC_NAMES.index(name) for name in PASCAL_FOLDS[check_fold(fold)]]
        source = VocEpisodes(VocImages(root, images, masks), classes, min_pixels, small_targets)
        sizes = (image_size, square, pad, resize_labels)
        vocabulary = Vocabulary.of(VOC_NAMES)
        super().__init__(vocabulary, source, shots, episodes, template, *sizes, eval_batch_size, num_workers, seed)


class Coco20i(OneShot):
    """COCO instances in four folds: of the 80 classes in the order of their ids, fold f has f, f + 4, f + 8, ... (HSNet's).

    As in HSNet an episode is a class drawn from the fold, then a query and its supports from the images of that class; 1,000 of
    them. ``annotations`` is an instances JSON and ``images`` the folder of its images, both below ``root``.

    What HSNet's code does otherwise:

    - its images are those of its own lists, which are pickles and not read here: a pickle can run anything. Ours are those with
      at least ``min_pixels`` of the class, by the sum of the annotations' areas
    - its masks are label maps, so of overlapping instances one hides the other; ours is the union of the class's instances,
      crowds included
    - it scores at ``image_size`` after squashing (``resize_labels: true``), ours at the image's own size
    - a support may be drawn twice for one query
    """

    in_order = False

    def __init__(
        self,
        root: str,
        fold: int = 0,
        shots: int = 1,
        episodes: int = 1000,
        template: str = "{label}",
        annotations: str = "annotations/instances_val2014.json",
        images: str = "val2014",
        min_pixels: int = MIN_PIXELS,
        image_size: int = 352,
        square: bool = True,
        pad: bool = False,
        resize_labels: bool = False,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        seed: int = 0,
    ) -> None:
        path = Path(root) / annotations
        if not path.is_file():
            raise InputError(f"there is no {path}: give the instances JSON in annotations")
        content = read_instances(path)
        vocabulary = Vocabulary.of([category["name"] for category in content["categories"]])
        classes = range(check_fold(fold), len(vocabulary), FOLDS)
        source = CocoEpisodes(path, content, Path(root), images, vocabulary, classes, min_pixels)
        sizes = (image_size, square, pad, resize_labels)
        super().__init__(vocabulary, source, shots, episodes, template, *sizes, eval_batch_size, num_workers, seed)


class Episodes(SegmentationDataset):
    """The episodes of a data module as items."""

    def __init__(self, data: OneShot) -> None:
        self.source, self.vocabulary, self.template = data.source, data.vocabulary, data.template
        self.shots = data.shots if data.has_supports("test") else 0
        self.length, self.in_order, self.seed = data.episodes, data.in_order, data.seed
        self.transform, self.support_transform, self.side = data.transform, data.support_transform, data.image_size

    def __len__(self) -> int:
        return self.length

    def episode(self, index: int, epoch: int = 0) -> tuple[int, int, list[int]]:
        """The query, the class and the supports, at most S of them."""
        rng = np.random.default_rng([self.seed, epoch, index])
        if self.in_order:
            query, classes = self.source.queries[index % len(self.source.queries)]
            label = int(rng.choice(classes))
        else:
            label = int(rng.choice(sorted(self.source.shows)))
            query = int(rng.choice(self.source.shows[label]))
        # Image numbers are lines of a list, and HSNet's lists have an image once for each of its classes.
        others = [image for image in self.source.shows.get(label, []) if self.source.files[image] != self.source.files[query]]
        return query, label, rng.permutation(others)[: self.shots].astype(int).tolist()

    def item(self, index: int, epoch: int) -> dict:
        query, label, supports = self.episode(index, epoch)
        raw = self.source.read(query, label)
        sample = self.transform(raw)
        labels = torch.from_numpy(sample["labels"].astype(np.int64))
        item = {
            "image": chw(sample["image"]),
            "labels": labels,
            "name": self.source.files[query].name,
            "index": index,
            "prompts": [self.template.replace("{label}", self.vocabulary.names[label])],
            "prompt_class": torch.tensor([label if self.template == "{label}" else -1]),
            "prompt_masks": (labels == 1)[None],
            "phrase_class": torch.tensor([label]),
            "phrase_kind": [size_word(raw["labels"] == 1)],
        }
        return item | self._supports(label, supports) if self.shots else item

    def _supports(self, label: int, supports: list[int]) -> dict[str, torch.Tensor]:
        samples = (self.support_transform(self.source.read(number, label)) for number in supports)
        pairs = ((sample["image"], sample["labels"] == 1) for sample in samples)
        return stack_supports([pairs], self.shots, self.side)


def check_fold(fold: int) -> int:
    if fold not in range(FOLDS):
        raise InputError(f"fold: got {fold}, want 0 to {FOLDS - 1}")
    return fold
