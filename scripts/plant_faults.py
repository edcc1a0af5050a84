"""Does the suite notice? Plants one small fault at a time into a copy of the code and runs the tests that should catch it.

    python scripts/plant_faults.py [--only NAME] [--jobs 1]

Prints for each fault which test failed first; exits with 1 if a fault is not caught, or if what it replaces is no longer there.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
# name: (file, what stands there, what is put there, tests)
FAULTS = {
    "swapped axes of the position embedding": (
        "models/attention.py",
        "torch.cat([y[:, None].expand(-1, width, -1), x[None].expand(height, -1, -1)], -1)",
        "torch.cat([x[:, None].expand(-1, height, -1), y[None].expand(width, -1, -1)], -1)",
        "test_pmp.py",
    ),
    "off by one in the ignored label": ("metrics.py", "valid = target != ignore_index", "valid = target < ignore_index - 1", "test_metrics.py"),
    "names are not normalised": ("models/query_decoder.py", "return F.normalize(names.float(), dim=-1)", "return names.float()", "test_pmp.py"),
    "images are not divided by their deviation": ("models/backbone.py", "(image - self.mean) / self.std", "(image - self.mean)", "test_backbone.py"),
    "padding prompts are read": ("models/prompt_attention.py", "text.tokens, text.tokens, text.valid[:, None, None]", "text.tokens, text.tokens, None", "test_pmp.py"),
    "a query looks where it is blocked": ("models/query_decoder.py", "else ~blocked[:, None]", "else blocked[:, None]", "test_pmp.py"),
    "dice counts what is ignored": ("point_losses.py", "prob, truth = logits.sigmoid() * inside, truth * inside", "prob, truth = logits.sigmoid(), truth", "test_losses.py test_properties.py"),
    "matching forgets the masks' BCE": ("losses.py", 'self.weights["mask"] * each +', '0 * self.weights["mask"] * each +', "test_losses.py"),
    "the normaliser is summed over ranks, not averaged": ("losses.py", "value = value / torch.distributed.get_world_size()", "value = value", "test_several_processes.py"),
    "few prompts are up to four": ("training/pmp.py", "torch.randint(1, 4, rows", "torch.randint(1, 5, rows", "test_training.py"),
    "run lengths row by row": ("rle.py", 'pixels = mask.astype(bool).ravel(order="F")', "pixels = mask.astype(bool).ravel()", "test_rle.py test_properties.py"),
    "images are padded at the left": (
        "models/backbone.py",
        "(0, -maps.shape[-1] % multiple, 0, -maps.shape[-2] % multiple)",
        "(-maps.shape[-1] % multiple, 0, 0, -maps.shape[-2] % multiple)",
        "test_properties.py test_pmp.py",
    ),
    "upsampling aligns corners": ("inference.py", 'maps = F.interpolate(maps, padded, mode="bilinear", align_corners=False)', 'maps = F.interpolate(maps, padded, mode="bilinear", align_corners=True)', "test_pmp.py"),
    "no object takes part in the class list": ("models/prompts.py", "return self.class_logits.softmax(-1)[..., :-1]", "return self.class_logits[..., :-1].softmax(-1)", "test_pmp.py"),
    "Swin shifts before it pads": (
        "models/swin.py",
        "        x = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))\n        padded = x.shape[1:3]\n        mask = None\n        if any(shift):\n            x = x.roll((-shift[0], -shift[1]), (1, 2))\n",
        "        x = x.roll((-shift[0], -shift[1]), (1, 2))\n        x = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))\n        padded = x.shape[1:3]\n        mask = None\n        if any(shift):\n",
        "test_from_transformers.py",
    ),
    "the gate of what is read is half open": ("models/prompt_attention.py", "nn.Parameter(torch.zeros(dim)) if gated", "nn.Parameter(torch.full((dim,), 0.5)) if gated", "test_pmp.py test_from_transformers.py"),
    "deformable points are half a pixel off": ("models/deformable.py", "* extent - 0.5", "* extent", "test_deformable.py"),
    "a table of rows gets its gradient by other weights": ("models/deformable.py", "weight.flatten()[order]", "weight.flatten()", "test_deformable.py"),
    "a query answers a prompt that it is not asked": ("losses.py", "cost.masked_fill(class_logits.gather(2, every) <= NOT_ASKED, 1e6)", "cost", "test_pmp.py"),
    "masks as products of another image": ("losses.py", "masks[order.argsort()][:, None]", "masks[:, None]", "test_losses.py"),
    "stuff counts as things": ("panoptic.py", "if label not in things:", "if label in things:", "test_panoptic.py"),
    "regions without a pixel are named by the CLIP": ("models/region.py", "torch.where(valid[..., None], phat**weight, 1.0)", "phat**weight", "test_region.py"),
    "patches that are cut are replaced, too": ("models/mask_prompts.py", ".ceil().flatten(1) > 0", ".floor().flatten(1) > 0", "test_mask_prompts.py"),
    "a threshold counts as above": ("metrics.py", "thresholds, out_int32=True)", "thresholds, out_int32=True, right=True)", "test_metrics.py"),
    "a continued run begins its epoch anew": ("data/base.py", "self.skip if epoch == self.first else 0", "0", "test_resume.py test_properties.py"),
    "every step draws the same": ("training/resume.py", "[self.seed, number, trainer.global_rank]", "[self.seed, 0, trainer.global_rank]", "test_resume.py"),
    "the last validation image counts twice": ("data/base.py", "self.own = range(rank, len(dataset), world_size)", "self.own = [i % len(dataset) for i in range(rank, len(dataset) + -len(dataset) % world_size, world_size)]", "test_folder.py test_properties.py"),
    "masks are not flipped with their image": ("data/transforms.py", "np.ascontiguousarray(result[key][..., ::-1])", "np.ascontiguousarray(result[key])", "test_transforms.py"),
    "a visual prompt repeats the border that it mirrors": ("visual_prompts.py", "period = max(2 * (length - 1), 1)", "period = max(2 * length - 1, 1)", "test_image_prompts.py"),
    "the background is dimmed towards black, whatever the mean": ("visual_prompts.py", "background = nothing + settings.background * (background - nothing)", "background = settings.background * background", "test_image_prompts.py"),
    "crops grow by their longer side": ("visual_prompts.py", "for side in (x1 - x0, y1 - y0))", "for side in [max(x1 - x0, y1 - y0)] * 2)", "test_image_prompts.py"),
    "crops grow by a rounding error": ("visual_prompts.py", "math.ceil(context * side - 1e-6)", "math.ceil(context * side)", "test_image_prompts.py"),
    "crops are put into the corner of their square": ("visual_prompts.py", "top, left = (side - height) // 2, (side - width) // 2", "top = left = 0", "test_image_prompts.py"),
    "levels are read shallowest first": ("models/clipseg.py", "reversed(tokens)", "tokens", "test_clipseg.py"),
    "a prompt's shift has the wrong sign": ("models/clipseg.py", "first[:, None] + shift", "first[:, None] - shift", "test_clipseg.py"),
    "text and example change places": ("supports.py", "weight * prompts.pooled + (1 - weight) *", "(1 - weight) * prompts.pooled + weight *", "test_clipseg.py"),
    "a tile's rows and columns are swapped": ("models/light_decoder.py", "bchw,coij->bohiwj", "bchw,coji->bohiwj", "test_clipseg.py"),
    "texts stand in for missing examples": ("evaluation.py", 'having = [k for k in asked if batch["support_valid"][i, k].any()]', "having = asked", "test_protocols.py::test_one_shot_from_yaml_to_numbers"),
    "masks lose what is counted out": ("training/clipseg.py", "(each * counted).sum()", "each.sum()", "test_clipseg_training.py"),
    "an opaque mask is all object": ("image_prompts.py", "if alpha.min() < 255:", "if True:", "test_image_prompts.py"),
    "a palette's numbers are a mask": ("image_prompts.py", 'picture.mode not in ("1", "L", "F")', 'picture.mode not in ("1", "L", "F", "P")', "test_image_prompts.py"),
    "a support of too few pixels": ("data/scene_support.py", "np.count_nonzero(mask) >= SMALLEST", "np.count_nonzero(mask)", "test_scene_support.py"),
    "supports of training come from test scenes": ("data/scenes.py", 'self.split == "test")', "True)", "test_scene_support.py"),
    "supports are the same in every epoch": ("data/scenes.py", "[self.seed, index, epoch, 3]", "[self.seed, index, 0, 3]", "test_scene_support.py"),
    "supports are the training scenes": ("data/scene_support.py", "False: 3_000_003", "False: 0", "test_scene_support.py"),
    "evaluate: a mirror image is not turned back": ("views.py", "return found.flip(-1) if one.mirrored else found", "return found", "test_views.py"),
    "evaluate: windows' weights are not divided by": ("views.py", "total[rows, columns] += weight", "total[rows, columns] += 1", "test_views.py"),
    "evaluate: a window too few": ("views.py", "math.ceil((length - window) / step) + 1", "max(2, math.ceil((length - window) / step))", "test_views.py"),
    "evaluate: a chunk's classes count from 0": ("inference.py", "torch.where(best > top, index + start, labels)", "torch.where(best > top, index, labels)", "test_views.py"),
    "evaluate: 255 is ignored, whatever the data says": ("evaluation.py", "ConfusionMetrics(len(vocabulary), ignore_index,", "ConfusionMetrics(len(vocabulary), 65534,", "test_evaluate.py::test_847_classes_against_plain_numpy"),
    "evaluate: unseen classes count as learned": ("evaluate.py", "for index in learned.seen for word", "for index in range(len(learned)) for word", "test_evaluate.py::test_the_command_prints_and_saves"),
    "evaluate: the last images count twice": ("data/base.py", "self.own = range(rank, len(dataset), world_size)", "self.own = [min(i, len(dataset) - 1) for i in range(rank, -(-len(dataset) // world_size) * world_size, world_size)]", "test_evaluate.py::test_any_number_of_processes_gives_the_same_numbers"),
    "evaluate: scores of a window at another's place": ("views.py", "slice(i * len(image), (i + 1) * len(image))", "slice(0, len(image))", "test_views.py"),
    "evaluate: views are left out": ("evaluation.py", "        if not self.views.is_plain:\n            if", "        if False:\n            if", "test_evaluate.py::test_windows_and_scales_reach_the_network"),
    "evaluate: windows' weights are left out": ("evaluate_options.py", '"weights": options.window_weights}', '"weights": None}', "test_evaluate.py::test_windows_and_scales_reach_the_network"),
    "evaluate: scaled images are brighter": ("evaluation.py", "[scaled.float() / 255 for", "[scaled.float() / 128 for", "test_evaluate.py::test_windows_and_scales_reach_the_network"),
    "COCO-Stuff: ids are not ids less one": ("data/coco_files.py", "table[np.array(IDS) - 1] =", "table[np.array(IDS)] =", "test_coco_stuff.py"),
    "benchmarks: the first class is 0": ("data/benchmark.py", "classes = values - first", "classes = values", "test_benchmarks.py"),
    "segments: each has the first one's prompt": ("losses.py", "name[row, query] = prompt[image, target]", "name[row, query] = prompt[image, 0]", "test_losses.py"),
    "focal: the other alpha": ("point_losses.py", "alpha = FOCAL_ALPHA * truth + (1 - FOCAL_ALPHA) * (1 - truth)", "alpha = (1 - FOCAL_ALPHA) * truth + FOCAL_ALPHA * (1 - truth)", "test_losses.py"),
    "oracle: a part is the whole": ("oracle.py", 'area + size - shared if overlap == "iou" else', 'area if overlap == "iou" else', "test_oracle.py"),
    "an absent class counts as 0": ("metrics.py", "iou = ratio.where(truth > 0, torch.nan)", "iou = ratio", "test_metrics.py"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="a part of a fault's name")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    chosen = [name for name in FAULTS if not args.only or args.only in name]
    for tests in sorted({FAULTS[name][3] for name in chosen}):
        if failed := run_tests("", "", "", tests):
            raise SystemExit(f"{tests} fails without a fault ({failed}): mend that first")
    with ThreadPoolExecutor(args.jobs) as pool:
        found = dict(zip(chosen, pool.map(plant, chosen), strict=True))
    missed = [name for name, test in found.items() if not test]
    print(f"\n{len(found) - len(missed)} of {len(found)} faults caught" + "".join(f"\nNOT CAUGHT: {name}" for name in missed))
    sys.exit(bool(missed))


def plant(name: str) -> str:
    """The first test that fails, or "" if none does."""
    failed = run_tests(*FAULTS[name])
    print(f"{'caught ' if failed else 'MISSED '} {name}: {failed or 'no test failed'}", flush=True)
    return failed


def run_tests(file: str, old: str, new: str, tests: str) -> str:
    """The first failing test in a copy of the code in which ``new`` stands for ``old``; "" where all pass."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ("src", "tests", "conf", "setup.cfg", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, Path(folder, part))
        if file:
            path = Path(folder, "src/pmpseg", file)
            text = path.read_text()
            if text.count(old) != 1:
                raise SystemExit(f"{file} no longer has exactly one {old!r}: mend the list in {__file__}")
            path.write_text(text.replace(old, new))
        shared = os.environ.get("PMPSEG_SHARED", str(ROOT.parent / "shared"))
        environment = os.environ | {"PYTHONPATH": f"{folder}/src", "PMPSEG_SHARED": shared, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *(f"tests/{t}" for t in tests.split())]
        ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", ran.stdout, re.M)
    if ran.returncode not in (0, 1) or (ran.returncode and not failed):
        raise SystemExit(f"{tests}: pytest ended with {ran.returncode}\n{ran.stdout[-2000:]}")
    return failed[1] if failed else ""


if __name__ == "__main__":
    main()
