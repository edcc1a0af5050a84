"""Metrics against plain loops, torchmetrics' Jaccard index and numbers by hand; also over 2 processes."""

import math
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex

from pmpseg.metrics import (
    ConfusionMetrics,
    PhraseMetrics,
    average_precision,
    confusion_matrix,
    confusion_scores,
    score_histogram,
)

CLASSES, IGNORE = 6, 255
UNSEEN, GROUPS = [1, 4], {"things": [0, 1, 2], "rare": [5]}
KINDS = ["thing", "stuff", "group"]


# Plain references


def label_maps(seed: int = 0, count: int = 5) -> tuple[Tensor, Tensor]:
    """Predictions and targets (count, 9, 7): class 4 predicted but never true, 5 neither; abstentions."""
    generator = np.random.default_rng(seed)
    target = generator.choice([0, 1, 2, 3, IGNORE], size=(count, 9, 7))
    guess = generator.choice([0, 1, 2, 3, 4, IGNORE], size=target.shape)
    labels = np.where((generator.random(target.shape) < 0.6) & (target != IGNORE), target, guess)
    return torch.from_numpy(labels), torch.from_numpy(target)


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def reference_confusion(labels: Tensor, target: Tensor) -> dict[str, float | list[float]]:
    pairs = zip(labels.flatten().tolist(), target.flatten().tolist(), strict=True)
    pairs = [(p, t) for p, t in pairs if t != IGNORE]
    iou, accuracy, weighted, predicted = {}, {}, 0.0, {p for p, _ in pairs if p != IGNORE}
    for c in {t for _, t in pairs}:
        both = sum(1 for p, t in pairs if p == c and t == c)
        either = sum(1 for p, t in pairs if p == c or t == c)
        size = sum(1 for _, t in pairs if t == c)
        iou[c], accuracy[c] = both / either, both / size
        weighted += size * iou[c] / len(pairs)
    seen = mean([iou[c] for c in iou if c not in UNSEEN])
    unseen = mean([iou[c] for c in iou if c in UNSEEN])
    return {
        "miou": mean(list(iou.values())),
        "miou_v06": mean([iou.get(c, 0.0) for c in iou.keys() | predicted]),
        "miou_seen": seen,
        "miou_unseen": unseen,
        "hiou": 2 / (1 / seen + 1 / unseen),
        "fwiou": weighted,
        "pixel_accuracy": sum(1 for p, t in pairs if p == t) / len(pairs),
        "mean_accuracy": mean(list(accuracy.values())),
        "iou": [iou.get(c, math.nan) for c in range(CLASSES)],
        **{f"miou_{name}": mean([iou[c] for c in classes if c in iou]) for name, classes in GROUPS.items()},
    }


def phrases(seed: int = 0, count: int = 9) -> tuple[Tensor, Tensor, list[str]]:
    """Scores and masks (count, 6, 8): every third absent, some answered with nothing."""
    generator = np.random.default_rng(seed)
    target = generator.random((count, 6, 8)) < 0.3
    target[::3] = False
    scores = np.clip(generator.random(target.shape) * 0.7 + 0.3 * target, 0, 1)
    scores[3::6] *= 0.4
    scores = np.round(scores * 256) / 256  # exact in float32
    return torch.from_numpy(scores).float(), torch.from_numpy(target), [KINDS[i % 2] for i in range(count)]


def reference_ap(scores: list[float], truth: list[bool]) -> float:
    """Average precision by definition: walk down the distinct scores, keep precision and recall."""
    total, before, area = sum(truth), 0.0, 0.0
    for score in sorted(set(scores), reverse=True):
        chosen = [t for s, t in zip(scores, truth, strict=True) if s >= score]
        recall = sum(chosen) / total
        area += (recall - before) * sum(chosen) / len(chosen)
        before = recall
    return area


def reference_phrases(scores: Tensor, target: Tensor, kinds: list[str], threshold: float) -> dict[str, float]:
    present_iou, absent_right, by_kind = [], [], {kind: [] for kind in KINDS}
    inter = union = background_inter = background_union = 0
    for score, truth, kind in zip(scores.numpy(), target.numpy(), kinds, strict=True):
        both = either = outside = 0
        for y in range(score.shape[0]):
            for x in range(score.shape[1]):
                answer = score[y, x] > threshold
                both += bool(answer and truth[y, x])
                either += bool(answer or truth[y, x])
                outside += bool(not answer and not truth[y, x])
        inter, union = inter + both, union + either
        background_inter += outside
        background_union += score.size - both
        if truth.any():
            present_iou.append(both / either)
            by_kind[kind].append(both / either)
        else:
            absent_right.append(float(either == 0))
    foreground, background = inter / union, background_inter / background_union
    return {
        "iou": mean(present_iou),
        "cumulative_iou": foreground,
        "iou_bin": (foreground + background) / 2,
        "absent_accuracy": mean(absent_right),
        "iou_with_absent": mean(present_iou + absent_right),
        **{f"iou_{kind}": mean(values) for kind, values in by_kind.items()},
        **{f"n_{kind}": len(values) for kind, values in by_kind.items()},
    }


def assert_same(got: dict, wanted: dict, tolerance: float = 1e-9) -> None:
    for key, value in wanted.items():
        if isinstance(value, dict):
            assert_same(got[key], value, tolerance)
        else:
            np.testing.assert_allclose(np.asarray(got[key]), value, rtol=0, atol=tolerance, err_msg=key)


def score_labels(labels: Tensor, target: Tensor, **options: object) -> dict[str, Tensor]:
    metric = ConfusionMetrics(CLASSES, **options)
    metric.update(labels, target)
    return metric.compute()


# Label maps


def test_confusion_by_hand() -> None:
    """The toy case of the two rules: class 2 is not in the ground truth and predicted once."""
    target = torch.tensor([[0, 0, 0, 1, 1, 255]])
    labels = torch.tensor([[0, 0, 2, 1, 1, 0]])
    matrix = confusion_matrix(labels, target, 4)
    assert matrix.tolist() == [[2, 0, 1, 0, 0], [0, 2, 0, 0, 0], [0] * 5, [0] * 5]
    metric = ConfusionMetrics(4, unseen=[1])
    metric.update(labels, target)
    wanted = {
        "miou": 5 / 6,  # (2/3 + 1) / 2
        "miou_v06": 5 / 9,  # (2/3 + 1 + 0) / 3
        "miou_seen": 2 / 3,
        "miou_unseen": 1,
        "hiou": 4 / 5,
        "fwiou": 4 / 5,  # (3 * 2/3 + 2 * 1) / 5
        "pixel_accuracy": 4 / 5,
        "mean_accuracy": 5 / 6,
        "iou": [2 / 3, 1, math.nan, math.nan],
    }
    got = metric.compute()
    assert got.keys() == wanted.keys()
    assert_same(got, wanted)


def test_no_answer_is_wrong_for_its_class_alone() -> None:
    target, labels = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 255, 1, 1]])
    assert confusion_matrix(labels, target, 2).tolist() == [[1, 0, 1], [0, 2, 0]]
    got = score_labels(labels, target)
    assert_same(got, {"miou": 3 / 4, "miou_v06": 3 / 4, "iou": [1 / 2, 1, *[math.nan] * 4]})


def test_dataset_iou_is_no_mean_over_images() -> None:
    target, labels = torch.zeros(2, 1, 10, dtype=torch.long), torch.zeros(2, 1, 10, dtype=torch.long)
    target[1, 0, 1:] = 255  # the second image has one valid pixel, and it is wrong
    labels[1] = 1
    metric = ConfusionMetrics(2)
    for image in range(2):
        metric.update(labels[image], target[image])
    assert_same(metric.compute(), {"miou": 10 / 11, "miou_v06": 5 / 11})


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_confusion_matches_loops(seed: int, dtype: torch.dtype) -> None:
    labels, target = label_maps(seed)
    got = score_labels(labels.to(dtype), target.to(dtype), unseen=UNSEEN, groups=GROUPS)
    wanted = reference_confusion(labels, target)
    assert got.keys() == wanted.keys()
    assert_same(got, wanted)
    assert wanted["miou"] > wanted["miou_v06"] + 0.05  # the data does tell the rules apart


def test_matches_torchmetrics() -> None:
    labels, target = label_maps(3)
    labels[labels == IGNORE] = 0  # torchmetrics knows no abstention
    macro = MulticlassJaccardIndex(CLASSES, average="macro", ignore_index=IGNORE)
    each = MulticlassJaccardIndex(CLASSES, average=None, ignore_index=IGNORE)
    got = score_labels(labels, target)
    assert_same(got, {"miou_v06": macro(labels, target)}, 1e-6)
    assert_same({"iou": got["iou"].nan_to_num(0.0)}, {"iou": each(labels, target)}, 1e-6)
    assert got["iou"].isnan().tolist() == [False, False, False, False, True, True]


def test_perfect_prediction() -> None:
    _, target = label_maps(1)
    got = score_labels(target, target, unseen=[1], groups={"things": [0, 2]})
    assert all(value == 1 for key, value in got.items() if key != "iou")


def test_order_of_classes_does_not_matter() -> None:
    labels, target = label_maps(2)
    order = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(1))
    table = torch.full((IGNORE + 1,), IGNORE)
    table[:CLASSES] = order  # class c becomes order[c]
    got = score_labels(labels, target, unseen=UNSEEN)
    renamed = score_labels(table[labels], table[target], unseen=order[UNSEEN].tolist())
    renamed["iou"] = renamed["iou"][order]
    assert_same(renamed, got, 1e-12)
    twice = score_labels(labels, target, unseen=[2, 1, 1])
    assert_same(twice, score_labels(labels, target, unseen=[1, 2]), 0)


def test_splits_do_not_matter() -> None:
    labels, target = label_maps(4)
    whole = score_labels(labels, target, unseen=UNSEEN)
    for splits in ([1, 1, 1, 1, 1], [2, 3], [4, 1]):
        metric = ConfusionMetrics(CLASSES, unseen=UNSEEN)
        for a, b in zip(labels.split(splits), target.split(splits), strict=True):
            metric(a, b)  # forward, which also resets and merges
        assert_same(metric.compute(), whole, 0)
    flat = score_labels(labels.reshape(1, 1, -1), target.reshape(1, 1, -1), unseen=UNSEEN)
    assert_same(flat, whole, 0)
    metric.reset()
    metric.update(target, target)
    assert metric.compute()["miou"] == 1


def test_ignored_pixels_never_matter() -> None:
    labels, target = label_maps(5)
    other = labels.clone()
    other[target == IGNORE] = 77  # not even checked
    assert_same(score_labels(other, target), score_labels(labels, target), 0)
    shifted = [torch.where(x == IGNORE, -1, x) for x in (labels, target)]
    assert_same(score_labels(*shifted, ignore_index=-1), score_labels(labels, target), 0)


def test_undefined_is_nan() -> None:
    nothing = score_labels(torch.zeros(1, 2, 2, dtype=torch.long), torch.full((1, 2, 2), IGNORE), unseen=[1])
    assert all(value.isnan().all() for value in nothing.values())
    some = score_labels(torch.tensor([[0]]), torch.tensor([[0]]))
    assert some["miou_seen"] == 1 and some["miou_unseen"].isnan() and some["hiou"].isnan()
    absent = score_labels(
        torch.tensor([[0, 1]]), torch.tensor([[0, 0]]), unseen=[1], groups={"other": [1, 2]}
    )
    assert absent["miou_unseen"].isnan() and absent["hiou"].isnan() and absent["miou_other"].isnan()


def test_harmonic_mean_of_zeros() -> None:
    got = score_labels(torch.tensor([[1, 0]]), torch.tensor([[0, 1]]), unseen=[1])
    assert got["miou_seen"] == got["miou_unseen"] == got["hiou"] == 0
    assert score_labels(torch.tensor([[0, 0]]), torch.tensor([[0, 1]]), unseen=[1])["hiou"] == 0


@pytest.mark.parametrize(
    ("labels", "target", "message"),
    [
        (torch.tensor([[6]]), torch.tensor([[0]]), "got class 6 in labels, wanted 0 to 5 or 255"),
        (torch.tensor([[-1]]), torch.tensor([[0]]), "got class -1 in labels"),
        (torch.tensor([[0]]), torch.tensor([[181]]), "got class 181 in target"),
        (torch.tensor([[0]]), torch.tensor([[-100]]), "got class -100 in target"),
        (torch.tensor([[0.0]]), torch.tensor([[0]]), "labels of torch.float32"),
        (torch.tensor([[0]]), torch.tensor([[True]]), "target of torch.bool"),
        (torch.zeros(2, 3, 3).long(), torch.zeros(3, 3).long(), "same shape"),
    ],
)
def test_confusion_errors(labels: Tensor, target: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        score_labels(labels, target)
    assert "\n" not in str(error.value)


def test_construction_errors() -> None:
    with pytest.raises(ValueError, match="ignore_index 255 is one of the 847 classes"):
        ConfusionMetrics(847)
    with pytest.raises(ValueError, match="num_classes 0"):
        ConfusionMetrics(0)
    with pytest.raises(ValueError, match="unseen has class 6, wanted 0 to 5"):
        ConfusionMetrics(CLASSES, unseen=[6])
    with pytest.raises(ValueError, match="stuff has class -1"):
        ConfusionMetrics(CLASSES, groups={"stuff": [-1]})
    with pytest.raises(ValueError, match="'v06' is taken"):
        ConfusionMetrics(CLASSES, groups={"v06": [1]})
    with pytest.raises(ValueError, match="0 <= threshold < 1"):
        PhraseMetrics(threshold=1.0)
    with pytest.raises(ValueError, match="0 <= threshold < 1"):
        PhraseMetrics(thresholds=[0.1, -0.2])
    with pytest.raises(ValueError, match="'bin' is taken"):
        PhraseMetrics(kinds=["bin"])
    with pytest.raises(ValueError, match="only once"):
        PhraseMetrics(kinds=["thing", "thing"])


# Phrases


def test_phrases_by_hand() -> None:
    scores = torch.tensor(
        [[[0.9, 0.6, 0.2, 0.1]], [[0.9, 0.4, 0.4, 0.1]], [[0.3, 0.3, 0.1, 0.1]], [[0.7, 0.1, 0.1, 0.1]]]
    )
    target = torch.tensor([[[1, 0, 1, 0]], [[1, 1, 0, 0]], [[0, 0, 0, 0]], [[0, 0, 0, 0]]]).bool()
    metric = PhraseMetrics(0.5, [0.25, 0.75], ["thing", "stuff"])
    metric.update(scores, target, ["thing", "stuff", "thing", "stuff"])
    wanted = {
        "iou": (1 / 3 + 1 / 2) / 2,
        "cumulative_iou": 2 / 6,  # intersections 1 + 1, unions 3 + 2 + 0 + 1
        "iou_bin": (2 / 6 + 10 / 14) / 2,  # background: 10 right; 12 in truth, 2 more in answers
        # levels from the top: 2 of 2 right, then 0 of 2, then 1 of 4, then 1 of 8
        "ap": (2 * 2 / 2 + 1 * 3 / 8 + 1 * 4 / 16) / 4,
        "absent_accuracy": 1 / 2,
        "iou_with_absent": (1 / 3 + 1 / 2 + 1 + 0) / 4,
        "iou_thing": 1 / 3,
        "n_thing": 1,
        "iou_stuff": 1 / 2,
        "n_stuff": 1,
        "curve": {
            "threshold": [0.25, 0.5, 0.75],
            "iou": [(1 / 3 + 2 / 3) / 2, (1 / 3 + 1 / 2) / 2, (1 / 2 + 1 / 2) / 2],
            "absent_accuracy": [0, 1 / 2, 1],
        },
    }
    got = metric.compute()
    assert got.keys() == wanted.keys()
    assert_same(got, wanted)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5, 0.7])
def test_phrases_match_loops(seed: int, threshold: float) -> None:
    scores, target, kinds = phrases(seed)
    grid = [0.25, 0.5, 0.703125]
    metric = PhraseMetrics(threshold, grid, KINDS)
    metric.update(scores, target, kinds)
    got = metric.compute()
    assert_same(got, reference_phrases(scores, target, kinds, threshold))
    assert got["iou_group"].isnan() and got["n_group"] == 0
    levels = sorted({*grid, threshold})
    each = [reference_phrases(scores, target, kinds, t) for t in levels]
    assert_same(got["curve"], {key: [one[key] for one in each] for key in ("iou", "absent_accuracy")})
    assert_same(got["curve"], {"threshold": levels}, 1e-7)
    bounds = [sum(s > t for t in levels) for s in scores.flatten().tolist()]
    assert_same(got, {"ap": reference_ap(bounds, target.flatten().tolist())})


def test_ap_is_exact_on_a_fine_grid() -> None:
    scores, target, _ = phrases(7)
    metric = PhraseMetrics(thresholds=[step / 256 for step in range(256)])
    metric.update(scores, target)
    assert_same(metric.compute(), {"ap": reference_ap(scores.flatten().tolist(), target.flatten().tolist())})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_threshold_is_strict(dtype: torch.dtype) -> None:
    """A score equal to the threshold is not above it, in `iou` and `curve`, also at 0.7, no exact float."""
    grid = [0.25, 0.7, 0.8]
    level = 0.7 if dtype in (torch.float32, torch.float64) else 0.25
    for threshold in grid:
        metric = PhraseMetrics(threshold, grid)
        metric.update(
            torch.tensor([[[level, level, 0.0]]], dtype=dtype), torch.tensor([[[True, False, False]]])
        )
        got = metric.compute()
        above = [0.5 if t < level else 0.0 for t in grid]
        assert_same(got["curve"], {"iou": above})
        assert got["iou"] == above[grid.index(threshold)]


def test_perfect_and_empty_answers() -> None:
    _, target, kinds = phrases(1)
    metric = PhraseMetrics(kinds=KINDS[:2])
    metric.update(target.float(), target, kinds)
    perfect = metric.compute()
    curve = perfect.pop("curve")
    assert all(value == 1 for key, value in perfect.items() if not key.startswith("n_"))
    assert (curve["iou"] == 1).all() and (curve["absent_accuracy"] == 1).all()
    metric.reset()
    metric.update(torch.zeros_like(target, dtype=torch.float32), target)
    empty = metric.compute()
    share = float(target.float().mean())
    wanted = {"iou": 0, "cumulative_iou": 0, "absent_accuracy": 1, "iou_with_absent": 1 / 3, "n_thing": 0}
    assert_same(empty, wanted)
    assert_same(empty, {"ap": share, "iou_bin": (1 - share) / 2}, 1e-7)


def test_undefined_phrase_scores() -> None:
    metric = PhraseMetrics()
    metric.update(torch.zeros(0, 4, 4), torch.zeros(0, 4, 4, dtype=torch.bool))
    nothing = metric.compute()
    assert all(value.isnan() for key, value in nothing.items() if key != "curve")
    metric.update(torch.zeros(2, 4, 4), torch.zeros(2, 4, 4, dtype=torch.bool))
    absent = metric.compute()
    assert absent["iou"].isnan() and absent["cumulative_iou"].isnan() and absent["ap"].isnan()
    assert absent["absent_accuracy"] == absent["iou_with_absent"] == 1


def test_phrase_splits_and_order_do_not_matter() -> None:
    scores, target, kinds = phrases(2)
    whole, parts = PhraseMetrics(0.4, kinds=KINDS), PhraseMetrics(0.4, kinds=KINDS)
    whole.update(scores, target, kinds)
    for i in torch.randperm(len(scores), generator=torch.Generator().manual_seed(0)).tolist():
        parts(scores[i : i + 1].mT, target[i : i + 1].mT, kinds[i : i + 1])
    assert_same(parts.compute(), whole.compute(), 0)


def test_low_precision_modules_do_not_round() -> None:
    """`precision: bf16-true` casts the module that holds the metrics: they must stay exact."""
    scores, target, kinds = phrases(3)
    plain = PhraseMetrics(0.3, kinds=KINDS)
    cast = nn.ModuleDict({"metric": PhraseMetrics(0.3, kinds=KINDS)}).to(torch.bfloat16)["metric"]
    for metric in (plain, cast):
        metric.update(scores, target, kinds)
    assert_same(cast.compute(), plain.compute(), 0)


@pytest.mark.parametrize(
    ("scores", "target", "kind", "message"),
    [
        (torch.full((1, 2, 2), 3.0), torch.ones(1, 2, 2).bool(), None, "apply a sigmoid"),
        (torch.full((1, 2, 2), -0.1), torch.ones(1, 2, 2).bool(), None, "wanted 0 to 1"),
        (torch.full((1, 2, 2), math.nan), torch.ones(1, 2, 2).bool(), None, "nan"),
        (torch.ones(1, 2, 2).bool(), torch.ones(1, 2, 2).bool(), None, "scores of torch.bool"),
        (torch.ones(1, 2, 2), torch.ones(1, 2, 2), None, "target of torch.float32"),
        (torch.ones(1, 2, 2), torch.ones(1, 4, 4).bool(), None, r"\(1, 2, 2\) and target \(1, 4, 4\)"),
        (torch.ones(2, 2), torch.ones(2, 2).bool(), None, r"wanted \(N, H, W\)"),
        (torch.ones(1, 2, 2), torch.ones(1, 2, 2).bool(), ["part"], "unknown kind 'part', wanted one of"),
        (torch.ones(1, 2, 2), torch.ones(1, 2, 2).bool(), ["thing", "thing"], "2 kinds for 1 phrases"),
    ],
)
def test_phrase_errors(scores: Tensor, target: Tensor, kind: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        PhraseMetrics(kinds=KINDS).update(scores, target, kind)
    assert "\n" not in str(error.value)


def test_functional_core() -> None:
    """The functions give what the classes give."""
    labels, target = label_maps(6)
    matrix = confusion_matrix(labels, target, CLASSES)
    assert matrix.dtype == torch.int64 and matrix.shape == (CLASSES, CLASSES + 1)
    assert matrix.sum() == (target != IGNORE).sum()
    assert_same(confusion_scores(matrix, UNSEEN), score_labels(labels, target, unseen=UNSEEN), 0)
    scores, truth = torch.tensor([[0.1, 0.5, 0.6]]), torch.tensor([[False, True, True]])
    counts = score_histogram(scores, truth, torch.tensor([0.5]))
    assert counts.tolist() == [[1, 0], [1, 1]]
    assert average_precision(counts) == 1 / 2 * 1 + 1 / 2 * 2 / 3


# Several processes


def run_rank(rank: int, folder: str) -> None:
    """One of 2 processes: rank 0 sees 3 images and 4 phrases one by one, rank 1 the rest at once."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    labels, target = label_maps(8)
    scores, masks, kinds = phrases(8)
    confusion = ConfusionMetrics(CLASSES, unseen=UNSEEN, groups=GROUPS)
    phrase, plain = PhraseMetrics(0.4, kinds=KINDS), PhraseMetrics(0.4)
    if rank == 0:
        for i in range(3):
            confusion.update(labels[i], target[i])
        for i in range(4):
            phrase.update(scores[i : i + 1], masks[i : i + 1], kinds[i : i + 1])
        plain.update(scores, masks)  # rank 1 has nothing for this one
    else:
        confusion.update(labels[3:], target[3:])
        phrase.update(scores[4:], masks[4:], kinds[4:])
    torch.save([metric.compute() for metric in (confusion, phrase, plain)], f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path) -> None:
    method = "fork" if sys.platform == "linux" else "spawn"  # which imports torch twice more
    torch.multiprocessing.start_processes(run_rank, (str(tmp_path),), nprocs=2, start_method=method)
    labels, target = label_maps(8)
    scores, masks, kinds = phrases(8)
    confusion = score_labels(labels, target, unseen=UNSEEN, groups=GROUPS)
    phrase, plain = PhraseMetrics(0.4, kinds=KINDS), PhraseMetrics(0.4)
    phrase.update(scores, masks, kinds)
    plain.update(scores, masks)
    for rank in range(2):
        got = torch.load(tmp_path / f"rank{rank}.pt")
        for one, wanted in zip(got, (confusion, phrase.compute(), plain.compute()), strict=True):
            assert one.keys() == wanted.keys()
            assert_same(one, wanted)


def test_a_phrase_may_have_several_kinds():
    scores = torch.zeros(2, 2, 2)
    scores[0, 0] = 0.9
    target = torch.zeros(2, 2, 2, dtype=torch.bool)
    target[0, 0], target[1, 1] = True, True
    metric = PhraseMetrics(kinds=("thing", "seen", "unseen"))
    metric.update(scores, target, [("thing", "seen"), ("thing", "unseen")])
    found = metric.compute()
    assert found["iou_thing"] == 0.5 and found["iou_seen"] == 1 and found["iou_unseen"] == 0
    assert found["n_thing"] == 2 and found["n_seen"] == 1
