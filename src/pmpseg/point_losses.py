"""Masks at points: reading maps there, and what an answer costs there: cross-entropy, its focal form, dice.

Letters: N masks, P points. All logits and truths are of one shape; a truth lies in [0, 1].
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0  # RetinaNet's, and MaskFormer's


def bce_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Binary cross-entropy, for each point."""
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="none")


def bce_terms(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The same as terms (a, d): a + d * y for a truth y."""
    return F.softplus(logits), -logits


def focal_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """RetinaNet's focal loss (arXiv 1708.02002, sec. 3), for each point; a truth between 0 and 1 has its share of each."""
    prob = logits.sigmoid()
    wrong = prob + truth - 2 * prob * truth  # 1 - p_t
    alpha = FOCAL_ALPHA * truth + (1 - FOCAL_ALPHA) * (1 - truth)
    return alpha * wrong**FOCAL_GAMMA * bce_loss(logits, truth)


def focal_terms(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The same as terms (a, d), for a truth of 0 or 1: the matching's cost, as MaskFormer has it."""
    prob = logits.sigmoid()
    outside = (1 - FOCAL_ALPHA) * prob**FOCAL_GAMMA * F.softplus(logits)
    return outside, FOCAL_ALPHA * (1 - prob) ** FOCAL_GAMMA * F.softplus(-logits) - outside


#: For each mask loss: that of every point, and its terms, for all pairs of answers and truths at once.
MASK_LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    "bce": (bce_loss, bce_terms),
    "focal": (focal_loss, focal_terms),
}


def dice_loss(logits: Tensor, truth: Tensor, inside: Tensor) -> Tensor:
    """1 - soft dice over points that count, with one added to both sides; (N, P) each -> (N,)."""
    prob, truth = logits.sigmoid() * inside, truth * inside
    return 1 - (2 * (prob * truth).sum(1) + 1) / (prob.sum(1) + truth.sum(1) + 1)


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps (B, C, H, W) at points (B, P, 2) given as (x, y) in [0, 1] -> (B, C, P).

    The outermost half pixel has the edge's value; Mask2Former's fades to 0 there, as if nothing were to be sure of at an edge.
    """
    return F.grid_sample(maps, 2 * points[:, :, None] - 1, padding_mode="border", align_corners=False)[..., 0]


def at_pixels(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear values of maps (B, C, H, W) at the middles of all pixels of a map (h, w) -> (B, C, h * w).

    They are ``sample``'s, without its grid for each of the maps, which would also be kept for the gradient.
    """
    if maps.shape[-2:] != torch.Size(size):
        maps = F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)
    return maps.flatten(2)
