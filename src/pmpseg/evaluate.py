"""Evaluate: ``python -m pmpseg.evaluate MODEL [-c conf/NAME.yaml]`` prints and saves the metrics of a model folder.

Of the config only its data counts; without one it is the data that the model was trained with.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pmpseg import cli
from pmpseg.config import Schema, find_class
from pmpseg.errors import InputError
from pmpseg.hub import model_folder
from pmpseg.predict import check_threshold, choose_device


def main(args: Sequence[str] | None = None) -> dict[str, float]:
    """Evaluates as the command line (or ``args``) says and returns the single numbers."""
    parser = argparse.ArgumentParser(prog="python -m pmpseg.evaluate", description="Score a model on a data set.")
    parser.add_argument("model", help="model folder (RUN/model) or hub id")
    parser.add_argument("-c", "--config", help="YAML whose 'data' is used; default: what the model was trained with")
    parser.add_argument("--split", default="test", choices=("val", "test"), help="default: test")
    parser.add_argument(
        "--phrase-mode",
        default="alone",
        choices=("alone", "mixed", "own"),
        help="how an image's phrases are asked: each alone (default), all with absent ones, or only those that are there, which "
        "leaks the truth; prompts that are the whole class list are asked together in any mode",
    )
    parser.add_argument(
        "--prompt-form",
        default="text",
        choices=("text", "image", "mixed"),
        help="what phrases are asked with: their words (default), the data's support images of them, or both; of data that has "
        "such images (shots of Pascal5i and Coco20i, supports of PhraseCut and Scenes), and a model that takes them",
    )
    parser.add_argument("--text-weight", type=float, help="of the words in a mixed prompt, 0 to 1; default: 0.5")
    parser.add_argument("--threshold", type=float, help="of scores, from 0 to below 1; default: the model's own")
    parser.add_argument("--region", help="second stage: a region model (of training/region.py), or a CLIP folder or hub id")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is one")
    parser.add_argument("--out", type=Path, help="JSON file; default: metrics_SPLIT.json beside the model folder")
    options = parser.parse_args(args)
    check_threshold(options.threshold)
    if options.text_weight is not None and options.prompt_form != "mixed":
        raise InputError("--text-weight is for mixed prompts: add --prompt-form mixed, or leave it out")
    text_weight = 0.5 if options.text_weight is None else options.text_weight
    if not 0 <= text_weight <= 1:
        raise InputError(f"--text-weight: got {text_weight:g}, want 0 (examples only) to 1 (words only)")
    if options.region and options.prompt_form != "text":
        raise InputError("a second stage names masks by words only: ask with --prompt-form text, or leave --region out")
    folder = model_folder(options.model)
    beside = folder.parent if Path(options.model).is_dir() else Path()  # and not in the hub's cache
    out = options.out or beside / f"metrics_{options.split}.json"
    if out.is_dir():
        raise InputError(f"--out {out} is a folder: give a file, as in {out / 'metrics.json'}")
    out.parent.mkdir(parents=True, exist_ok=True)

    from pmpseg.evaluation import as_json, numbers, table
    from pmpseg.segmenter import Segmenter

    segmenter = Segmenter.load(folder, choose_device(options.device))
    if options.region:
        from pmpseg.region_stage import RegionStage

        segmenter.region = RegionStage.load(options.region).to(segmenter.device)
    spec = read_data(options.config) if options.config else own_data(segmenter.data, options.model)
    data = build_data(spec)
    forms = (options.prompt_form, text_weight)
    scores = evaluate(segmenter, data, options.split, options.threshold, options.phrase_mode, *forms)
    print(table(scores, data.vocabulary))
    asked = {"model": str(options.model), "region": options.region, "split": options.split}
    asked |= {"phrase_mode": options.phrase_mode, "prompt_form": options.prompt_form, "data": spec}
    if options.prompt_form == "mixed":
        asked["text_weight"] = text_weight
    by_class = {}
    if "iou" in scores:
        by_class = {"iou": dict(zip(data.vocabulary.names, scores["iou"].reshape(-1).tolist(), strict=True))}
    with cli.whole_file(out) as temporary:
        temporary.write_text(json.dumps(asked | as_json(scores | by_class), indent=1) + "\n")
    if scores.get("phrase_n_without_support"):
        print(f"\n{scores['phrase_n_without_support']} phrases have no support image and were left out")
    print(f"\nsaved: {out}")
    return numbers(scores)


def evaluate(
    segmenter: Any,
    data: Any,
    split: str = "test",
    threshold: float | None = None,
    phrase_mode: str = "alone",
    prompt_form: str = "text",
    text_weight: float = 0.5,
) -> dict[str, Any]:
    """All scores (see ``Evaluator.compute``) of a ``Segmenter`` on one split of a data module."""
    from tqdm import tqdm

    from pmpseg.evaluation import Evaluator
    from pmpseg.supports import PromptForm

    threshold = segmenter.threshold if threshold is None else threshold
    form = PromptForm(prompt_form, text_weight, segmenter.embed, segmenter.showing)
    evaluator = Evaluator.of_data(data, threshold, phrase_mode, form).to(segmenter.device)
    data.supports_in_evaluation = prompt_form != "text"
    loader = data.val_dataloader() if split == "val" else data.test_dataloader()
    for batch in tqdm(loader, desc=f"evaluate {split}", unit="batch"):
        on_device = {k: v.to(segmenter.device) if hasattr(v, "to") else v for k, v in batch.items()}
        evaluator.update(segmenter.network, segmenter.text, on_device, segmenter.region)
    return evaluator.compute()


def own_data(spec: dict[str, Any] | None, model: str) -> dict[str, Any]:
    """The data that a model's config.json names: only classes of pmpseg, since a downloaded file must not choose what is run."""
    if not spec:
        raise InputError(f"{model} does not say what data it was trained with; give a config with -c")
    path = spec.get("class_path")
    if not str(path).startswith("pmpseg."):
        raise InputError(f"{model} was trained with {path}, no class of pmpseg; give a config that you trust with -c")
    return spec


def read_data(path: str) -> dict[str, Any]:
    """The ``data`` of a YAML config as class_path and init_args."""
    data = _schema().read(path).get("data")
    if not isinstance(data, dict) or "class_path" not in data:
        raise InputError(f"{path}: no 'data' with a class_path in it")
    return data


def build_data(spec: dict[str, Any]) -> Any:
    """The data module that a config's ``data`` describes; unknown classes and arguments give one clear line."""
    schema = _schema()
    schema.check({"data": spec}, "data")
    cls = find_class(spec["class_path"], schema.bases["data"])
    return cls(**(spec.get("init_args") or {}))


def _schema() -> Schema:
    from lightning.pytorch import LightningDataModule

    return Schema({"data"}, {"data": LightningDataModule})


if __name__ == "__main__":
    cli.run(main)
