"""All benchmarks in their official layouts below one root, tiny, for tests: noise images and rectangles of classes."""

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

SIZE = (40, 52)
COUNTS = {
    "ade20k_847": 3,
    "pascal_context_459": 4,
    "ade20k_150": 7,  # so many images make batches of unequal number for 2 and 3 processes
    "pascal_context_59": 4,
    "pascal_voc_20": 5,
    "pascal_voc_21": 5,
}
FOLDERS = {  # images and label maps of each
    "ade20k_847": (
        "ADE20K_2021_17_01/benchmark_847/validation/images",
        "ADE20K_2021_17_01/benchmark_847/validation/annotations",
    ),
    "pascal_context_459": ("VOCdevkit/VOC2010/JPEGImages", "VOCdevkit/VOC2010/context_459_val"),
    "ade20k_150": ("ADEChallengeData2016/images/validation", "ADEChallengeData2016/annotations/validation"),
    "pascal_context_59": ("VOCdevkit/VOC2010/JPEGImages", "VOCdevkit/VOC2010/SegmentationClassContext"),
    "pascal_voc_20": ("VOCdevkit/VOC2012/JPEGImages", "VOCdevkit/VOC2012/SegmentationClass"),
    "pascal_voc_21": ("VOCdevkit/VOC2012/JPEGImages", "VOCdevkit/VOC2012/SegmentationClass"),
}


def make_benchmarks(root: Path) -> dict[str, list[np.ndarray]]:
    """Writes all six below ``root``; the label values in each one's files as they were written, in the order of the names.

    Label maps are of the releases, but for A-847 and PC-459, which are as the prepare scripts leave them. PC-59 is in
    mmsegmentation's layout, with a training image that its list leaves out; VOC has one, too.
    """
    values: dict[str, list[np.ndarray]] = {}
    # 16 bits, classes from 0, 65535 = ignore
    images, maps = (root / folder for folder in FOLDERS["ade20k_847"])
    values["ade20k_847"] = [write(images, maps, f"ADE_val_{n:08}", n, range(847), 65535) for n in range(1, 4)]
    # 0 = nothing, classes from 1
    images, maps = (root / folder for folder in FOLDERS["ade20k_150"])
    values["ade20k_150"] = [write(images, maps, f"ADE_val_{n:08}", 10 + n, range(1, 151), 0) for n in range(1, 8)]
    # Context: 16 bits, classes from 0, 65535 = ignore; and mmsegmentation's 59 with 0 as background over the same images
    images, maps = (root / folder for folder in FOLDERS["pascal_context_459"])
    stems = [f"2008_{n:06}" for n in range(1, 5)]
    values["pascal_context_459"] = [write(images, maps, stem, 20 + n, range(459), 65535) for n, stem in enumerate(stems)]
    maps = root / FOLDERS["pascal_context_59"][1]
    values["pascal_context_59"] = [write(images, maps, stem, 30 + n, range(1, 60), 0) for n, stem in enumerate(stems)]
    write(images, maps, "2008_000009", 39, range(1, 60), 0)
    write_list(root / "VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt", stems)
    # VOC: palette PNGs, 0 = background, classes 1..20, 255 = ignore
    images, maps = (root / folder for folder in FOLDERS["pascal_voc_20"])
    stems = [f"2007_{n:06}" for n in range(1, 6)]
    voc = [write(images, maps, stem, 40 + n, range(21), 255, palette=True) for n, stem in enumerate(stems)]
    write(images, maps, "2007_000009", 49, range(21), 255, palette=True)
    write_list(root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt", stems)
    return {**values, "pascal_voc_20": voc, "pascal_voc_21": voc}


def write(images: Path, maps: Path, stem: str, seed: int, classes: range, ignored: int, palette: bool = False) -> np.ndarray:
    """An image and its label map of some classes, the first two and the last among them; its values."""
    for folder in (images, maps):
        folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    values = draw([*rng.choice(classes, 4), *classes[:2], classes[-1]], ignored, rng)
    Image.fromarray(rng.integers(0, 256, (*SIZE, 3)).astype(np.uint8)).save(images / f"{stem}.jpg")
    image = Image.fromarray(values.astype(np.uint16 if ignored > 255 else np.uint8))
    if palette:
        image = Image.frombytes("P", SIZE[::-1], values.astype(np.uint8).tobytes())
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    image.save(maps / f"{stem}.png")
    return values


def draw(chosen: list, ignored: int, rng: np.random.Generator, size: tuple[int, int] = SIZE) -> np.ndarray:
    """(H, W) int64: a stripe of each value, noise of them in a corner, and an ignored frame."""
    values = np.repeat(np.array(chosen), -(-size[1] // len(chosen)))[: size[1]] * np.ones((size[0], 1), np.int64)
    values[: size[0] // 4, : size[1] // 4] = rng.choice(chosen, (size[0] // 4, size[1] // 4))
    values[-2:] = ignored
    return values.astype(np.int64)


def make_context_release(root: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Pascal Context as it comes, in VOC2010/ at ``root``: .mat files, labels.txt, VOC's own list; the LabelMaps by name."""
    label_maps = {}
    for folder in ("JPEGImages", "trainval", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number in range(3):
        rng = np.random.default_rng(number)
        stem = f"2008_{number:06}"
        every = np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) % 460  # so that no class of the tables goes unseen
        label_maps[stem] = draw([1, 459, *rng.choice(range(1, 460), 10)], 0, rng) if number else every
        savemat(root / "trainval" / f"{stem}.mat", {"LabelMap": label_maps[stem].astype(np.uint16)}, do_compression=True)
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3)).astype(np.uint8)).save(root / "JPEGImages" / f"{stem}.jpg")
    (root / "labels.txt").write_text("".join(f"{number}: {name}\n" for number, name in enumerate(names, start=1)))
    write_list(root / "ImageSets/Main/val.txt", list(label_maps))
    return label_maps


def write_list(path: Path, stems: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(stems) + "\n")
