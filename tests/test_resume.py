"""Stop and continue: from every checkpoint that a run writes, the rest of it comes out the same, bit for bit."""

import csv
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from pmpseg import Segmenter, fit
from pmpseg.data import Scenes
from pmpseg.data.base import EpochSampler
from pmpseg.errors import InputError
from pmpseg.training import PMPModule
from pmpseg.training.resume import LastCheckpoint, StepSeed, clear_leftovers

SMALL = (
    "--model.backbone test_resnet --model.dim 32 --model.num_queries 6 --model.num_layers 2 --model.num_heads 4 "
    "--model.ffn_dim 32 --model.num_points 64 --model.few_prompts 0.5 "
    "--data.train_length 10 --data.val_length 4 --data.test_length 6 --data.batch_size 2 --data.num_workers 0 "
    "--trainer.log_every_n_steps 1 --trainer.enable_progress_bar false --trainer.accelerator cpu"
).split()
BY_STEPS = "--trainer.max_steps 13 --trainer.val_check_interval 3".split()  # 5 batches make an epoch
BY_EPOCHS = "--trainer.max_steps -1 --trainer.max_epochs 3 --trainer.val_check_interval 1.0".split()
BY_EPOCHS += "--trainer.check_val_every_n_epoch 2".split()
ACCUMULATED = [*BY_STEPS, *"--trainer.max_steps 7 --trainer.accumulate_grad_batches 2".split()]


def losses(root: Path) -> dict[int, tuple[float, ...]]:
    with (root / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
    assert len({row["step"] for row in rows}) == len(rows), "a step stands twice in metrics.csv"
    return {int(row["step"]): tuple(float(row[f"train/{k}"]) for k in ("loss", "class", "mask", "dice")) for row in rows}


def last_weights(root: Path) -> dict[str, torch.Tensor]:
    return torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def run(root: Path, *options: str) -> Path:
    return fit.main([*SMALL, "--trainer.default_root_dir", str(root), *options])


AT_EPOCH_ENDS = [*BY_STEPS, *"--trainer.val_check_interval 5".split()]
# Where checkpoints are: after every step, but not at the end of an epoch that no validation follows.
CASES = {
    "by steps": (BY_STEPS, {*range(1, 14)} - {5, 10}),
    "at epoch ends": (AT_EPOCH_ENDS, {*range(1, 14)}),
    "by epochs": (BY_EPOCHS, {*range(1, 15)} - {5}),
    "accumulated": (ACCUMULATED, {1, 2, 4, 5, 7}),  # 3 steps make an epoch
}


@pytest.mark.parametrize("case", CASES)
def test_from_every_checkpoint_the_run_ends_the_same(case, tmp_path, monkeypatch):
    how, steps = CASES[case]
    save, copies = LastCheckpoint._save, []

    def save_and_copy(self, trainer):
        root = Path(trainer.default_root_dir)
        last = root / "checkpoints" / "last.ckpt"
        before = last.stat().st_mtime_ns if last.exists() else 0
        save(self, trainer)
        if root.name in ("whole", "again") and last.stat().st_mtime_ns != before:
            copies.append(tmp_path / f"{root.name}_{len(copies):02d}_step_{trainer.global_step:03d}")
            shutil.copytree(root, copies[-1])

    monkeypatch.setattr(LastCheckpoint, "_save", save_and_copy)
    whole = run(tmp_path / "whole", *how, "--save_every", "1")
    assert {int(copy.name[-3:]) for copy in copies} == steps
    first = list(copies)
    # A run that was continued is stopped, and continued once more.
    shutil.copytree(first[1], tmp_path / "again")
    run(tmp_path / "again", *how, "--ckpt_path", "last", "--save_every", "1")
    assert {int(copy.name[-3:]) for copy in copies} == steps and len(copies) > len(first)
    wanted, weights, end = losses(whole), Segmenter.load(whole / "model").network.state_dict(), last_weights(whole)
    history = json.loads((whole / "metrics.json").read_text())["history"]
    for copy in first + copies[len(first) :: 3]:
        run(copy, *how, "--ckpt_path", "last", "--save_every", "1")
        assert losses(copy) == wanted, copy.name
        found = Segmenter.load(copy / "model").network.state_dict()
        assert all(torch.equal(found[k], v) for k, v in weights.items()), copy.name
        found = last_weights(copy)
        assert all(torch.equal(found[k], v) for k, v in end.items()), copy.name
        assert json.loads((copy / "metrics.json").read_text())["history"] == history, copy.name


def test_the_steps_of_a_run_are_not_all_alike(tmp_path):
    found = losses(run(tmp_path, *BY_STEPS, "--model.lr", "0", "--trainer.max_steps", "10"))
    assert len(set(found.values())) == 10  # neither data nor points repeat, although the weights stay
    other = losses(run(tmp_path / "other", *BY_STEPS, "--model.lr", "0", "--trainer.max_steps", "10", "--seed_everything", "1"))
    assert not set(found.values()) & set(other.values())


def test_a_steps_randomness_comes_from_seed_batch_and_rank_alone():
    def drawn(seed, number, rank):
        trainer = SimpleNamespace(fit_loop=SimpleNamespace(total_batch_idx=number), global_rank=rank)
        torch.rand(3)  # whatever was drawn before
        StepSeed(seed).on_train_batch_start(trainer, None, None, 0)
        return float(torch.rand(())), float(np.random.rand()), random.random()

    places = [(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0)]
    found = [drawn(*place) for place in places]
    assert found == [drawn(*place) for place in places]
    assert all(len({draws[kind] for draws in found}) == 4 for kind in range(3))


def test_what_a_run_remembers_starts_afresh_at_a_checkpoint(tmp_path, monkeypatch):
    cached = []
    save = PMPModule.on_save_checkpoint
    monkeypatch.setattr(PMPModule, "on_save_checkpoint", lambda self, c: (save(self, c), cached.append(len(self.text._cache))))
    run(tmp_path, "--trainer.max_steps", "2", "--save_every", "1")
    assert cached == [0, 0]


def test_a_sampler_goes_on_where_it_stopped():
    dataset = Scenes(train_length=11).dataset("train")
    first = EpochSampler(dataset, seed=3)
    orders = {}
    for epoch in range(3):
        first.set_epoch(epoch)
        orders[epoch] = list(first)
    later = EpochSampler(dataset, seed=3, epoch=1, skip=4)
    assert list(later) == orders[1][4:] and len(later) == 11  # before set_epoch, as Lightning asks
    later.set_epoch(1)
    assert list(later) == orders[1][4:]
    later.set_epoch(2)
    assert list(later) == orders[2]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    return run(tmp_path_factory.mktemp("stopped") / "run", "--trainer.max_steps", "3", "--trainer.val_check_interval", "2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.lr", "0.5"], r"model.lr 0.0015, this start has 0.5: continue with -c RUN/config.yaml"),
        (["--data.batch_size", "3"], "data.batch_size 2, this start has 3"),
        (["--seed_everything", "7", "--model.dim", "64"], r"model.dim 32, this start has 64 \(and 1 more\)"),
        (["--trainer.gradient_clip_val", "2"], "gradient_clip_val 1.0, this start has 2"),
    ],
)
def test_another_config_is_no_continuation(stopped, options, message):
    before = sorted(path.name for path in stopped.rglob("*"))
    with pytest.raises(InputError, match=message) as error:
        run(stopped, "--ckpt_path", "last", *options)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in stopped.rglob("*")) == before


def test_a_run_may_be_made_longer(stopped, tmp_path, capsys):
    shutil.copytree(stopped, tmp_path / "longer")
    run(tmp_path / "longer", "--ckpt_path", "last", "--trainer.max_steps", "5", "--data.num_workers", "1")
    assert "max_steps was 3, is 5" in capsys.readouterr().err
    assert list(losses(tmp_path / "longer")) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("damage", ["cut", "foreign", "text", "empty", "code"])
def test_a_checkpoint_that_cannot_be_read_is_one_line(stopped, tmp_path, damage):
    path = tmp_path / "last.ckpt"
    whole = (stopped / "checkpoints" / "last.ckpt").read_bytes()
    if damage == "foreign":
        torch.save({"state_dict": {}}, path)
    elif damage == "code":
        torch.save({"state_dict": Path.home}, path)  # a pickle that names what to call
    else:
        path.write_bytes({"cut": whole[: len(whole) // 2], "text": b"hello", "empty": b""}[damage])
    with pytest.raises(InputError, match="no checkpoint of pmpseg" if damage == "foreign" else "not a whole checkpoint") as error:
        run(tmp_path / "run", "--ckpt_path", str(path))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_continued_bar_begins_where_it_stopped(stopped, tmp_path, capfd):
    shutil.copytree(stopped, tmp_path / "run")
    run(tmp_path / "run", "--ckpt_path", "last", "--trainer.max_steps", "7", "--trainer.enable_progress_bar", "true")
    said = capfd.readouterr()
    bars = [text for text in (said.out + said.err).replace("\r", "\n").splitlines() if text.startswith("Epoch 0:")]
    assert any("| 3/5 [" in bar for bar in bars) and any("| 5/5 [" in bar for bar in bars)
    assert not any("| 1/5 [" in bar or ", -" in bar for bar in bars)


def test_rows_cut_short_by_a_kill_are_left_out(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    path = tmp_path / "run" / "metrics.csv"
    whole = path.read_text()
    last = whole.splitlines()[-1]
    for rest in ("9", last[: len(last) // 2], ""):
        path.write_text(whole + rest)
        shutil.rmtree(tmp_path / "run" / "model")
        run(tmp_path / "run", "--ckpt_path", "last", "--trainer.max_steps", "3", "--trainer.val_check_interval", "2")
        assert losses(tmp_path / "run") == losses(stopped)
        assert not list((tmp_path / "run").glob(".*"))


def test_a_run_goes_on_in_another_folder_and_keeps_its_best_model(stopped, tmp_path):
    last = str(stopped / "checkpoints" / "last.ckpt")
    root = run(tmp_path / "other", "--ckpt_path", last, "--trainer.max_steps", "3", "--trainer.val_check_interval", "2")
    found, wanted = (Segmenter.load(r / "model").network.state_dict() for r in (root, stopped))
    assert all(torch.equal(found[k], v) for k, v in wanted.items())


def test_other_images_are_no_continuation(stopped, tmp_path, monkeypatch):
    shutil.copytree(stopped, tmp_path / "run")
    monkeypatch.setattr(Scenes, "dataset", lambda self, split, of=Scenes.dataset: Subset(of(self, split), range(4)))
    with pytest.raises(InputError, match="an epoch had 5 batches, and now has 2"):
        run(tmp_path / "run", "--ckpt_path", "last", "--trainer.max_steps", "9")


def test_leftovers_of_a_killed_process_go(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / ".model-abc" / "new").mkdir(parents=True)
    for name in ("checkpoints/.last.ckpt.123.tmp", ".metrics.json.5.tmp", "checkpoints/last.ckpt", "metrics.json"):
        (tmp_path / name).write_text("x")
    clear_leftovers(tmp_path)
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert left == ["checkpoints/last.ckpt", "metrics.json"]
    assert not (tmp_path / ".model-abc").exists()
