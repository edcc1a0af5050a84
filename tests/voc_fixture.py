"""A small VOC 2012 in its official layout, for tests: images with rectangles of classes, masks as palette PNGs, lists."""

from pathlib import Path

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int, int]  # class, top, left, height, width

# Fold 0 is 1..5, fold 1 6..10, ... An image's size is (height, width). 2048 pixels are 32 x 64.
PICTURES: dict[str, tuple[tuple[int, int], list[Box]]] = {
    "2007_000001": ((90, 120), [(1, 5, 5, 50, 60)]),
    "2007_000002": ((90, 120), [(1, 10, 20, 60, 70), (6, 70, 0, 10, 10)]),
    "2007_000003": ((120, 90), [(1, 40, 10, 40, 60), (2, 0, 0, 35, 70)]),
    "2007_000004": ((80, 80), [(2, 30, 0, 32, 64)]),  # just 2048 pixels
    "2007_000005": ((80, 80), [(2, 20, 0, 31, 66), (1, 60, 10, 10, 10)]),  # 2046, and 100
    "2007_000006": ((80, 80), [(3, 10, 10, 60, 60), (1, 0, 0, 8, 9)]),  # the only one of class 3
    "2007_000007": ((80, 120), [(12, 10, 10, 60, 60)]),
    "2007_000008": ((80, 120), [(10, 0, 0, 40, 60), (14, 40, 0, 40, 60), (20, 0, 60, 40, 60)]),
}


def make_voc(root: Path, masks: tuple[str, ...] = ("SegmentationClassAug",)) -> Path:
    """Writes VOC2012/ below root and returns it. A white line of 255, as VOC has it, runs along the top of each object."""
    voc = root / "VOC2012"
    for folder in ("JPEGImages", "ImageSets/Segmentation", *masks):
        (voc / folder).mkdir(parents=True)
    for number, (stem, (size, boxes)) in enumerate(PICTURES.items()):
        noise = np.random.default_rng(number).integers(0, 80, (*size, 3))
        labels = np.zeros(size, np.uint8)
        for label, top, left, height, width in boxes:
            labels[max(0, top - 1), left : left + width] = 255
            labels[top : top + height, left : left + width] = label
        pixels = noise + 8 * np.where(labels == 255, 0, labels)[..., None]
        Image.fromarray(pixels.astype(np.uint8)).save(voc / "JPEGImages" / f"{stem}.jpg", quality=95)
        for folder in masks:
            mask = Image.fromarray(labels).convert("P") if folder == "SegmentationClass" else Image.fromarray(labels)
            if mask.mode == "P":
                mask = Image.frombytes("P", size[::-1], labels.tobytes())
                mask.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
            mask.save(voc / folder / f"{stem}.png")
    (voc / "ImageSets/Segmentation/val.txt").write_text("\n".join(PICTURES) + "\n")
    return voc
