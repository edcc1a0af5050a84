"""Scoring so that models can be compared: phrase IoU at the same share of absent phrases rejected, recall, the class list's mIoU.

A phrase is answered with one mask if its score is above a threshold. Thresholds are chosen on the validation split so that a
given share of absent phrases is rightly answered with nothing, and applied to the test split: models are compared at the same
accuracy there, or anyone could win by answering more. *Recall* is the best IoU of any query, chosen by the truth: what the
proposals hold, apart from the selection.
"""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pmpseg.inference import answers, ask_one_by_one, ask_together, semantic_labels, soft_masks, upsample, with_synonyms
from pmpseg.metrics import ConfusionMetrics
from pmpseg.models.clip import TextEncoder
from pmpseg.models.region import RegionClassifier
from pmpseg.region_stage import RegionStage
from pmpseg.vocabulary import Vocabulary

ASKED = ("alone", "mixed")


class Phrases:
    """The rows of one run's phrases.csv as arrays."""

    def __init__(self, path: Path) -> None:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        column = {k: np.array([row[k] for row in rows]) for k in rows[0]}
        self.test, self.present = column["split"] == "test", column["present"] == "1"
        self.kind, self.group, self.scene = column["kind"], column["group"], column["scene"]
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

    def numbers(self) -> dict[str, float]:
        """The single numbers of a table; those of a kind at 60 %."""
        at_50, at_60 = self.threshold(0.5), self.threshold(0.6)
        found = {"iou_at_50": self.mean_iou(at_50), "iou_at_60": self.mean_iou(at_60), "recall": self.mean_recall()}
        found |= {"absent_accuracy_at_50": self.accuracy(at_50), "absent_accuracy_at_60": self.accuracy(at_60)}
        for column in (self.kind, self.group):
            here = np.unique(column[self.test & self.present])
            found |= {f"iou_at_60_{name}": self.mean_iou(at_60, column == name) for name in here if name}
        return found


def asked_as(stage: RegionStage, options: dict[str, Any]) -> RegionStage:
    """The second stage with the ``mode``, ``weight`` and ``templates`` of the options, as if it had been built with them.

    Raises ``InputError`` where that cannot be, as for ``pool`` with mask prompts.
    """
    changed = {name: options[name] for name in ("mode", "weight") if name in options}
    classifier = RegionClassifier(**(stage.classifier.config | changed))
    classifier.load_state_dict(stage.classifier.state_dict())
    text = stage.text
    if "templates" in options:
        text = TextEncoder(text.name, options["templates"], text.normalize)
    return RegionStage(classifier, text, stage.contrast)


@torch.inference_mode()
def score_splits(segmenter: Any, data: Any, asked: str = "alone") -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row for each phrase of the validation and the test split, and the test split's mIoU of the class list.

    Phrases are asked ``alone``, or ``mixed``: all of an image together, absent ones too.
    """
    rows: list[dict[str, Any]] = []
    names, vocabulary = data.vocabulary.names, data.vocabulary
    words = with_synonyms(names, vocabulary)
    class_list = segmenter.text.encode(words)
    classes = ConfusionMetrics(
        len(vocabulary), unseen=vocabulary.unseen or None, groups=getattr(data, "class_groups", None) or None
    )
    for split in ("val", "test"):
        dataset = data.dataset(split)
        for index in tqdm(range(len(dataset)), desc=f"score {split}", unit="image"):
            item = dataset[index]
            image = item["image"][None].float() / 255
            features = segmenter.network.encode(image)
            if "prompt_masks" in item:
                found = _phrases(segmenter, features, item, index, asked, vocabulary)
                rows += [{"split": split, "scene": index, **row} for row in found]
            if split == "test":
                regions = segmenter.region.ask(image, words) if segmenter.region else None
                prediction = ask_together(segmenter.network, features, class_list, regions)
                classes.update(semantic_labels(prediction, *_sizes(item)), item["labels"][None])
    return rows, {k: float(v) for k, v in classes.compute().items() if v.numel() == 1 and not v.isnan()}


def _phrases(
    segmenter: Any, features: Any, item: dict[str, Any], index: int, how: str, vocabulary: Vocabulary
) -> list[dict[str, Any]]:
    # In any order: present ones come first in an item, and what "shuffled" reads depends on the place.
    asked = np.random.default_rng(index).permutation([k for k, phrase in enumerate(item["prompts"]) if phrase])
    network, words = segmenter.network, with_synonyms([item["prompts"][k] for k in asked], vocabulary)
    prompts = segmenter.text.encode(words)
    regions = segmenter.region.ask(item["image"][None].float() / 255, words) if segmenter.region else None
    if how == "alone":
        prediction = network.decode(features.repeat(len(asked)), prompts.one_by_one())  # prompts as the batch
        named = ask_one_by_one(network, features, prompts, regions=regions) if regions else soft_masks(prediction)
    else:
        prediction = ask_together(network, features, prompts, regions)
        named = soft_masks(prediction)
    soft, scores = (x.flatten(0, 1) for x in named)  # (N, h, w) and (N,)
    sizes, truth = _sizes(item), item["prompt_masks"][asked]
    found = answers(upsample(soft[:, None], *sizes)[:, 0], scores) > 0
    proposals = upsample(prediction.mask_logits, *sizes) > 0  # (N or 1, Q, H, W)
    best = iou(proposals, truth[:, None]).amax(1)
    rows = []
    for n, k in enumerate(asked):
        kind, _, group = item["phrase_kind"][k].partition(" ")  # only scenes have groups of phrases
        row = {"phrase": item["prompts"][k], "kind": kind, "group": group, "present": int(truth[n].any())}
        row |= {"score": round(float(scores[n]), 6), "iou": round(float(iou(found[n], truth[n])), 6)}
        rows.append(row | {"recall": round(float(best[n]), 6)})
    return rows


def _sizes(item: dict[str, Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    return tuple(item["image"].shape[-2:]), tuple(item["labels"].shape[-2:])


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Of masks (..., H, W) bool; 0 where both are empty."""
    union = (a | b).flatten(-2).sum(-1)
    return (a & b).flatten(-2).sum(-1) / union.clamp(min=1)
