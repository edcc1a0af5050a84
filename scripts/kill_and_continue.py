"""Kills training at random points with SIGKILL, continues it with ``--ckpt_path last``, and compares with a run left alone.

    python scripts/kill_and_continue.py [--runs 5] [--kills 4]

Every second kill waits until a checkpoint is just being written. A row for each kill: where it hit. At the end of each run:
whether all losses, step by step, and the saved model equal those of the run that was never stopped, bit for bit. Exits with 1
if not.
Scenes, a very small network, epochs of 10 steps, a checkpoint every 4; POSIX only, since it forks.
"""

import argparse
import csv
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from pmpseg import fit

OPTIONS = (
    "--model.backbone test_resnet --model.dim 32 --model.num_queries 8 --model.num_layers 2 --model.num_heads 4 "
    "--model.ffn_dim 64 --model.num_points 64 "
    "--data.train_length 40 --data.val_length 8 --data.batch_size 4 --trainer.max_steps 120 "
    "--trainer.val_check_interval 17 --trainer.log_every_n_steps 1 --trainer.enable_progress_bar false --trainer.accelerator cpu "
    "--save_every 4"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--kills", type=int, default=4, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder, "alone")
        started = time.monotonic()
        start(alone, 0).join()
        seconds = time.monotonic() - started
        wanted, weights = losses(alone), model(alone)
        print(f"never stopped: {len(wanted)} steps, {seconds:.0f} s")
        wrong = 0
        for n in range(args.runs):
            root, workers = Path(folder, f"run_{n}"), n % 2
            for kill in range(args.kills):
                how = stop(start(root, workers), root, seconds / args.kills, while_saving=kill % 2 == 1)
                print(f"  run {n}, kill {kill + 1}: {how}", flush=True)
            start(root, workers).join()
            found = losses(root)
            different = [step for step in sorted(wanted.keys() | found.keys()) if wanted.get(step) != found.get(step)]
            same_losses, same_model = not different, same(model(root), weights)
            for step in different[:3]:
                print(f"  step {step}: wanted {wanted.get(step)}, got {found.get(step)}")
            left = [p.name for p in root.rglob(".*")]
            wrong += not (same_losses and same_model and not left)
            words = ["DIFFERS", "equal"]
            print(f"run {n}: losses: {words[same_losses]}, model: {words[same_model]}, left over: {left}", flush=True)
    print(f"{args.runs * args.kills} kills, {wrong} of {args.runs} runs differ")
    sys.exit(bool(wrong))


def start(root: Path, workers: int) -> multiprocessing.Process:
    go_on = ["--ckpt_path", "last"] if (root / "checkpoints" / "last.ckpt").exists() else []
    process = multiprocessing.get_context("fork").Process(target=train, args=(root, workers, go_on))
    process.start()
    return process


def train(root: Path, workers: int, go_on: list[str]) -> None:
    torch.set_num_threads(1)
    root.parent.mkdir(exist_ok=True)
    os.dup2(os.open(root.parent / f"{root.name}.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY), 1)
    os.dup2(1, 2)
    fit.main([*OPTIONS, "--trainer.default_root_dir", str(root), "--data.num_workers", str(workers), *go_on])


def stop(process: multiprocessing.Process, root: Path, at_most: float, while_saving: bool) -> str:
    """Kills it at a random moment, or the first moment after it at which a checkpoint is being written."""
    time.sleep(random.uniform(0.5, at_most))
    deadline = time.monotonic() + 60
    while while_saving and process.is_alive() and time.monotonic() < deadline:
        if any((root / "checkpoints").glob(".*.tmp")):
            break
    if not process.is_alive():
        return "it had ended"
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    half = [p.name for p in root.glob("checkpoints/.*.tmp")]
    last = root / "checkpoints" / "last.ckpt"
    saved = torch.load(last, weights_only=True)["global_step"] if last.exists() else "nothing"
    rows = losses(root) if (root / "metrics.csv").exists() else {}
    return f"last.ckpt holds {saved} steps, metrics.csv {len(rows)}" + (f", in the middle of writing {half[0]}" if half else "")


def losses(root: Path) -> dict[int, list[str]]:
    with (root / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
    return {int(row["step"]): [row[f"train/{name}"] for name in ("loss", "class", "mask", "dice")] for row in rows}


def model(root: Path) -> dict[str, torch.Tensor]:
    """The weights that the run left: those of the best validation and those of the last step."""
    last = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return load_file(root / "model" / "model.safetensors") | {f"last.{name}": value for name, value in last.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


if __name__ == "__main__":
    main()
