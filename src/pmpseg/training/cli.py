"""The command line of ``python -m pmpseg.fit``: LightningCLI with one class for the model and one for data.

Configurations are merged by us and not by jsonargparse, for reasons met with its version 4.53: what comes
last wins, so that options before ``-c`` are lost or fail; a class chosen later inherits the arguments of the
one before where names agree; a typo gives ten lines and no suggestion; null passes for any type. So
``defaults`` come first, then each ``-c`` in order, then the options, and jsonargparse gets one file that has
been checked.

    def main() -> None:
        cli = PmpsegCLI(defaults=[CONF / "base.yaml"], start=CONF / "demo.yaml")
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.checkpoint())

    if __name__ == "__main__":
        pmpseg.cli.run(main)
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pmpseg.cli import explain, whole_file
from pmpseg.config import Config, Schema, merge
from pmpseg.errors import InputError

BASES: dict[str, type] = {"model": LightningModule, "data": LightningDataModule}
BASES |= {"trainer.logger": Logger, "trainer.callbacks": Callback}
DESCRIPTION = "Train a model. The arguments of the chosen model and data: --model.help, --data.help"


class PmpsegCLI(LightningCLI):
    """Parses the command line and builds ``model``, ``datamodule`` and ``trainer``; starts nothing.

    ``defaults`` are YAML files merged first, always. ``start`` is the run without arguments: it comes next,
    unless a ``-c`` file names a class for the model and so is a whole run of its own (a preset is not). The
    run's folder is ``trainer.default_root_dir``; the resolved configuration is saved there as ``config.yaml``
    when training starts. Raises ``InputError`` for anything that the user got wrong.
    """

    def __init__(
        self,
        defaults: Sequence[str | Path] = (),
        start: str | Path | None = None,
        args: Sequence[str] | None = None,
        trainer_defaults: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.defaults, self.start = list(defaults), start
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=list(sys.argv[1:] if args is None else args),
            trainer_defaults=trainer_defaults,
            seed_everything_default=seed,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False, "description": DESCRIPTION},
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # it puts names of classes to run into checkpoints
        )

    @property
    def run_folder(self) -> Path:
        return Path(self.trainer.default_root_dir)

    def checkpoint(self) -> Path | None:
        """The file that ``--ckpt_path`` names; ``last`` is the newest ``last*.ckpt`` in the run's folder.

        Raises ``InputError`` where there is none: Lightning would start anew without a word.
        """
        wanted = self.config.ckpt_path
        if wanted is None:
            return None
        if wanted == "last":
            found = sorted(self.run_folder.rglob("last*.ckpt"), key=lambda path: path.stat().st_mtime)
            if not found:
                raise InputError(
                    f"--ckpt_path last: no last.ckpt in {self.run_folder}: give the file, or leave it out"
                )
            return found[-1]
        if not Path(wanted).is_file():
            raise InputError(f"--ckpt_path {wanted}: no such file; give a .ckpt file or 'last'")
        return Path(wanted)

    def before_instantiate_classes(self) -> None:
        """A logger that would write beside the run, as WandbLogger does, writes into its folder."""
        for logger in self._loggers():
            if logger.get("init_args") is not None and str(logger.init_args.get("save_dir", "")) == ".":
                logger.init_args.save_dir = self.config.trainer.default_root_dir
                Path(logger.init_args.save_dir).mkdir(parents=True, exist_ok=True)

    def _loggers(self) -> list[Any]:
        given = self.config.trainer.logger
        return [one for one in (given if isinstance(given, list) else [given]) if hasattr(one, "class_path")]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="Checkpoint to continue from; 'last': of the run's folder.",
        )
        parser.add_argument(
            "--save_every",
            type=int,
            default=200,
            help="Steps between checkpoints to continue from: what a kill costs at most.",
        )
        parser.add_argument(
            "--encoders",
            type=Literal["copy", "reference"],
            default="copy",
            help="Put frozen encoders into the run's model/, or only their names and the hashes of their weights.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:  # always the list from __init__
        schema = Schema([action.dest for action in parser._actions], BASES)
        files, choices, options = _split(args, schema)
        config = self._merge(files, choices, schema)
        wants_help = any(word in ("-h", "--help") or word.endswith(".help") for word in options)
        for key in ("model", "data"):
            if key in config:  # help on the chosen class; jsonargparse would show the base class
                chosen = f"--{key}.help={config[key]['class_path']}"
                options = [chosen if word == f"--{key}.help" else word for word in options]
            elif not wants_help:
                raise InputError(f"no class for the {key} is chosen: give a file with -c, or --{key} CLASS")
        schema.check_options(options, config)
        with tempfile.TemporaryDirectory() as folder:
            merged = Path(folder) / "config.yaml"
            merged.write_text(yaml.safe_dump(config), encoding="utf-8")
            try:
                self.config = parser.parse_args([f"--config={merged}", *options])
            except argparse.ArgumentError as error:
                raise InputError(explain(str(error))) from error
        del self.config["config"]  # the temporary file
        schema.check_nulls(self.config.as_dict())

    def _merge(self, files: Sequence[Path], choices: Config, schema: Schema) -> Config:
        first = [(str(path), schema.read(path)) for path in self.defaults]
        layers = [(str(path), schema.read(path)) for path in files]
        if self.start and not any("class_path" in (layer.get("model") or {}) for _, layer in layers):
            first.append((str(self.start), schema.read(self.start)))
        config: Config = {}
        for source, layer in [*first, *layers, ("command line", choices)]:
            config = merge(config, layer)
            schema.check(config, source)  # what is wrong now came with this layer
        return config

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ModuleNotFoundError as error:  # as WandbLogger raises where wandb is not installed
            raise InputError(str(error)) from error
        except ValueError as error:  # jsonargparse wraps what a constructor raises in errors of its own
            cause: BaseException | None = error
            while cause and not isinstance(cause, InputError):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cause from None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError, ValueError) as error:
            raise InputError(f"trainer: {error}") from error


class SaveConfig(SaveConfigCallback):
    """Saves the resolved configuration as ``config.yaml``; that of an earlier run becomes config.1.yaml.

    The stock callback stops with a traceback where the file exists, as it does whenever a run is continued.
    """

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        config = self.config.clone()
        del config["ckpt_path"]  # it belongs to this start; the file describes the run
        text = self.parser.dump(config, skip_unset=False)
        path = Path(trainer.default_root_dir) / self.config_filename
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            keep_numbered(path)
        with whole_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def keep_numbered(path: Path) -> None:
    """Renames an earlier run's file.csv to file.1.csv, or the next free number."""
    if path.exists():
        numbered = (path.with_suffix(f".{n}{path.suffix}") for n in range(1, 10**6))
        path.rename(next(other for other in numbered if not other.exists()))


def _split(args: Sequence[str], schema: Schema) -> tuple[list[Path], Config, list[str]]:
    """The command line as -c files, choices of classes as a configuration, and the remaining options."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config", action="append", type=Path, default=[])
    for base in BASES:
        names = (f"--{base}", f"--{base}.class_path")
        parser.add_argument(*names, dest=base, type=yaml.safe_load, default=argparse.SUPPRESS)
    try:
        found, options = parser.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from error
    choices: Config = {}
    for base, value in vars(found).items():
        if base != "config":
            spec = schema.with_specs(value, base)
            for part in reversed(base.split(".")):
                spec = {part: spec}
            choices = merge(choices, spec)
    return found.config, choices, options
