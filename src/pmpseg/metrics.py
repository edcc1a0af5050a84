"""Segmentation metrics: counts that add up over batches and processes, under thin torchmetrics classes.

``ConfusionMetrics`` scores label maps, ``PhraseMetrics`` one mask a phrase. Sources: the two mIoU rules are
those of detectron2's ``SemSegEvaluator`` (v0.6, and since 2022-07-06); IoU_FG, IoU_BIN and the mean over
phrases are those of PhraseCut (Wu et al. 2020) and CLIPSeg (Lueddecke and Ecker 2022), without the 1 that
CLIPSeg adds to each denominator. Every state is an int64 sum: results do not depend on how the data is split,
and no precision setting can round them. Results are float64 tensors on the CPU, already summed over
processes (log them with ``sync_dist=False``); NaN is undefined.
Shapes: label maps (..., H, W); scores and masks (N, H, W) for N phrases; T thresholds.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

PERCENT = tuple(step / 100 for step in range(1, 100))
_IOU_UNIT = 1 << 32  # IoUs are summed as integers of this unit: exact to 3e-10, for up to 2**31 phrases


class ConfusionMetrics(Metric):
    """Scores of label maps from one confusion matrix over everything seen since ``reset``.

    ``unseen`` lists the classes without training labels; ``groups`` names more lists of classes to average
    over. ``compute`` gives values in [0, 1]:

    - ``iou`` (C,): IoU of each class, NaN where the ground truth does not have it, predicted or not
    - ``miou``: mean IoU over the classes in the ground truth (detectron2 since 2022-07-06)
    - ``miou_v06``: mean over the classes in the ground truth or predicted, so one that is predicted but
      absent counts 0 (detectron2 v0.6; torchmetrics' macro Jaccard index)
    - ``miou_seen``, ``miou_unseen``, ``miou_<group>``: ``miou`` over those classes only
    - ``hiou``: harmonic mean of ``miou_seen`` and ``miou_unseen``, 0 when both are 0
    - ``fwiou``: mean of ``iou`` weighted by the classes' true pixels
    - ``pixel_accuracy``, and ``mean_accuracy``: mean recall over the classes in the ground truth

    torchmetrics squeezes results of one element: with a single class ``iou`` has no dimension.
    """

    full_state_update = False
    matrix: Tensor

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        unseen: Sequence[int] | None = None,
        groups: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.unseen = sorted(set(unseen or ()))
        self.groups = {name: sorted(set(classes)) for name, classes in (groups or {}).items()}
        _check_classes(num_classes, ignore_index)
        for name, classes in {"unseen": self.unseen, **self.groups}.items():
            wrong = [index for index in classes if not 0 <= index < num_classes]
            if wrong:
                raise ValueError(f"{name} has class {wrong[0]}, wanted 0 to {num_classes - 1}")
        taken = {"seen", "unseen", "v06"} & self.groups.keys()
        if taken:
            raise ValueError(f"the group name {min(taken)!r} is taken by 'miou_{min(taken)}': choose another")
        empty = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64)
        self.add_state("matrix", empty, dist_reduce_fx="sum")

    def update(self, labels: Tensor, target: Tensor) -> None:
        """Adds predicted ``labels`` and ``target``, both (..., H, W) integers; see ``confusion_matrix``."""
        self.matrix = self.matrix + confusion_matrix(labels, target, self.num_classes, self.ignore_index)

    def compute(self) -> dict[str, Tensor]:
        return confusion_scores(self.matrix, self.unseen, self.groups)


class PhraseMetrics(Metric):
    """Scores of one mask a phrase; its answer is where the score is above (strictly ``>``) a threshold.

    ``threshold`` is the one that single numbers are given at; it joins ``thresholds`` on the grid, T in all,
    of ``curve`` and ``ap``. Scores and thresholds are compared in float32. ``kinds`` are the kinds a phrase
    may have. A phrase is present if its ground truth has a pixel, else absent. ``compute`` gives values in
    [0, 1]:

    - ``iou``: mean of the IoUs of the present phrases (PhraseCut's mean IoU)
    - ``cumulative_iou``: IoU_FG, sum of intersections over sum of unions, over all phrases
    - ``iou_bin``: mean of IoU_FG and the same of the background
    - ``ap``: pixel-level average precision over all phrases, see ``average_precision``
    - ``absent_accuracy``: share of the absent phrases that are answered with an empty mask
    - ``iou_with_absent``: mean over all phrases; an absent one is 1 if answered with an empty mask, else 0
    - ``iou_<kind>`` and ``n_<kind>``: ``iou`` of the present phrases of that kind, and their number (int64)
    - ``curve``: dict of ``threshold``, ``iou`` and ``absent_accuracy``, each (T,), thresholds rising
    """

    full_state_update = False

    counts: Tensor
    iou_sum: Tensor
    absent_empty: Tensor
    present: Tensor
    absent: Tensor
    kind_iou_sum: Tensor
    kind_present: Tensor

    def __init__(
        self,
        threshold: float = 0.5,
        thresholds: Sequence[float] = PERCENT,
        kinds: Sequence[str] = (),
    ) -> None:
        super().__init__()
        for value in (threshold, *thresholds):
            if not 0 <= value < 1:
                raise ValueError(f"got threshold {value}, wanted 0 <= threshold < 1")
        taken = {"bin", "with_absent"} & set(kinds)
        if taken:
            raise ValueError(f"the kind {min(taken)!r} is taken by 'iou_{min(taken)}': choose another")
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"got kinds {list(kinds)}, wanted each only once")
        self.kinds = list(kinds)
        # A plain attribute and no buffer: training in bfloat16 would round a buffer.
        self.grid = torch.tensor([threshold, *thresholds], dtype=torch.float32).unique()  # (T,) sorted
        self.at = int(torch.bucketize(torch.tensor(threshold, dtype=torch.float32), self.grid))
        size = len(self.grid)
        shapes = {
            "counts": (2, size + 1),  # pixels by background / foreground and score level
            "iou_sum": (size,),
            "absent_empty": (size,),
            "present": (),
            "absent": (),
            "kind_iou_sum": (len(kinds),),
            "kind_present": (len(kinds),),
        }
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, target: Tensor, kind: Sequence[str | Sequence[str]] | None = None) -> None:
        """Adds N phrases: ``scores`` (N, H, W) in [0, 1], ``target`` (N, H, W) bool, ``kind`` a name or several for each."""
        check_phrases(scores, target)
        if kind is not None and len(kind) != len(scores):
            raise ValueError(f"got {len(kind)} kinds for {len(scores)} phrases, wanted one kind a phrase")
        names = [[k] if isinstance(k, str) else list(k) for k in kind or ()]
        unknown = {name for of_one in names for name in of_one} - set(self.kinds)
        if unknown:
            raise ValueError(f"unknown kind {min(unknown)!r}, wanted one of {self.kinds}: give it in `kinds`")
        if len(scores) == 0:
            return
        grid = self.grid.to(scores.device)
        # One phrase at a time keeps the memory at one (H, W) map.
        counts = torch.stack([score_histogram(s, t, grid) for s, t in zip(scores, target, strict=True)])
        false, hit = above(counts).unbind(1)  # (N, T) each
        size = counts[:, 1].sum(1)  # (N,) ground truth pixels
        present = size > 0
        iou = hit * _IOU_UNIT // (size[:, None] + false).clamp(min=1)  # (N, T), 0 for absent phrases
        absent_empty = ~present[:, None] & (false == 0)
        self.counts = self.counts + counts.sum(0)
        self.iou_sum = self.iou_sum + iou.sum(0)
        self.absent_empty = self.absent_empty + absent_empty.sum(0)
        self.present = self.present + present.sum()
        self.absent = self.absent + (~present).sum()
        if kind is not None:
            pairs = [(n, self.kinds.index(name)) for n, of_one in enumerate(names) for name in of_one]
            row, index = torch.tensor(pairs, dtype=torch.long, device=scores.device).reshape(-1, 2).T
            self.kind_iou_sum = self.kind_iou_sum.index_add(0, index, iou[row, self.at])
            self.kind_present = self.kind_present.index_add(0, index, present[row].long())

    def compute(self) -> dict[str, Tensor | dict[str, Tensor]]:
        counts = self.counts.cpu().double()
        background, foreground = counts.sum(1)
        false, hit = above(counts)[:, self.at]
        cumulative = hit / (foreground + false)
        cumulative_background = (background - false) / (background + foreground - hit)
        iou_sum = self.iou_sum.cpu().double() / _IOU_UNIT  # (T,)
        absent_empty = self.absent_empty.cpu().double()  # (T,)
        present, absent = self.present.cpu().double(), self.absent.cpu().double()
        iou, absent_accuracy = iou_sum / present, absent_empty / absent
        scores = {
            "iou": iou[self.at],
            "cumulative_iou": cumulative,
            "iou_bin": (cumulative + cumulative_background) / 2,
            "ap": average_precision(counts),
            "absent_accuracy": absent_accuracy[self.at],
            "iou_with_absent": (iou_sum + absent_empty)[self.at] / (present + absent),
            "curve": {"threshold": self.grid, "iou": iou, "absent_accuracy": absent_accuracy},
        }
        kind_iou = self.kind_iou_sum.cpu().double() / _IOU_UNIT / self.kind_present.cpu()
        for name, value, number in zip(self.kinds, kind_iou, self.kind_present.cpu(), strict=True):
            scores |= {f"iou_{name}": value, f"n_{name}": number}
        return scores


def confusion_matrix(labels: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Counts pixels by true class (rows) and predicted class (columns): (C, C + 1) int64.

    ``labels`` (predicted) and ``target`` are integers of one shape. Pixels whose target is ``ignore_index``
    are left out. A prediction of ``ignore_index`` is "no answer": it counts in the last column, so it lowers
    the IoU and recall of its true class and is no false positive of any. Other values outside 0..C-1 are a
    ValueError.
    """
    _check_classes(num_classes, ignore_index)
    if labels.shape != target.shape:
        got = f"labels {tuple(labels.shape)} and target {tuple(target.shape)}"
        raise ValueError(f"got {got}, wanted the same shape: resize the prediction to the target")
    for name, values in (("labels", labels), ("target", target)):
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise ValueError(f"got {name} of {values.dtype}, wanted integers: take the argmax first")
    target = target.long()  # before comparing: uint8 cannot be compared with a negative ignore_index
    valid = target != ignore_index
    target, labels = target[valid], labels.long()[valid]
    answered = labels != ignore_index
    for name, values in (("labels", labels[answered]), ("target", target)):
        wrong = values[(values < 0) | (values >= num_classes)]
        if len(wrong):
            last = num_classes - 1
            raise ValueError(f"got class {int(wrong[0])} in {name}, wanted 0 to {last} or {ignore_index}")
    columns = num_classes + 1
    index = target * columns + torch.where(answered, labels, num_classes)
    return torch.bincount(index, minlength=num_classes * columns).view(num_classes, columns)


def confusion_scores(
    matrix: Tensor, unseen: Sequence[int] = (), groups: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Tensor]:
    """The scores that ``ConfusionMetrics`` lists, of a ``confusion_matrix`` (C, C + 1)."""
    counts = matrix.cpu().double()
    hit = counts.diagonal()  # (C,)
    truth, predicted = counts.sum(1), counts[:, :-1].sum(0)  # (C,) each
    ratio = hit / (truth + predicted - hit)  # NaN: neither in the ground truth nor predicted
    iou = ratio.where(truth > 0, torch.nan)
    seen = [index for index in range(len(iou)) if index not in unseen]
    miou_seen, miou_unseen = iou[seen].nanmean(), iou[list(unseen)].nanmean()
    both = miou_seen + miou_unseen
    scores = {
        "miou": iou.nanmean(),
        "miou_v06": ratio.nanmean(),
        "miou_seen": miou_seen,
        "miou_unseen": miou_unseen,
        "hiou": (2 * miou_seen * miou_unseen / both).where(both != 0, 0.0),
        "fwiou": (truth * iou).nansum() / truth.sum(),
        "pixel_accuracy": hit.sum() / truth.sum(),
        "mean_accuracy": (hit / truth).nanmean(),
        "iou": iou,
    }
    return scores | {f"miou_{name}": iou[list(classes)].nanmean() for name, classes in (groups or {}).items()}


def score_histogram(scores: Tensor, target: Tensor, thresholds: Tensor) -> Tensor:
    """Counts the pixels of one phrase by background / foreground and score level: (2, T + 1) int64.

    Level j holds the ``scores`` (H, W) that are above exactly j of the rising ``thresholds`` (T,); ``target``
    is (H, W) bool.
    """
    levels = len(thresholds) + 1
    level = torch.bucketize(scores.float().contiguous(), thresholds, out_int32=True)  # thresholds < score
    return torch.bincount((level + target * levels).flatten(), minlength=2 * levels).view(2, levels)


def average_precision(counts: Tensor) -> Tensor:
    """Area under the precision-recall steps, sum of (R_j - R_j+1) P_j, of a ``score_histogram`` (2, T + 1).

    This is the usual, uninterpolated average precision (scikit-learn's) with all pixels pooled and the scores
    of one level treated as ties: exact for scores rounded to the grid, up to recall 1. CLIPSeg's AP is
    another one: Simpson's rule over 49 thresholds, not extended to recall 0 and 1. NaN without a foreground
    pixel.
    """
    false, hit = counts.flip(-1).cumsum(-1).double()  # (T + 1,) each, falling levels
    gained = counts[1].flip(-1)
    return (gained * hit / (hit + false).clamp(min=1)).sum() / hit[-1]


def above(counts: Tensor) -> Tensor:
    """Pixels above each threshold, (..., T), of histograms (..., T + 1)."""
    return counts.flip(-1).cumsum(-1).flip(-1)[..., 1:]


def _check_classes(num_classes: int, ignore_index: int) -> None:
    if num_classes < 1:
        raise ValueError(f"got num_classes {num_classes}, wanted at least 1")
    if 0 <= ignore_index < num_classes:
        raise ValueError(
            f"ignore_index {ignore_index} is one of the {num_classes} classes: take one above, as 65535"
        )


def check_phrases(scores: Tensor, target: Tensor) -> None:
    if scores.ndim != 3 or scores.shape != target.shape:
        got = f"scores {tuple(scores.shape)} and target {tuple(target.shape)}"
        raise ValueError(f"got {got}, wanted (N, H, W) for both: resize the scores to the target")
    if not scores.is_floating_point() or target.dtype != torch.bool:
        got = f"scores of {scores.dtype} and target of {target.dtype}"
        raise ValueError(f"got {got}, wanted float and torch.bool")
    if scores.numel():
        low, high = (value.item() for value in scores.aminmax())
        if not (low >= 0 and high <= 1):  # so written that NaN fails too
            raise ValueError(f"got scores from {low:.4g} to {high:.4g}, wanted 0 to 1: apply a sigmoid")
