"""Several looks at one image that become one class map: sliding windows, scales, mirror images.

A look is a network's answer for a part of the image. The score of a class at a pixel is the mean over scales and mirror images,
and over the windows that cover the pixel, weighted by how far it lies from their edges. As in ``inference.semantic_labels`` the
prompts of a look are one list, whole, and only the scores (K, H, W) are made in chunks of classes.

Letters: B images, K prompts, (H, W) the image as the network sees it at one scale, ``size`` the answer's, the image's own.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import InputError
from .inference import Answer, Size, best_of_chunks, class_scores, len_of_list, weighed
from .models.prompts import PixelPrediction, Prediction

WEIGHTS = ("triangle", "uniform")


@dataclass(frozen=True)
class Views:
    """How often, and at what, a network looks; by default once, at the whole image.

    Args:
        window: side of square windows, in pixels of the image as the network sees it; None for the whole image.
        overlap: share of a window, 0 to below 1, that it has in common with the next one, at least.
        weights: of a window's pixels where windows overlap: falling towards its edges (triangle), or all the same (uniform).
        scales: sizes, as factors of the data's image size.
        flip: also look at the mirror image.
    """

    window: int | None = None
    overlap: float = 1 / 3
    weights: str = "triangle"
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 32:
            raise InputError(f"window: got {self.window}, want pixels, 32 or more")
        if not 0 <= self.overlap < 1:
            raise InputError(f"overlap: got {self.overlap:g}, want a share of the window, 0 to below 1")
        if self.weights not in WEIGHTS:
            raise InputError(f"window weights: got {self.weights!r}, want {' or '.join(WEIGHTS)}")
        if not self.scales or not all(0.1 <= scale <= 10 for scale in self.scales):
            got = ", ".join(f"{scale:g}" for scale in self.scales) or "none"
            raise InputError(f"scales: got {got}, want factors of the image size from 0.1 to 10, one or more")

    @property
    def is_plain(self) -> bool:
        return self.window is None and self.scales == (1.0,) and not self.flip


class Look(NamedTuple):
    """What a network answers for a part of an image: ``size`` (h, w) at (top, left) of one that is ``whole`` (H, W)."""

    prediction: Answer
    corner: Size
    size: Size
    whole: Size
    mirrored: bool
    weights: str


def look(
    images: Sequence[Tensor], views: Views, ask: Callable[[Tensor], Answer], at_once: int = 4
) -> Iterator[Look]:
    """The looks of ``views`` at ``images``, the same ones (B, 3, H, W) in [0, 1] at each of the scales.

    ``ask`` gives the network's answer for any such batch; windows, which are of one size, are asked ``at_once`` images at a time.
    """
    if len(images) != len(views.scales):
        raise InputError(f"got images of {len(images)} scales for scales {views.scales}: this data gives one scale only")
    for image in images:
        whole = (image.shape[-2], image.shape[-1])
        side = views.window or max(whole)
        size = (min(side, whole[0]), min(side, whole[1]))
        corners = [(y, x) for y in starts(whole[0], size[0], views.overlap) for x in starts(whole[1], size[1], views.overlap)]
        count = max(1, at_once // len(image))
        for mirrored in (False, True) if views.flip else (False,):
            for first in range(0, len(corners), count):
                some = corners[first : first + count]
                parts = torch.cat([image[..., y : y + size[0], x : x + size[1]] for y, x in some])
                answer = ask(parts.flip(-1) if mirrored else parts)
                for i, corner in enumerate(some):
                    part = _rows(answer, slice(i * len(image), (i + 1) * len(image)))
                    yield Look(part, corner, size, whole, mirrored, views.weights)


def starts(length: int, window: int, overlap: float) -> list[int]:
    """Where windows begin, evenly, from the first pixel to the last: as few as overlap by that share or more."""
    if length <= window:
        return [0]
    step = max(1, math.floor(window * (1 - overlap)))
    count = math.ceil((length - window) / step) + 1
    return [round(i * (length - window) / (count - 1)) for i in range(count)]


def merged_labels(
    looks: Sequence[Look], size: Size | None = None, chunk: int = 64, factors: Mapping[int, float] | None = None
) -> Tensor:
    """The best class for every pixel -> (B, *size) int64. Of one look at the whole image: ``semantic_labels``'s answer.

    ``size``: by default that of the first look's whole image. ``chunk`` classes at a time, which changes nothing but the memory:
    masks are made at full size again for every chunk, since those of all looks would take more than the scores.
    """
    size, count = size or looks[0].whole, len_of_list(looks[0].prediction)
    wholes: dict[tuple[Size, bool], list[Look]] = {}  # windows of one image go together
    for one in looks:
        wholes.setdefault((one.whole, one.mirrored), []).append(one)

    def scores(some: slice) -> Tensor:
        return sum((_scores(group, some, size) for group in wholes.values()), torch.zeros(()))

    return best_of_chunks(weighed(scores, factors, count, looks[0].prediction[0]), count, chunk)


def _scores(looks: list[Look], some: slice, size: Size) -> Tensor:
    """(B, k, *size): the classes ``some``, from all windows of one image."""
    first = looks[0]
    if len(looks) == 1:
        return _of(first, some, size)
    like, classes = first.prediction[0], range(len_of_list(first.prediction))[some]  # its logits, of pixels or masks
    canvas, total = like.new_zeros(len(like), len(classes), *first.whole), like.new_zeros(first.whole)
    for one in looks:
        rows, columns = (slice(start, start + length) for start, length in zip(one.corner, one.size, strict=True))
        weight = edge_weights(one.size, one.weights).to(like)
        canvas[..., rows, columns] += _of(one, some, one.size) * weight
        total[rows, columns] += weight
    canvas = canvas / total
    return canvas if first.whole == size else F.interpolate(canvas, size, mode="bilinear", align_corners=False)


def _of(one: Look, some: slice, size: Size) -> Tensor:
    """(B, k, *size): the scores of the classes ``some`` in one look, the right way round."""
    found = class_scores(one.prediction, one.size, size)(some)
    return found.flip(-1) if one.mirrored else found


def edge_weights(size: Size, kind: str) -> Tensor:
    """(h, w), above 0: of a window's pixels, 1 in its middle, falling in a line to its edges if ``triangle``."""
    if kind == "uniform":
        return torch.ones(size)
    rows, columns = ((torch.arange(n) + 0.5) / n for n in size)
    return (1 - (2 * rows - 1).abs())[:, None] * (1 - (2 * columns - 1).abs())


def _rows(answer: Answer, rows: slice) -> Answer:
    """Some images of a batch's answer, without what only training needs."""
    if isinstance(answer, PixelPrediction):
        return PixelPrediction(answer.logits[rows])
    fused = None if answer.fused is None else answer.fused[rows]
    return Prediction(answer.mask_logits[rows], answer.class_logits[rows], fused=fused)
