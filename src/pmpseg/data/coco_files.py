"""COCO-Stuff's files: where a split's images, label maps and JSONs lie, whether they fit, and what their values mean."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from pmpseg.errors import InputError

from .base import IGNORE
from .image_store import ImageStore, exists

SPLITS = {"train": "train2017", "val": "val2017", "test": "val2017"}
# Ids 1..91 are COCO's things, of which 11 were never annotated, 92..182 stuff. A map's values are ids - 1.
NEVER_ANNOTATED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
IDS = tuple(number for number in range(1, 183) if number not in NEVER_ANNOTATED)
THINGS = sum(number <= 91 for number in IDS)  # the first 80 classes
WRONG = 254  # what no value means
CHECKED_MAPS = 8  # of each split, read in full at start; the others when their turn comes

PLACES: dict[str, tuple[str, ...]] = {  # of the images and of the label maps of a split
    "images": ("{split}", "images/{split}", "{split}.zip", "images/{split}.zip"),
    "label maps": ("stuffthingmaps/{split}", "stuffthingmaps_trainval2017.zip", "stuffthingmaps_trainval2017/{split}"),
}
ANNOTATIONS = ("annotations", "annotations_trainval2017.zip")
PANOPTIC = ("annotations", "panoptic_annotations_trainval2017.zip", "annotations/panoptic_annotations_trainval2017.zip")
# the PNGs, in a folder or zip of their own, or in a zip in a zip
PANOPTIC_MAPS: tuple[str, ...] = ("{name}", "{name}.zip", "annotations/{name}", "annotations/{name}.zip")
PANOPTIC_MAPS += tuple(f"{place}/annotations/{{name}}.zip" for place in PANOPTIC if place.endswith(".zip"))


def class_of_value() -> np.ndarray:
    """(256,) uint8: the class of each value of a label map; 255 stays, ``WRONG`` where no class has that value."""
    table = np.full(256, WRONG, dtype=np.uint8)
    table[np.array(IDS) - 1] = np.arange(len(IDS))
    table[IGNORE] = IGNORE
    return table


def class_of_thing() -> np.ndarray:
    """(92,) int16: the class of a thing's category id, -1 where there is none."""
    table = np.full(92, -1, dtype=np.int16)
    table[np.array(IDS[:THINGS])] = np.arange(THINGS)
    return table


class Sample(NamedTuple):
    image: np.ndarray  # (H, W, 3) uint8
    labels: np.ndarray  # (H, W) uint8


class CocoFiles:
    """The images of a split and their label maps, paired by name; ``names`` are those of the images, in order.

    Raises ``InputError``, with the file's name, where either is alone, the maps' size is another, or a value is no class.
    """

    def __init__(self, root: Path, split: str, expect: int | None = None) -> None:
        self.images, self.maps = (_store(root, what, split) for what in PLACES)
        self.names = np.array([name.encode() for name in self.images.sorted_names], dtype=bytes)
        stems, maps = (_stems(store) for store in (self.images, self.maps))
        if len(stems) < len(self.names):
            raise InputError(f"{self.images.described}: two images of {split} differ by suffix only: remove one")
        for one, other, what, wanted in ((stems, maps, "label map", self.maps), (maps, stems, "image", self.images)):
            alone = sorted(one.keys() - other.keys())
            if alone:
                listed = ", ".join(one[stem] for stem in alone[:3]) + (f" and {len(alone) - 3} more" if len(alone) > 3 else "")
                counts = f"{len(stems)} images, {len(maps)} label maps"
                raise InputError(f"no {what} in {wanted.described} for {listed} ({counts}): is the download whole?")
        if expect is not None and len(self.names) != expect:
            raise InputError(f"{self.images.described} has {len(self.names)} images of {split}, want {expect} (expect)")
        self._table = class_of_value()

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index].decode()

    def stem(self, index: int) -> str:
        return self.name(index).rpartition(".")[0]

    def check(self) -> list[int]:
        """Reads some maps in full, and their images' sizes; returns which."""
        chosen = np.linspace(0, len(self) - 1, min(CHECKED_MAPS, len(self))).astype(int).tolist()
        for index in chosen:
            self._check_size(index, self.labels(index), self.images.size(self.name(index)))
        return chosen

    def read(self, index: int) -> Sample:
        sample = Sample(self.images.read(self.name(index)), self.labels(index))
        height, width = sample.image.shape[:2]
        self._check_size(index, sample.labels, (width, height))
        return sample

    def labels(self, index: int) -> np.ndarray:
        """(H, W) uint8: classes 0..170, and 255."""
        name = f"{self.stem(index)}.png"
        values = self.maps.read_indices(name)
        if values.dtype != np.uint8 and not (values.dtype == bool or 0 <= values.min() <= values.max() <= IGNORE):
            raise InputError(f"{self.maps.where(name)} has value {values.max()}: {WANTED}")
        labels = self._table[values.astype(np.uint8)]
        if (labels == WRONG).any():
            wrong = np.unique(values[labels == WRONG])
            raise InputError(f"{self.maps.where(name)} has value {', '.join(map(str, wrong[:5]))}: {WANTED}")
        return labels

    def _check_size(self, index: int, labels: np.ndarray, image: tuple[int, int]) -> None:
        height, width = labels.shape
        if (width, height) != image:
            where = self.maps.where(f"{self.stem(index)}.png")
            raise InputError(f"{where} is {width}x{height}, its image {image[0]}x{image[1]}: they must have one size")


WANTED = "COCO-Stuff's values are ids 1..182 less one, without those of 11 things never annotated, and 255"


def find_split(root: Path, split: str) -> bool:
    """Whether there are images of a split."""
    return any((root / place.format(split=split)).exists() for place in PLACES["images"])


def read_json(root: Path, name: str, places: tuple[str, ...]) -> tuple[bytes, str] | None:
    """(the content of a JSON, its name for messages), or None where none of the places has it."""
    found = [root / place for place in places if (root / place).exists()]
    store = ImageStore(found, suffixes=(f"{name}.json",))
    if f"{name}.json" not in store:
        return None
    return store.read_bytes(f"{name}.json"), store.where(f"{name}.json")


def panoptic_maps(root: Path, split: str) -> ImageStore:
    """The PNGs of panoptic_SPLIT."""
    name = f"panoptic_{split}"
    places = [root / place.format(name=name) for place in PANOPTIC_MAPS]
    found = next((place for place in places if exists(place)), None)
    if found is None:
        wanted = ", ".join(str(place.relative_to(root)) for place in places)
        raise InputError(f"{root.resolve()} has {name}.json, but not its PNGs: want one of {wanted}")
    return ImageStore([found], suffixes=(".png",))


def _store(root: Path, what: str, split: str) -> ImageStore:
    places = [root / place.format(split=split) for place in PLACES[what]]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        wanted = ", ".join(str(place.relative_to(root)) for place in places)
        raise InputError(f"{root.resolve()} has no {what} of {split}: want one of {wanted}")
    store = ImageStore([found], under=split, suffixes=(".png",) if what == "label maps" else (".jpg", ".jpeg", ".png"))
    if not len(store):
        raise InputError(f"{found} has no {what} of {split}")
    return store


def _stems(store: ImageStore) -> dict[str, str]:
    """Name without suffix -> name."""
    return {name.rpartition(".")[0]: name for name in store.sorted_names}
