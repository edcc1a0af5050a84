"""The command line: one-line errors that name the nearest right word, and how configurations are merged."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader

from pmpseg import cli
from pmpseg.errors import InputError
from pmpseg.training.cli import PmpsegCLI

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class ToyModel(LightningModule):
    def __init__(
        self,
        prompt_attention: Literal["none", "layers"] = "layers",
        width: int = 32,
        scales: list[float] | None = None,
        lr: float = 1e-3,
    ) -> None:
        super().__init__()
        if width < 1:
            raise InputError(f"width must be at least 1, got {width}")
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self.layer(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class OtherModel(LightningModule):
    def __init__(self, width: int = 3, name: str = "x") -> None:
        super().__init__()
        self.save_hyperparameters()


class ToyData(LightningDataModule):
    def __init__(self, batch_size: int = 16, root: str = "data", flip: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.zeros(2, 1), batch_size=1)


class FolderToy(LightningDataModule):
    def __init__(self, root: str, batch_size: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()


START = {
    "model": {"class_path": "test_cli.ToyModel", "init_args": {"width": 8}},
    "data": {"class_path": "test_cli.ToyData"},
    "trainer": {"max_epochs": 1},
}


@pytest.fixture
def parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``parse("--data.batch_size 4", {...}, ...)``: options, and configurations that become -c files."""
    monkeypatch.chdir(tmp_path)
    Path("start.yaml").write_text(yaml.safe_dump(START))

    def parse(options: str = "", *configs: dict | str) -> PmpsegCLI:
        files = []
        for number, config in enumerate(configs):
            Path(f"c{number}.yaml").write_text(config if isinstance(config, str) else yaml.safe_dump(config))
            files += ["-c", f"c{number}.yaml"]
        return PmpsegCLI(start="start.yaml", args=[*options.split(), *files], trainer_defaults=QUIET)

    return parse


def arguments(parsed: PmpsegCLI) -> dict:
    return {**parsed.model.hparams, **parsed.datamodule.hparams}


# what is understood


def test_start_alone(parse) -> None:
    parsed = parse()
    assert isinstance(parsed.model, ToyModel) and isinstance(parsed.datamodule, ToyData)
    assert (parsed.model.hparams.width, parsed.trainer.max_epochs, parsed.config.seed_everything) == (8, 1, 0)


@pytest.mark.parametrize(
    ("option", "name", "value"),
    [
        ("--model.prompt_attention none", "prompt_attention", "none"),
        ("--model.init_args.width=9", "width", 9),
        ("--model.lr -1", "lr", -1.0),
        ("--model.lr 1e-4", "lr", 1e-4),
        ("--model.scales [1,2]", "scales", [1.0, 2.0]),
        ("--model.scales null", "scales", None),
        ("--data.root 5", "root", "5"),
        ("--data.flip true", "flip", True),
        ("--data FolderToy --data.root x", "root", "x"),
        ("--data.root x --data test_cli.FolderToy", "root", "x"),
    ],
)
def test_options(parse, option: str, name: str, value: object) -> None:
    assert arguments(parse(option))[name] == value


def test_later_files_and_options_win(parse) -> None:
    """Whatever the order on the command line: files, in order, and then options."""
    parsed = parse(
        "--data.batch_size 3", {"model": {"init_args": {"width": 1}}}, {"model": {"init_args": {"width": 2}}}
    )
    assert arguments(parsed)["width"] == 2 and arguments(parsed)["batch_size"] == 3


def test_preset_is_merged_onto_start(parse) -> None:
    parsed = parse("", {"data": {"init_args": {"batch_size": 2}}, "trainer": {"max_steps": 1}})
    assert arguments(parsed)["width"] == 8 and arguments(parsed)["batch_size"] == 2
    assert (parsed.trainer.max_epochs, parsed.trainer.max_steps) == (1, 1)


def test_file_with_a_model_stands_alone(parse) -> None:
    parsed = parse("", {"model": "test_cli.ToyModel", "data": "test_cli.ToyData"})
    assert arguments(parsed)["width"] == 32
    assert parsed.trainer.max_epochs is None


@pytest.mark.parametrize("option", ["--model OtherModel", "--model.class_path test_cli.OtherModel"])
def test_another_class_drops_the_arguments_of_the_first(parse, option: str) -> None:
    assert parse(option).model.hparams.width == 3


def test_defaults_come_first(parse, tmp_path: Path) -> None:
    Path("base.yaml").write_text("trainer: {max_epochs: 7, max_steps: 5}\n")
    parsed = PmpsegCLI(["base.yaml"], "start.yaml", args=[], trainer_defaults=QUIET)
    assert (parsed.trainer.max_epochs, parsed.trainer.max_steps) == (1, 5)


def test_numbers_without_a_point(parse) -> None:
    """YAML 1.1 reads 1e-4 as a word."""
    parsed = parse("", "model: {init_args: {lr: 1e-4, scales: [1, 2e-1]}}")
    assert arguments(parsed)["lr"] == 1e-4 and arguments(parsed)["scales"] == [1.0, 0.2]


def test_loggers_and_callbacks(parse, tmp_path: Path) -> None:
    parsed = parse("--trainer.logger CSVLogger --trainer.logger.save_dir logs --trainer.callbacks+ Timer")
    assert Path(parsed.trainer.logger.save_dir) == Path("logs")
    assert "Timer" in [type(callback).__name__ for callback in parsed.trainer.callbacks]


@pytest.mark.parametrize(
    ("option", "shown"), [("--help", "--data.help"), ("--model.help", "--model.prompt_attention")]
)
def test_help(parse, capsys: pytest.CaptureFixture, option: str, shown: str) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(option)
    assert stop.value.code == 0 and shown in capsys.readouterr().out


# what is not: the whole message


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--model.promt_attention none",
            "unknown key 'model.promt_attention': did you mean 'model.prompt_attention'?",
        ),
        ("--model.batch_size 3", "unknown key 'model.batch_size': did you mean 'data.batch_size'?"),
        ("--max_epochs 3", "unknown key 'max_epochs': did you mean 'trainer.max_epochs'?"),
        ("--trainer.max_epo 3", "unknown key 'trainer.max_epo': did you mean 'trainer.max_epochs'?"),
        ("--conf x", "unknown key 'conf': did you mean 'config'?"),
        ("--qqq 3", "unknown key 'qqq'"),
        ("--data.batch_size many", "data.batch_size: got 'many', want int"),
        ("--data.batch_size 4.5", "data.batch_size: got 4.5, want int"),
        ("--data.batch_size null", "data.batch_size: got null, want int"),
        (
            "--model.prompt_attention nnone",
            "model.prompt_attention: got 'nnone', want 'none' or 'layers': did you mean 'none'?",
        ),
        ("--model.scales [1,x]", "model.scales: got 'x', want list[float] or null"),
        ("--trainer.max_epochs many", "trainer.max_epochs: got 'many', want int or null"),
        ("--seed_everything x", "seed_everything: got 'x', want bool or int"),
        ("--trainer.devices x", "trainer: `devices` selected with `CPUAccelerator` should be an int > 0."),
        ("--data FolderToy", "data.root is missing: give a value"),
        ("--data FoldrToy", "command line: class_path 'FoldrToy' not found: did you mean 'FolderToy'?"),
        ("--data ToyModel", "command line: class_path 'ToyModel' not found"),
        (
            "--trainer.logger CSVLoger",
            "command line: class_path 'CSVLoger' not found: did you mean 'CSVLogger'?",
        ),
        ("--trainer.logger CSVLogger", "trainer.logger.save_dir is missing: give a value"),
        (
            "--trainer.logger CSVLogger --trainer.logger.nme x",
            "unknown key 'trainer.logger.nme': did you mean 'trainer.logger.name'?",
        ),
        ("--data.flip", "--data.flip wants a value, as in '--data.flip VALUE'"),
        ("--model.width --data.flip true", "--model.width wants a value, as in '--model.width VALUE'"),
        ("stray", "unexpected argument 'stray': options are written --key value"),
        ("--data.flip true stray", "unexpected argument 'stray': options are written --key value"),
        ("--model.width 0", "width must be at least 1, got 0"),
        ("-c strat.yaml", "no configuration 'strat.yaml': did you mean 'start.yaml'?"),
        ("-c", "argument -c/--config: expected one argument"),
    ],
)
def test_wrong_options(parse, option: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        parse(option)
    assert str(error.value) == message


CHECKPOINT = "lightning.pytorch.callbacks.ModelCheckpoint"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            "{model: {init_args: {widht: 8}}}",
            "c0.yaml: unknown key 'model.init_args.widht': did you mean 'model.init_args.width'?",
        ),
        ("{model: {width: 8}}", "c0.yaml: unknown key 'model.width': did you mean 'model.init_args.width'?"),
        (
            "{trainer: {max_epocs: 8}}",
            "c0.yaml: unknown key 'trainer.max_epocs': did you mean 'trainer.max_epochs'?",
        ),
        ("{modle: {width: 8}}", "c0.yaml: unknown key 'modle': did you mean 'model'?"),
        ("{trainer: 3}", "c0.yaml: trainer: got 3, want a mapping of its keys"),
        (
            "{model: test_cli.ToyModl}",
            "c0.yaml: class_path 'test_cli.ToyModl' not found: did you mean 'test_cli.ToyModel'?",
        ),
        (
            "{model: test_cil.ToyModel}",
            "c0.yaml: class_path 'test_cil.ToyModel' not found: did you mean 'test_cli.ToyModel'?",
        ),
        ("{model: test_cli.ToyData}", "c0.yaml: class_path 'test_cli.ToyData' is no LightningModule"),
        (
            "{data: pmpseg.data.Scene}",
            "c0.yaml: class_path 'pmpseg.data.Scene' not found: did you mean 'pmpseg.data.Scenes'?",
        ),
        (
            "{data: pmpseg.dat.Scenes}",
            "c0.yaml: class_path 'pmpseg.dat.Scenes' not found: did you mean 'pmpseg.data.Scenes'?",
        ),
        ("{data: {init_args: {batch_size: }}}", "data.batch_size: got null, want int"),
        (
            f"{{trainer: {{callbacks: [{{class_path: {CHECKPOINT}, init_args: {{save_lst: 1}}}}]}}}}",
            "c0.yaml: unknown key 'trainer.callbacks.init_args.save_lst': "
            "did you mean 'trainer.callbacks.init_args.save_last'?",
        ),
        (
            f"{{trainer: {{callbacks: [{{class_path: {CHECKPOINT}, init_args: {{save_last: x}}}}]}}}}",
            "trainer.callbacks.save_last: got 'x', want bool or 'link' or null",
        ),
        (
            f"{{trainer: {{callbacks: {CHECKPOINT}s}}}}",
            f"c0.yaml: class_path '{CHECKPOINT}s' not found: did you mean '{CHECKPOINT}'?",
        ),
        (
            f"{{trainer: {{callbacks: [{CHECKPOINT}, Timr]}}}}",
            "c0.yaml: class_path 'Timr' not found: did you mean 'Timer'?",
        ),
        ("", "c0.yaml must hold a mapping of keys to values, got None"),
    ],
)
def test_wrong_files(parse, config: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        parse("", config)
    assert str(error.value) == message


def test_malformed_yaml_names_the_line(parse) -> None:
    with pytest.raises(InputError, match=r"c0\.yaml is no valid YAML(.|\n)*line 2"):
        parse("", "model:\n  x: [3\n")


def test_no_class() -> None:
    with pytest.raises(InputError, match="no class for the model is chosen: give a file with -c"):
        PmpsegCLI(args=[])


def test_explain_falls_back_to_one_line() -> None:
    assert cli.explain("something\n   else") == "something else"


# runs


def test_config_is_saved_and_runs_again(parse, tmp_path: Path) -> None:
    parsed = parse("--trainer.default_root_dir run --model.width 5 --trainer.enable_checkpointing false")
    parsed.trainer.fit(parsed.model, parsed.datamodule)
    saved = tmp_path / "run" / "config.yaml"
    first = saved.read_text()
    assert "ckpt_path" not in first
    again = PmpsegCLI(args=["-c", str(saved)])
    assert again.config.as_dict() == parsed.config.as_dict()

    again.trainer.fit(again.model, again.datamodule)  # the file is there already, and equal
    assert saved.read_text() == first and len(list(saved.parent.glob("config*"))) == 1

    other = PmpsegCLI(args=["-c", str(saved), "--model.width", "6"])
    other.trainer.fit(other.model, other.datamodule)
    assert (saved.parent / "config.1.yaml").read_text() == first
    assert yaml.safe_load(saved.read_text())["model"]["init_args"]["width"] == 6


def test_continue_from_last(parse, tmp_path: Path) -> None:
    options = "--trainer.default_root_dir run --ckpt_path"
    with pytest.raises(InputError, match=r"no last\.ckpt in run"):
        parse(f"{options} last").checkpoint()
    with pytest.raises(InputError, match="no such file"):
        parse(f"{options} nope.ckpt").checkpoint()
    assert parse().checkpoint() is None
    for number, name in enumerate(["a/last.ckpt", "b/last-v1.ckpt"]):
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (number, number))
    assert parse(f"{options} last").checkpoint() == Path("run/b/last-v1.ckpt")


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        ("InputError('a line\\nand another')", 2, "pmpseg: error: a line and another"),
        ("KeyboardInterrupt()", 130, "pmpseg: interrupted"),
        (
            "OSError(28, 'No space left on device', 'x.png')",
            2,
            "pmpseg: error: No space left on device: 'x.png': free some space, or write to another disk",
        ),
        ("FileNotFoundError('no model at x')", 2, "pmpseg: error: no model at x"),
    ],
)
def test_run(
    raised: str, status: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def main() -> int:
        raise eval(raised)

    for traceback in ("0", "1"):
        monkeypatch.setenv("PMPSEG_TRACEBACK", traceback)
        with pytest.raises(SystemExit) as stop:
            cli.run(main)
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == status and lines[-1] == line
        assert (len(lines) > 1) == (traceback == "1")


def test_run_leaves_bugs_and_statuses_alone() -> None:
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 // 0)
    with pytest.raises(OSError, match="bad descriptor"):
        cli.run(lambda: (_ for _ in ()).throw(OSError(9, "bad descriptor")))
    for result, status in ((3, 3), (None, 0), (Path("made"), 0)):
        with pytest.raises(SystemExit) as stop:
            cli.run(lambda result=result: result)
        assert stop.value.code == status


def test_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    for text in ("one", "two"):
        with cli.whole_file(path) as temporary:
            temporary.write_text(text)
        assert path.read_text() == text
    with pytest.raises(ValueError, match="stop"), cli.whole_file(path) as temporary:
        temporary.write_text("half")
        raise ValueError("stop")
    assert path.read_text() == "two" and list(tmp_path.iterdir()) == [path]


def test_shared_part_is_light() -> None:
    code = "import sys, pmpseg.cli; print({'torch', 'lightning', 'jsonargparse', 'yaml'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
