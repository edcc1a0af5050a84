"""What ``python -m pmpseg.evaluate`` may be told, and what is wrong with it."""

import argparse
import os
from pathlib import Path
from typing import Any

from .errors import InputError
from .hub import model_folder
from .predict import check_threshold
from .processes import launched
from .vocabulary import TEMPLATES


def parser() -> argparse.ArgumentParser:
    what = "Score a model on a data set, or on benchmarks."
    parser = argparse.ArgumentParser(prog="python -m pmpseg.evaluate", description=what)
    parser.add_argument("model", help="model folder (RUN/model) or hub id; also transformers' CLIPSeg, Mask2Former, MaskFormer")
    parser.add_argument("-c", "--config", help="YAML whose 'data' is used; default: what the model was trained with")
    parser.add_argument("--split", default="test", choices=("val", "test"), help="default: test")
    parser.add_argument("--threshold", type=float, help="of phrases' scores, from 0 to below 1; default: the model's own")
    parser.add_argument("--out", type=Path, help="JSON file, of benchmarks a folder; default: beside the model folder")
    parser.add_argument("--save-labels", type=Path, help="a new folder for the class maps, PNGs of class indices")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is one")
    parser.add_argument("--devices", type=int, default=1, help="processes, each with its GPU or a share of the cores; default: 1")

    group = parser.add_argument_group("benchmarks")
    group.add_argument("--benchmark", help="all, or names as ade20k_150,pascal_voc_20; in place of -c")
    group.add_argument("--root", help="folder that holds ADEChallengeData2016/, VOCdevkit/, ...; default: ../data")
    group.add_argument("--image-size", type=int, help="short side of images, in pixels; default: the model's")
    group.add_argument("--max-size", type=int, help="long side, at most; OVSeg has 640 and 2560")
    group.add_argument("--names-only", action="store_true", help="ask each class by its name, without its synonyms")
    group.add_argument("--num-workers", type=int, help="processes that read images; default: 2")
    group.add_argument("--name", help="what the table's row calls the model")

    group = parser.add_argument_group("class lists: looks that become one map")
    group.add_argument("--window", type=int, help="side of sliding windows, in pixels of the resized image; default: no windows")
    group.add_argument("--overlap", type=float, help="of neighbouring windows, a share of their side; default: a third")
    group.add_argument("--window-weights", choices=("triangle", "uniform"), help="of a window's pixels; default: triangle")
    group.add_argument("--scales", help="sizes, as 0.75,1,1.25; default: 1")
    group.add_argument("--flip", action="store_true", help="look at the mirror image, too")

    group.add_argument("--class-chunk", type=int, default=64, help="classes scored at a time, for memory only; default: 64")

    group = parser.add_argument_group("two stages")
    group.add_argument("--region", help="second stage: a region model (of training/region.py), or a CLIP folder or hub id")
    group.add_argument(
        "--ensemble-weight", help="of the second stage's names, 0 to 1, or 'paper': OVSeg's for each benchmark; default: its own"
    )
    group.add_argument(
        "--region-templates", choices=tuple(TEMPLATES), help="phrases that its words are put into; default: its own"
    )
    group.add_argument(
        "--oracle",
        choices=("masks", "classes"),
        help="the truth's masks, named by the second stage; or proposals, each with the class of the truth that it fits best",
    )

    group = parser.add_argument_group("phrases")
    group.add_argument(
        "--phrase-mode",
        default="alone",
        choices=("alone", "mixed", "own"),
        help="how an image's phrases are asked: each alone (default), all with absent ones, or only those that are there, which "
        "leaks the truth; prompts that are the whole class list are asked together in any mode",
    )
    group.add_argument(
        "--prompt-form",
        default="text",
        choices=("text", "image", "mixed"),
        help="what phrases are asked with: their words (default), the data's support images of them, or both; of data that has "
        "such images (shots of Pascal5i and Coco20i, supports of PhraseCut and Scenes), and a model that takes them",
    )
    group.add_argument("--text-weight", type=float, help="of the words in a mixed prompt, 0 to 1; default: 0.5")
    return parser


def check(options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """The model's folder and the chosen benchmarks by name; fills in defaults that depend on them. Raises InputError."""
    check_threshold(options.threshold)
    if options.text_weight is not None and options.prompt_form != "mixed":
        raise InputError("--text-weight is for mixed prompts: add --prompt-form mixed, or leave it out")
    if options.prompt_form == "mixed" and options.text_weight is None:
        options.text_weight = 0.5
    if options.text_weight is not None and not 0 <= options.text_weight <= 1:
        raise InputError(f"--text-weight: got {options.text_weight:g}, want 0 (examples only) to 1 (words only)")
    if options.region and options.prompt_form != "text":
        raise InputError("a second stage names masks by words only: ask with --prompt-form text, or leave --region out")
    if options.class_chunk < 1:
        raise InputError(f"--class-chunk: got {options.class_chunk}, want 1 or more")
    for key in ("image_size", "max_size"):
        if getattr(options, key) is not None and getattr(options, key) < 1:
            raise InputError(f"--{key.replace('_', '-')}: got {getattr(options, key)}, want pixels, 1 or more")
    if options.oracle and options.ensemble_weight is not None:
        raise InputError("--ensemble-weight says nothing to an oracle, in which one stage answers: leave it out")
    if options.devices < 1:
        raise InputError(f"--devices: got {options.devices}, want 1 or more")
    weight = options.ensemble_weight
    if weight not in (None, "paper") and not 0 <= _number("--ensemble-weight", weight) <= 1:
        raise InputError(f"--ensemble-weight: got {weight}, want 0 (no second stage) to 1 (only that one), or 'paper'")
    if not views_of(options).is_plain and options.oracle:
        raise InputError("an oracle looks once: leave windows, scales and flips out")
    benchmarks = _benchmarks(options.benchmark)
    if benchmarks and options.config:
        raise InputError("got both -c and --benchmark: give one of them")
    of_phrases = {"threshold": None, "phrase_mode": "alone", "prompt_form": "text"}
    for key in (key for key, unset in of_phrases.items() if benchmarks and getattr(options, key) != unset):
        raise InputError(f"--{key.replace('_', '-')} is for phrases, and benchmarks have class lists: leave it out")
    if not benchmarks:
        of_benchmarks = ("root", "image_size", "max_size", "names_only", "num_workers", "name")
        for key in of_benchmarks + (("ensemble_weight",) if weight == "paper" else ()):
            if getattr(options, key) not in (None, False):
                raise InputError(f"--{key.replace('_', '-')} is for benchmarks: add --benchmark, or set it in the config's data")
    options.root = options.root or "../data"
    folder = model_folder(options.model)
    beside = folder.parent if Path(options.model).is_dir() else Path()  # and not in the hub's cache
    options.out = options.out or beside / ("benchmarks" if benchmarks else f"metrics_{options.split}.json")
    if benchmarks and options.out.is_file():
        raise InputError(f"--out {options.out} is a file: of benchmarks give a folder")
    if not benchmarks and options.out.is_dir():
        raise InputError(f"--out {options.out} is a folder: give a file, as in {options.out / 'metrics.json'}")
    if options.save_labels and options.save_labels.exists() and any(options.save_labels.iterdir()) and not launched():
        raise InputError(f"--save-labels {options.save_labels} is not empty: give a new folder")
    check_place(options.out if benchmarks else options.out.parent)
    return folder, benchmarks


def check_place(folder: Path) -> None:
    """Raises InputError where a folder cannot be made or written: hours of work would be lost."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"--out {folder}: {there} is no folder that may be written: choose another place")


def _benchmarks(names: str | None) -> dict[str, Any]:
    if names is None:
        return {}
    from .benchmarks import parse_benchmarks

    return {benchmark.name: benchmark for benchmark in parse_benchmarks(names)}


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{name}: got {text!r}, want a number") from None


def views_of(options: argparse.Namespace) -> Any:
    from pmpseg.views import Views

    given: dict[str, Any] = {"window": options.window, "overlap": options.overlap, "weights": options.window_weights}
    given = {name: value for name, value in given.items() if value is not None}
    if options.window is None and given:
        raise InputError("--overlap and --window-weights are for sliding windows: add --window")
    if options.scales is not None:
        given["scales"] = tuple(_number("--scales", part) for part in options.scales.split(","))
    return Views(**given, flip=options.flip)
