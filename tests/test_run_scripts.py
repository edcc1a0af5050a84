"""scripts/runs: every command that they would run is one that its program takes, and names files that are there."""

import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pmpseg import evaluate, fit
from pmpseg.config import Schema
from pmpseg.evaluate_options import check, parser
from pmpseg.training.cli import PmpsegCLI

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts/runs"


def commands(name: str, runs: Path, *args: str, **variables: str) -> list[list[str]]:
    """What a script prints in a dry run, split into words."""
    env = os.environ | {"RUNS": str(runs), "PYTHON": sys.executable, "DATA": "/data"} | variables
    done = subprocess.run([str(SCRIPTS / name), *args], env=env, capture_output=True, text=True, check=True)
    return [shlex.split(line) for line in done.stdout.splitlines()]


def arguments(found: list[list[str]], program: str) -> list[list[str]]:
    return [words[words.index(program) + 1 :] for words in found if program in words]


@pytest.fixture
def parsed(monkeypatch):
    """The configuration of a fit command, with nothing built."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(PmpsegCLI, "instantiate_classes", lambda self: None)
    return lambda args: fit.command_line(args).config


@pytest.mark.parametrize(
    ("name", "fits", "scores"), [("coco_stuff_pmp.sh", 8, 8), ("ovseg.sh", 4, 10), ("clipseg_phrasecut.sh", 7, 11)]
)
def test_every_command_is_understood(name, fits, scores, tmp_path, parsed):
    found = commands(name, tmp_path, "--dry")
    trained, scored = arguments(found, "pmpseg.fit"), arguments(found, "pmpseg.evaluate")
    assert (len(trained), len(scored)) == (fits, scores)
    folders, total = set(), {"coco_stuff_pmp.sh": {32}, "ovseg.sh": {32, 256, 1024}, "clipseg_phrasecut.sh": {64}}[name]
    for args in trained:
        config = parsed(args)
        folders.add(Path(config.trainer.default_root_dir))
        assert config.data.init_args.batch_size * int(config.trainer.devices) in total
        if name == "ovseg.sh" and "CocoStuff" in config.data.class_path:  # trained as it is asked
            assert not config.data.init_args.synonyms
    assert len(folders) == fits
    for folder in folders:
        (folder / "model").mkdir(parents=True)
        (folder / "model/config.json").write_text("{}")
    results = []
    for args in scored:
        options = parser().parse_args(args)
        model, benchmarks = check(options)  # whose folder is one of those above
        assert model.parent in folders and bool(benchmarks) == ("--benchmark" in args)
        assert options.region is None or "/clip-vit-" in options.region or Path(options.region) in folders
        assert options.names_only == (name == "ovseg.sh")
        results.append(options.out)
        if options.config:
            schema = Schema({"data"}, {"data": object})
            schema.check({"data": evaluate.read_data(options.config)}, options.config)
    assert len(set(results)) == scores  # none is written over
    mined = arguments(found, "scripts/mine_pairs.py")
    assert len(mined) == (2 if name == "ovseg.sh" else 0)
    for args in mined:
        options = runpy.run_path(str(ROOT / "scripts/mine_pairs.py"))["parse_arguments"](args)
        assert Path(options.proposals).parent in folders


def test_a_run_that_was_stopped_goes_on(tmp_path):
    last = tmp_path / "pmp_coco_stuff_swin_t_blind/checkpoints/last.ckpt"
    last.parent.mkdir(parents=True)
    last.touch()
    trained = arguments(commands("coco_stuff_pmp.sh", tmp_path, DRY="1"), "pmpseg.fit")
    assert [args[-1] == "last" for args in trained] == [False, False, False, True, False, False, False, False]


def test_other_numbers_of_devices(tmp_path):
    (first, *_) = arguments(commands("coco_stuff_pmp.sh", tmp_path, DRY="1", DEVICES="2"), "pmpseg.fit")
    assert first[first.index("--data.batch_size") + 1] == "16" and first[first.index("--trainer.devices") + 1] == "2"
    with pytest.raises(subprocess.CalledProcessError) as error:
        commands("coco_stuff_pmp.sh", tmp_path, DRY="1", DEVICES="3")
    assert "a batch of 32 cannot be shared by 3 devices" in error.value.stderr


@pytest.mark.parametrize(("script", "program"), [("torchrun_two_nodes.sh", "torchrun"), ("slurm.sbatch", "srun")])
def test_several_machines(script, program, tmp_path, parsed):
    """With a stand-in for the launcher that prints its arguments."""
    stand_in = tmp_path / program
    stand_in.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    stand_in.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NODE_RANK": "1", "MASTER_ADDR": "first"}
    env |= {"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8"}
    given = ["-c", "conf/pmp_coco_stuff.yaml", "--data.batch_size", "2"]
    done = subprocess.run(["bash", str(SCRIPTS / script), *given], env=env, capture_output=True, text=True, check=True)
    (args,) = arguments([done.stdout.splitlines()], "pmpseg.fit")
    config = parsed(args)
    assert config.trainer.num_nodes == 2 and int(config.trainer.devices) == 8 and config.trainer.strategy == "ddp"
    assert config.data.init_args.batch_size * 2 * 8 == 32


@pytest.mark.parametrize("cores", ["6", None])
def test_srun_is_told_of_the_cores_where_the_job_says_how_many(cores, tmp_path):
    (tmp_path / "srun").write_text('#!/bin/sh\necho "cores ${SRUN_CPUS_PER_TASK-none}"\n')
    (tmp_path / "srun").chmod(0o755)
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SRUN_"))}
    env |= {"PATH": f"{tmp_path}:{env['PATH']}", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8"}
    env |= {"SLURM_CPUS_PER_TASK": cores} if cores else {}
    done = subprocess.run(["bash", str(SCRIPTS / "slurm.sbatch")], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == f"cores {cores or 'none'}\n"
