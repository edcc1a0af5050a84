"""Train: ``python -m pmpseg.fit`` trains PMP on generated scenes; ``-c conf/NAME.yaml`` is an experiment.

Any key may follow: ``--model.prompt_attention none --data.batch_size 32 --trainer.max_steps 500``. A run writes one folder,
``trainer.default_root_dir``: the resolved config, ``metrics.csv``, ``metrics.json``, ``panels/``, ``checkpoints/`` (without
frozen weights) and ``model/``, which ``Segmenter.load`` opens anywhere.
"""

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger

from pmpseg import cli
from pmpseg.training.callbacks import PlainProgressBar, RunCheckpoint, RunRecord
from pmpseg.training.cli import PmpsegCLI, keep_numbered

ASSETS = Path(__file__).parent / "assets"


def main(args: Sequence[str] | None = None) -> Path:
    """Trains as the command line (or ``args``) says and returns the run's folder."""
    _quieten()
    defaults, start = [ASSETS / "defaults.yaml"], ASSETS / "scenes.yaml"
    run = PmpsegCLI(defaults, start, args, trainer_defaults={"callbacks": [RunCheckpoint(), RunCheckpoint(None)]})
    trainer, root = run.trainer, run.run_folder
    default_bars = (TQDMProgressBar, RichProgressBar)
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    record = RunRecord(run.config.data.as_dict(), run.config.encoders)
    trainer.callbacks = [record, *(PlainProgressBar() if type(c) in default_bars else c for c in callbacks)]  # type: ignore[attr-defined]
    if not trainer.loggers:
        if trainer.is_global_zero:
            keep_numbered(root / "metrics.csv")  # the logger would begin it anew
        trainer.logger = CSVLogger(root, name="", version="")
    trainer.fit(run.model, datamodule=run.datamodule, ckpt_path=run.checkpoint())
    if trainer.is_global_zero:
        print(f"run: {root}\nmodel: {root / 'model'}")
    return root


def _quieten() -> None:
    """Hides advice that no user of this command can act on; warnings about their own doing stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tokenizer warns when workers are forked after its use
    patterns = "does not have many workers", "Checkpoint directory .* exists", "isinstance.*LeafSpec", "in eval mode at the start"
    for pattern in patterns:
        warnings.filterwarnings("ignore", f".*{pattern}")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)


if __name__ == "__main__":
    cli.run(main)
