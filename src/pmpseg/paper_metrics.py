"""CLIPSeg's metrics as its paper reports them, beside our own: for comparing with its tables and for nothing else.

Source: Lueddecke and Ecker 2022 (``FixedIntervalMetrics`` of the released code; papers.md 3.7). The states are sums of
integers, as in ``pmpseg.metrics``, so that results do not depend on how the data is split into batches and processes.
Shapes: scores and masks (N, H, W) for N samples (an image with one prompt); T = 49 thresholds; C classes.
"""

from typing import Any

import numpy as np
import torch
from scipy.integrate import simpson
from torch import Tensor
from torchmetrics import Metric

from .metrics import above, check_phrases, score_histogram

GRID = tuple(step / 50 for step in range(1, 50))  # 0.02, 0.04, ... 0.98
REPORTED = (0.1, 0.2, 0.3, 0.5)
_IOU_UNIT = 1 << 32  # as in pmpseg.metrics: IoUs are summed as integers of this unit, exact to 3e-10


class ClipSegMetrics(Metric):
    """mIoU, IoU_FG, IoU_BIN and AP by CLIPSeg's definitions, at 49 thresholds t; a pixel is answered where its score is > t.

    TP, FP, FN and TN are pixels, summed over all samples. Ignored pixels are in none of them. ``compute`` gives, in [0, 1]:

    - ``iou_fg@t``: TP / (1 + TP + FP + FN)
    - ``iou_bin@t``: mean of ``iou_fg@t`` and TN / (1 + TN + FP + FN)
    - ``miou@t``: mean over classes of TP / (1 + TP + FP + FN), each of these summed over the samples of that class. With
      ``num_classes`` None every sample is a class by itself (the paper on PhraseCut), else ``class_id`` says which (Pascal,
      COCO); classes without a sample are left out
    - ``ap``: area under precision TP / (1 + TP + FP) over recall TP / (1 + TP + FN), see ``simpson_ap``
    - ``curve``: dict of ``threshold``, ``miou``, ``iou_fg``, ``iou_bin``, ``precision`` and ``recall``, each (T,)

    for t = 0.1, 0.2, 0.3, 0.5 and ``custom_threshold`` (one of the 49), and ``@best``: the maximum over the thresholds, of each
    metric by itself. They are chosen on the very data that is scored, so @best flatters. NaN: no sample, or for AP no answer.

    What differs from ``PhraseMetrics``:

    - each denominator has 1 more: a little less for small masks, and 0, not undefined, where everything is empty
    - ``miou`` of samples counts an absent phrase as 0 whatever is answered; ``iou`` leaves absent phrases out
    - ``miou`` of classes adds up pixels first, so large objects weigh more; ``iou`` is a mean over phrases
    - ``iou_fg`` and ``iou_bin`` are ``cumulative_iou`` and ``iou_bin`` but for the 1
    - ``ap`` is Simpson's rule between the lowest and the highest recall that the 49 thresholds reach, and so misses what lies
      outside; ours is the step sum over 100 levels up to recall 1 (average precision as usual)
    - pixels can be ignored
    """

    full_state_update = False
    counts: Tensor
    samples: Tensor
    iou_sum: Tensor

    def __init__(self, num_classes: int | None = None, custom_threshold: float | None = None) -> None:
        super().__init__()
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"got num_classes {num_classes}, wanted at least 1, or None for samples")
        self.num_classes = num_classes
        self.reported = {f"{t:g}": GRID.index(t) for t in REPORTED}
        if custom_threshold is not None:
            near = round(custom_threshold * 50) / 50
            if near not in GRID or abs(near - custom_threshold) > 1e-9:
                raise ValueError(f"got custom_threshold {custom_threshold}, wanted one of the grid 0.02, 0.04, ... 0.98")
            self.reported[f"{near:g}"] = GRID.index(near)
        self.grid = torch.tensor(GRID, dtype=torch.float32)  # (T,); no buffer: training in bfloat16 would round it
        shapes = {
            "counts": (num_classes or 1, 2, len(GRID) + 1),  # pixels by class, background / foreground and score level
            "samples": (num_classes or 1,),
            "iou_sum": (len(GRID),),  # over samples
        }
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, target: Tensor, ignore: Tensor | None = None, class_id: Tensor | None = None) -> None:
        """Adds N samples: ``scores`` (N, H, W) in [0, 1], ``target`` and ``ignore`` (N, H, W) bool, ``class_id`` (N,) int64."""
        check_phrases(scores, target)
        if ignore is not None and (ignore.shape != target.shape or ignore.dtype != torch.bool):
            raise ValueError(f"got ignore {tuple(ignore.shape)} of {ignore.dtype}, wanted {tuple(target.shape)} of torch.bool")
        classes = self._classes(class_id, scores)
        if len(scores) == 0:
            return
        grid, keep = self.grid.to(scores.device), torch.ones_like(target) if ignore is None else ~ignore
        # One sample at a time keeps the memory at one (H, W) map.
        counts = torch.stack([score_histogram(s[k], t[k], grid) for s, t, k in zip(scores, target, keep, strict=True)])
        false, hit = above(counts).unbind(1)  # (N, T) each
        union = counts[:, 1].sum(1, keepdim=True) + false
        self.iou_sum = self.iou_sum + (hit * _IOU_UNIT // (1 + union)).sum(0)
        self.counts = self.counts.index_add(0, classes, counts)
        self.samples = self.samples + torch.bincount(classes, minlength=len(self.samples))

    def _classes(self, class_id: Tensor | None, scores: Tensor) -> Tensor:
        if self.num_classes is None:
            return torch.zeros(len(scores), dtype=torch.long, device=scores.device)
        if class_id is None:
            raise ValueError(f"got no class_id, wanted one for each sample: this metric was made for {self.num_classes} classes")
        if class_id.shape != scores.shape[:1]:
            raise ValueError(f"got class_id {tuple(class_id.shape)} for {len(scores)} samples, wanted one a sample")
        wrong = class_id[(class_id < 0) | (class_id >= self.num_classes)]
        if len(wrong):
            raise ValueError(f"got class {int(wrong[0])}, wanted 0 to {self.num_classes - 1}")
        return class_id.to(scores.device).long()

    def compute(self) -> dict[str, Any]:
        counts, samples = self.counts.cpu().double(), self.samples.cpu()
        fp, tp = above(counts.sum(0))  # (T,) each
        background, foreground = counts.sum((0, 2))
        fn, tn = foreground - tp, background - fp
        if self.num_classes is None:
            miou = self.iou_sum.cpu().double() / _IOU_UNIT / samples.sum()
        else:
            of_class = counts[samples > 0]  # (classes with a sample, 2, T + 1)
            false, hit = above(of_class).unbind(1)
            miou = (hit / (1 + of_class[:, 1].sum(1, keepdim=True) + false)).mean(0)
        iou_fg = tp / (1 + tp + fp + fn)
        by_threshold = {"miou": miou, "iou_fg": iou_fg, "iou_bin": (iou_fg + tn / (1 + tn + fp + fn)) / 2}
        if not samples.sum():
            by_threshold = {name: torch.full_like(iou_fg, torch.nan) for name in by_threshold}
        scores: dict[str, Any] = {}
        for name, values in by_threshold.items():
            scores |= {f"{name}@{t}": values[index] for t, index in self.reported.items()}
            scores[f"{name}@best"] = values.max()
        precision, recall = tp / (1 + tp + fp), tp / (1 + tp + fn)
        answered = tp + fp > 0
        scores["ap"] = torch.tensor(simpson_ap(precision[answered].numpy(), recall[answered].numpy()), dtype=torch.float64)
        scores["curve"] = {"threshold": self.grid, **by_threshold, "precision": precision, "recall": recall}
        return scores


def simpson_ap(precision: np.ndarray, recall: np.ndarray) -> float:
    """Simpson's rule over the pairs, each once, sorted by recall and, where it is the same, by precision; NaN for no pairs.

    For an even number of points Simpson's rule leaves one interval over: scipy did it, when the paper was written, by a trapezoid
    at the one end and at the other, and took the mean (its ``even="avg"``, no longer offered). We do so, too.
    """
    points = np.unique(np.stack([recall, precision], 1), axis=0)  # sorted by columns
    x, y = points.T
    if len(x) < 2:
        return 0.0 if len(x) else float("nan")
    if len(x) % 2:
        return float(simpson(y, x=x))
    first, last = ((y[i] + y[i + 1]) / 2 * (x[i + 1] - x[i]) for i in (0, len(x) - 2))
    if len(x) == 2:
        return float(first)
    return float((simpson(y[:-1], x=x[:-1]) + last + first + simpson(y[1:], x=x[1:])) / 2)
