"""DDP over gloo processes: the same metrics as one process, gradients everywhere, no hang without objects, clear errors."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import make_tiny_clip

from pmpseg import fit
from pmpseg.losses import mean_over_ranks
from pmpseg.models import RegionClassifier
from pmpseg.training import PMPModule
from pmpseg.training.resume import LastCheckpoint

# No learning and no batch norm: the weights stay, so that the metrics of any number of processes are those of one network.
STILL = (
    "--model.backbone clip --model.backbone_weights tiny_clip --model.backbone_frozen true --model.dim 32 --model.num_queries 6 "
    "--model.num_layers 2 --model.num_heads 4 --model.ffn_dim 32 --model.num_points 64 --model.lr 0 --data.num_workers 0 "
    "--trainer.log_every_n_steps 1 --trainer.enable_progress_bar false --trainer.accelerator cpu --save_every 1"
).split()
SCENES = "--data.train_length 7 --data.val_length 10 --data.eval_batch_size 2 --data.batch_size 1".split()
STEPS = "--trainer.max_steps 3 --trainer.val_check_interval 2".split()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def as_rank(rank: int, world: int, port: int, args: list[str], errors: str) -> None:
    """One process, as torchrun would start it."""
    torch.set_num_threads(1)
    values = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in values.items()})
    step = PMPModule.on_before_optimizer_step

    def checked(self, optimizer):
        idle = [n for n, p in self.named_parameters() if p.requires_grad and p.grad is None]
        assert not idle, f"no gradient: {idle}"
        step(self, optimizer)

    PMPModule.on_before_optimizer_step = checked
    try:
        fit.main([*args, "--trainer.strategy", "ddp", "--trainer.devices", str(world)])
    except Exception as error:
        Path(errors, f"rank_{rank}").write_text(f"{type(error).__name__}: {error}")
        raise


def fit_on(world: int, root: Path, *args: str, timeout: float = 120) -> dict:
    """Runs ``fit`` in ``world`` forked processes and returns its metrics.json."""
    options = [*STILL, *args, "--trainer.default_root_dir", str(root)]
    root.parent.mkdir(parents=True, exist_ok=True)
    context = torch.multiprocessing.start_processes(
        as_rank, (world, free_port(), options, str(root.parent)), nprocs=world, start_method="fork", join=False
    )
    deadline = time.monotonic() + timeout
    while not context.join(1):  # True once all have ended well; raises what one of them raised
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"{world} processes hang")
    return json.loads((root / "metrics.json").read_text())


needs_fork = pytest.mark.skipif(not hasattr(os, "fork") or torch.cuda.is_available(), reason="forks, before CUDA is used")


@needs_fork
def test_any_number_of_processes_gives_the_metrics_of_one(tmp_path):
    run = fit.main([*STILL, *SCENES, *STEPS, "--trainer.default_root_dir", str(tmp_path / "one")])
    one = json.loads((run / "metrics.json").read_text())
    assert one["history"][0]["phrase_iou"] > 0
    for world in (2, 3):
        found = fit_on(world, tmp_path / str(world) / "run", *SCENES, *STEPS)
        assert [h.keys() for h in found["history"]] == [h.keys() for h in one["history"]]
        for got, wanted in zip(found["history"], one["history"], strict=True):
            assert got == pytest.approx(wanted, abs=1e-6), world
        assert (tmp_path / str(world) / "run" / "model" / "model.safetensors").is_file()


def folder_without_objects(root: Path) -> Path:
    """7 images for training, of which every second has not one labelled pixel, and 3 for validation."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 7), ("val", 3)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for n in range(count):
            Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(root / "images" / split / f"{n}.png")
            labels = np.full((40, 50), 255, np.uint8) if n % 2 else rng.integers(0, 3, (40, 50), dtype=np.uint8)
            Image.fromarray(labels).save(root / "masks" / split / f"{n}.png")
    (root / "classes.txt").write_text("cat\ndog\ngrass\n")
    return root


@needs_fork
@pytest.mark.parametrize("world", [2, 3])
def test_a_process_without_an_object_neither_hangs_nor_lacks_gradients(world, tmp_path):
    root = folder_without_objects(tmp_path / "data")
    data = f"--data pmpseg.data.FolderData --data.root {root} --data.image_size 32 --data.batch_size 1".split()
    options = [*STILL, *data, "--model.lr", "0.001", "--trainer.max_steps", "6", "--trainer.val_check_interval", "3"]
    assert len(fit_on(world, tmp_path / "run", *options)["history"]) == 2


@needs_fork
def test_fewer_images_than_processes_is_one_line(tmp_path):
    options = [*STILL, *SCENES, *STEPS, "--data.val_length", "1", "--trainer.default_root_dir", str(tmp_path / "run")]
    with pytest.raises(torch.multiprocessing.ProcessRaisedException):
        torch.multiprocessing.start_processes(as_rank, (2, free_port(), options, str(tmp_path)), nprocs=2, start_method="fork")
    errors = [p.read_text() for p in tmp_path.glob("rank_*")]
    wanted = "InputError: 1 val images for 2 processes: give each at least one, or use fewer devices"
    assert errors and all(error == wanted for error in errors)


def test_devices_2_on_the_command_line(tmp_path):
    command = [sys.executable, "-m", "pmpseg.fit", *STILL, *SCENES, *STEPS, "--trainer.devices", "2"]
    command += ["--trainer.default_root_dir", str(tmp_path / "run")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.count("model: ") == 1  # one process speaks
    assert [h["step"] for h in json.loads((tmp_path / "run" / "metrics.json").read_text())["history"]] == [2]


def average(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=3)
    value = torch.tensor([rank, 6.0])
    torch.save((mean_over_ranks(value), value), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@needs_fork
def test_normalisers_are_means_over_the_processes(tmp_path):
    torch.multiprocessing.start_processes(average, (str(tmp_path),), nprocs=3, start_method="fork")
    for rank in range(3):
        mean, value = torch.load(tmp_path / f"{rank}.pt")
        assert mean.tolist() == [1, 6] and value.tolist() == [rank, 6]
    assert mean_over_ranks(torch.tensor(4.0)) == 4  # one process


@needs_fork
def test_two_processes_continue_exactly(tmp_path, monkeypatch):
    save, whole, copies = LastCheckpoint._save, tmp_path / "whole", tmp_path / "copies"

    def save_and_copy(self, trainer):
        save(self, trainer)
        if trainer.is_global_zero and Path(trainer.default_root_dir) == whole and (whole / "checkpoints" / "last.ckpt").exists():
            shutil.copytree(whole, copies / str(trainer.global_step), dirs_exist_ok=True)

    monkeypatch.setattr(LastCheckpoint, "_save", save_and_copy)  # which the forked processes inherit
    options = [*STILL, *SCENES, "--model.lr", "0.001", "--model.few_prompts", "0.5", "--trainer.val_check_interval", "2"]
    fit_on(2, whole, *options, "--trainer.max_steps", "5")  # an epoch has 3 steps
    wanted = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert sorted(p.name for p in copies.iterdir()) == ["1", "2", "4", "5"]
    for step in ("1", "4"):
        fit_on(2, copies / step, *options, "--trainer.max_steps", "5", "--ckpt_path", "last")
        found = torch.load(copies / step / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        assert all(torch.equal(found[name], value) for name, value in wanted.items()), step


# ---- a CLIP tuned on regions: every region meets the nouns of all processes

REGIONS = (
    "--model pmpseg.training.RegionModule --model.tune all_then_prompts --model.mask_prompt_depth 2 --model.lr 1e-3 "
    "--model.warmup_steps 1 --model.repeated_nouns ignored --data pmpseg.data.SceneRegions --data.train_length 12 "
    "--data.val_length 4 --data.regions 2 --data.num_workers 0 --trainer.max_steps 4 --trainer.val_check_interval 4 "
    "--trainer.check_val_every_n_epoch null --trainer.enable_progress_bar false --trainer.accelerator cpu "
    "--trainer.log_every_n_steps 1"
).split()


def as_region_rank(rank: int, port: int, args: list[str]) -> None:
    torch.set_num_threads(1)
    values = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in values.items()})
    fit.main([*args, "--trainer.strategy", "ddp", "--trainer.devices", "2"])


@needs_fork
def test_two_processes_tune_as_one(tmp_path):
    """Batches of one scene on each of two processes are a batch of two scenes: both stages learn the same weights."""
    clip = ["--model.clip", str(make_tiny_clip(tmp_path / "clip"))]
    two = [*REGIONS, *clip, "--data.batch_size", "1", "--trainer.default_root_dir", str(tmp_path / "two")]
    context = torch.multiprocessing.start_processes(as_region_rank, (free_port(), two), nprocs=2, start_method="fork", join=False)
    deadline = time.monotonic() + 100
    while not context.join(1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("two processes hang")
    fit.main([*REGIONS, *clip, "--data.batch_size", "2", "--trainer.default_root_dir", str(tmp_path / "one")])
    one, both = (
        torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in ("one", "two")
    )
    start = RegionClassifier(tmp_path / "clip").state_dict()
    for name, value in one.items():
        torch.testing.assert_close(both[name], value, atol=2e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    learned = {k: v for k, v in one.items() if "vision" in k}
    assert learned and all(not torch.equal(v, start[k.removeprefix("classifier.")]) for k, v in learned.items())
    scores = [json.loads((tmp_path / run / "metrics.json").read_text())["best"] for run in ("one", "two")]
    assert scores[0] == pytest.approx(scores[1])
