"""Scoring a network on batches of a data module: the same code in validation and in ``python -m pmpseg.evaluate``."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .inference import (
    Encoded,
    Network,
    answers,
    ask_one_by_one,
    ask_together,
    semantic_labels,
    soft_masks,
    upsample,
    with_synonyms,
)
from .metrics import ConfusionMetrics, PhraseMetrics
from .models.clip import TextEncoder
from .models.prompts import Prompts
from .models.region import Regions
from .region_stage import RegionStage
from .vocabulary import Vocabulary

PHRASE_MODES = ("alone", "mixed", "own")


class Evaluator(nn.Module):
    """Both metrics of a data set: the class list as a label map, and phrases (or overlapping classes) as one mask each.

    Phrases are asked ``alone``, as ``Segmenter.segment`` does; the whole class list, whose answer is at hand, is asked together.
    ``mixed`` asks an image's phrases together with its absent ones, ``own`` asks and scores only those that are there: this
    leaks the ground truth through the list, and is offered to measure by how much.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        class_groups: dict[str, list[int]] | None = None,
        phrase_kinds: Sequence[str] = (),
        threshold: float = 0.5,
        phrase_mode: str = "alone",
    ) -> None:
        super().__init__()
        if phrase_mode not in PHRASE_MODES:
            raise ValueError(f"phrase_mode: got {phrase_mode!r}, want one of {', '.join(PHRASE_MODES)}")
        self.vocabulary, self.phrase_mode = vocabulary, phrase_mode
        self.classes = ConfusionMetrics(len(vocabulary), unseen=vocabulary.unseen or None, groups=class_groups or None)
        self.phrases = PhraseMetrics(threshold, kinds=phrase_kinds)

    @torch.no_grad()
    def update(self, network: Network, text: TextEncoder, batch: dict[str, Any], region: RegionStage | None = None) -> None:
        """Adds one batch; its answers are scored at the size of its labels, the image's own."""
        image, size = batch["image"].float() / 255, tuple(batch["labels"].shape[-2:])
        image_size = tuple(image.shape[-2:])
        features, names = network.encode(image), self.vocabulary.names
        words = with_synonyms(names, self.vocabulary)
        prediction = ask_together(network, features, text.encode(words), region.ask(image, words) if region else None)
        self.classes.update(semantic_labels(prediction, image_size, size), batch["labels"])
        if "prompt_masks" not in batch:
            return
        is_class_list = all(row == names for row in batch["prompts"])
        by_class = soft_masks(prediction) if is_class_list else None  # (B, C, h, w) and (B, C)
        for i, (row, truth) in enumerate(zip(batch["prompts"], batch["prompt_masks"], strict=True)):
            leaky = self.phrase_mode == "own" and not is_class_list
            asked = [k for k, phrase in enumerate(row) if phrase and (not leaky or truth[k].any())]
            if not asked:
                continue
            if by_class is None:
                words = with_synonyms([row[k] for k in asked], self.vocabulary)
                regions = region.ask(image[i, None], words) if region else None
                soft, scores = self._ask(network, features.select(i), text.encode(words), regions)
            else:
                soft, scores = (x[i, None] for x in by_class)
            kinds = [self._kinds(batch["phrase_kind"][i][k]) for k in asked] if self.phrases.kinds else None
            soft = upsample(soft, image_size, size, network.stride)
            self.phrases.update(answers(soft, scores, network.by_pixel)[0], truth[asked], kinds)

    def _ask(self, network: Network, features: Encoded, prompts: Prompts, regions: Regions | None) -> tuple[Tensor, Tensor]:
        """Soft masks (1, K, h, w) and scores (1, K) of the phrases of one image."""
        if self.phrase_mode == "alone":
            return ask_one_by_one(network, features, prompts, regions=regions)
        return soft_masks(ask_together(network, features, prompts, regions))

    def _kinds(self, kind: str) -> list[str]:
        """"relation word" counts as both and, where the data lists it, as "relation_word"."""
        words = kind.split()
        joint = "_".join(words)
        return [*words, joint] if len(words) > 1 and joint in self.phrases.kinds else words

    def compute(self) -> dict[str, Any]:
        """Single numbers under their metric's names, phrase scores as ``phrase_*``; ``iou`` (C,) and ``phrase_curve`` beside.

        Counts (``phrase_n_*``) are integers. What is undefined (no unseen class, no phrase) is left out. All ranks must call it.
        """
        by_class = self.classes.compute()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*was called before the ``update``")  # data, or a rank, without phrases
            by_phrase: dict[str, Any] = dict(self.phrases.compute())  # a copy: torchmetrics keeps what it returned
        scores: dict[str, Any] = {k: float(v) for k, v in by_class.items() if k != "iou" and not math.isnan(v)}
        scores["iou"] = by_class["iou"].cpu()
        if not math.isnan(by_phrase["iou_with_absent"]):  # some rank had a phrase
            scores["phrase_curve"] = by_phrase.pop("curve")
            scores |= {f"phrase_{k}": v.item() for k, v in by_phrase.items() if not math.isnan(v)}
        return scores

    def reset(self) -> None:
        self.classes.reset()
        self.phrases.reset()


def numbers(scores: dict[str, Any]) -> dict[str, float]:
    """The single numbers among ``Evaluator.compute``'s, without counts: what goes into logs."""
    return {k: v for k, v in scores.items() if isinstance(v, float)}


def as_json(value: Any) -> Any:
    """Scores as plain JSON values: tensors as lists, 5 digits, null where undefined."""
    if isinstance(value, dict):
        return {k: as_json(v) for k, v in value.items()}
    if isinstance(value, Tensor):
        return as_json(value.tolist())
    if isinstance(value, list):
        return [as_json(v) for v in value]
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 5)
    return value


def best_threshold(scores: dict[str, Any]) -> float | None:
    """The threshold at which present and absent phrases are answered best together; None without phrases.

    Choose it on a validation split. It maximises the harmonic mean of the IoU on present phrases and the accuracy on absent ones:
    their sum would have a weak model answer nothing at all.
    """
    if "phrase_curve" not in scores:
        return None
    curve = scores["phrase_curve"]
    iou, absent = torch.nan_to_num(curve["iou"]), torch.nan_to_num(curve["absent_accuracy"])
    both = 2 * iou * absent / (iou + absent).clamp(min=1e-9)
    return round(float(curve["threshold"][both.argmax()]), 4)


def table(scores: dict[str, Any], vocabulary: Vocabulary) -> str:
    """IoU by class ("-" where a class is absent), phrase IoU by kind and group, then every other number; all in percent."""
    unseen = set(vocabulary.unseen)
    names = [name + "*" * (i in unseen) for i, name in enumerate(vocabulary.names)]
    lines = _in_columns(dict(zip(names, scores["iou"].reshape(-1).tolist(), strict=True)), 4)
    if unseen:
        lines.append("(* held out of training)")
    others = numbers(scores)
    crossed = {k: k.removeprefix("phrase_iou_").split("_") for k in others}
    crossed = {k: words for k, words in crossed.items() if len(words) == 2 and all(f"phrase_iou_{w}" in others for w in words)}
    if crossed:
        columns = list(dict.fromkeys(words[1] for words in crossed.values()))
        lines += ["", f"{'phrase IoU':12}" + "".join(f"{c:>14}" for c in columns)]
        for kind in dict.fromkeys(words[0] for words in crossed.values()):
            row = [others.get(f"phrase_iou_{kind}_{c}", math.nan) for c in columns]
            lines.append(f"{kind:12}" + "".join(f"{_percent(v):>14}" for v in row))
    return "\n".join([*lines, "", *_in_columns({k: v for k, v in others.items() if k not in crossed}, 3)])


def _in_columns(values: dict[str, float], columns: int) -> list[str]:
    width = max(map(len, values)) + 2
    cells = [f"{name:<{width}}{_percent(value):>5}" for name, value in values.items()]
    rows = -(-len(cells) // max(1, min(columns, 118 // (width + 8))))
    return ["   ".join(cells[row::rows]) for row in range(rows)]


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"
