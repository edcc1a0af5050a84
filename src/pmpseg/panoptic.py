"""From query logits to segments: instances, and panoptic maps in which every pixel has one.

Source: Mask2Former (arXiv 2112.01527; ``instance_inference`` and ``panoptic_inference`` of its code). transformers'
``post_process_*`` functions differ from it; ``transformers=True`` does as they do, for comparisons (``inference.semantic_labels``
has the same option): masks by way of 384 x 384 pixels whatever the image, and, in panoptic maps, mask areas counted after
weighting by score, no cut at a probability of one half, and ids that can occur twice after a fused class.

Letters: Q queries, K classes, N segments. ``image_size`` and ``size`` as in ``inference``.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .inference import Size, by_way_of_transformers, upsample
from .models.prompts import Prediction


class Instances(NamedTuple):
    """masks (N, H, W) bool, which may overlap; labels (N,) int64; scores (N,) in [0, 1], the best first."""

    masks: Tensor
    labels: Tensor
    scores: Tensor


class Segment(NamedTuple):
    """One segment of a panoptic map: its number there, its class, and how sure its query (of several, the first) is."""

    id: int
    label: int
    score: float


def instances(
    prediction: Prediction,
    image_size: Size,
    size: Size | None = None,
    threshold: float = 0.5,
    transformers: bool = False,
) -> list[Instances]:
    """For each image the Q best (query, class) pairs whose score is ``threshold`` or more.

    The score is p(k | query) times the mean probability of the mask's pixels; a query may count for several classes.
    """
    found = []
    for probabilities, masks in zip(prediction.probabilities(), prediction.mask_logits, strict=True):
        queries, classes = probabilities.shape
        best, pair = probabilities.flatten().topk(queries)
        query, labels = pair // classes, pair % classes
        masks = masks[None, query]
        own = (by_way_of_transformers(masks) if transformers else upsample(masks, image_size, size))[0]
        inside = own > 0
        scores = best * (own.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
        if transformers:
            inside = F.interpolate(inside[None].float(), size or image_size, mode="nearest")[0] > 0
        keep = (scores >= threshold) & inside.flatten(1).any(1)
        order = scores[keep].argsort(descending=True)
        found.append(Instances(inside[keep][order], labels[keep][order], scores[keep][order]))
    return found


def panoptic(
    prediction: Prediction,
    image_size: Size,
    size: Size | None = None,
    things: set[int] | frozenset[int] = frozenset(),
    threshold: float = 0.8,
    overlap: float = 0.8,
    transformers: bool = False,
) -> list[tuple[Tensor, list[Segment]]]:
    """For each image a map (H, W) int32 of segment ids, 0 where there is none, and its segments.

    things: the classes whose instances stay apart; those of any other class are one segment.
    threshold: of p(class | query), above which a query takes part.
    overlap: the share of its mask that a query must win against the others, or it is left out.
    """
    best, named = prediction.probabilities().max(-1)  # (B, Q)
    taking_part = best > threshold
    if prediction.fused is None:  # a second stage knows no "no object"
        taking_part &= best >= prediction.class_logits.softmax(-1)[..., -1]
    found: list[tuple[Tensor, list[Segment]]] = []
    for scores, labels, keep, masks in zip(best, named, taking_part, prediction.mask_logits, strict=True):
        if not keep.any():
            found.append((torch.zeros(size or image_size, dtype=torch.int32, device=masks.device), []))
            continue
        if transformers:
            small = by_way_of_transformers(masks[None, keep]).sigmoid()
            probability = F.interpolate(small, size or image_size, mode="bilinear", align_corners=False)[0]
        else:
            probability = upsample(masks[None, keep], image_size, size)[0].sigmoid()
        found.append(_merge(probability, scores[keep], labels[keep], set(things), overlap, transformers))
    return found


def _merge(
    probability: Tensor, scores: Tensor, labels: Tensor, things: set[int], overlap: float, transformers: bool
) -> tuple[Tensor, list[Segment]]:
    """Masks (Q, H, W) compete for each pixel by score times probability."""
    ids = torch.zeros(probability.shape[1:], dtype=torch.int32, device=probability.device)
    segments: list[Segment] = []
    weighted = probability * scores[:, None, None]
    winner = weighted.argmax(0)
    counted = weighted if transformers else probability
    stuff: dict[int, int] = {}
    current = 0
    for k, (label, score) in enumerate(zip(labels.tolist(), scores.tolist(), strict=True)):
        won = winner == k
        own = counted[k] >= 0.5
        area, whole = int(won.sum()), int(own.sum())
        if not transformers:
            won = won & own
        # A share of exactly ``overlap`` is enough for Mask2Former and too little for transformers.
        share = area / whole if whole else 0.0
        if not won.any() or share < overlap or (transformers and share <= overlap):
            continue
        known = label in stuff
        current = stuff[label] if known and transformers else current if known else current + 1
        at = stuff.get(label, current)
        ids[won] = at
        if label not in things:
            stuff[label] = at
        if not known or transformers:
            segments.append(Segment(at, label, score))
    return ids, segments
