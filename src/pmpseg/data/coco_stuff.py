"""CocoStuff: COCO-Stuff-164k, 171 classes of things and stuff, from folders or straight from the official zip files.

Source: Caesar et al., "COCO-Stuff", CVPR 2018, https://github.com/nightrome/cocostuff. Below ``root``:

    train2017/ val2017/                                          or train2017.zip val2017.zip
    stuffthingmaps/{train2017,val2017}/                          or stuffthingmaps_trainval2017.zip
    annotations/{instances,captions}_{train,val}2017.json        or annotations_trainval2017.zip
    annotations/panoptic_{train,val}2017.json, the PNGs in a     or panoptic_annotations_trainval2017.zip
    folder or zip of that name beside it

JSONs are needed for ``segments: things`` and for captions only. Items are those of ``base``: labels, no masks; these are made on
the device.
"""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from pmpseg.errors import InputError
from pmpseg.vocabulary import Vocabulary

from .base import IGNORE, SegmentationData, SegmentationDataset, choose_prompts, collate, ignore_unseen
from .coco_captions import Captions
from .coco_files import (
    ANNOTATIONS,
    IDS,
    PANOPTIC,
    SPLITS,
    CocoFiles,
    class_of_thing,
    find_split,
    panoptic_maps,
    read_json,
)
from .coco_things import LEAST_AGREEMENT, InstanceThings, PanopticThings, agreement, part
from .items import class_list_item
from .transforms import check_augmentation, eval_transform, train_transform


class CocoStuff(SegmentationData):
    """COCO-Stuff's training images, and its val images for val and test.

    Args:
        root: where the folders or zips lie, as above.
        classes: the vocabulary, 171 classes in COCO-Stuff's order, by default pmpseg's coco_stuff_171.txt. Classes that it marks
            [unseen] are ignored and never asked in training: pmpseg's coco_stuff_156.txt marks the usual 15.
        synonyms: False: each class goes by its name only, in training, in validation and in the saved model.
        segments: class: items of training have labels only, a class is one mask. things: they also have ``segments``, each thing
            one of its own (``coco_things.part`` says how), from the panoptic JSON or, where there is none, the instances JSON.
        captions: items of training have "captions", the image's captions, which name unseen classes, too; so has
            ``data.captions(split)``.
        expect: images of train and val, checked at start; the full set has 118287 and 5000.
        image_size: short side in evaluation, at most ``max_size`` for the long one.
        crop_size: (height, width) of a training image; by default a square of ``image_size``.
        scale: large-scale jitter: the short side of a training image in units of the crop's, at random between the two.
        sizes: lengths of the short side to choose from, instead; as MaskFormer does.
        max_size: of the long side after that.
        max_class_share: a crop is drawn anew, up to ten times, while one class covers more than that share of what is labelled in
            it; 1 takes any.
        flip: probability of a mirror image.
        colour: range of brightness, contrast and saturation, or "ssd": that of SSD, as MaskFormer uses.
        resize_labels: in evaluation score at the network's size, not the images' own.
        num_prompts, batch_size, eval_batch_size, num_workers, seed: see ``SegmentationData``.

    Raises ``InputError``, with the file's name, for what is missing, alone, broken or out of range. All names are compared at
    start, and some maps read in full; the others are checked when their turn comes.
    """

    def __init__(
        self,
        root: str = "../data/coco",
        classes: str | None = None,
        synonyms: bool = True,
        segments: Literal["class", "things"] = "class",
        captions: bool = False,
        expect: tuple[int, int] | None = None,
        image_size: int = 512,
        crop_size: tuple[int, int] | None = None,
        scale: tuple[float, float] = (0.5, 2.0),
        sizes: list[int] | None = None,
        max_size: int | None = None,
        max_class_share: float = 1.0,
        flip: float = 0.5,
        colour: float | Literal["ssd"] = 0.4,
        resize_labels: bool = False,
        num_prompts: int | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 1,
        num_workers: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__(image_size, num_prompts, batch_size, eval_batch_size, num_workers, seed)
        if segments not in ("class", "things"):
            raise InputError(f"segments: got {segments!r}, want class or things")
        if expect is not None and (len(expect) != 2 or not all(isinstance(count, int) and count > 0 for count in expect)):
            raise InputError(f"expect: got {expect}, want the numbers of training and validation images")
        self.root = Path(root)
        self.max_size, self.resize_labels = max_size, resize_labels
        crop = tuple(crop_size) if crop_size else (image_size, image_size)
        check_augmentation(crop, scale, flip, colour, sizes, max_size, max_class_share)
        crop = (crop[0], crop[1])
        # called when a training begins: it imports albumentations
        self.augmentation = partial(train_transform, crop, scale, flip, colour, sizes, max_size, max_class_share)
        self.vocabulary = Vocabulary.read(classes or str(resources.files("pmpseg") / "assets" / "vocab" / "coco_stuff_171.txt"))
        if len(self.vocabulary) != len(IDS):
            raise InputError(f"{classes}: got {len(self.vocabulary)} classes, want COCO-Stuff's {len(IDS)}, in its order")
        if not synonyms:
            self.vocabulary = Vocabulary.of(self.vocabulary.names, self.vocabulary.unseen)
        counts = dict(zip(("train", "val"), expect or (None, None), strict=True))
        found = [split for split in counts if find_split(self.root, SPLITS[split])]
        if not found:
            raise InputError(f"{self.root.resolve()} has no images: want train2017 or val2017 in it, folders or zips")
        self.files = {split: CocoFiles(self.root, SPLITS[split], counts[split]) for split in found}
        checked = {split: files.check() for split, files in self.files.items()}
        self.things: PanopticThings | InstanceThings | None = None
        if segments == "things" and "train" in self.files:
            self.things = self._read_things(checked["train"])
        self._captions: dict[str, Captions] = {}
        self.with_captions = captions
        if captions and "train" in self.files:
            self.captions("train")

    def dataset(self, split: str) -> "CocoStuffDataset":
        """The data set of "train", "val" or "test" (which is val)."""
        return CocoStuffDataset(self._of(split), split == "train", self)

    def captions(self, split: str) -> Mapping[str, list[str]]:
        """Image name -> its captions. Raises ``InputError`` where there is no captions JSON."""
        name = f"captions_{self._name(split)}"
        if name not in self._captions:
            found = read_json(self.root, name, ANNOTATIONS)
            if found is None:
                raise InputError(f"{self.root.resolve()} has no {name}.json, in annotations/ or annotations_trainval2017.zip")
            self._captions[name] = Captions(*found)
        return self._captions[name]

    @staticmethod
    def collate(items: list[dict]) -> dict:
        batch = collate(items)
        return batch | {key: [item[key] for item in items] for key in ("captions",) if key in items[0]}

    def _of(self, split: str) -> CocoFiles:
        own = "val" if self._name(split) == SPLITS["val"] else "train"
        if own not in self.files:
            raise InputError(f"{self.root.resolve()} has no images for {split}: want {SPLITS[split]} in it, a folder or a zip")
        return self.files[own]

    @staticmethod
    def _name(split: str) -> str:
        if split not in SPLITS:
            raise InputError(f"split: got {split!r}, want {', '.join(SPLITS)}")
        return SPLITS[split]

    def _read_things(self, checked: list[int]) -> PanopticThings | InstanceThings:
        files, things = self.files["train"], class_of_thing()
        name = SPLITS["train"]
        source: PanopticThings | InstanceThings
        if panoptic := read_json(self.root, f"panoptic_{name}", PANOPTIC):
            source = PanopticThings(*panoptic, panoptic_maps(self.root, name), things)
        elif instances := read_json(self.root, f"instances_{name}", ANNOTATIONS):
            source = InstanceThings(*instances, things)
        else:
            wanted = f"panoptic_{name}.json or instances_{name}.json in annotations/, or an official zip of annotations"
            raise InputError(f"segments: things: {self.root.resolve()} has no {wanted}")
        source.check([files.stem(index) for index in range(len(files))])
        counts = np.zeros(2)
        for index in checked:
            labels = files.labels(index)
            counts += agreement(source.read(files.stem(index), labels.shape, strict=True), labels)
        if counts[0] < LEAST_AGREEMENT * counts[1]:
            said = f"{source.where}: its things do not lie where the label maps have their classes"
            raise InputError(f"{said} ({counts[0] / counts[1]:.0%} of their pixels): are both of one release?")
        return source


class CocoStuffDataset(SegmentationDataset):
    """One split: augmented for training, or resized for evaluation."""

    def __init__(self, files: CocoFiles, train: bool, data: CocoStuff) -> None:
        self.files = files
        self.train = train
        self.vocabulary = data.vocabulary
        self.num_prompts = data.num_prompts
        self.seed = data.seed
        self.things = data.things if train else None
        self.captions = data.captions("train") if train and data.with_captions else None
        self.transform: Callable[..., dict]
        if train:
            self.transform = data.augmentation()
        else:
            self.transform = eval_transform(data.image_size, data.resize_labels, data.max_size, data.eval_scales)

    def __len__(self) -> int:
        return len(self.files)

    def item(self, index: int, epoch: int) -> dict:
        image, labels = self.files.read(index)
        sample = {"image": image, "labels": labels}
        name = self.files.name(index)
        if not self.train:
            return class_list_item(self.transform(sample), self.vocabulary, name, index)
        if self.things is not None:
            things = self.things.read(self.files.stem(index), labels.shape)
            sample["segments"] = things.numbers
        rng = np.random.default_rng([self.seed, epoch, index])
        sample = self.transform(sample, int(rng.integers(2**63)))
        sample["labels"] = ignore_unseen(sample["labels"], self.vocabulary)
        if self.things is not None:
            segments, classes = part(sample["labels"], things._replace(numbers=sample["segments"]))
            # what lies between things is nobody's, not an example of what the class is not
            sample["labels"] = np.where(segments < 0, IGNORE, sample["labels"])
        prompts, prompt_class = choose_prompts(_present(sample["labels"]), self.vocabulary, self.num_prompts, rng)
        item = class_list_item(sample, self.vocabulary, name, index)
        item |= {"prompts": prompts, "prompt_class": torch.from_numpy(prompt_class)}
        if self.things is not None:
            place = np.full(256, -1, dtype=np.int64)
            place[prompt_class[prompt_class >= 0]] = np.flatnonzero(prompt_class >= 0)
            item |= {"segments": torch.from_numpy(segments), "segment_prompt": torch.from_numpy(place[classes])}
        if self.captions is not None:
            item["captions"] = self.captions.get(name, [])
        return item


def _present(labels: np.ndarray) -> np.ndarray:
    """The values of labels (H, W) uint8; many times as fast as np.unique."""
    return np.flatnonzero(np.bincount(labels.ravel(), minlength=256))
