"""Does prompt guidance help? Blind proposals, PMP, and PMP reading another image's prompts, on scenes, over seeds.

    python scripts/ablate_prompt_attention.py --seeds 3 --steps 1500           # trains what is not there yet, two runs at a time
    python scripts/ablate_prompt_attention.py --report                         # the tables of what is there

Arms differ in ``--model.prompt_attention`` only: ``none``, ``pooled``, and ``shuffled``, which has PMP's parameters and
layers but reads the prompts of another image: what it gains over ``none`` is not guidance. Every run is a ``pmpseg.fit`` of
conf/pmp_scenes.yaml and leaves RUN/phrases.csv, one row a phrase, from which all tables are made; a stopped run is continued.

A phrase is answered with one mask if its score is above a threshold. Thresholds are chosen on the validation split so that a
given share of absent phrases is rightly answered with nothing, and applied to the test split: models are compared at the same
accuracy there, or anyone could win by answering more. *Recall* is the best IoU of any query, chosen by the truth: what the
proposals hold, apart from the selection.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pmpseg.cli import whole_file

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
    parser.add_argument("--score", type=Path, help=argparse.SUPPRESS)  # one run, in a process of its own
    parser.add_argument("options", nargs="*", help="after --: more options of pmpseg.fit, the same for all arms")
    args = parser.parse_args()
    if args.score:
        score(args.score, args.test)
        return
    if not args.report:
        jobs = [(arm, seed) for seed in range(args.seeds) for arm in args.arms]
        with ThreadPoolExecutor(args.at_once) as pool:
            list(pool.map(lambda job: run(*job, args), jobs))
    report(args.out)


def run(arm: str, seed: int, args: argparse.Namespace) -> None:
    folder = args.out / f"{arm}_{seed}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "1000000000"}
    folder.mkdir(parents=True, exist_ok=True)
    settings, kept = json.dumps({"steps": args.steps, "test": args.test, "options": args.options}), folder / "settings.json"
    if kept.exists() and kept.read_text() != settings:
        raise SystemExit(f"{folder} was made with {kept.read_text()}, now asked for {settings}: give another --out")
    kept.write_text(settings)
    with (folder / "log.txt").open("a") as log:
        if not (folder / "model").exists():
            command = [sys.executable, "-m", "pmpseg.fit", "-c", str(ROOT / "conf/pmp_scenes.yaml")]
            command += ["--model.prompt_attention", ARMS[arm], "--seed_everything", str(seed), "--data.seed", str(seed)]
            command += ["--trainer.default_root_dir", str(folder), "--trainer.max_steps", str(args.steps)]
            command += ["--trainer.val_check_interval", str(args.steps // 3), "--trainer.enable_progress_bar", "false"]
            command += ["--data.val_length", "192", "--data.num_workers", "0", *args.options]
            if (folder / "checkpoints" / "last.ckpt").exists():
                command += ["--ckpt_path", "last"]
            subprocess.run(command, check=True, env=environment, stdout=log, stderr=log)
        if not (folder / "phrases.csv").exists():
            command = [sys.executable, __file__, "--score", str(folder), "--test", str(args.test)]
            subprocess.run(command, check=True, env=environment, stdout=log, stderr=log)
    print(f"done: {folder}", flush=True)


# ---- scoring one run: a row a phrase, and the class list's mIoU


@torch.inference_mode()
def score(folder: Path, test: int) -> None:
    from pmpseg import Segmenter
    from pmpseg.data import Scenes
    from pmpseg.evaluate import evaluate
    from pmpseg.inference import answers, soft_masks, upsample
    from pmpseg.models.query_decoder import Features

    segmenter = Segmenter.load(folder / "model")
    network, rows = segmenter.network, []
    # The same scenes and phrases for all seeds of training: seed 0 is that of the data's default.
    data = Scenes(val_length=test // 2, test_length=test, num_workers=0)
    for split in ("val", "test"):
        dataset = data.dataset(split)
        for index in range(len(dataset)):
            item = dataset[index]
            image = item["image"][None].float() / 255
            size = (image.shape[-2], image.shape[-1])
            asked = [k for k, phrase in enumerate(item["prompts"]) if phrase]
            # In any order: present ones come first in an item, and what "shuffled" reads depends on the place.
            asked = list(np.random.default_rng(index).permutation(asked))
            prompts = segmenter.text.encode([item["prompts"][k] for k in asked]).one_by_one()
            features: Features = network.encode(image)
            prediction = network.decode(features.repeat(len(asked)), prompts)
            soft, scores = soft_masks(prediction)  # (N, 1, h, w) and (N, 1)
            found = answers(upsample(soft, size), scores)[:, 0] > 0
            truth = item["prompt_masks"][asked]
            proposals = upsample(prediction.mask_logits, size) > 0
            best = iou(proposals, truth[:, None]).amax(1)
            for n, k in enumerate(asked):
                kind, group = item["phrase_kind"][k].split()
                row = {"split": split, "scene": index, "phrase": item["prompts"][k], "kind": kind, "group": group}
                row |= {"present": int(truth[n].any()), "score": round(float(scores[n, 0]), 6)}
                row |= {"iou": round(float(iou(found[n], truth[n])), 6), "recall": round(float(best[n]), 6)}
                rows.append(row)
    classes = evaluate(segmenter, data, "test")
    numbers = {k: classes[k] for k in ("miou_seen", "miou_combination", "miou_word")}
    numbers |= {"parameters": sum(p.numel() for p in network.parameters())}
    (folder / "scores.json").write_text(json.dumps(numbers, indent=1) + "\n")
    with whole_file(folder / "phrases.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    union = (a | b).flatten(-2).sum(-1)
    return (a & b).flatten(-2).sum(-1) / union.clamp(min=1)


# ---- tables


class Phrases:
    """The rows of one run's phrases.csv as arrays."""

    def __init__(self, path: Path) -> None:
        with path.open() as file:
            rows = list(csv.DictReader(file))
        column = {k: np.array([row[k] for row in rows]) for k in rows[0]}
        self.test, self.present = column["split"] == "test", column["present"] == "1"
        self.kind, self.group = column["kind"], column["group"]
        self.score, self.iou, self.recall = (column[k].astype(float) for k in ("score", "iou", "recall"))

    def threshold(self, accuracy: float) -> float:
        """The least one that answers this share of validation's absent phrases with nothing."""
        return float(np.quantile(self.score[~self.test & ~self.present], accuracy, method="higher"))

    def accuracy(self, threshold: float) -> float:
        return float((self.score[self.test & ~self.present] <= threshold).mean())

    def mean_iou(self, threshold: float, chosen: Any = True) -> float:
        here = self.test & self.present & chosen
        return float((self.iou * (self.score > threshold))[here].mean())

    def mean_recall(self, chosen: Any = True) -> float:
        return float(self.recall[self.test & self.present & chosen].mean())


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
    scores = {arm: [json.loads(path.with_name("scores.json").read_text()) for path in paths] for arm, paths in runs.items()}
    names = ("miou_seen", "miou_combination", "miou_word")
    print_table({arm: {n.removeprefix("miou_"): [s[n] for s in ss] for n in names} for arm, ss in scores.items()})
    print("\nCost")
    seconds = step_seconds(list(runs))
    first = next(iter(seconds.values()))
    for arm, spent in seconds.items():
        print(f"  {arm:10} {scores[arm][0]['parameters']:>10,} parameters   {spent:.3f} CPU-s a step   x{spent / first:.3f}")
    print("\nValidation mIoU over the run (have the curves flattened?)")
    for arm, paths in runs.items():
        histories = [json.loads(path.with_name("metrics.json").read_text())["history"] for path in paths]
        steps = [h["step"] for h in histories[0]]
        means = [100 * np.mean([h[i]["miou"] for h in histories]) for i in range(len(steps))]
        print(f"  {arm:10} " + "  ".join(f"{step}: {mean:.1f}" for step, mean in zip(steps, means, strict=True)))


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


def step_seconds(arms: list[str], repeat: int = 12) -> dict[str, float]:
    """CPU seconds of a training step of each arm, taken in turns in one process: the median."""
    import yaml

    from pmpseg.data import Scenes
    from pmpseg.training import PMPModule
    from pmpseg.training.pmp import prompt_targets

    torch.set_num_threads(1)
    model = yaml.safe_load((ROOT / "conf/pmp_scenes.yaml").read_text())["model"]["init_args"]
    batch = next(iter(Scenes(train_length=16, num_workers=0).train_dataloader()))
    modules = {}
    for arm in arms:
        torch.manual_seed(0)
        modules[arm] = PMPModule(**(model | {"prompt_attention": ARMS[arm]}))
        modules[arm].network.train()
    spent: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(repeat):
        for arm, module in modules.items():
            start = time.process_time()
            prompts = module.text.encode_batch(batch["prompts"])
            masks = prompt_targets(batch)
            prediction = module.network(batch["image"].float() / 255, prompts)
            module.loss(prediction, masks, prompts.valid & masks.flatten(2).any(-1))["loss"].backward()
            spent[arm].append(time.process_time() - start)
            module.zero_grad()
    return {arm: float(np.median(times[2:])) for arm, times in spent.items()}


if __name__ == "__main__":
    main()
