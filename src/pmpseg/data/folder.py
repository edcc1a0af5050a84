"""FolderData: your own images and masks, with no code.

Either  images/  masks/  classes.txt                   for each image a PNG of class indices, of the same name
or      images/  annotations/instances_train.json      COCO instances: each category is a prompt

Both may be split, as images/train, masks/train, images/val, ... or as instances_val.json; what is missing is
made up: "val" from a fixed part of "train", "test" from "val". Everything is checked when the DataModule is
made, and what is wrong is said with the file's name.
"""

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pmpseg.data.base import (
    IGNORE,
    SegmentationData,
    SegmentationDataset,
    choose_prompts,
    ignore_unseen,
)
from pmpseg.data.items import class_list_item
from pmpseg.data.sources import CocoInstances, MaskFolder, read_instances
from pmpseg.data.transforms import eval_transform, train_transform
from pmpseg.errors import InputError
from pmpseg.vocabulary import Vocabulary

Source = MaskFolder | CocoInstances
CHECKED_MASKS = 8  # of each split, read in full at start; the others when their turn comes


class FolderData(SegmentationData):
    """Images with masks, or with COCO instances, in the folder ``root``.

    ``classes`` is a vocabulary file; by default ``root/classes.txt`` or, for COCO, the category names in the
    order of their ids. ``ignore_label`` is one more mask value, beside 255, that means ignore.
    ``split_names`` are the folders, or the ends of the JSON names, of train, val and test. ``val_fraction``
    of the training images, chosen by their names, is for validation where there is no val split (1: all of
    them). Training images are cut to ``crop_size`` (height, width), by default a square of ``image_size``;
    ``scale``, ``flip`` and ``colour`` are explained at ``train_transform``. In evaluation labels keep the
    images' own size unless ``resize_labels``. The other arguments are explained at ``SegmentationData``.

    Pixels of COCO images that belong to no instance have label 255.
    Raises ``InputError`` for missing, unreadable, mismatched or out-of-range files.
    """

    def __init__(
        self,
        root: str,
        classes: str | None = None,
        images: str = "images",
        masks: str = "masks",
        annotations: str = "annotations",
        split_names: tuple[str, str, str] = ("train", "val", "test"),
        val_fraction: float = 0.1,
        ignore_label: int = IGNORE,
        image_size: int = 512,
        crop_size: tuple[int, int] | None = None,
        scale: tuple[float, float] = (0.5, 2.0),
        flip: float = 0.5,
        colour: float = 0.4,
        resize_labels: bool = False,
        num_prompts: int | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__(image_size, num_prompts, batch_size, eval_batch_size, num_workers, seed)
        self.root = Path(root)
        self.crop_size = crop_size or (image_size, image_size)
        self.scale = scale
        self.flip = flip
        self.colour = colour
        self.resize_labels = resize_labels
        class_list = Path(classes) if classes else self.root / "classes.txt"
        names = dict(zip(("train", "val", "test"), split_names, strict=True))
        jsons = {split: self.root / annotations / f"instances_{name}.json" for split, name in names.items()}
        contents = {split: read_instances(path) for split, path in jsons.items() if path.is_file()}
        sources: dict[str, Source]
        if (self.root / masks).is_dir():
            self.vocabulary = Vocabulary.read(class_list)
            num_classes = len(self.vocabulary)
            folders = {split: name for split, name in names.items() if (self.root / images / name).is_dir()}
            sources = {
                split: MaskFolder(
                    self.root / images / name, self.root / masks / name, num_classes, ignore_label
                )
                for split, name in (folders or {"train": "."}).items()
            }
        elif contents:
            categories = next(iter(contents.values()))["categories"]
            if classes or class_list.is_file():
                self.vocabulary = Vocabulary.read(class_list)
            else:
                self.vocabulary = Vocabulary.of([category["name"] for category in categories])
            sources = {
                split: CocoInstances(jsons[split], content, self.root / images, names[split], self.vocabulary)
                for split, content in contents.items()
            }
        else:
            raise InputError(
                f"{self.root.resolve()} has neither a folder {masks}/ nor a file {annotations}/instances_"
                f"{names['train']}.json: one of them must say what is on the images"
            )
        _check(sources, self.vocabulary)
        self._splits = _fill_splits(sources, val_fraction)

    def dataset(self, split: str) -> "FolderDataset":
        """The data set of "train", "val" or "test"."""
        if split not in self._splits:
            raise InputError(f"{self.root} has no images for {split}: it has {' and '.join(self._splits)}")
        source, indices = self._splits[split]
        transform: Callable[..., dict]
        if split == "train":
            transform = train_transform(self.crop_size, self.scale, self.flip, self.colour)
        else:
            transform = eval_transform(self.image_size, self.resize_labels, scales=self.eval_scales)
        return FolderDataset(source, indices, transform, split == "train", self)


class FolderDataset(SegmentationDataset):
    """The images ``indices`` of a source, augmented for training or resized for evaluation."""

    def __init__(
        self,
        source: Source,
        indices: list[int],
        transform: Callable[..., dict],
        train: bool,
        data: FolderData,
    ) -> None:
        self.source = source
        self.indices = indices
        self.transform = transform
        self.train = train
        self.vocabulary = data.vocabulary
        self.num_prompts = data.num_prompts
        self.seed = data.seed

    def __len__(self) -> int:
        return len(self.indices)

    def item(self, index: int, epoch: int) -> dict:
        sample = self.source.read(self.indices[index])
        if self.train:
            rng = np.random.default_rng([self.seed, epoch, index])
            sample = self.transform(sample, int(rng.integers(2**63)))
            sample["labels"] = ignore_unseen(sample["labels"], self.vocabulary)
            prompts, prompt_class = choose_prompts(_present(sample), self.vocabulary, self.num_prompts, rng)
        else:
            sample = self.transform(sample)
        item = class_list_item(sample, self.vocabulary, self.source.files[self.indices[index]].name, index)
        if self.train:
            item |= {"prompts": prompts, "prompt_class": torch.from_numpy(prompt_class)}
        if "masks" in sample:
            masks = np.zeros((len(item["prompts"]), *sample["masks"].shape[1:]), dtype=bool)
            for mask, label in zip(sample["masks"], sample["classes"], strict=True):
                masks[item["prompt_class"].numpy() == label] = mask
            item["prompt_masks"] = torch.from_numpy(masks)
            item["phrase_kind"] = ["class" if prompt else "" for prompt in item["prompts"]]
        return item


def _present(sample: dict) -> np.ndarray:
    """The classes to be seen in an augmented sample; where masks overlap they know more than labels."""
    if "masks" in sample:
        return sample["classes"][sample["masks"].any((1, 2))]
    return np.unique(sample["labels"])


def _check(sources: dict[str, Source], vocabulary: Vocabulary) -> None:
    if len(vocabulary) > IGNORE:
        raise InputError(f"{len(vocabulary)} classes: at most {IGNORE} are possible, {IGNORE} means ignore")
    for source in sources.values():
        source.check_sizes()
        for index in np.linspace(0, len(source) - 1, min(CHECKED_MASKS, len(source))).astype(int):
            source.read(index)


def _fill_splits(
    sources: dict[str, Source], val_fraction: float
) -> dict[str, tuple[Source, list[int]]]:
    """(source, indices) by split; a missing "val" is a part of "train", a missing "test" is "val"."""
    splits = {split: (source, list(range(len(source)))) for split, source in sources.items()}
    if "train" in splits and "val" not in splits:
        source, indices = splits["train"]
        # By a hash of the name: the same images whatever the seed, and nearly so when images are added.
        by_hash = sorted(indices, key=lambda index: zlib.crc32(source.files[index].name.encode()))
        count = max(1, round(val_fraction * len(indices)))
        splits |= {"train": (source, sorted(by_hash[count:])), "val": (source, sorted(by_hash[:count]))}
    if "val" in splits:
        splits.setdefault("test", splits["val"])
    return splits
