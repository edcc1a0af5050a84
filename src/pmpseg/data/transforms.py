"""Augmentation and resizing: the only file that imports albumentations, and not before a training needs it.

A sample is a dict of ``image`` (H, W, 3) uint8, ``labels`` (H, W) integers with 255 = ignore and, optionally,
``masks`` (N, H, W) bool; other keys pass through. Every transform returns a new dict and leaves its input as
it was. Source: large-scale jitter as in Ghiasi et al., "Simple Copy-Paste", 2021, and Mask2Former's recipe.
"""

import os
import random
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from PIL import Image

Transform = Callable[[dict, int | Sequence[int]], dict]  # (sample, seed) -> sample


def train_transform(
    size: int | tuple[int, int],
    scale: tuple[float, float] = (0.5, 2.0),
    flip: float = 0.5,
    colour: float = 0.4,
) -> Transform:
    """Resize to a random scale, cut or pad to ``size``, flip, and change the colours.

    ``size`` is the side or (height, width) of the result; ``scale`` is the short side after resizing, in
    units of the result's short side; ``flip`` is the probability of a mirror image (0 where prompts speak of
    left and right); ``colour`` is the range of brightness, contrast and saturation, and 8 times that of the
    hue, which stays small because prompts name colours. Padding is image 0, label 255, mask 0.

    The result is a function ``(sample, seed) -> sample``; the seed, an integer or a sequence of them such as
    (seed, epoch, index), decides everything, so it does not matter which worker calls it or how often.
    """
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it asks a server for updates otherwise
    import albumentations as A
    import cv2

    cv2.setNumThreads(0)  # the loader's workers are the parallelism; threads in each of them get in their way
    height, width = (size, size) if isinstance(size, int) else size
    short = min(height, width)
    steps = [
        A.SmallestMaxSize(
            max_size=list(range(max(1, round(scale[0] * short)), round(scale[1] * short) + 1)),
            interpolation=cv2.INTER_LINEAR,
            mask_interpolation=cv2.INTER_NEAREST_EXACT,  # plain INTER_NEAREST is off by up to half a pixel
            area_for_downscale="image",
        ),
        A.RandomCrop(height, width, pad_if_needed=True, pad_position="random", fill=0, fill_mask=255),
        A.HorizontalFlip(p=flip),
    ]
    if colour:
        around = (1 - colour, 1 + colour)
        steps.append(A.ColorJitter(around, around, around, hue=(-colour / 8, colour / 8), p=0.8))
    return _Augmentation(A.Compose(steps))


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
    """An albumentations pipeline that draws afresh from the seed of each call."""

    def __init__(self, compose) -> None:
        self._compose = compose

    def __call__(self, sample: dict, seed: int | Sequence[int]) -> dict:
        # Not set_random_seed: it gives every step the same stream, and so ties, say, brightness to scale.
        generator = np.random.default_rng(seed)
        self._compose.set_random_state(generator, random.Random(int(generator.integers(2**63))))
        inputs = {"image": sample["image"], "mask": sample["labels"].astype(np.int32)}
        masks = sample.get("masks")
        if masks is not None and len(masks):
            inputs["masks"] = masks.astype(np.uint8)
        outputs = self._compose(**inputs)
        result = {
            **sample,
            "image": outputs["image"],
            "labels": outputs["mask"].astype(sample["labels"].dtype),
        }
        if masks is not None:
            none = np.zeros((0, *result["labels"].shape), dtype=bool)
            result["masks"] = np.equal(outputs["masks"], 1) if len(masks) else none  # padding is 255
        return result


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
