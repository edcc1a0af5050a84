"""Evaluate: ``python -m pmpseg.evaluate MODEL`` prints and saves the metrics of a model, folder or hub id.

On its own data; on that of a config (``-c conf/NAME.yaml``, of which only the data counts); or on the benchmarks of
open-vocabulary segmentation (``--benchmark all``), with the row of a paper's table. What the scores depend on is saved with them.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pmpseg import cli
from pmpseg.config import Schema, find_class
from pmpseg.errors import InputError
from pmpseg.evaluate_options import check, parser, views_of
from pmpseg.predict import choose_device
from pmpseg.processes import launch, launched, together
from pmpseg.vocabulary import TEMPLATES

PACKAGES = ("pmpseg", "torch", "transformers", "timm", "torchmetrics")  # on which scores may depend


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Evaluates as the command line (or ``args``) says and returns the single numbers, of several benchmarks by their names."""
    options = parser().parse_args(args)
    folder, benchmarks = check(options)
    if options.devices > 1 and not launched():
        launch("pmpseg.evaluate", sys.argv[1:] if args is None else args, options.devices)
        if not benchmarks:
            return _numbers_of(options.out)
        return {name: _numbers_of(options.out / f"{name}.json") for name in benchmarks}

    with together(choose_device(options.device)) as (rank, device):
        segmenter = _load(options, folder, device)
        hashes = _hashes(segmenter) if rank == 0 else {}
        if not benchmarks:
            spec = read_data(options.config) if options.config else own_data(segmenter.data, options.model)
            data = build_data(spec)
            scores = _evaluate(options, segmenter, data, options.save_labels)
            return _report(options, segmenter, data, scores, {"data": spec}, options.out, hashes)
        from pmpseg.report import rows

        found, of_name = {}, {}
        # All are looked for before the first begins, which may take hours.
        for name, data in {name: _benchmark_data(options, segmenter, name) for name in benchmarks}.items():
            benchmark = benchmarks[name]
            if rank == 0:
                print(f"{benchmark.title} ({name})")
            if options.ensemble_weight == "paper":
                segmenter.region.classifier.weight = benchmark.region_weight
            labels = options.save_labels and options.save_labels / name
            found[benchmark.title] = scores = _evaluate(options, segmenter, data, labels)
            said = {"benchmark": name, "root": options.root, "remark": data.remark}
            said |= {"image_size": data.image_size, "max_size": data.max_size}
            of_name[name] = _report(options, segmenter, data, scores, said, options.out / f"{name}.json", hashes)
            if rank == 0:  # of those so far: a later one may fail
                text = rows(options.name or str(options.model), found)
                with cli.whole_file(options.out / "table.md") as temporary:
                    temporary.write_text(text + "\n")
        if rank == 0:
            print(f"\n{text}")
        return of_name


def evaluate(
    segmenter: Any,
    data: Any,
    split: str = "test",
    threshold: float | None = None,
    phrase_mode: str = "alone",
    prompt_form: str = "text",
    text_weight: float = 0.5,
    views: Any = None,
    oracle: str | None = None,
    unseen: Sequence[int] | None = None,
    save_labels: Path | None = None,
    chunk: int = 64,
) -> dict[str, Any]:
    """All scores (see ``Evaluator.compute``) of a ``Segmenter`` on one split of a data module, and ``usage`` (see ``Meter``).

    ``views``, ``oracle``, ``unseen``, ``chunk``: as in ``Evaluator``. ``save_labels``: a folder for the class maps, PNGs of class
    indices. In one of several processes it takes its share of the images, and all have all scores.
    """
    from tqdm import tqdm

    from pmpseg.evaluation import Evaluator
    from pmpseg.models.closed_list import ClosedWords
    from pmpseg.processes import is_first
    from pmpseg.supports import PromptForm
    from pmpseg.usage import Meter, parameters

    threshold = segmenter.threshold if threshold is None else threshold
    form = PromptForm(prompt_form, text_weight, segmenter.embed, segmenter.showing)
    asked = {"phrase_mode": phrase_mode, "form": form, "views": views, "oracle": oracle, "unseen": unseen, "chunk": chunk}
    evaluator = Evaluator.of_data(data, threshold, **asked).to(segmenter.device)
    if isinstance(segmenter.text, ClosedWords):
        _check_words(segmenter, data.vocabulary)
    data.supports_in_evaluation = prompt_form != "text"
    data.eval_scales = evaluator.views.scales
    loader = data.val_dataloader() if split == "val" else data.test_dataloader()
    if save_labels and evaluator.classes is None:
        raise InputError("--save-labels is for class lists, and this data has phrases only: leave it out")
    writer = save_labels and LabelWriter(save_labels, len(data.vocabulary), data.ignore_index)
    meter = Meter(segmenter.device)
    batches = meter.watch(loader, lambda batch: len(batch["name"]))
    for batch in tqdm(batches, f"evaluate {split}", len(loader), unit="batch", disable=not is_first()):
        on_device = {k: _to(v, segmenter.device) for k, v in batch.items()}
        labels = evaluator.update(segmenter.network, segmenter.text, on_device, segmenter.region)
        if writer and labels is not None:
            writer(batch["name"], labels)
    modules = {"network": segmenter.network, "text": segmenter.text, "region": segmenter.region}
    return evaluator.compute() | {"usage": meter.result() | {"parameters": parameters(modules)}}


class LabelWriter:
    """Class maps as PNGs of class indices, 16 bits where 8 are too few, under the images' names in a new or empty folder."""

    def __init__(self, folder: Path, num_classes: int, ignore_index: int) -> None:
        self.folder, self.wide = folder, max(num_classes - 1, ignore_index) > 255

    def __call__(self, names: Sequence[str], labels: Any) -> None:
        import numpy as np
        from PIL import Image

        self.folder.mkdir(parents=True, exist_ok=True)
        for name, one in zip(names, labels.cpu().numpy(), strict=True):
            path = self.folder / f"{Path(name).stem}.png"
            if path.exists():
                raise InputError(f"{path} exists: give --save-labels a new folder; two images of one name cannot both be saved")
            Image.fromarray(one.astype(np.uint16 if self.wide else np.uint8)).save(path)


def _check_words(segmenter: Any, vocabulary: Any) -> None:
    """Says which classes a model with a list of its own does not know; raises InputError where it knows none."""
    from pmpseg.inference import with_synonyms
    from pmpseg.processes import is_first

    words = with_synonyms(vocabulary.names, vocabulary)
    missing = segmenter.text.missing(words)
    if segmenter.region is None:
        segmenter.text.check(words)
        if missing and is_first():
            few = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            print(f"{len(missing)} of {len(words)} classes are none of the model's, and are never found: {few}")


def _load(options: Namespace, folder: Path, device: str) -> Any:
    """The model, with its second stage as the options say."""
    from pmpseg.segmenter import Segmenter

    segmenter = Segmenter.load(folder, device)
    if options.region:
        from pmpseg.region_stage import RegionStage

        segmenter.region = RegionStage.load(options.region).to(segmenter.device)
    region = segmenter.region
    for name in ("ensemble_weight", "region_templates"):
        if getattr(options, name) is not None and region is None:
            raise InputError(f"--{name.replace('_', '-')} is of a second stage, and this model has none: add --region")
    if region is not None and options.region_templates:
        region.text = copy(region.text)  # which may be the first stage's, too
        region.text.templates = TEMPLATES[options.region_templates]
    if region is not None and options.ensemble_weight not in (None, "paper"):
        region.classifier.weight = float(options.ensemble_weight)
    return segmenter


def _benchmark_data(options: Namespace, segmenter: Any, name: str) -> Any:
    """One benchmark as the model wants its images."""
    from pmpseg.data import Benchmark
    from pmpseg.vocabulary import Vocabulary

    longest = None if segmenter.square else segmenter.longest_side
    sizes = {"image_size": options.image_size or segmenter.image_size, "max_size": options.max_size or longest}
    workers = {} if options.num_workers is None else {"num_workers": options.num_workers}
    data = Benchmark(name, options.root, **sizes, square=segmenter.square, **workers)
    if segmenter.vocabulary is not None:  # by synonyms, too, whatever is asked
        data.unseen = unseen_classes(data.vocabulary, segmenter.vocabulary)
    if options.names_only:
        data.vocabulary = Vocabulary.of(data.vocabulary.names)
    return data


def unseen_classes(asked: Any, learned: Any) -> list[int]:
    """The classes of the vocabulary ``asked`` that share no word with a class that was ``learned`` from masks.

    A background counts as learned: it is what no mask covers.
    """
    known = {"background"} | {word.casefold() for index in learned.seen for word in learned.synonyms[index]}
    return [index for index, words in enumerate(asked.synonyms) if not known & {word.casefold() for word in words}]


def _hashes(segmenter: Any) -> dict[str, str]:
    """Of the weights of all parts that answer: once for all benchmarks, since a CLIP has hundreds of megabytes."""
    from pmpseg.storage import weights_hash

    parts = {"network": segmenter.network, "text": segmenter.text, "region": segmenter.region}
    return {name: weights_hash(part) for name, part in parts.items() if part is not None}


def _evaluate(options: Namespace, segmenter: Any, data: Any, save_labels: Path | None) -> dict[str, Any]:
    return evaluate(
        segmenter,
        data,
        options.split,
        options.threshold,
        options.phrase_mode,
        options.prompt_form,
        0.5 if options.text_weight is None else options.text_weight,
        views_of(options),
        options.oracle,
        getattr(data, "unseen", None),
        save_labels,
        options.class_chunk,
    )


def _report(
    options: Namespace,
    segmenter: Any,
    data: Any,
    scores: dict[str, Any],
    of_data: dict[str, Any],
    out: Path,
    hashes: dict[str, str],
) -> dict[str, float]:
    """Prints the scores and saves them with all that they depend on; returns the single numbers.

    Without ``hashes``, in a process that is not the first, it only does the last.
    """
    from pmpseg.evaluation import as_json, numbers
    from pmpseg.report import table, usage_line

    if not hashes:
        return numbers(scores)
    unseen, region, text = getattr(data, "unseen", None), segmenter.region, segmenter.text
    asked = {key: getattr(options, key) for key in ("model", "region", "split", "phrase_mode", "prompt_form")} | of_data
    if options.prompt_form == "mixed":
        asked["text_weight"] = options.text_weight
    asked["options"] = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k not in asked}
    asked |= {"views": asdict(views_of(options)), "square": segmenter.square, "weights_sha256": hashes["network"]}
    asked["text"] = {"name": getattr(text, "name", None), "templates": list(getattr(text, "templates", ()))}
    asked["text"]["sha256"] = hashes["text"]
    asked["phrase_threshold"] = segmenter.threshold if options.threshold is None else options.threshold
    if region is not None:
        of_region = {"weight": region.classifier.weight, "templates": list(region.text.templates)}
        of_region |= {"contrast": list(region.contrast), "sha256": hashes["region"]}
        asked["second_stage"] = region.classifier.config | of_region
    asked["classes"] = dict(zip(data.vocabulary.names, data.vocabulary.synonyms, strict=True))
    asked["unseen"] = [data.vocabulary.names[i] for i in (data.vocabulary.unseen if unseen is None else unseen)]
    asked["versions"] = {name: version(name) for name in PACKAGES}
    by_class = {}
    if "iou" in scores:
        by_class = {"iou": dict(zip(data.vocabulary.names, scores["iou"].reshape(-1).tolist(), strict=True))}
    out.parent.mkdir(parents=True, exist_ok=True)
    with cli.whole_file(out) as temporary:
        temporary.write_text(json.dumps(asked | as_json(scores | by_class), indent=1) + "\n")
    print(table(scores, data.vocabulary, unseen))
    print(f"\n{usage_line(scores['usage'])}")
    if scores.get("phrase_n_without_support"):
        print(f"{scores['phrase_n_without_support']} phrases have no support image and were left out")
    if of_data.get("remark"):
        print(f"not the whole benchmark: {of_data['remark']}")
    print(f"saved: {out}")
    return numbers(scores)


def _numbers_of(path: Path) -> dict[str, float]:
    """The single numbers of a file that another process saved."""
    asked = ("text_weight", "phrase_threshold")
    return {k: v for k, v in json.loads(path.read_text()).items() if isinstance(v, float) and k not in asked}


def _to(value: Any, device: Any) -> Any:
    """A tensor, or a list of tensors, on a device; anything else as it is."""
    if isinstance(value, list):
        return [_to(one, device) for one in value]
    return value.to(device) if hasattr(value, "to") else value


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
