"""Augmentation and resizing: the only file that imports albumentations, and not before a training needs it.

A sample is a dict of ``image`` (H, W, 3) uint8, ``labels`` (H, W) integers with 255 = ignore and, optionally,
``masks`` (N, H, W) bool and ``segments`` (H, W) integers, -1 where there is none; other keys pass through. Every transform
returns a new dict and leaves its input as it was. Sources: large-scale jitter as in Ghiasi et al., "Simple Copy-Paste", 2021, and
Mask2Former's recipe; sizes to choose from, crops that no class fills and SSD's colours as in MaskFormer (arXiv 2107.06278, and
the names of detectron2's settings).
"""

import os
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from pmpseg.errors import InputError

IGNORE = 255  # as data.base has it, which imports torch and lightning
FILLS = {"labels": IGNORE, "masks": False, "segments": -1}  # of padding
CROP_TRIES = 10

Transform = Callable[[dict, int | Sequence[int]], dict]  # (sample, seed) -> sample


def train_transform(
    size: int | tuple[int, int],
    scale: tuple[float, float] = (0.5, 2.0),
    flip: float = 0.5,
    colour: float | Literal["ssd"] = 0.4,
    sizes: Sequence[int] | None = None,
    max_size: int | None = None,
    max_class_share: float = 1.0,
) -> Transform:
    """Resize to a random scale, cut or pad to ``size``, flip, and change the colours.

    ``size`` is the side or (height, width) of the result; ``scale`` is the short side after resizing, in
    units of the result's short side, or, with ``sizes``, one of these, in pixels; the long side is ``max_size`` at most.
    While one class covers more than ``max_class_share`` of the labelled pixels of a crop another is drawn, ten in all.
    ``flip`` is the probability of a mirror image (0 where prompts speak of
    left and right); ``colour`` is the range of brightness, contrast and saturation, and 8 times that of the
    hue, which stays small because prompts name colours; or "ssd" (``ssd_colour``). Padding is image 0, label 255, mask 0,
    segment -1.

    The result is a function ``(sample, seed) -> sample``; the seed, an integer or a sequence of them such as
    (seed, epoch, index), decides everything, so it does not matter which worker calls it or how often.
    Raises ``InputError`` for settings that make no sense.
    """
    height, width = (size, size) if isinstance(size, int) else size
    check_augmentation((height, width), scale, flip, colour, sizes, max_size, max_class_share)
    short = min(height, width)
    if sizes is None:
        sizes = range(max(1, round(scale[0] * short)), round(scale[1] * short) + 1)
    return _Augmentation((height, width), sizes, max_size, max_class_share, flip, colour)


def check_augmentation(
    crop: Sequence[int],
    scale: tuple[float, float],
    flip: float,
    colour: float | str,
    sizes: Sequence[int] | None,
    max_size: int | None,
    max_class_share: float,
) -> None:
    """Raises ``InputError`` for settings of ``train_transform`` that make no sense, without importing what it needs."""
    if len(crop) != 2 or min(crop) < 1:
        raise InputError(f"crop_size: got {list(crop)}, want [height, width], 1 pixel or more")
    if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
        raise InputError(f"scale: got {list(scale)}, want [least, most], above 0")
    if not 0 <= flip <= 1:
        raise InputError(f"flip: got {flip}, want a probability, 0 to 1")
    if colour != "ssd" and not (isinstance(colour, int | float) and 0 <= colour <= 1):
        raise InputError(f"colour: got {colour!r}, want ssd or a number from 0 to 1, the range of brightness")
    if not 0 < max_class_share <= 1:
        raise InputError(f"max_class_share: got {max_class_share}, want a share above 0, up to 1")
    if sizes is not None and not (sizes and min(sizes) > 0):
        raise InputError(f"sizes: got {sizes}, want lengths of the short side, in pixels")
    if max_size is not None and max_size < 1:
        raise InputError(f"max_size: got {max_size}, want 1 or more")


def eval_transform(
    size: int, resize_labels: bool = False, max_size: int | None = None, scales: Sequence[float] = (1.0,)
) -> Callable[[dict], dict]:
    """Resize the image so that its short side is ``size``, or its long one ``max_size`` where that is less; the aspect stays.

    Labels and masks keep the image's own size, at which answers are scored, unless ``resize_labels``. With other ``scales`` than
    1 the sample also has ``scaled``, a list: the image at so many times that size, each made from the original.
    """
    # a closure could not be sent to a worker
    return partial(_eval, size=size, resize_labels=resize_labels, max_size=max_size, scales=tuple(scales))


def square_transform(
    size: int, pad: bool = False, resize_labels: bool = False, scales: Sequence[float] = (1.0,)
) -> Callable[[dict], dict]:
    """Resize the image to ``size`` x ``size``: squashed, or with ``pad`` its long side, and black below or to the right.

    Labels and masks keep the image's own size unless ``resize_labels``; with ``pad`` they are padded to a square, too, with 255
    and False, so that they still show what the image shows. ``scales`` as in ``eval_transform``.
    """
    return partial(_square, size=size, pad=pad, resize_labels=resize_labels, scales=tuple(scales))


class _Augmentation:
    """One training transform; it draws afresh from the seed of each call.

    Where to cut is chosen before anything is resized, and only what is in the crop is made: an image at twice its crop's size
    has four times its pixels. Colours are albumentations', on the crop.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        sizes: Sequence[int],
        max_size: int | None,
        max_class_share: float,
        flip: float,
        colour: float | str,
    ) -> None:
        self.shape, self.sizes, self.max_size = shape, sizes, max_size
        self.max_class_share, self.flip = max_class_share, flip
        self.colour: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None
        if colour:
            self.colour = ssd_colour if isinstance(colour, str) else _Jitter(colour)

    def __call__(self, sample: dict, seed: int | Sequence[int]) -> dict:
        import cv2

        cv2.setNumThreads(0)  # the loader's workers are the parallelism; threads in each of them get in their way
        rng = np.random.default_rng(seed)
        old = sample["image"].shape[:2]
        factor = float(rng.choice(self.sizes)) / min(old)
        if self.max_size is not None:
            factor = min(factor, self.max_size / max(old))
        new = max(1, round(old[0] * factor)), max(1, round(old[1] * factor))
        view = self._choose(sample["labels"], new, rng)
        image = view.image(sample["image"])
        result = {**sample, "image": view.pad(self.colour(image, rng) if self.colour else image, 0)}
        result |= {key: view.nearest(sample[key], fill) for key, fill in FILLS.items() if key in sample}
        if rng.random() < self.flip:
            result["image"] = cv2.flip(result["image"], 1)
            result |= {key: np.ascontiguousarray(result[key][..., ::-1]) for key in FILLS if key in sample}
        return result

    def _choose(self, labels: np.ndarray, new: tuple[int, int], rng: np.random.Generator) -> "_View":
        """A crop, or, of ten, the first in which no class covers too much."""
        view = _View.draw(labels.shape, new, self.shape, rng)
        for _ in range(CROP_TRIES - 1 if self.max_class_share < 1 else 0):
            values = view.nearest(labels, IGNORE)
            counts = np.bincount(values[values != IGNORE].ravel(), minlength=1)
            if counts.max() <= self.max_class_share * counts.sum():
                break
            view = _View.draw(labels.shape, new, self.shape, rng)
        return view


class _View(NamedTuple):
    """A crop of ``shape`` of a picture resized from ``old`` to ``new``; its first pixel is at (``top``, ``left``), below 0 in
    padding."""

    old: tuple[int, int]
    new: tuple[int, int]
    shape: tuple[int, int]
    top: int
    left: int

    @classmethod
    def draw(cls, old: tuple[int, int], new: tuple[int, int], shape: tuple[int, int], rng: np.random.Generator) -> "_View":
        """Anywhere inside; where the picture is too small it lies anywhere in the padding."""
        spare = (side - own for side, own in zip(new, shape, strict=True))
        top, left = (int(rng.integers(room + 1)) if room > 0 else -int(rng.integers(1 - room)) for room in spare)
        return cls(old, new, shape, top, left)

    @property
    def inside(self) -> tuple[slice, slice]:
        """What of the resized picture is in the crop."""
        starts = self.top, self.left
        ends = (min(start + side, own) for start, side, own in zip(starts, self.shape, self.new, strict=True))
        rows, columns = (slice(max(start, 0), end) for start, end in zip(starts, ends, strict=True))
        return rows, columns

    def image(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) -> (h, w, 3): the part in the crop, without padding."""
        import cv2

        rows, columns = self.inside
        if self.new == self.old:
            return image[rows, columns]
        if self.new[0] < self.old[0] or self.new[1] < self.old[1]:  # each pixel is a mean, over all of the picture
            return cv2.resize(image, self.new[::-1], interpolation=cv2.INTER_AREA)[rows, columns]
        step_y, step_x = self.old[0] / self.new[0], self.old[1] / self.new[1]
        corner = (columns.start + 0.5) * step_x - 0.5, (rows.start + 0.5) * step_y - 0.5
        to_old = np.array([[step_x, 0, corner[0]], [0, step_y, corner[1]]])
        size = columns.stop - columns.start, rows.stop - rows.start
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(image, to_old, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)

    def nearest(self, labels: np.ndarray, fill: int) -> np.ndarray:
        """(..., H, W) of any type -> (..., *shape), each pixel from the one under its centre."""
        at = (np.arange(part.start, part.stop) + 0.5 for part in self.inside)
        rows, columns = ((a * (old / new)).astype(int) for a, old, new in zip(at, self.old, self.new, strict=True))
        return self.pad(labels[..., rows, :][..., columns], fill, -2)

    def pad(self, part: np.ndarray, fill: int, axis: int = 0) -> np.ndarray:
        """What is in the crop -> the crop; ``axis`` is that of the rows, the columns' is the next."""
        if part.shape[axis : axis + 2 or None] == self.shape:
            return part
        rows, columns = (slice(a.start - first, a.stop - first) for a, first in zip(self.inside, self[3:], strict=True))
        axis %= part.ndim
        whole = np.full((*part.shape[:axis], *self.shape, *part.shape[axis + 2 :]), fill, dtype=part.dtype)
        whole[(slice(None),) * axis + (rows, columns)] = part
        return whole


class _Jitter:
    """Brightness, contrast, saturation and hue, by albumentations."""

    def __init__(self, colour: float) -> None:
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it asks a server for updates otherwise
        import albumentations as A
        around = (1 - colour, 1 + colour)
        self._compose = A.Compose([A.ColorJitter(around, around, around, hue=(-colour / 8, colour / 8), p=0.8)])

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        # Not set_random_seed: it gives every step the same stream, and so ties, say, brightness to scale.
        self._compose.set_random_state(rng, random.Random(int(rng.integers(2**63))))
        return self._compose(image=np.ascontiguousarray(image))["image"]


def ssd_colour(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """SSD's colours (Liu et al., arXiv 1512.02325, and its code): (H, W, 3) uint8 -> the same.

    Each with probability 1/2: brightness +- 32 of 255, contrast 0.5 to 1.5, saturation 0.5 to 1.5, hue +- 36 degrees; contrast
    comes before or after the last two. (As in detectron2: 18 of OpenCV's half degrees.)
    """
    import cv2

    brightness, contrast, saturation, hue, early = rng.random(5) < 0.5
    light, stretch, vivid, turn = rng.uniform([-32, 0.5, 0.5, -36], [32, 1.5, 1.5, 36])
    first = np.arange(256, dtype=np.float32)
    if brightness:
        first = np.clip(first + light, 0, 255)
    last = np.clip(np.arange(256, dtype=np.float32) * (stretch if contrast else 1), 0, 255).round().astype(np.uint8)
    if early or not (saturation or hue):
        return _recolour(cv2.LUT(image, last[first.round().astype(np.uint8)]), saturation, vivid, hue, turn)
    return cv2.LUT(_recolour(cv2.LUT(image, first.round().astype(np.uint8)), saturation, vivid, hue, turn), last)


def _recolour(image: np.ndarray, saturation: bool, vivid: float, hue: bool, turn: float) -> np.ndarray:
    """Saturation times ``vivid``, hue plus ``turn`` degrees."""
    import cv2

    if not (saturation or hue):
        return image
    values = np.arange(256, dtype=np.float32)
    turned = (values + turn / 2 * hue).round() % 180  # OpenCV's hue has 180 steps
    tables = [turned, np.clip(values * (vivid if saturation else 1), 0, 255).round(), values]
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    return cv2.cvtColor(cv2.LUT(hsv, np.stack(tables, axis=-1).astype(np.uint8)[None]), cv2.COLOR_HSV2RGB)


def _eval(sample: dict, size: int, resize_labels: bool, max_size: int | None, scales: tuple[float, ...]) -> dict:
    height, width = sample["image"].shape[:2]
    factor = size / min(height, width)
    if max_size is not None:
        factor = min(factor, max_size / max(height, width))

    def at(scale: float) -> np.ndarray:
        return resize(sample["image"], (max(1, round(height * factor * scale)), max(1, round(width * factor * scale))))

    result = {**sample, "image": at(1), **_scaled(at, scales)}
    if resize_labels:
        shape = result["image"].shape[:2]
        result |= {key: nearest(sample[key], shape) for key in ("labels", "masks") if key in sample}
    return result


def _square(sample: dict, size: int, pad: bool, resize_labels: bool, scales: tuple[float, ...]) -> dict:
    height, width = sample["image"].shape[:2]
    long = max(height, width)

    def at(scale: float) -> np.ndarray:
        side = max(1, round(size * scale))
        if not pad:
            return resize(sample["image"], (side, side))
        shape = (max(1, round(height * side / long)), max(1, round(width * side / long)))
        return np.pad(resize(sample["image"], shape), ((0, side - shape[0]), (0, side - shape[1]), (0, 0)))

    result = {**sample, "image": at(1), **_scaled(at, scales)}
    if pad:
        result |= {key: _pad(sample[key], long, fill) for key, fill in (("labels", 255), ("masks", 0)) if key in sample}
    if resize_labels:
        result |= {key: nearest(result[key], (size, size)) for key in ("labels", "masks") if key in result}
    return result


def _scaled(at: Callable[[float], np.ndarray], scales: tuple[float, ...]) -> dict:
    return {} if scales == (1.0,) else {"scaled": [at(scale) for scale in scales]}


def _pad(labels: np.ndarray, side: int, fill: int) -> np.ndarray:
    """(..., H, W) -> (..., side, side), filled below and to the right."""
    height, width = labels.shape[-2:]
    widths = [(0, 0)] * (labels.ndim - 2) + [(0, side - height), (0, side - width)]
    return np.pad(labels, widths, constant_values=fill)


def resize(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 -> (h, w, 3); PIL smooths when it shrinks."""
    if image.shape[:2] == shape:
        return image
    return np.array(Image.fromarray(image).resize(shape[::-1], Image.Resampling.BILINEAR))


def nearest(labels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(..., H, W) of any type -> (..., h, w), each pixel from the one under its centre."""
    rows, columns = (
        ((np.arange(new) + 0.5) * (old / new)).astype(int)
        for old, new in zip(labels.shape[-2:], shape, strict=True)
    )
    return labels[..., rows[:, None], columns]
