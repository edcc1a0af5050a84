"""Does prompt guidance help? Blind proposals, PMP, and PMP reading another image's prompts, on scenes, over seeds.

    python scripts/ablate_prompt_attention.py --seeds 3 --steps 1500           # trains what is not there yet, two runs at a time
    python scripts/ablate_prompt_attention.py --report                         # the tables of what is there

Arms differ in ``--model.prompt_attention`` only: ``none``, ``pooled``, and ``shuffled``, which has PMP's parameters and
layers but reads the prompts of another image: what it gains over ``none`` is not guidance. Every run is a ``pmpseg.fit`` of
conf/pmp_scenes.yaml and leaves RUN/phrases.csv, one row a phrase, from which all tables are made; a stopped run is continued.

How phrases are scored: pmpseg.ablation.scoring. Many choices at a shorter budget: python -m pmpseg.ablate.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from pmpseg.ablation.runs import Job, run
from pmpseg.ablation.scoring import Phrases
from pmpseg.ablation.timing import step_seconds
from pmpseg.fit import command_line

ARMS = {"blind": "none", "pmp": "pooled", "shuffled": "shuffled"}
ACCURACIES = (0.5, 0.6, 0.7, 0.8, 0.9)
MATCHED = 0.7  # the column that tables by granularity are made at
KINDS = ("thing", "attributes", "group", "part", "stuff", "relation")
GROUPS = ("seen", "combination", "word")
ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/ablate_prompt_attention"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500, help="of 16 scenes")
    parser.add_argument("--test", type=int, default=480, help="test scenes; half as many for validation")
    parser.add_argument("--at-once", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--report", action="store_true", help="only print the tables of the runs that are there")
    parser.add_argument("options", nargs="*", help="after --: more options of pmpseg.fit, the same for all arms")
    args = parser.parse_args()
    failed = [] if args.report else train(args)
    report(args.out)
    if failed:
        raise SystemExit("\n".join(failed))


def train(args: argparse.Namespace) -> list[str]:
    """Trains and scores what is not there yet; returns the failures. All are scored on the same scenes and phrases."""
    common = ["-c", str(ROOT / "conf/pmp_scenes.yaml"), "--trainer.max_steps", str(args.steps)]
    common += ["--trainer.val_check_interval", str(args.steps // 3), "--trainer.enable_progress_bar", "false"]
    common += ["--data.val_length", "192", "--data.num_workers", "0", *args.options]
    scoring = {"data": {"val_length": args.test // 2, "test_length": args.test}}
    jobs = []
    for seed in range(args.seeds):
        for arm in args.arms:
            fit = [*common, "--model.prompt_attention", ARMS[arm], "--seed_everything", str(seed), "--data.seed", str(seed)]
            jobs.append(Job(arm, seed, args.out / f"{arm}_{seed}", {"fit": fit, "model": "model", "score": scoring}))
    for job in jobs:
        job.check()
    return run(jobs, args.at_once)


# ---- tables


def report(out: Path) -> None:
    runs = {arm: sorted(out.glob(f"{arm}_[0-9]*/phrases.csv")) for arm in ARMS}
    runs = {arm: paths for arm, paths in runs.items() if paths}
    if not runs:
        raise SystemExit(f"no runs in {out}: leave out --report")
    phrases = {arm: [Phrases(path) for path in paths] for arm, paths in runs.items()}
    counts = ", ".join(f"{arm} {len(paths)}" for arm, paths in runs.items())
    print(f"Runs: {counts}. Percent; mean ± standard deviation over seeds.")

    print("\nPhrase IoU on the test split at thresholds from validation, by the share of absent phrases answered with nothing")
    columns = {f"{a:.0%}": lambda p, a=a: p.mean_iou(p.threshold(a)) for a in ACCURACIES}
    print_table({arm: {name: [f(p) for p in ps] for name, f in columns.items()} for arm, ps in phrases.items()})
    print("  accuracy on the test split's absent phrases at these thresholds")
    columns = {f"{a:.0%}": lambda p, a=a: p.accuracy(p.threshold(a)) for a in ACCURACIES}
    print_table({arm: {name: [f(p) for p in ps] for name, f in columns.items()} for arm, ps in phrases.items()})

    print(f"\nPhrase IoU at {MATCHED:.0%} of absent phrases answered with nothing")
    parts: dict[str, Any] = {k: ("kind", k) for k in KINDS} | {g: ("group", g) for g in GROUPS}
    rows = {}
    for arm, ps in phrases.items():
        rows[arm] = {n: [p.mean_iou(p.threshold(MATCHED), getattr(p, a) == v) for p in ps] for n, (a, v) in parts.items()}
        rows[arm]["all"] = [p.mean_iou(p.threshold(MATCHED)) for p in ps]
    rows |= trivial(len({*csv_column(runs[next(iter(runs))][0], "scene")}))
    print_table(rows)

    print("\nRecall: the best IoU of any query, chosen by the truth")
    rows = {}
    for arm, ps in phrases.items():
        rows[arm] = {n: [p.mean_recall(getattr(p, a) == v) for p in ps] for n, (a, v) in parts.items()}
        rows[arm]["all"] = [p.mean_recall() for p in ps]
    print_table(rows)

    print("\nThe class list asked together: mIoU")
    scores = {arm: [numbers(path.with_name("scores.json")) for path in paths] for arm, paths in runs.items()}
    names = ("miou_seen", "miou_combination", "miou_word")
    print_table({arm: {n.removeprefix("miou_"): [s[n] for s in ss] for n in names} for arm, ss in scores.items()})
    print("\nCost")
    seconds = cost(list(runs))
    first = next(iter(seconds.values()))
    for arm, spent in seconds.items():
        print(f"  {arm:10} {scores[arm][0]['parameters']:>10,} parameters   {spent:.3f} CPU-s a step   x{spent / first:.3f}")
    print("\nValidation mIoU over the run (have the curves flattened?)")
    for arm, paths in runs.items():
        histories = [json.loads(path.with_name("metrics.json").read_text())["history"] for path in paths]
        steps = [h["step"] for h in histories[0]]
        means = [100 * np.mean([h[i]["miou"] for h in histories]) for i in range(len(steps))]
        print(f"  {arm:10} " + "  ".join(f"{step}: {mean:.1f}" for step, mean in zip(steps, means, strict=True)))


def numbers(path: Path) -> dict[str, float]:
    scores = json.loads(path.read_text())
    return scores.get("numbers", scores)  # which earlier versions wrote alone


def csv_column(path: Path, name: str) -> list[str]:
    with path.open() as file:
        return [row[name] for row in csv.DictReader(file) if row["split"] == "test"]


def print_table(rows: dict[str, dict[str, list[float]]]) -> None:
    names = list(next(iter(rows.values())))
    print(f"  {'':14}" + "".join(f"{name:>14}" for name in names))
    for row, values in rows.items():
        cells = []
        for name in names:
            v = 100 * np.array(values[name])
            cells.append(f"{v.mean():.1f}" + (f" ± {v.std(ddof=1):.1f}" if len(v) > 1 else ""))
        print(f"  {row:14}" + "".join(f"{cell:>14}" for cell in cells))


def trivial(count: int) -> dict[str, dict[str, list[float]]]:
    """Two lazy answers on the same phrases, and how often they rightly answer nothing."""
    from scenes_oracles import all_things, asked, same_colour
    from scenes_oracles import iou as mask_iou

    from pmpseg.data import Scenes

    dataset = Scenes(test_length=count).dataset("test")
    table = {}
    for answer in (all_things, same_colour):
        values: dict[str, list[float]] = {name: [] for name in (*KINDS, *GROUPS, "all", "absent")}
        for index in range(count):
            scene = dataset.scene(index)
            for phrase in asked(dataset, index):
                truth = phrase.mask(scene)
                given = answer(scene, phrase, truth)
                if truth.any():
                    for name in (phrase.kind, phrase.group, "all"):
                        values[name].append(mask_iou(given, truth))
                else:
                    values["absent"].append(float(not given.any()))
        rejected = np.mean(values.pop("absent"))
        name = answer.__name__.replace("_", " ")
        table[f"{name} {rejected:.0%}"] = {k: [float(np.mean(v))] for k, v in values.items()}
    return table


def cost(arms: list[str]) -> dict[str, float]:
    """CPU seconds of a training step of each arm."""
    models = {}
    for arm in arms:
        conf = str(ROOT / "conf/pmp_scenes.yaml")
        built = command_line(["-c", conf, "--model.prompt_attention", ARMS[arm], "--data.num_workers", "0"])
        models[arm] = built.model, next(iter(built.datamodule.train_dataloader()))
    return step_seconds(models)


if __name__ == "__main__":
    main()
