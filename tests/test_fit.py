"""From the command line to a model folder and back: fit, evaluate, predict, on a few generated scenes."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from pmpseg import Segmenter, evaluate, fit, predict
from pmpseg.errors import InputError
from pmpseg.hub import shipped_or
from pmpseg.models import build_backbone
from pmpseg.storage import weights_hash

CONF = Path(__file__).parents[1] / "conf"
OPTIONS = (
    "--model.backbone test_resnet --model.dim 32 --model.num_queries 6 --model.num_layers 2 --model.num_heads 4 "
    "--model.ffn_dim 32 --model.num_points 64 "
    "--data.train_length 12 --data.val_length 4 --data.test_length 6 --data.batch_size 2 --data.num_workers 0 "
    "--trainer.max_steps 4 --trainer.val_check_interval 2 --trainer.log_every_n_steps 1 "
    "--trainer.enable_progress_bar false --trainer.accelerator cpu"
)
SMALL = OPTIONS.split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs") / "one"
    return fit.main([*SMALL, "--trainer.default_root_dir", str(root)])


def test_a_run_leaves_its_record(run):
    files = "config.yaml", "metrics.csv", "metrics.json", "checkpoints/best.ckpt", "checkpoints/last.ckpt", "model/config.json"
    for name in files:
        assert (run / name).is_file(), name
    assert sorted(p.name for p in (run / "panels").iterdir()) == ["step_000002.png", "step_000004.png"]
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["dim"] == 32
    history = json.loads((run / "metrics.json").read_text())["history"]
    assert [h["step"] for h in history] == [2, 4] and 0 <= history[0]["phrase_iou"] <= 1
    assert "train/loss" in (run / "metrics.csv").read_text().splitlines()[0]


def test_the_model_holds_the_best_checkpoints_weights(run):
    state = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    weights = Segmenter.load(run / "model").network.state_dict()
    learned = {k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")}
    assert learned and all(torch.equal(weights[k], v) for k, v in learned.items())


def test_the_last_checkpoint_is_the_last_and_not_the_best(run):
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4


def test_a_run_too_short_for_a_validation_still_gives_a_model(tmp_path):
    root = fit.main([*SMALL, "--trainer.max_steps", "1", "--trainer.default_root_dir", str(tmp_path)])
    assert Segmenter.load(root / "model").threshold == 0.5


def test_checkpoints_leave_frozen_weights_out(tmp_path):
    frozen = ["--model.backbone", "clip", "--model.backbone_weights", "tiny_clip", "--model.backbone_frozen", "true"]
    root = fit.main([*SMALL, *frozen, "--trainer.default_root_dir", str(tmp_path / "frozen"), "--trainer.max_steps", "2"])
    keys = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"].keys()
    assert not [k for k in keys if k.startswith("text.") or ".tower." in k] and any(".stem." in k for k in keys)
    model = Segmenter.load(root / "model")  # which is whole all the same
    shipped = build_backbone("clip", shipped_or("tiny_clip"), frozen=True).tower
    assert weights_hash(model.network.backbone.tower) == weights_hash(shipped)
    assert model.segment(Image.new("RGB", (40, 30)), ["grass"]).labels.shape == (30, 40)


def test_evaluate_says_the_same_as_validation(run, capsys):
    scores = evaluate.main([str(run / "model"), "--split", "val", "--device", "cpu", "--threshold", "0.5"])
    best = json.loads((run / "metrics.json").read_text())["best"]
    assert scores["miou"] == pytest.approx(best["miou"], abs=1e-6)
    assert scores["phrase_iou"] == pytest.approx(best["phrase_iou"], abs=1e-6)
    assert json.loads((run / "metrics_val.json").read_text())["split"] == "val"
    assert "miou_seen" in capsys.readouterr().out


def test_evaluate_on_the_data_of_a_config(run, tmp_path, capsys):
    config = tmp_path / "other.yaml"
    config.write_text("data:\n  class_path: pmpseg.data.Scenes\n  init_args: {test_length: 3, num_workers: 0}\n")
    scores = evaluate.main([str(run / "model"), "-c", str(config), "--out", str(tmp_path / "scores.json")])
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert saved["data"]["init_args"]["test_length"] == 3 and saved["miou"] == pytest.approx(scores["miou"], abs=1e-5)
    config.write_text("data:\n  class_path: pmpseg.data.Scenes\n  init_args: {test_lenght: 3}\n")
    with pytest.raises(InputError, match="test_length"):
        evaluate.main([str(run / "model"), "-c", str(config)])


def test_phrase_modes_differ(run):
    segmenter = Segmenter.load(run / "model")
    data = evaluate.build_data({"class_path": "pmpseg.data.Scenes", "init_args": {"test_length": 6, "num_workers": 0}})
    modes = ("alone", "mixed", "own")
    scores = {evaluate.evaluate(segmenter, data, phrase_mode=mode, threshold=0.1)["phrase_ap"] for mode in modes}
    assert len(scores) == 3


def test_predict_with_the_trained_model(run, tmp_path):
    Image.new("RGB", (50, 40), "green").save(tmp_path / "a.png")
    out = str(tmp_path / "out")
    status = predict.main([str(run / "model"), str(tmp_path / "a.png"), "--prompts", "grass; red circle", "--out", out])
    assert not status
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert "predictions.json" in names and sum("mask" in n for n in names) == 2 and sum("overlay" in n for n in names) == 1


def test_continuing_goes_on_from_the_last_step(run, tmp_path):
    copy = tmp_path / "two"
    shutil.copytree(run, copy)
    fit.main([*SMALL, "--trainer.default_root_dir", str(copy), "--trainer.max_steps", "6", "--ckpt_path", "last"])
    with (copy / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == list(range(6)) and not (copy / "metrics.1.csv").exists()
    assert [h["step"] for h in json.loads((copy / "metrics.json").read_text())["history"]] == [2, 4, 6]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.promt_attention", "none"], "did you mean 'model.prompt_attention'"),
        (["--data", "pmpseg.data.Scene"], "did you mean 'pmpseg.data.Scenes'"),
        (["--data.batch_size", "many"], "data.batch_size: got 'many', want int"),
        (["-c", str(CONF / "pmp_scene.yaml")], "did you mean .*pmp_scenes.yaml"),
        (["--model.prompt_attention", "pool"], "prompt_attention: got 'pool', want .*none.*pooled"),
        (["--model.text", "nowhere/at/all"], "nowhere/at/all"),
        (["--ckpt_path", "last"], "no last.ckpt"),
        (["--model.dim", "30"], "dim: got 30, want a multiple of 4"),
        (["--data.image_size", "600"], "image_size: got 600, want 64 to 256"),
    ],
)
def test_mistakes_are_named_in_one_line(args, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        fit.main([*SMALL, "--trainer.default_root_dir", str(tmp_path), *args])
    assert isinstance(error.value, InputError) and len(str(error.value).splitlines()) == 1


def test_the_start_config_is_the_one_in_conf():
    assert yaml.safe_load((fit.ASSETS / "scenes.yaml").read_text()) == yaml.safe_load((CONF / "pmp_scenes.yaml").read_text())


def test_the_blind_config_differs_in_the_prompt_attention_only():
    guided, blind = (yaml.safe_load((CONF / f"pmp_scenes{x}.yaml").read_text()) for x in ("", "_blind"))
    assert blind["model"]["init_args"].pop("prompt_attention") == "none"
    assert guided["model"]["init_args"].pop("prompt_attention") == "pooled"
    assert blind["model"] == guided["model"] and blind["data"] == guided["data"]


def test_prediction_does_not_import_lightning(run, tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    args = [str(run / "model"), str(tmp_path / "a.png"), "--prompts", "grass", "--out", str(tmp_path / "o")]
    code = (
        f"import sys; from pmpseg import predict; predict.main({args!r}); "
        "sys.exit('lightning' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_wandb_writes_offline_into_the_run(tmp_path):
    root = tmp_path / "run"
    logger = ["--trainer.logger", "lightning.pytorch.loggers.WandbLogger", "--trainer.logger.offline", "true"]
    fit.main([*SMALL, *logger, "--trainer.max_steps", "2", "--trainer.default_root_dir", str(root)])
    assert list((root / "wandb").glob("offline-run-*"))
