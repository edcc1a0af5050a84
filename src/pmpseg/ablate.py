"""Ablate: ``python -m pmpseg.ablate conf/ablation/NAME.yaml --seeds 3`` trains a base and named differences, and writes a table.

What is done is skipped, what was begun is continued. Everything goes into ``runs/ablation/NAME``: a folder for each run, as
``pmpseg.fit`` leaves it, with its scores, and ``table.csv`` (a row a run) and ``table.md``, written anew after each run.
"""

import argparse
import fcntl
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pmpseg import cli
from pmpseg.ablation.spec import Ablation, Training
from pmpseg.errors import InputError


def main(args: Sequence[str] | None = None) -> int:
    """Runs what the command line (or ``args``) says; returns 1 if a run failed."""
    parser = argparse.ArgumentParser(prog="python -m pmpseg.ablate", description="Train a base and its variants; write a table.")
    parser.add_argument("file", type=Path, help="conf/ablation/NAME.yaml (see src/pmpseg/ablation/spec.py)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant; default: 3")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these variants and what they need; the base always is")
    parser.add_argument("--parallel", type=int, help="runs at a time, one thread each; default: the number of cores")
    parser.add_argument("--out", type=Path, help="folder; default: runs/ablation/NAME")
    parser.add_argument("--report", action="store_true", help="run nothing: only the tables of what is there")
    options = parser.parse_args(args)
    for name in ("seeds", "parallel"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise InputError(f"--{name}: got {getattr(options, name)}, want 1 or more")
    ablation = Ablation.read(options.file)
    out = options.out or Path("runs/ablation") / options.file.stem
    names = chosen(ablation, options.only)

    from pmpseg.ablation import runs, table

    failed: list[str] = []

    def write() -> None:
        table.write(table.collect(ablation, out), out, options.file.stem.replace("_", " "))

    if not options.report:
        jobs = runs.jobs(ablation, out, options.seeds, names)
        for job in jobs:
            job.check()
        untimed = to_time(ablation, names, out)
        built = build(ablation, names | untimed)
        out.mkdir(parents=True, exist_ok=True)
        with alone(out):
            write()
            failed = runs.run(jobs, options.parallel or len(os.sched_getaffinity(0)), write)
            if untimed:
                time_steps({name: one for name, one in built.items() if name in untimed}, out)
    elif not out.is_dir():
        raise InputError(f"no runs in {out}: leave out --report, or give --out")
    write()
    print((out / "table.md").read_text(encoding="utf-8"))
    print(f"saved: {out / 'table.csv'} {out / 'table.md'}")
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return int(bool(failed))


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Two commands in one folder would train the same runs into each other."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another ablate is at work in {out}: wait for it, or give another --out") from None
        yield


def chosen(ablation: Ablation, only: Sequence[str] | None) -> set[str]:
    """The names to run: those wanted, the base, and what they need."""
    known = {*ablation.trainings, *ablation.evaluations}
    wanted = {ablation.base_name, *only} if only else known
    for name in only or ():
        if name not in known:
            raise InputError(f"--only {name}: {ablation.path} has {', '.join(sorted(known))}{cli.did_you_mean(name, known)}")
    return with_needs(ablation, wanted)


def with_needs(ablation: Ablation, wanted: set[str]) -> set[str]:
    while more := {needed for name in wanted for needed in ablation.needs(name)} - wanted:
        wanted = wanted | more
    return wanted


def build(ablation: Ablation, names: set[str]) -> dict[str, Any]:
    """Every training as ``pmpseg.fit`` builds it, and every second stage, so that mistakes are found before the first run."""
    from pmpseg import fit

    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    built: dict[str, Any] = {}
    names = with_needs(ablation, names)
    for name in ablation.in_order:
        if name in names:
            with named(f"{ablation.path}: {name}"):
                built[name] = fit.command_line(with_stand_ins(ablation.trainings[name], built).arguments(0))
    for name in names & ablation.evaluations.keys():
        with named(f"{ablation.path}: {name}"):
            check_second_stage(ablation.evaluations[name], built)
    return {name: built[name] for name in ablation.trainings if name in built}


def with_stand_ins(training: Training, built: dict[str, Any]) -> Training:
    """The training with stand-ins for the runs that it needs: what each of them begins with itself, or the shipped CLIP."""
    instead = {}
    for key, value in training.options.items():
        if needed := Training([], {key: value}).needs():
            head, _, tail = key.partition(".")
            config = built[needed.pop()].config
            own = next((config[place] for place in (f"{head}.init_args.{tail}", key) if place in config), "tiny_clip")
            instead[key] = own if own is None or isinstance(own, str) else "tiny_clip"
    return Training(training.configs, training.options | instead)


def check_second_stage(given: dict[str, Any], built: dict[str, Any]) -> None:
    from pmpseg.ablation.scoring import asked_as
    from pmpseg.region_stage import RegionStage

    if (region := given.get("region")) in built:
        model = built[region].model
        if not hasattr(model, "classifier"):
            raise InputError(f"region: got {region!r}, which trains no second stage: give a part that does, or a CLIP")
        asked_as(RegionStage(model.classifier, model.text), given)
    elif region:
        asked_as(RegionStage.load(region), given)


@contextmanager
def named(where: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def to_time(ablation: Ablation, names: set[str], out: Path) -> set[str]:
    """Whose steps to measure: nobody's, if all of these names have been, or else all that the file is to hold.

    Only what was measured in turns can be compared, so that one name more measures all again.
    """
    path = out / "step_seconds.json"
    known = set(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else set()
    rows = ablation.trainings.keys() - ablation.parts
    return set() if names & rows <= known else (names | known) & rows


def time_steps(built: dict[str, Any], out: Path) -> None:
    """Measures these in turns; step_seconds.json keeps it."""
    from pmpseg.ablation.timing import step_seconds

    print(f"timing a step of {', '.join(built)} in turns", file=sys.stderr)
    for one in built.values():
        one.datamodule.num_workers = 0
        if getattr(one.model, "embedder", None) is not None:
            one.model.show_as(one.datamodule.image_size)  # as a trainer's setup does
    seconds = step_seconds({name: (one.model, next(iter(one.datamodule.train_dataloader()))) for name, one in built.items()})
    with cli.whole_file(out / "step_seconds.json") as temporary:
        temporary.write_text(json.dumps(seconds, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
