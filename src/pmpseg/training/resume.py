"""Stop and continue: a run that was killed anywhere goes on from ``last.ckpt`` as if it had never stopped.

Five things make it so, since Lightning alone falls short of it:

- a checkpoint takes the place of the one before in a single rename, so there is always a whole one (``WholeCheckpoints``);
- ``last.ckpt`` is written every few steps, with the logs flushed, and never where Lightning would go on wrongly
  (``LastCheckpoint``);
- what a run remembers besides its weights starts afresh at each checkpoint (the cache of ``TextEncoder``);
- everything random in a training step comes from (seed, batch number, rank), so no random state has to be saved (``StepSeed``);
- the data module saves how many batches were taken, and its sampler goes on from there (``data.base``).

``read_checkpoint`` and ``check_same_run`` turn what cannot be continued into one line.
"""

import csv
import json
import pickle
import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment

from pmpseg.cli import whole_file
from pmpseg.errors import InputError

CONFIG = "pmpseg_config"  # the key of a checkpoint under which the run's configuration stands, as JSON
ROW = "pmpseg_row"  # and the row of metrics.csv that Lightning had not written when it was saved, or nothing
# Beside model, data and seed, what decides how a run goes on. Longer or shorter is allowed, and said.
TRAINER_KEYS = {"accumulate_grad_batches", "devices", "gradient_clip_algorithm", "gradient_clip_val", "limit_train_batches"}
TRAINER_KEYS |= {"num_nodes", "overfit_batches", "precision", "sync_batchnorm"}
LENGTH_KEYS = ("trainer.max_steps", "trainer.max_epochs")
FREE = ("data.init_args.root", "data.init_args.num_workers", "data.init_args.eval_batch_size")


class WholeCheckpoints(TorchCheckpointIO):
    """Saves beside the file and renames; Lightning writes to the system's temporary folder, from where a move is a copy."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            torch.save(checkpoint, temporary)


class LastCheckpoint(Checkpoint):
    """``checkpoints/last.ckpt`` of the run's folder: every ``every_n_steps`` steps, after each validation, and at ``max_steps``.

    ``config`` is the run's resolved configuration; every checkpoint holds it, for ``check_same_run``.
    """

    def __init__(self, every_n_steps: int, config: Mapping[str, Any]) -> None:
        if every_n_steps < 1:
            raise InputError(f"save_every: got {every_n_steps}, want 1 step or more")
        self.every_n_steps, self.config = every_n_steps, json.dumps(config, default=str)
        self._saved_at = 0
        self._row: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_at = trainer.global_step
        taken, before = getattr(trainer.datamodule, "continued", (0, 0))  # type: ignore[attr-defined]
        if taken and before != trainer.num_training_batches:
            now = f"an epoch had {before} batches, and now has {trainer.num_training_batches}"
            raise InputError(f"the training images are not those the run began with: {now}; restore them, or start anew")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step, loop, fetcher = trainer.global_step, trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        due = step - self._saved_at >= self.every_n_steps or step == trainer.max_steps
        if step == self._saved_at or not due or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        # Not where Lightning would go on wrongly: it would take a validation that is due for done, and miscount epochs from a
        # last batch that none follows. After the validation, or a step later, all is well.
        if fetcher is not None and not loop._should_check_val_fx(fetcher) and not loop._num_ready_batches_reached():
            if step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
                logged = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("train/")}
                self._row = {"epoch": trainer.current_epoch, "step": step - 1, **logged}
            self._save(trainer)
            self._row = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._save(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint |= {CONFIG: self.config, ROW: self._row}

    def _save(self, trainer: Trainer) -> None:
        if trainer.fit_loop._should_accumulate():  # gradients are not saved
            return
        for logger in trainer.loggers:
            logger.save()  # what comes before the checkpoint is never computed again
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")
        self._saved_at = trainer.global_step


class StepSeed(Callback):
    """Seeds torch, numpy and random before each batch from (``seed``, batch number, rank)."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        number = trainer.fit_loop.total_batch_idx  # over all epochs
        state = int(np.random.SeedSequence([self.seed, number, trainer.global_rank]).generate_state(1)[0])
        torch.manual_seed(state)
        np.random.seed(state)
        random.seed(state)


class RunCSV(CSVLogger):
    """``metrics.csv`` in the run's own folder. A run that is continued from ``checkpoint`` goes on below the rows before it."""

    def __init__(self, folder: Path, checkpoint: Mapping[str, Any] | None = None) -> None:
        super().__init__(folder, name="", version="")
        self._kept: list[dict[str, Any]] = []
        if checkpoint:
            row = checkpoint[ROW]
            rows = [r for r in _rows(folder / "metrics.csv") if int(r["step"]) < checkpoint["global_step"]]
            again = [r for r in rows if row and int(r["step"]) == row["step"] and r.get("train/loss")]
            self._kept = [r for r in rows if r not in again] + ([row] if row else [])

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = _RunWriter(self.log_dir, self._kept)
        return self._experiment


class _RunWriter(ExperimentWriter):
    """Lightning's, but what stands in the file is never gone for a moment: it begins, and gets new columns, in one rename."""

    def __init__(self, folder: str, rows: list[dict[str, Any]]) -> None:
        self._first = rows
        super().__init__(folder)

    def _check_log_dir_exists(self) -> None:  # the stock one deletes the file
        Path(self.log_dir).mkdir(parents=True, exist_ok=True)
        self.metrics_keys = sorted({name for row in self._first for name in row})
        if self._first:
            self._write(self._first)
        else:
            Path(self.metrics_file_path).unlink(missing_ok=True)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._write(list(_rows(Path(self.metrics_file_path))))

    def _write(self, rows: list[dict[str, Any]]) -> None:
        with whole_file(self.metrics_file_path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if None not in row.values() and None not in row:  # else cut short by a kill
                    yield row


def clear_leftovers(folder: Path) -> None:
    """Removes what a killed process left half written in a run's folder: ``.name.PID.tmp`` and ``.model-xxx/``."""
    for path in [*folder.glob(".*.tmp"), *folder.glob("checkpoints/.*.tmp"), *folder.glob("panels/.*.tmp")]:
        path.unlink(missing_ok=True)
    for path in folder.glob(".model-*"):
        shutil.rmtree(path, ignore_errors=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of a run. Raises ``InputError`` for a file that is cut short or not one; runs no code from it."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"{path}: not a whole checkpoint ({reason}): give another one, or start without --ckpt_path") from None
    if not isinstance(checkpoint, dict) or not {"state_dict", "loops", CONFIG} <= checkpoint.keys():
        raise InputError(f"{path}: no checkpoint of pmpseg.fit: give RUN/checkpoints/last.ckpt, or start without --ckpt_path")
    return checkpoint


def check_same_run(checkpoint: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> str:
    """Raises ``InputError`` if a run would go on otherwise than it began; returns a remark on a changed length, or "".

    Compared are the model, the data, the seed, and of the trainer what decides the steps; not where the data lies
    (``data.root``), nor how fast it is read.
    """
    if config.get("trainer", {}).get("overfit_batches"):
        raise InputError(f"{path}: a run with trainer.overfit_batches cannot be continued: start it without --ckpt_path")
    before = dict(_decisive(json.loads(checkpoint[CONFIG])))
    now = dict(_decisive(json.loads(json.dumps(config, default=str))))
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    remarks = [f"{key} was {before.get(key)}, is {now.get(key)}" for key in changed if key in LENGTH_KEYS]
    wrong = [key for key in changed if key not in LENGTH_KEYS]
    if wrong:
        key = wrong[0]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise InputError(
            f"{path} began with {key.replace('.init_args', '')} {before.get(key)!r}, this start has {now.get(key)!r}{more}: "
            "continue with -c RUN/config.yaml, or leave out --ckpt_path to start anew"
        )
    return f"{'; '.join(remarks)}: the learning rate follows the new length from here" if remarks else ""


def _decisive(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _decisive(value, f"{key}.")
        elif _is_decisive(key):
            yield key, value


def _is_decisive(key: str) -> bool:
    if key.startswith(("model.", "data.")):
        return key not in FREE
    return key == "seed_everything" or key in LENGTH_KEYS or key.removeprefix("trainer.") in TRAINER_KEYS
