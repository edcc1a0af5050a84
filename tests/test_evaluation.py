"""The evaluator: the right masks to the right metric, whatever the batch looks like; and what ``evaluate`` refuses and saves."""

import json
from types import SimpleNamespace

import pytest
import torch

from pmpseg import evaluate, evaluate_options, segmenter
from pmpseg.errors import InputError
from pmpseg.evaluation import Evaluator, as_json, best_threshold, numbers
from pmpseg.models import PMP, Prompts
from pmpseg.report import table
from pmpseg.vocabulary import Vocabulary


class Words(torch.nn.Module):
    """A text side that gives every phrase its own random embedding."""

    def __init__(self):
        super().__init__()
        self.known = {"": torch.zeros(12)}

    def encode_batch(self, prompts):
        for phrase in (p for row in prompts for p in row):
            self.known.setdefault(phrase, torch.randn(12))
        pooled = torch.stack([torch.stack([self.known[p] for p in row]) for row in prompts])
        valid = torch.tensor([[bool(p) for p in row] for row in prompts])
        return Prompts(pooled[:, :, None], valid[..., None], pooled, valid)

    def encode(self, prompts):
        return self.encode_batch([[p if isinstance(p, str) else p[0] for p in prompts]])


@pytest.fixture
def network():
    torch.manual_seed(0)
    return PMP(backbone="test_resnet", text_dim=12, dim=32, num_queries=5, num_layers=2, num_heads=4, ffn_dim=32).eval()


def batch(size=(64, 64), count=3, phrases=True):
    g = torch.Generator().manual_seed(1)
    made = {
        "name": [f"{n}.jpg" for n in range(count)],
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
    kinds = ("thing", "part", "seen", "word", "part_word")
    return Evaluator(Vocabulary.of(["x", "y", "z"], unseen=[2]), phrase_kinds=kinds, **options)


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


def test_kinds_are_scored_together_where_the_data_lists_it(network):
    scored = evaluator()
    scored.update(network, Words(), batch())
    scores = scored.compute()
    assert scores["phrase_n_part_word"] == 3 and scores["phrase_iou_part_word"] == scores["phrase_iou_word"]
    assert "phrase_n_thing_seen" not in scores and not [k for k in numbers(scores) if k.startswith("phrase_n")]


def test_absent_phrases_are_not_scored_where_they_are_not_asked(network):
    asked = batch()
    asked["prompt_masks"][:, 1] = False
    scored = evaluator(phrase_mode="own")
    scored.update(network, Words(), asked)
    assert (int(scored.phrases.present), int(scored.phrases.absent)) == (3, 0)


def test_a_class_list_is_decoded_once(network, monkeypatch):
    asked = batch() | {"prompts": [["x", "y", "z"]] * 3, "prompt_class": torch.arange(3).repeat(3, 1)}
    asked["phrase_kind"] = [["thing"] * 3] * 3
    decode, calls = network.decode, []
    monkeypatch.setattr(network, "decode", lambda *args: calls.append(1) or decode(*args))
    for mode in ("alone", "mixed", "own"):
        scored = evaluator(phrase_mode=mode)
        scored.update(network, Words(), asked)
        assert int(scored.phrases.present + scored.phrases.absent) == 9
    assert len(calls) == 3


def test_some_of_the_classes_are_asked_one_by_one(network):
    """As ``segment`` asks them: the answers do not depend on what else is asked."""
    text, scores, whole = Words(), [], batch()
    whole["prompt_masks"][:, 1] = False
    for n in (1, 2):
        scored = evaluator(threshold=0.05)
        asked = {"prompts": [["x", "y"][:n]] * 3, "prompt_class": torch.arange(n).repeat(3, 1)}
        asked |= {"prompt_masks": whole["prompt_masks"][:, :n], "phrase_kind": [["thing"] * n] * 3}
        scored.update(network, text, whole | asked)
        scores.append(scored.compute()["phrase_iou"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


def test_a_process_without_phrases_says_what_the_others_found(network):
    """``compute`` waits for all processes, so that no process may leave it out; the answer is the same for all."""
    first, second = evaluator(), evaluator()
    first.update(network, Words(), batch())
    second.update(network, Words(), batch(phrases=False))
    second.phrases.compute = first.phrases.compute  # as if synchronised
    assert second.compute()["phrase_iou"] == first.compute()["phrase_iou"]


def test_answers_are_scored_at_the_labels_size(network):
    scored = evaluator()
    scored.update(network, Words(), batch(size=(100, 90)))
    assert int(scored.classes.matrix.sum()) == 27000
    assert int(scored.phrases.counts.sum()) == 6 * 9000


@pytest.mark.filterwarnings("error")
def test_data_without_phrases(network):
    scored = evaluator()
    scored.update(network, Words(), batch(phrases=False))
    scores = scored.compute()
    assert not [k for k in scores if k.startswith("phrase")] and best_threshold(scores) is None


def test_the_threshold_balances_present_and_absent():
    curve = {"threshold": [0.1, 0.5, 0.9], "iou": [0.8, 0.7, 0.1], "absent_accuracy": [0.0, 0.5, 0.9]}
    assert best_threshold({"phrase_curve": {name: torch.tensor(values) for name, values in curve.items()}}) == 0.5


def test_the_table_shows_absent_and_unseen_classes():
    scores = {"miou": 0.5, "iou": torch.tensor([0.25, float("nan"), 0.75])}
    text = table(scores, Vocabulary.of(["sky", "tree", "car"], unseen=[2]))
    assert "sky    25.0" in text and "tree      -" in text and "car*   75.0" in text and "miou   50.0" in text


def test_unknown_phrase_mode():
    with pytest.raises(ValueError, match="phrase_mode: got 'all'"):
        evaluator(phrase_mode="all")


@pytest.fixture
def command(network, tmp_path, monkeypatch):
    """``evaluate.main`` on a model folder and data that are stubs; the network and the scores are real."""
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    spec = {"class_path": "pmpseg.data.Scenes", "init_args": {}}
    cpu = torch.device("cpu")
    model = SimpleNamespace(network=network, text=Words(), threshold=0.25, device=cpu, data=spec, region=None, square=False)
    model.embed = model.showing = None
    vocabulary, kinds = Vocabulary.of(["x", "y", "z", "never"], unseen=[2]), ("thing", "part", "seen", "word")
    data = SimpleNamespace(vocabulary=vocabulary, phrase_kinds=kinds, test_dataloader=lambda: [batch()], ignore_index=255)
    monkeypatch.setattr(segmenter.Segmenter, "load", lambda folder, device: model)
    monkeypatch.setattr(evaluate, "build_data", lambda spec: data)
    monkeypatch.chdir(tmp_path)

    def run(*args):
        return evaluate.main(["run/model", "--device", "cpu", *args])

    run.model = model
    return run


def test_what_evaluate_saves(command, tmp_path):
    scores = command()
    saved = json.loads((tmp_path / "run" / "metrics_test.json").read_text())
    assert saved["miou"] == round(scores["miou"], 5) and saved["phrase_n_thing"] == 3
    assert saved["iou"].keys() == {"x", "y", "z", "never"} and saved["iou"]["never"] is None
    curve = saved["phrase_curve"]
    assert curve.keys() == {"threshold", "iou", "absent_accuracy"} and {len(v) for v in curve.values()} == {99}
    assert curve["threshold"][:2] == [0.01, 0.02] and curve["absent_accuracy"] == [None] * 99
    command("--out", "new/folder/x.json")
    assert json.loads((tmp_path / "new" / "folder" / "x.json").read_text())["miou"] == saved["miou"]


def test_what_comes_from_the_hub_is_saved_here(command, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_options, "model_folder", lambda name: tmp_path / "cache" / "model")
    evaluate.main(["owner/name", "--device", "cpu"])
    assert (tmp_path / "metrics_test.json").is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--threshold", "1.5"], "--threshold must lie in 0 to 1 .* got 1.5"),
        (["--device", "cuda"], "--device cuda: torch sees no CUDA device"),
        (["--out", "run"], "--out run is a folder: give a file"),
    ],
)
def test_evaluate_refuses_before_it_works(command, monkeypatch, args, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(evaluate, "evaluate", lambda *args: pytest.fail("it began to work"))
    with pytest.raises(InputError, match=message):
        command(*args)
    with pytest.raises(InputError, match="run is the folder of a run: give its model, run/model"):
        evaluate.main(["run"])


def test_a_model_chooses_no_code_outside_of_pmpseg(command):
    command.model.data = {"class_path": "os.path.Data"}
    with pytest.raises(InputError, match=r"trained with os\.path\.Data, no class of pmpseg; give a config that you trust"):
        command()


def test_json_has_no_nan():
    scores = {"miou": 1 / 3, "curve": {"iou": torch.tensor([float("nan"), 0.5])}, "n": 3}
    assert as_json(scores) == {"miou": 0.33333, "curve": {"iou": [None, 0.5]}, "n": 3}
