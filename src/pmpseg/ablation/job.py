"""One run in a process of its own: ``python -m pmpseg.ablation.job FOLDER`` does what FOLDER/settings.json says.

It trains, continuing what was begun, and then scores: phrases.csv, one row a phrase, and at last scores.json. The process ends
when its standard input does, and so with the one that started it, however that ends: no run goes on unseen.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from pmpseg import cli


def main() -> None:
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    folder = Path(sys.argv[1])
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    seconds = train(folder, settings["fit"]) if settings["fit"] else None
    if settings["score"] is not None:
        score(folder, folder / settings["model"], settings["score"], seconds)


def train(folder: Path, arguments: list[str]) -> float | None:
    """Runs ``pmpseg.fit`` if that is not done; returns its seconds, or None if it had been begun before."""
    if is_trained(folder):
        return None
    from pmpseg import fit

    begun = (folder / "checkpoints" / "last.ckpt").is_file()
    start = time.monotonic()
    fit.main([*arguments, "--trainer.default_root_dir", str(folder), *(["--ckpt_path", "last"] if begun else [])])
    return None if begun else time.monotonic() - start


def is_trained(folder: Path) -> bool:
    return (folder / "model" / "config.json").is_file()  # what a run writes last


def score(folder: Path, model: Path, options: dict[str, Any], train_seconds: float | None = None) -> None:
    """Scores a model on its own data with seed 0, so that the scenes and phrases are the same for all seeds of training.

    ``options``: ``data``, arguments of it that differ in scoring; ``asked`` of ``score_splits``; ``region``, a region model's
    folder or a CLIP, with what ``asked_as`` changes.
    """
    from pmpseg.ablation.forms import score_forms
    from pmpseg.ablation.scoring import Phrases, asked_as, score_splits
    from pmpseg.ablation.table import write_rows
    from pmpseg.evaluate import build_data, own_data
    from pmpseg.region_stage import RegionStage
    from pmpseg.segmenter import Segmenter

    segmenter = Segmenter.load(model)
    if region := options.get("region"):
        segmenter.region = asked_as(RegionStage.load(folder / region if region.startswith("../") else region), options)
    spec = own_data(segmenter.data, str(model))
    changed = {"seed": 0, "num_workers": 0, **options.get("data", {})}
    data = build_data(spec | {"init_args": (spec.get("init_args") or {}) | changed})
    start = time.process_time()
    rows: list[dict[str, Any]] = []
    if options.get("asked") == "forms":
        numbers = score_forms(segmenter, data)
    else:
        rows, numbers = score_splits(segmenter, data, options.get("asked", "alone"))
    images = len(data.dataset("val")) + len(data.dataset("test"))
    passes = 2 if "image_iou" in numbers else 1  # by text and by example
    numbers |= {"image_seconds": (time.process_time() - start) / images / passes}
    numbers |= {"parameters": sum(p.numel() for p in segmenter.network.parameters())}
    if segmenter.region:
        numbers["parameters"] += sum(p.numel() for p in segmenter.region.classifier.parameters())
    if rows:
        write_rows(folder / "phrases.csv", rows)
        numbers |= Phrases(folder / "phrases.csv").numbers()
    trained = json.loads((model.parent / "metrics.json").read_text(encoding="utf-8"))
    numbers |= {f"val_{name}": value for name, value in trained["best"].items() if name not in ("step", "threshold")}
    record = {"steps": trained["history"][-1]["step"], "seconds": train_seconds, "commit": commit()}
    with cli.whole_file(folder / "scores.json") as temporary:
        temporary.write_text(json.dumps({"record": record, "numbers": numbers}, indent=1) + "\n")


def commit() -> str:
    """The commit of this package's checkout, "+" if files differ from it; "" outside of one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        return name + "+" * bool(subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout)
    except (OSError, subprocess.CalledProcessError):
        return ""


def _end_with_stdin() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    cli.run(main)
