"""Pascal VOC 2012 as it lies on disk: JPEGImages/, SegmentationClassAug/ or SegmentationClass/, and lists of images.

A list is ImageSets/Segmentation/NAME.txt, or any file of lines in one of these forms::

    2007_000033                                                     VOC's own
    JPEGImages/2007_000033.jpg SegmentationClassAug/2007_000033.png  PFENet's and DeepLab's
    2007_000033__01                                                 HSNet's: with the class to ask for, 1..20

Masks are found by the image's name, whatever folder the list says: those in circulation name folders of their authors' machines.
"""

from pathlib import Path

import numpy as np

from pmpseg.data.base import IGNORE
from pmpseg.data.removal import PASCAL_CLASSES
from pmpseg.data.sources import read_indices
from pmpseg.errors import InputError
from pmpseg.images import read_image

VOC_NAMES = PASCAL_CLASSES  # of the label values 1..20, as words; 0 is the background
MASKS = ("SegmentationClassAug", "SegmentationClass")  # SBD's extended masks first, as the few-shot protocols have it


class VocImages:
    """The images of a list: ``files``, ``classes`` (HSNet's, 1..20; None in other lists) and ``read(i)``.

    ``root`` is VOC2012/ or a folder that holds it (also as VOCdevkit/VOC2012). ``images`` names a list or is its path. ``masks``
    is the folder of the masks, by default the first of ``MASKS`` that there is. Raises ``InputError`` for what is missing.
    """

    def __init__(self, root: str | Path, images: str = "val", masks: str | None = None) -> None:
        self.root = _voc_root(Path(root))
        folders = (masks,) if masks else MASKS
        found = [folder for folder in folders if (self.root / folder).is_dir()]
        if not found:
            raise InputError(f"{self.root} has no folder {' or '.join(folders)}: the masks must lie there")
        named = self.root / "ImageSets" / "Segmentation" / f"{images}.txt"
        self.path = Path(images) if Path(images).is_file() else named
        if not self.path.is_file():
            raise InputError(f"there is no list {named}, nor a file {images}: give the name of a list, or its path")
        lines = [line.split()[0] for line in self.path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise InputError(f"{self.path} lists no image")
        stems, classes = zip(*(_parse(line, self.path) for line in lines), strict=True)
        self.classes: list[int | None] = list(classes)
        self.files = [self.root / "JPEGImages" / f"{stem}.jpg" for stem in stems]
        self.masks = [self.root / found[0] / f"{stem}.png" for stem in stems]
        for file in (*self.files, *self.masks):
            if not file.is_file():
                raise InputError(f"{self.path} lists {file.stem}, but there is no {file}")

    def __len__(self) -> int:
        return len(self.files)

    def labels(self, index: int) -> np.ndarray:
        """(H, W) uint8: 0 background, 1..20, 255 ignore."""
        labels = read_indices(self.masks[index])
        wrong = labels[(labels != IGNORE) & ((labels < 0) | (labels > len(VOC_NAMES)))]
        if labels.ndim != 2 or wrong.size:
            what = f"label {wrong.flat[0]}" if wrong.size else f"{labels.ndim} dimensions"
            raise InputError(f"{self.masks[index]} has {what}: a VOC mask has one channel of 0..20 and 255")
        return labels.astype(np.uint8)

    def read(self, index: int) -> dict:
        """A sample: image (H, W, 3) uint8 and labels (H, W) uint8."""
        image, labels = np.array(read_image(self.files[index])), self.labels(index)
        if image.shape[:2] != labels.shape:
            sizes = f"{image.shape[1]}x{image.shape[0]} and {labels.shape[1]}x{labels.shape[0]}"
            raise InputError(f"{self.files[index]} and {self.masks[index]} are {sizes}: they must have one size")
        return {"image": image, "labels": labels}


def _voc_root(root: Path) -> Path:
    for folder in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (folder / "JPEGImages").is_dir():
            return folder
    raise InputError(f"{root.resolve()} has no JPEGImages/, nor has a VOC2012/ in it: give the folder of VOC 2012")


def _parse(word: str, path: Path) -> tuple[str, int | None]:
    stem, _, number = Path(word).stem.partition("__")
    if not number:
        return stem, None
    if not number.isdecimal() or not 1 <= int(number) <= len(VOC_NAMES):
        raise InputError(f"{path}: {word} should end in a class from __01 to __20")
    return stem, int(number)
