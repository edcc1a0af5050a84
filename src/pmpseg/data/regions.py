"""Regions with names, to tune and to score a CLIP on: what generated scenes and mined pairs share.

An item is a dict of lists, a region each: images (3, h, w) uint8 and masks (h, w) bool, both cut to the region's box; nouns, str;
classes, indices into ``vocabulary``. A batch is the same with the lists of its items put together, and classes (N,) int64.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pmpseg.errors import InputError
from pmpseg.models.region import boxes_of

from .base import SegmentationData


class RegionData(SegmentationData):
    """Loaders of batches of regions over the data sets that a subclass gives, as ``SegmentationData`` has them.

    ``expand`` as in ``RegionClassifier``. ``scale``: a training region is seen through a random window of at least this share of
    its box; OVSeg has 0.9.
    """

    def __init__(self, expand: float, scale: float, batch_size: int, eval_batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__(1, None, batch_size, eval_batch_size, num_workers, seed)
        if expand < 1 or not 0 < scale <= 1:
            raise InputError(f"expand, scale: got {expand}, {scale}, want 1 or more, and above 0 to 1")
        self.expand, self.scale = expand, scale

    @staticmethod
    def collate(items: list[dict]) -> dict:
        return collate(items)


def collate(items: Sequence[dict]) -> dict:
    batch = {key: [x for item in items for x in item[key]] for key in ("images", "masks", "nouns", "classes")}
    return batch | {"classes": torch.tensor(batch["classes"], dtype=torch.int64)}


def cut(
    image: Tensor, mask: Tensor, expand: float, scale: float = 1.0, rng: np.random.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """``image`` (3, H, W) and ``mask`` (H, W) bool, cut to the mask's box, or with ``rng`` to a random window of it.

    The window has at least the share ``scale`` of the box's area. It leaves a pixel of the region, or it is the whole box.
    """
    x0, y0, x1, y1 = boxes_of(mask[None], expand)[0].tolist()
    if rng is not None:
        area = rng.uniform(scale, 1)
        high = rng.uniform(area, 1)  # shares of the sides
        sides = (max(1, round((y1 - y0) * high)), max(1, round((x1 - x0) * area / high)))
        top, left = (int(rng.integers(low, high - side + 1)) for low, high, side in ((y0, y1, sides[0]), (x0, x1, sides[1])))
        if mask[top : top + sides[0], left : left + sides[1]].any():
            y0, x0, y1, x1 = top, left, top + sides[0], left + sides[1]
    return image[:, y0:y1, x0:x1].clone(), mask[y0:y1, x0:x1].clone()
