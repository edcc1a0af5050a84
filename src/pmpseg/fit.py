"""Train: ``python -m pmpseg.fit`` trains PMP on generated scenes; ``-c conf/NAME.yaml`` is an experiment.

Any key may follow: ``--model.prompt_attention none --data.batch_size 32 --trainer.max_steps 500``. A run writes one folder,
``trainer.default_root_dir``: the resolved config, ``metrics.csv``, ``metrics.json``, ``panels/``, ``checkpoints/`` (without
frozen weights) and ``model/``, which ``Segmenter.load`` opens anywhere.
"""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from pmpseg import cli
from pmpseg.training.callbacks import BestCheckpoint, FiniteLoss, PlainProgressBar, RunRecord
from pmpseg.training.cli import PmpsegCLI, keep_numbered
from pmpseg.training.resume import (
    LastCheckpoint,
    RunCSV,
    StepSeed,
    WholeCheckpoints,
    check_same_run,
    clear_leftovers,
    read_checkpoint,
)

ASSETS = Path(__file__).parent / "assets"


def main(args: Sequence[str] | None = None) -> Path:
    """Trains as the command line (or ``args``) says and returns the run's folder."""
    run = command_line(args)
    trainer, root, config = run.trainer, run.run_folder, run.config.as_dict()
    path = run.checkpoint()
    checkpoint = read_checkpoint(path) if path else None
    if path and checkpoint and (remark := check_same_run(checkpoint, config, path)):
        print(f"pmpseg: {remark}", file=sys.stderr)
    if trainer.is_global_zero:
        clear_leftovers(root)
    default_bars = (TQDMProgressBar, RichProgressBar)
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    seed = run.config.seed_everything
    own = [
        getattr(run.model, "record", RunRecord)(config["data"], run.config.encoders),
        FiniteLoss(),
        StepSeed(seed if isinstance(seed, int) else 0),
        *(PlainProgressBar() if type(c) in default_bars else c for c in callbacks),
    ]
    if config["trainer"].get("enable_checkpointing") is not False:
        own.append(LastCheckpoint(run.config.save_every, config))  # after the best one, whose state it saves
    trainer.callbacks = own  # type: ignore[attr-defined]
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpoints()
    if not trainer.loggers:
        if trainer.is_global_zero and not path:
            keep_numbered(root / "metrics.csv")  # of a run that is not continued
        trainer.logger = RunCSV(root, checkpoint)
    trainer.fit(run.model, datamodule=run.datamodule, ckpt_path=path, weights_only=True)
    if trainer.is_global_zero:
        print(f"run: {root}\nmodel: {root / 'model'}")
    return root


def command_line(args: Sequence[str] | None = None) -> PmpsegCLI:
    """The model, the data and the trainer that the arguments choose, checked and built; nothing is started."""
    _quieten()
    defaults, start = [ASSETS / "defaults.yaml"], ASSETS / "scenes.yaml"
    return PmpsegCLI(defaults, start, args, trainer_defaults={"callbacks": [BestCheckpoint()]})


def _quieten() -> None:
    """Hides advice that no user of this command can act on; warnings about their own doing stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tokenizer warns when workers are forked after its use
    patterns = ["does not have many workers", "Checkpoint directory .* exists", "isinstance.*LeafSpec"]
    patterns += ["in eval mode at the start", "your dataloader is not resumable"]  # its sampler is
    patterns += ["smaller than the logging interval"]  # which counts steps over all epochs
    for pattern in patterns:
        warnings.filterwarnings("ignore", f".*{pattern}")
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.WARNING)


if __name__ == "__main__":
    cli.run(main)
