"""Starting what is not done, several processes at a time; a stop ends them, and the next start continues them."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pmpseg import cli
from pmpseg.ablation.job import is_trained
from pmpseg.ablation.spec import Ablation
from pmpseg.errors import InputError

# One thread each, none that spins; large arrays are kept instead of returned (see the Makefile).
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
ENVIRONMENT |= {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "1000000000"}
COMMAND = [sys.executable, "-m", "pmpseg.ablation.job"]
PATIENCE = 10  # seconds that a process has to end


@dataclass
class Job:
    """One (name, seed): what its process is to do, and the folders that must be done before."""

    name: str
    seed: int
    folder: Path
    settings: dict[str, Any]
    needs: list[Path] = field(default_factory=list)

    @property
    def done(self) -> bool:
        trained = not self.settings["fit"] or is_trained(self.folder)
        return trained and (self.settings["score"] is None or (self.folder / "scores.json").is_file())

    def check(self) -> None:
        """Raises ``InputError`` if the folder holds a run of other settings."""
        kept = self.folder / "settings.json"
        if not kept.is_file():
            return
        try:
            before = dict(json.loads(kept.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise InputError(f"{kept} is broken, so this may be any run: give another --out, or remove its folder") from None
        if before != self.settings:
            was, now = (_as_text(s) for s in (before, self.settings))
            raise InputError(f"{self.folder} was made with '{was}', now asked for '{now}': give another --out, or remove it")

    def start(self) -> "subprocess.Popen[bytes]":
        self.folder.mkdir(parents=True, exist_ok=True)
        with cli.whole_file(self.folder / "settings.json") as temporary:
            temporary.write_text(json.dumps(self.settings, indent=1) + "\n", encoding="utf-8")
        command = [*COMMAND, str(self.folder)]
        with (self.folder / "log.txt").open("ab") as log:
            return subprocess.Popen(  # in a group of its own, since Ctrl-C is ours to pass on
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=os.environ | ENVIRONMENT, process_group=0
            )

    def last_words(self) -> str:
        lines = (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def jobs(ablation: Ablation, out: Path, seeds: int, only: set[str]) -> list[Job]:
    """Seed by seed, so that a table that is stopped has all of its rows."""
    names = [name for name in (*ablation.trainings, *ablation.evaluations) if name in only]
    return [_job(ablation, out, name, seed) for seed in range(seeds) for name in names]


def _job(ablation: Ablation, out: Path, name: str, seed: int) -> Job:
    folders = {other: out / f"{other}_{seed}" for other in ablation.trainings}
    needs = [folders[other] for other in sorted(ablation.needs(name))]
    if given := ablation.evaluations.get(name):
        model = f"../{folders[given['model']].name}/model"
        score = {key: value for key, value in given.items() if key != "model"}
        if (part := given.get("region")) in folders:
            score["region"] = f"../{folders[part].name}/model"
        settings: dict[str, Any] = {"fit": None, "model": model, "score": score}
    else:
        words = [_filled(word, folders) for word in ablation.trainings[name].arguments(seed)]
        fit = [*words, "--trainer.enable_progress_bar", "false"]
        settings = {"fit": fit, "model": "model", "score": None if name in ablation.parts else {"asked": ablation.asked}}
    return Job(name, seed, out / f"{name}_{seed}", settings, needs)


def _as_text(settings: dict[str, Any]) -> str:
    return " ".join(map(str, settings.get("fit") or settings.values()))


def _filled(word: str, folders: dict[str, Path]) -> str:
    for name, folder in folders.items():
        word = word.replace(f"{{{name}}}", str(folder))
    return word


def run(wanted: list[Job], parallel: int, after_each: Callable[[], object] = lambda: None) -> list[str]:
    """Runs what is not done, ``parallel`` at a time, and returns the failures, one line each; the others go on."""
    waiting = [job for job in wanted if not job.done]
    failed: dict[Path, str] = {}
    shown = 0.0
    running: dict[subprocess.Popen[bytes], Job] = {}
    bar = tqdm(total=len(wanted), initial=len(wanted) - len(waiting), desc="runs", unit="run", smoothing=0)
    try:
        while waiting or running:
            pending = {job.folder for job in (*waiting, *running.values())}
            for job in [job for job in waiting if not pending.intersection(job.needs)]:
                if missing := failed.keys() & set(job.needs):
                    failed[job.folder] = f"{job.folder.name}: {missing.pop().name}, which it needs, failed"
                    waiting.remove(job)
                    bar.update()
                elif len(running) < parallel:
                    running[job.start()] = job
                    waiting.remove(job)
            now = ", ".join(job.folder.name for job in running.values())
            if now != bar.postfix or time.monotonic() > shown + 5:
                bar.set_postfix_str(now)
                shown = time.monotonic()
            for process in [process for process in running if process.poll() is not None]:
                job = running.pop(process)
                stop(process)  # closes its standard input
                if not job.done:
                    failed[job.folder] = f"{job.folder.name}: {job.last_words()} (log: {job.folder / 'log.txt'})"
                    bar.write(f"failed: {failed[job.folder]}", file=sys.stderr)
                bar.update()
                after_each()
            time.sleep(0.1)
    finally:
        bar.close()
        for process in running:
            stop(process)
    return list(failed.values())


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Ends a job's process; what it was writing is whole or not there."""
    if process.stdin:
        process.stdin.close()  # at which it ends
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
