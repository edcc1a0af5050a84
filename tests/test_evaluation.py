"""The evaluator: the right masks to the right metric, whatever the batch looks like."""

import pytest
import torch

from pmpseg.evaluation import Evaluator, best_threshold, numbers, table
from pmpseg.models import PMP, Prompts
from pmpseg.vocabulary import Vocabulary


class Words:
    """A text side that gives every phrase its own random embedding."""

    def __init__(self):
        self.known = {"": torch.zeros(12)}

    def encode_batch(self, prompts):
        for phrase in (p for row in prompts for p in row):
            self.known.setdefault(phrase, torch.randn(12))
        pooled = torch.stack([torch.stack([self.known[p] for p in row]) for row in prompts])
        valid = torch.tensor([[bool(p) for p in row] for row in prompts])
        return Prompts(pooled[:, :, None], valid[..., None], pooled, valid)

    def encode(self, prompts):
        return self.encode_batch([[p[0] for p in prompts]])


@pytest.fixture
def network():
    torch.manual_seed(0)
    return PMP(backbone="test_resnet", text_dim=12, dim=32, num_queries=5, num_layers=2, num_heads=4, ffn_dim=32).eval()


def batch(size=(64, 64), count=3, phrases=True):
    g = torch.Generator().manual_seed(1)
    made = {
        "image": torch.randint(0, 256, (count, 3, 64, 64), generator=g, dtype=torch.uint8),
        "labels": torch.randint(0, 3, (count, *size), generator=g),
        "prompts": [["a", "b", ""]] * count,
        "prompt_class": torch.full((count, 3), -1),
    }
    if phrases:
        made["prompt_masks"] = torch.rand(count, 3, *size, generator=g) > 0.5
        made["prompt_masks"][:, 2] = False
        made["phrase_kind"] = [["thing seen", "part word", ""]] * count
    return made


def evaluator(**options):
    return Evaluator(Vocabulary.of(["x", "y", "z"], unseen=[2]), phrase_kinds=("thing", "part", "seen", "word"), **options)


def split(whole, rows):
    return {k: v[rows] if isinstance(v, (torch.Tensor, list)) else v for k, v in whole.items()}


def test_batches_do_not_matter(network):
    text, whole, parts = Words(), evaluator(), evaluator()
    whole.update(network, text, batch())
    for rows in (slice(0, 1), slice(1, 3)):
        parts.update(network, text, split(batch(), rows))
    a, b = numbers(whole.compute()), numbers(parts.compute())
    assert a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], abs=1e-6) for k in a)
    assert {"miou", "miou_v06", "miou_seen", "miou_unseen", "hiou", "phrase_iou", "phrase_iou_part"} <= a.keys()


def test_padding_prompts_are_not_scored(network):
    scored = evaluator()
    scored.update(network, Words(), batch())
    assert int(scored.phrases.present + scored.phrases.absent) == 6
    assert scored.compute()["phrase_n_thing"] == 3 and scored.compute()["phrase_n_word"] == 3


def test_answers_are_scored_at_the_labels_size(network):
    scored = evaluator()
    scored.update(network, Words(), batch(size=(100, 90)))
    assert int(scored.classes.matrix.sum()) == 27000
    assert int(scored.phrases.counts.sum()) == 6 * 9000


def test_data_without_phrases(network):
    scored = evaluator()
    scored.update(network, Words(), batch(phrases=False))
    scores = scored.compute()
    assert not [k for k in scores if k.startswith("phrase")] and best_threshold(scores) is None


def test_the_threshold_balances_present_and_absent():
    curve = {"threshold": torch.tensor([0.1, 0.5, 0.9]), "iou": torch.tensor([0.8, 0.7, 0.1]), "absent_accuracy": torch.tensor([0.0, 0.5, 0.9])}
    assert best_threshold({"phrase_curve": curve}) == 0.5


def test_the_table_shows_absent_and_unseen_classes():
    scores = {"miou": 0.5, "iou": torch.tensor([0.25, float("nan"), 0.75])}
    text = table(scores, Vocabulary.of(["sky", "tree", "car"], unseen=[2]))
    assert "sky    25.0" in text and "tree      -" in text and "car*   75.0" in text and "miou   50.0" in text


def test_unknown_phrase_mode():
    with pytest.raises(ValueError, match="phrase_mode: got 'all'"):
        evaluator(phrase_mode="all")
