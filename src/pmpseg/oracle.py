"""Where a two-stage model loses: each stage scored with a perfect other one. Never a model's score: both read the ground truth.

Source: OVSeg (arXiv 2210.04150, sec. 1 and A.1). On A-150 they report 20.1 mIoU for true masks that an ordinary CLIP names, and
66.5 for ordinary proposals that the truth names: the CLIP is the bottleneck. The figures are theirs, not ours.

The paper leaves open which overlap is "best", what happens to masks that meet no class or vanish, and whether the network's own
class scores keep a part; what is done here stands at each function.

Letters: B images, Q queries, K words, N classes that occur in an image. Images (B, 3, H, W) as the network sees them; labels
(B, h, w) int64 at the image's own size, and so are the answers. "No answer" is ``ignore_index``, as for ``ConfusionMetrics``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .inference import Size, upsample
from .models.pmp import MASK_STRIDE
from .region_stage import RegionStage

OVERLAPS = ("iou", "inside")


@torch.no_grad()
def name_true_masks(
    region: RegionStage,
    image: Tensor,
    labels: Tensor,
    words: Sequence[str | Sequence[str]],
    ignore_index: int = 255,
    chunk: int = 32,
) -> Tensor:
    """True masks, the CLIP's names -> (B, h, w) int64: a perfect first stage.

    image (B, 3, H, W) in [0, 1]; labels (B, h, w) int64; words, the K prompts of the whole list, or lists of synonyms. A mask is
    all of a class in an image, as in a label map, with no instances apart. ``chunk`` masks of the working image's size exist at
    once, which changes nothing but the memory.

    The region stage looks at the working image, so that masks are taken there from the labels by nearest neighbour. A mask that
    vanishes there is no region, gets no answer, and its class misses those pixels; no other class gains them. Nor do pixels
    of no class get an answer. The CLIP names alone, whatever the stage's ``weight``: there is no other opinion to weigh it with.
    """
    names = region.text.encode(words).pooled.to(image.device)  # (1, K, E)
    _check(labels, image, ignore_index, names.shape[1])
    answer = torch.full_like(labels, ignore_index)
    small = F.interpolate(labels[:, None].float(), image.shape[-2:], mode="nearest-exact")[:, 0].long()  # exact up to 2^24
    for b, truth in enumerate(labels):
        for classes in _classes(truth, ignore_index).split(chunk):
            masks = (small[b] == classes[:, None, None]).float()  # (N, H, W)
            logits, valid = region.classifier(image[b, None], masks[None], names)
            best = logits[0].argmax(-1).where(valid[0], ignore_index)  # (N,)
            for label, name in zip(classes, best, strict=True):
                answer[b].masked_fill_(truth == label, int(name))
    return answer


@torch.no_grad()
def name_by_truth(
    mask_logits: Tensor,
    image_size: Size,
    labels: Tensor,
    ignore_index: int = 255,
    overlap: str = "iou",
    stride: int = MASK_STRIDE,
) -> Tensor:
    """The network's masks, the truth's names -> (B, h, w) int64: a perfect second stage.

    mask_logits (B, Q, h / stride, w / stride) of the padded image; ``image_size`` is (H, W) of the image that the network saw;
    labels (B, h, w) int64. A proposal, where its mask is above 0.5, gets the class that it overlaps best: by intersection over
    union (``iou``), or over the proposal's own area (``inside``), by which a part of a mask is named as the whole. Ignored pixels
    count in no area. The map is the usual rule's, argmax over classes of the sum of sigmoid(mask) over the class's proposals:
    all proposals count alike, the network's class scores and its "no object" have no say. Between equal overlaps the lower class
    wins. A proposal that overlaps no class takes no part; where no proposal has anything to say there is no answer.

    Only the N classes that occur are looked at: nothing has the size of the whole list.
    """
    if overlap not in OVERLAPS:
        raise ValueError(f"overlap: got {overlap!r}, want one of {', '.join(OVERLAPS)}")
    _check(labels, mask_logits, ignore_index)
    answer = torch.full_like(labels, ignore_index)
    for b, truth in enumerate(labels):
        classes = _classes(truth, ignore_index)
        if not len(classes):
            continue
        size = (truth.shape[0], truth.shape[1])
        masks = upsample(mask_logits[b, None].float(), image_size, size, stride)[0].sigmoid()  # (Q, h, w)
        named = _named(masks > 0.5, truth, classes, ignore_index, overlap)  # (Q, N)
        best, index = torch.einsum("qn,qhw->nhw", named, masks).max(0)
        answer[b] = classes[index].where(best > 0, ignore_index)
    return answer


def _named(proposals: Tensor, truth: Tensor, classes: Tensor, ignore_index: int, overlap: str) -> Tensor:
    """One-hot (Q, N) float: the class that each of the proposals (Q, h, w) overlaps best; no class where it overlaps none."""
    inside = (proposals & (truth != ignore_index)).float()
    of_class = (truth == classes[:, None, None]).float()  # (N, h, w)
    shared = torch.einsum("qhw,nhw->qn", inside, of_class)
    area, size = inside.flatten(1).sum(1)[:, None], of_class.flatten(1).sum(1)
    score = shared / (area + size - shared if overlap == "iou" else area.clamp(min=1))
    best, index = score.max(1)
    return F.one_hot(index, len(classes)).float() * (best > 0)[:, None]


def _classes(truth: Tensor, ignore_index: int) -> Tensor:
    """The classes that occur in one image's labels, rising: (N,)."""
    classes = truth.unique()
    return classes[classes != ignore_index]


def _check(labels: Tensor, batch: Tensor, ignore_index: int, count: int | None = None) -> None:
    if labels.ndim != 3 or labels.dtype != torch.int64 or batch.ndim != 4 or len(labels) != len(batch):
        got = f"labels {labels.dtype} {tuple(labels.shape)} for {tuple(batch.shape)}"
        raise ValueError(f"got {got}; wanted int64 (B, h, w), and as many images")
    if count is None:
        return
    wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= count))]
    if len(wrong):
        raise ValueError(f"labels: got class {int(wrong[0])}, wanted 0 to {count - 1}, one a word, or {ignore_index}")
