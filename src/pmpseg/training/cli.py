"""The command line of ``python -m pmpseg.fit``: LightningCLI with one class for the model and one for the data.

Configurations are merged here and not by jsonargparse, for four reasons that were met with version 4.53: options
before ``-c`` fail or lose, whichever order is meant; a class chosen later keeps the earlier class's arguments where
their names agree; typos give ten lines and no suggestion; null passes for any type. So: ``defaults``, then
each ``-c`` in order, then the options, and jsonargparse gets one checked file.

    def main() -> None:
        cli = PmpsegCLI(defaults=[CONF / "base.yaml"], start=CONF / "demo.yaml")
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.checkpoint())

    if __name__ == "__main__":
        pmpseg.cli.run(main)
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pmpseg.cli import check_config, check_nulls, check_options, did_you_mean, explain, whole_file
from pmpseg.errors import InputError

BASES = {"model": LightningModule, "data": LightningDataModule, "trainer.logger": Logger, "trainer.callbacks": Callback}

DESCRIPTION = "Train a model. The arguments of the chosen model and data: --model.help, --data.help"


class PmpsegCLI(LightningCLI):
    """Parses the command line and builds ``model``, ``datamodule`` and ``trainer``; starts nothing.

    ``defaults`` are YAML files merged first, always. ``start`` is the run without arguments: it comes next, unless a
    ``-c`` file names a class for the model and so is a whole run of its own (a preset is not). The run's folder is
    ``trainer.default_root_dir``; the resolved configuration is saved there as ``config.yaml`` when training starts.
    Raises ``InputError`` for anything that the user got wrong.
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
            load_from_checkpoint_support=False,  # it would write class names into checkpoints, to be run from there
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
                raise InputError(f"--ckpt_path last: no last.ckpt in {self.run_folder}: give the file, or leave it out")
            return found[-1]
        if not Path(wanted).is_file():
            raise InputError(f"--ckpt_path {wanted}: no such file; give a .ckpt file or 'last'")
        return Path(wanted)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="Checkpoint to continue from; 'last': of the run's folder."
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        keys = {action.dest for action in parser._actions}
        files, choices, options = _split(args)
        config = self._merge(files, keys)
        if choices:
            config = merge(config, choices)
            check_config(config, _yaml_keys(keys), BASES, "command line")
        asks_help = any(word in ("-h", "--help") or word.endswith(".help") for word in options)
        for key in ("model", "data"):
            if key not in config and not asks_help:
                raise InputError(f"no class for the {key} is chosen: give a configuration with -c, or --{key} CLASS")
        check_options(options, config, keys, BASES)
        chosen = {f"--{key}.help": f"--{key}.help={config[key]['class_path']}" for key in ("model", "data") if key in config}
        options = [chosen.get(word, word) for word in options]
        with tempfile.TemporaryDirectory() as folder:
            merged = Path(folder) / "config.yaml"
            merged.write_text(yaml.safe_dump(config), encoding="utf-8")
            try:
                self.config = parser.parse_args([f"--config={merged}", *options])
            except argparse.ArgumentError as error:
                raise InputError(explain(str(error))) from error
        del self.config["config"]  # the temporary file
        check_nulls(self.config.as_dict(), BASES)

    def _merge(self, files: Sequence[Path], keys: set[str]) -> dict[str, Any]:
        layers = [(Path(path), read_config(path)) for path in (*self.defaults, *files)]
        chosen = [layer for _, layer in layers[len(self.defaults) :] if "class_path" in (layer.get("model") or {})]
        if self.start and not chosen:
            layers.insert(len(self.defaults), (Path(self.start), read_config(self.start)))
        config: dict[str, Any] = {}
        for path, layer in layers:
            config = merge(config, layer)
            check_config(config, _yaml_keys(keys), BASES, str(path))  # what is wrong now came with this file
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
            raise cause or error from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError, ValueError) as error:
            raise InputError(f"trainer: {error}") from error


class SaveConfig(SaveConfigCallback):
    """Saves the resolved configuration as ``config.yaml``; one of an earlier run there is kept as config.1.yaml, ...

    The stock callback stops with a traceback where the file exists, as it does whenever a run is continued.
    """

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        config = self.config.clone()
        del config["ckpt_path"]  # of this start only: the file describes the run, however often it is continued
        text = self.parser.dump(config, skip_unset=False)
        path = Path(trainer.default_root_dir) / self.config_filename
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            number = next(n for n in range(1, 10**6) if not path.with_suffix(f".{n}.yaml").exists())
            path.rename(path.with_suffix(f".{number}.yaml"))
        with whole_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def read_config(path: str | Path) -> dict[str, Any]:
    """A YAML file as nested dicts. Raises ``InputError`` where it is missing, malformed or no mapping."""
    path = Path(path)
    if not path.is_file():
        others = [str(other) for other in path.parent.glob("*.yaml")]
        raise InputError(f"no configuration {str(path)!r}{did_you_mean(str(path), others)}")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} must hold a mapping of keys to values, got {config!r}")
    return _specs(config, "")


def merge(config: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with ``layer`` on top, key by key. Lists are replaced; another class drops the old one's arguments."""
    merged = dict(config)
    if "class_path" in layer and layer["class_path"] != config.get("class_path"):
        merged.pop("init_args", None)
    for key, value in layer.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _specs(value: Any, key: str) -> Any:
    """The configuration with names of classes written as specs: ``model: X`` as ``model: {class_path: X}``."""
    if key in BASES:
        if isinstance(value, list):
            return [_specs(item, key) for item in value]
        return {"class_path": value} if isinstance(value, str) else value
    if isinstance(value, Mapping):
        return {name: _specs(below, f"{key}.{name}".lstrip(".")) for name, below in value.items()}
    return value


def _split(args: Sequence[str]) -> tuple[list[Path], dict[str, Any], list[str]]:
    """The command line as -c files, choices of classes as a nested configuration, and the remaining options."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config", action="append", type=Path, default=[])
    for base in BASES:
        parser.add_argument(f"--{base}", f"--{base}.class_path", type=yaml.safe_load, dest=base, default=argparse.SUPPRESS)
    try:
        found, options = parser.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from error
    choices: dict[str, Any] = {}
    for base, value in vars(found).items():
        if base != "config":
            spec = _specs(value, base)
            for part in reversed(base.split(".")):
                spec = {part: spec}
            choices = merge(choices, spec)
    return found.config, choices, options


def _yaml_keys(keys: set[str]) -> set[str]:
    return {key for key in keys - {"help", "config", "print_config"} if not key.endswith(".help")}
