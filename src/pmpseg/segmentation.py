"""The answer for one image: masks, labels, scores, pictures and COCO's format, each made when asked for."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import InputError
from .inference import Size, answers, upsample
from .models.pmp import MASK_STRIDE

NOTHING = -1  # label of a pixel that no prompt claims


@dataclass
class Segmentation:
    """The answer for one image of (H, W) pixels and P prompts.

    ``scores`` (P,) float in [0, 1]: how sure the model is that there is something to find. ``soft`` (P, h, w) in [0, 1] are the
    masks as the network gave them (``stride`` and ``by_pixel`` as in ``inference``); ``mask(i)`` and ``labels`` are computed from
    them at the image's own size when asked for.

    Masks of prompts that were asked one by one may overlap or leave pixels out. Those of prompts asked together are a partition:
    every pixel belongs to the best prompt, ``class_labels`` (H, W) says to which, and the threshold has no part in it.
    """

    image: Image.Image
    prompts: list[str]
    scores: np.ndarray
    soft: Tensor
    threshold: float
    image_size: Size
    class_labels: np.ndarray | None = None
    stride: int = MASK_STRIDE
    by_pixel: bool = False

    @property
    def size(self) -> Size:
        """(H, W) of the image."""
        return self.image.height, self.image.width

    def probability(self, index: int) -> np.ndarray:
        """(H, W) float32 in [0, 1]: how much each pixel belongs to prompt ``index``."""
        return upsample(self.soft[index][None, None], self.image_size, self.size, self.stride)[0, 0].numpy()

    def mask(self, index: int) -> np.ndarray:
        """(H, W) bool: the pixels of prompt ``index``; all False when its score is not above the threshold."""
        if not -len(self.prompts) <= index < len(self.prompts):
            raise InputError(f"mask({index}): there are {len(self.prompts)} prompts, 0 to {len(self.prompts) - 1}")
        if self.class_labels is not None:
            return self.class_labels == index % len(self.prompts)
        score = torch.as_tensor(self.scores[index])
        return (answers(torch.from_numpy(self.probability(index)), score, self.by_pixel) > self.threshold).numpy()

    @cached_property
    def labels(self) -> np.ndarray:
        """(H, W) int64: the prompt that each pixel belongs to most, or -1 for none of them (not of prompts asked together)."""
        if self.class_labels is not None:
            return self.class_labels
        labels = np.full(self.size, NOTHING)
        best = np.zeros(self.size, np.float32)
        for i in range(len(self.prompts)):
            here = self.probability(i) * self.mask(i)
            labels[here > best] = i
            best = np.maximum(best, here)
        return labels

    def overlay(self) -> Image.Image:
        """The image with every mask outlined and named."""
        from .drawing import overlay

        return overlay(self.image, [self.mask(i) for i in range(len(self.prompts))], self.prompts)

    def to_coco(self) -> list[dict[str, Any]]:
        """One dict a prompt: prompt, score, area in pixels, bbox [x, y, w, h] and segmentation as compressed COCO RLE."""
        from .rle import encode

        found = []
        for i, prompt in enumerate(self.prompts):
            mask = self.mask(i)
            ys, xs = np.nonzero(mask)
            box = [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1] if len(xs) else [0, 0, 0, 0]
            found.append(
                {"prompt": prompt, "score": float(self.scores[i]), "area": len(xs), "bbox": box, "segmentation": encode(mask)}
            )
        return found
