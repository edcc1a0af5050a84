"""Does tuning a CLIP on regions help to name them, and how? OVSeg's table 3 (and 6), on scenes, over seeds.

    python scripts/region_table.py --choose                # learning rates for the tiny CLIP, by the validation split
    python scripts/region_table.py --seeds 3               # before, MPT only, FT only, FT then MPT
    python scripts/region_table.py --seeds 1 --arms depth  # MPT with 1, 3 and 6 layers of prompts

Each run is a ``pmpseg.fit`` of conf/region_scenes.yaml on true masks of seen classes; what was trained is not trained again. The
score is zero-shot accuracy over the whole class list (55 names; held-out combinations and words among them) on true masks of test
scenes, the same for all seeds. MPT tunes the mask prompts alone, FT the image side alone; FT then MPT goes on from FT, so it has
twice the steps of either. FT then FT is its control, with as many steps and no prompts. Percent, mean +- standard deviation.
"""

import argparse
import json
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch

from pmpseg import fit
from pmpseg.cli import whole_file
from pmpseg.data import SceneRegions
from pmpseg.region_metrics import RegionAccuracy
from pmpseg.region_stage import RegionStage

CONF = Path(__file__).parents[1] / "conf" / "region_scenes.yaml"
SHOWN = {"accuracy": "all", "accuracy_seen": "seen", "accuracy_combination": "combination", "accuracy_word": "word"}
TABLE = ("before", "MPT only", "FT only", "FT then MPT", "FT then FT")
DEPTHS = ("MPT depth 1", "MPT depth 3", "MPT depth 6")
LRS, PROMPT_LRS = (1e-4, 3e-4, 1e-3), (5e-3, 2e-2, 5e-2)
CHOOSING = 100  # a seed that no run of the table has


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/region_table"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50, help="of each tuning")
    parser.add_argument("--scenes", type=int, default=8, help="of 4 regions, in a step")
    parser.add_argument("--test", type=int, default=150, help="test scenes")
    parser.add_argument("--arms", choices=("table", "depth"), default="table")
    parser.add_argument("--choose", action="store_true", help="learning rates, by validation; into OUT/chosen.json")
    args = parser.parse_args()
    if args.choose:
        choose(args)
        return
    chosen = args.out / "chosen.json"
    rates = json.loads(chosen.read_text()) if chosen.is_file() else {"lr": 1e-3, "prompt_lr": 5e-2}  # as chosen once
    arms = TABLE if args.arms == "table" else DEPTHS
    rows: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    for seed, arm in product(range(args.seeds), arms):
        if arm == "before" and seed:
            continue
        rows[arm].append(score(args, arm, seed, rates))
        print(f"{arm}, seed {seed}: " + ", ".join(f"{SHOWN[k]} {100 * v:.1f}" for k, v in rows[arm][-1].items()), flush=True)
    print(f"\n{args.steps} steps of {4 * args.scenes} regions, {rates}\n")
    print(f"{'':12}" + "".join(f"{name:>16}" for name in SHOWN.values()))
    for arm, scores in rows.items():
        cells = [100 * np.array([s[k] for s in scores]) for k in SHOWN]
        print(f"{arm:12}" + "".join(f"{c.mean():9.1f} ± {c.std(ddof=1):4.1f}" if len(c) > 1 else f"{c[0]:16.1f}" for c in cells))


def train(args: argparse.Namespace, arm: str, seed: int, rates: dict[str, float]) -> Path:
    """The run's folder, trained now if it is not there whole."""
    name = arm.replace(" ", "_") + f"_{args.steps}x{args.scenes}_{rates['lr']:g}_{rates['prompt_lr']:g}_{seed}"
    folder = args.out / name
    if (folder / "model").is_dir():
        return folder
    clip = train(args, "FT only", seed, rates) / "model" if arm.startswith("FT then") else "tiny_clip"
    options = {"model.clip": clip, "model.tune": "all" if arm.endswith(("FT", "FT only")) else "prompts"}
    options |= {"model.mask_prompt_depth": arm.split()[-1] if "depth" in arm else 3}
    options |= {"model.lr": rates["lr"], "model.prompt_lr": rates["prompt_lr"]}
    options |= {"trainer.default_root_dir": folder, "trainer.max_steps": args.steps, "trainer.val_check_interval": args.steps}
    # FT again sees scenes that FT has not seen, as MPT after it does.
    options |= {"seed_everything": seed, "data.seed": seed + 1000 * arm.startswith("FT then")}
    options |= {"data.batch_size": args.scenes, "data.val_length": 64, "data.num_workers": 0}
    options |= {"trainer.enable_progress_bar": "false", "trainer.accelerator": "cpu"}
    start = time.perf_counter()
    fit.main(["-c", str(CONF), *(str(word) for key, value in options.items() for word in (f"--{key}", value))])
    print(f"{arm}, seed {seed}: trained in {time.perf_counter() - start:.0f} s", flush=True)
    return folder


def score(args: argparse.Namespace, arm: str, seed: int, rates: dict[str, float]) -> dict[str, float]:
    """Test accuracy; kept beside the run's model."""
    args.out.mkdir(parents=True, exist_ok=True)
    folder = args.out if arm == "before" else train(args, arm, seed, rates)
    kept = folder / f"test_{args.test}.json"
    if not kept.is_file():
        stage = RegionStage.load("tiny_clip" if arm == "before" else folder)
        stage.text.templates = ("a {}",)
        data = SceneRegions(test_length=args.test, num_workers=0)
        accuracy = RegionAccuracy(data.vocabulary, data.class_groups)
        for batch in data.test_dataloader():
            accuracy.update(stage.classifier, stage.text, batch)
        with whole_file(kept) as temporary:
            temporary.write_text(json.dumps(accuracy.compute()))
    scores = json.loads(kept.read_text())
    return {key: scores[key] for key in SHOWN}


def choose(args: argparse.Namespace) -> None:
    """The rate of FT that validates best, then that of MPT, each alone and from the tiny CLIP."""
    rates = {"lr": LRS[0], "prompt_lr": PROMPT_LRS[0]}
    for key, arm, tried in (("lr", "FT only", LRS), ("prompt_lr", "MPT only", PROMPT_LRS)):
        found = {}
        for rate in tried:
            run = train(args, arm, CHOOSING, rates | {key: rate})
            found[rate] = json.loads((run / "metrics.json").read_text())["best"]["accuracy"]
            print(f"{arm}, {key} {rate:g}: validation accuracy {100 * found[rate]:.1f}", flush=True)
        rates[key] = max(found, key=lambda rate: found[rate])
    with whole_file(args.out / "chosen.json") as temporary:
        temporary.write_text(json.dumps(rates))
    print(f"chosen: {rates}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
