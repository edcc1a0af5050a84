"""CLIPSeg's metrics against their definitions written out pixel by pixel, and against the ways in which data can be split."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.integrate import simpson

from pmpseg.metrics import PhraseMetrics
from pmpseg.paper_metrics import GRID, ClipSegMetrics, simpson_ap


def samples(count=7, seed=0, size=(9, 11)):
    """Scores that are better than chance, on the grid's own values too, with their targets and ignored pixels."""
    rng = np.random.default_rng(seed)
    target = rng.random((count, *size)) < rng.uniform(0.05, 0.6, (count, 1, 1))
    scores = np.clip(rng.normal(0.35 + 0.3 * target, 0.2), 0, 1).astype(np.float32)
    scores[:, 0] = np.round(scores[:, 0] * 50).astype(np.float32) / 50
    return torch.tensor(scores), torch.tensor(target), torch.tensor(rng.random((count, *size)) < 0.2)


def by_definition(scores, target, ignore, classes):
    """The metrics pixel by pixel, as reported and as curves; ``classes`` None: each sample is one."""
    classes = list(range(len(scores))) if classes is None else [int(c) for c in classes]
    curves = {"miou": [], "iou_fg": [], "iou_bin": []}
    pairs = set()
    for threshold in np.linspace(0, 1, 51)[1:-1]:
        count = {c: {"tp": 0, "fp": 0, "fn": 0, "tn": 0} for c in classes}
        for score, truth, out, c in zip(scores, target, ignore, classes, strict=True):
            for s, t, ignored in zip(score.flatten(), truth.flatten(), out.flatten(), strict=True):
                if not ignored:
                    answer = bool(s > np.float32(threshold))
                    count[c][{(1, 1): "tp", (1, 0): "fp", (0, 1): "fn", (0, 0): "tn"}[answer, bool(t)]] += 1
        total = {k: sum(of_one[k] for of_one in count.values()) for k in ("tp", "fp", "fn", "tn")}
        fg = total["tp"] / (1 + total["tp"] + total["fp"] + total["fn"])
        curves["iou_fg"].append(fg)
        curves["iou_bin"].append((fg + total["tn"] / (1 + total["tn"] + total["fp"] + total["fn"])) / 2)
        curves["miou"].append(np.mean([n["tp"] / (1 + n["tp"] + n["fp"] + n["fn"]) for n in count.values()]))
        if total["tp"] + total["fp"]:
            pairs.add((total["tp"] / (1 + total["tp"] + total["fn"]), total["tp"] / (1 + total["tp"] + total["fp"])))
    recall, precision = np.array(sorted(pairs)).T
    wanted = {f"{name}@{t:g}": values[round(t * 50) - 1] for name, values in curves.items() for t in (0.1, 0.2, 0.3, 0.5, 0.24)}
    wanted |= {f"{name}@best": max(values) for name, values in curves.items()}
    assert len(recall) % 2, "choose a seed with an odd number of points: scipy's rule for an even one has changed"
    return wanted | {"ap": float(simpson(precision, x=recall))}, curves


@pytest.mark.parametrize("by_class", [False, True])
def test_as_defined(by_class):
    scores, target, ignore = samples()
    target[3] = False  # an absent one counts as 0
    classes = torch.tensor([0, 2, 0, 2, 2, 5, 5]) if by_class else None
    metric = ClipSegMetrics(6 if by_class else None, custom_threshold=0.24)
    metric.update(scores, target, ignore, classes)
    got = metric.compute()
    curve = got.pop("curve")
    wanted, curves = by_definition(scores.numpy(), target.numpy(), ignore.numpy(), classes)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float(got[name]) == pytest.approx(value, abs=1e-9), name
    for name, values in curves.items():
        assert curve[name].tolist() == pytest.approx(values, abs=1e-9)
    assert got["miou@best"] > got["miou@0.5"] > 0  # so that the numbers above are not all alike
    assert curve["threshold"].tolist() == pytest.approx(list(GRID))


@pytest.mark.parametrize("by_class", [False, True])
def test_updates_and_merging_do_not_matter(by_class):
    scores, target, ignore = samples(12, seed=3)
    classes = torch.arange(12) % 4 if by_class else None
    part = lambda rows: (scores[rows], target[rows], ignore[rows], None if classes is None else classes[rows])  # noqa: E731
    whole = ClipSegMetrics(5 if by_class else None)
    one, other = copy.deepcopy(whole), copy.deepcopy(whole)
    whole.update(*part(slice(0, 12)))
    one.update(*part(slice(0, 5)))
    other.update(*part(slice(5, 6)))
    other.update(*part(slice(6, 6)))
    other.update(*part(slice(6, 12)))
    one.merge_state(other)
    wanted, got = whole.compute(), one.compute()
    assert wanted.pop("curve")["miou"].equal(got.pop("curve")["miou"])
    assert wanted == got and not math.isnan(wanted["miou@0.3"])


def test_states_are_sums_that_do_not_grow_with_the_data():
    metric = ClipSegMetrics()
    before = {name: value.shape for name, value in metric.metric_state.items()}
    for seed in range(3):
        metric.update(*samples(20, seed))
    assert {name: value.shape for name, value in metric.metric_state.items()} == before
    assert all(reduction.__name__ == "dim_zero_sum" for reduction in metric._reductions.values())
    assert sum(value.numel() for value in metric.metric_state.values()) < 200


def test_ignored_pixels_change_nothing():
    scores, target, ignore = samples()
    clean, dirty = ClipSegMetrics(), ClipSegMetrics()
    clean.update(scores, target, ignore)
    dirty.update(torch.where(ignore, 1 - scores, scores), target ^ ignore, ignore)
    a, b = clean.compute(), dirty.compute()
    assert all(a[k] == b[k] for k in a if k != "curve")
    everything = ClipSegMetrics()
    everything.update(scores, target)
    assert everything.compute()["iou_fg@0.3"] != a["iou_fg@0.3"]


def test_beside_our_own_metrics():
    """The same pixels: IoU_FG without the 1; every absent phrase costs the paper's mIoU, and ours nothing."""
    scores, target, _ = samples(6, size=(60, 60))
    ours, paper = PhraseMetrics(0.3), ClipSegMetrics()
    ours.update(scores, target)
    paper.update(scores, target)
    a, b = ours.compute(), paper.compute()
    assert float(b["iou_fg@0.3"]) == pytest.approx(float(a["cumulative_iou"]), rel=2e-3) and b["iou_fg@0.3"] < a["cumulative_iou"]
    assert float(b["miou@0.3"]) == pytest.approx(float(a["iou"]), rel=2e-2)
    nothing = torch.zeros(6, 60, 60)
    ours.update(nothing, nothing.bool())
    paper.update(nothing, nothing.bool())
    assert ours.compute()["iou"] == a["iou"] and float(paper.compute()["miou@0.3"]) == pytest.approx(float(b["miou@0.3"]) / 2)


def test_simpson():
    recall = np.linspace(0, 1, 9)
    assert simpson_ap(recall**3, recall) == pytest.approx(0.25, abs=1e-12)  # exact for cubics at even spacing
    assert simpson_ap(np.tile(recall**3, 2), np.tile(recall, 2)) == pytest.approx(0.25, abs=1e-12)  # each pair once
    order = np.random.default_rng(0).permutation(9)
    assert simpson_ap((recall**3)[order], recall[order]) == pytest.approx(0.25, abs=1e-12)
    even = recall[:8]
    by_hand = [simpson(even[:-1] ** 2, x=even[:-1]) + np.trapezoid(even[-2:] ** 2, even[-2:])]
    by_hand += [np.trapezoid(even[:2] ** 2, even[:2]) + simpson(even[1:] ** 2, x=even[1:])]
    assert simpson_ap(even**2, even) == pytest.approx(np.mean(by_hand), abs=1e-12)
    assert simpson_ap(np.array([0.5, 1.0]), np.array([0.2, 0.6])) == pytest.approx(0.3)
    assert simpson_ap(np.array([0.5]), np.array([0.2])) == 0 and math.isnan(simpson_ap(np.array([]), np.array([])))
    assert np.isfinite(simpson_ap(np.array([0.2, 0.4, 0.6, 0.9, 0.9]), np.array([0.5, 0.5, 0.5, 0.7, 0.9])))  # equal recalls


def test_nothing_seen_and_nothing_answered():
    metric = ClipSegMetrics()
    metric.update(torch.zeros(0, 4, 4), torch.zeros(0, 4, 4, dtype=torch.bool))
    scores = metric.compute()
    assert all(math.isnan(scores[k]) for k in ("miou@0.3", "miou@best", "iou_fg@0.3", "iou_bin@best", "ap"))
    metric.update(torch.zeros(1, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool))
    scores = metric.compute()
    assert scores["miou@best"] == 0 and math.isnan(scores["ap"])


def test_refusals():
    scores, target, ignore = samples(2)
    with pytest.raises(ValueError, match="wanted one of the grid"):
        ClipSegMetrics(custom_threshold=0.25)
    with pytest.raises(ValueError, match="one for each sample"):
        ClipSegMetrics(3).update(scores, target)
    with pytest.raises(ValueError, match="got class 3, wanted 0 to 2"):
        ClipSegMetrics(3).update(scores, target, None, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="apply a sigmoid"):
        ClipSegMetrics().update(scores * 3, target)
    with pytest.raises(ValueError, match="got ignore"):
        ClipSegMetrics().update(scores, target, ignore.float())
