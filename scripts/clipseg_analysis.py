"""Mean IoU by form of the prompt, size of the object, and class: the paper's appendix (CLIPSeg, Fig. 7 and 8), as Markdown.

    python scripts/clipseg_analysis.py RUN/model -c conf/eval/phrasecut.yaml --out analysis.md

Forms are the bare phrase, the nine prefixes that the paper trains with ("shuffle+"), and the data's support images where it has
them. A phrase's IoU is at --threshold and at the image's own size; absent phrases are left out. Sizes are shares of the image.
The class is the data's where phrases have one, else the phrase itself. Of the images an even choice of --images is taken.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from pmpseg import cli
from pmpseg.data.base import IGNORE
from pmpseg.data.phrase_parts import PREFIXES, SIZE_BOUNDS, SIZES, size_word
from pmpseg.errors import InputError
from pmpseg.evaluate import build_data, own_data, read_data
from pmpseg.inference import answers, ask_one_by_one, upsample
from pmpseg.predict import check_threshold, choose_device
from pmpseg.segmenter import Segmenter
from pmpseg.supports import PromptForm

BARE, IMAGE = "{}", "(support images)"
TEXT_FORMS = (BARE, *PREFIXES["shuffle+"])


class Row(NamedTuple):
    """The IoU of one phrase in one form."""

    form: str
    size: str
    label: str
    iou: float


def main(args: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model folder (RUN/model), or transformers' CLIPSeg")
    parser.add_argument("-c", "--config", help="YAML whose 'data' is used; default: what the model was trained with")
    parser.add_argument("--split", default="test", choices=("val", "test"), help="default: test")
    parser.add_argument("--images", type=int, default=5000, help="at most so many; default: 5000")
    parser.add_argument("--classes", type=int, default=20, help="rows of the table by class: the most frequent; default: 20")
    parser.add_argument("--threshold", type=float, help="default: the model's own")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is one")
    parser.add_argument("--out", type=Path, help="Markdown file; it is printed in any case")
    options = parser.parse_args(args)
    check_threshold(options.threshold)
    for name in ("images", "classes"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name}: got {getattr(options, name)}, want 1 or more")
    segmenter = Segmenter.load(options.model, choose_device(options.device))
    data = build_data(read_data(options.config) if options.config else own_data(segmenter.data, options.model))
    threshold = segmenter.threshold if options.threshold is None else options.threshold
    rows = measure(segmenter, data, options.split, threshold, options.images)
    if not rows:
        raise InputError("no phrase of the data is on its image: there is nothing to measure")
    head = f"Mean IoU in percent of {sum(row.form == BARE for row in rows)} phrases, threshold {threshold:g}.\n"
    text = "\n\n".join([head, *tables(rows, options.classes)]) + "\n"
    print(text)
    if options.out:
        with cli.whole_file(options.out) as temporary:
            temporary.write_text(text)
    return rows


def measure(segmenter: Segmenter, data: Any, split: str, threshold: float, images: int) -> list[Row]:
    """Every present phrase of an even choice of images, in all forms."""
    if hasattr(data, "template"):
        data.template = "{label}"  # the bare class name; the forms are put around it here
    dataset, rows = data.dataset(split), []
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(images, len(dataset))).round().astype(int)).tolist()
    loader: Iterable = DataLoader(Subset(dataset, chosen), 1, num_workers=data.num_workers, collate_fn=data.collate)
    for batch in tqdm(loader, desc=f"analyse {split}", unit="image"):
        if "prompt_masks" not in batch:
            raise InputError("the data has no phrases, only a class list: give one with phrases, as PhraseCut or Pascal5i")
        on_device = {k: v.to(segmenter.device) if hasattr(v, "to") else v for k, v in batch.items()}
        rows += measure_image(segmenter, data, on_device, threshold)
    return rows


@torch.no_grad()
def measure_image(segmenter: Segmenter, data: Any, batch: dict[str, Any], threshold: float) -> list[Row]:
    """A batch of one image."""
    network, labels, truth = segmenter.network, batch["labels"][0], batch["prompt_masks"][0]
    keep = labels != IGNORE if getattr(data, "ignore_labels", False) else torch.ones_like(labels, dtype=torch.bool)
    asked = [k for k, phrase in enumerate(batch["prompts"][0]) if phrase and (truth[k] & keep).any()]
    if not asked:
        return []
    truth, phrases = truth[asked], [batch["prompts"][0][k] for k in asked]
    sizes, names, rows = [size_word(mask.cpu().numpy()) for mask in truth], phrases, []
    if "phrase_class" in batch:
        names = [data.vocabulary.names[k] for k in batch["phrase_class"][0, asked].tolist()]
    image = batch["image"].float() / 255
    features = network.encode(image)

    def score(form: str, prompts: Any, some: list[int]) -> None:
        soft, scores = ask_one_by_one(network, features, prompts)
        soft = upsample(soft, tuple(image.shape[-2:]), tuple(labels.shape), network.stride)
        found = answers(soft, scores, network.by_pixel)[0] > threshold
        for n, iou in zip(some, ious(found, truth[some], keep), strict=True):
            rows.append(Row(form, sizes[n], names[n], iou))

    everything = list(range(len(asked)))
    for form in TEXT_FORMS:
        score(form, segmenter.text.encode([form.format(phrase) for phrase in phrases]), everything)
    if "support_image" in batch and segmenter.takes_examples:
        supported = [n for n in everything if batch["support_valid"][0, asked[n]].any()]
        if supported:
            at = [asked[n] for n in supported]
            words = segmenter.text.encode([phrases[n] for n in supported])
            supports = [batch[f"support_{key}"][0, at][None] for key in ("image", "mask", "valid")]
            form = PromptForm("image", embed=segmenter.embed, showing=segmenter.showing)
            score(IMAGE, form(words, *supports, segmenter.text.normalize), supported)
    return rows


def ious(found: Tensor, truth: Tensor, keep: Tensor) -> list[float]:
    """IoU of each of K masks (K, H, W) bool in the pixels ``keep`` (H, W)."""
    both, either = ((x & keep).flatten(1).sum(1) for x in (found & truth, found | truth))
    return (both / either).tolist()


def tables(rows: list[Row], classes: int) -> list[str]:
    """By form; by size; by class, the most frequent ones, best first. The latter two by the bare phrase and by images."""
    forms = list(dict.fromkeys(row.form for row in rows))
    columns = [form for form in (BARE, IMAGE) if form in forms]
    bounds = [f"below {SIZE_BOUNDS[0]:.0%}", f"{SIZE_BOUNDS[0]:.0%} to {SIZE_BOUNDS[1]:.0%}", f"{SIZE_BOUNDS[1]:.0%} and more"]
    named = {size: f"{size} ({bound})" for size, bound in zip(SIZES, bounds, strict=True)}
    number: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.form == BARE:
            number[row.label].append(row.iou)
    frequent = sorted(number, key=lambda label: (-len(number[label]), label))[:classes]
    by_form = ["| prompt | mean IoU | phrases |", "|---|---|---|"]
    by_form += [f"| {form} | {_mean(rows, lambda row, form=form: row.form == form)} |" for form in forms]
    by_size = _crossed("size", columns, rows, [(named[s], lambda row, s=s: row.size == s) for s in SIZES])
    best = sorted(frequent, key=lambda label: -float(np.mean(number[label])))
    by_class = _crossed("class", columns, rows, [(label, lambda row, label=label: row.label == label) for label in best])
    return ["\n".join(by_form), "\n".join(by_size), "\n".join(by_class)]


def _crossed(title: str, columns: list[str], rows: list[Row], kinds: list[tuple[str, Callable[[Row], bool]]]) -> list[str]:
    lines = [f"| {title} | " + " | ".join(f"{c} | phrases" for c in columns) + " |", "|---" * (1 + 2 * len(columns)) + "|"]
    for name, of_kind in kinds:
        some = [row for row in rows if of_kind(row)]
        cells = [_mean(some, lambda row, c=c: row.form == c) for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _mean(rows: list[Row], wanted: Callable[..., bool]) -> str:
    some = [row.iou for row in rows if wanted(row)]
    return f"{100 * np.mean(some):.1f} | {len(some)}" if some else "- | 0"


if __name__ == "__main__":
    cli.run(main)
