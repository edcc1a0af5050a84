"""Scoring a network on batches of a data module: the same code in validation and in ``python -m pmpseg.evaluate``."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torchmetrics import SumMetric

from .errors import InputError
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
from .paper_metrics import ClipSegMetrics
from .region_stage import RegionStage
from .supports import PromptForm
from .vocabulary import Vocabulary

PHRASE_MODES = ("alone", "mixed", "own")
OF_DATA = ("class_groups", "class_list", "class_factors", "ignore_labels", "paper_metrics", "phrase_classes", "phrase_kinds")
IGNORE = 255


class Evaluator(nn.Module):
    """Both metrics of a data set: the class list as a label map, and phrases (or overlapping classes) as one mask each.

    Phrases are asked ``alone``, as ``Segmenter.segment`` does; the whole class list, whose answer is at hand, is asked together.
    ``mixed`` asks an image's phrases together with its absent ones, ``own`` asks and scores only those that are there: this
    leaks the ground truth through the list, and is offered to measure by how much.

    The other arguments are attributes that a data module may have (see ``of_data``):

    - ``class_list`` False: the vocabulary is not asked as a list, there is no label map
    - ``class_factors``: of the scores of some classes in the label map, before the best is taken
    - ``ignore_labels``: phrases are not scored where the labels are 255 (a phrase's answer counts as empty there)
    - ``paper_metrics`` "clipseg": ``ClipSegMetrics`` beside, of ``phrase_classes`` classes, or of each phrase by itself (None).
      The paper's code resizes scores to the labels with corners aligned; here they are resized as everywhere

    ``form``: what phrases are asked with; other than text it wants supports in the batches. The class list is asked by words.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        class_groups: dict[str, list[int]] | None = None,
        phrase_kinds: Sequence[str] = (),
        threshold: float = 0.5,
        phrase_mode: str = "alone",
        form: PromptForm | None = None,
        class_list: bool = True,
        class_factors: Mapping[int, float] | None = None,
        ignore_labels: bool = False,
        paper_metrics: str | None = None,
        phrase_classes: int | None = None,
    ) -> None:
        super().__init__()
        if phrase_mode not in PHRASE_MODES:
            raise ValueError(f"phrase_mode: got {phrase_mode!r}, want one of {', '.join(PHRASE_MODES)}")
        if paper_metrics not in (None, "clipseg"):
            raise ValueError(f"paper_metrics: got {paper_metrics!r}, want None or 'clipseg'")
        self.vocabulary, self.phrase_mode, self.form = vocabulary, phrase_mode, form or PromptForm()
        self.class_factors, self.ignore_labels, self.phrase_classes = class_factors, ignore_labels, phrase_classes
        self.classes = None
        if class_list:
            self.classes = ConfusionMetrics(len(vocabulary), unseen=vocabulary.unseen or None, groups=class_groups or None)
        self.phrases = PhraseMetrics(threshold, kinds=phrase_kinds)
        self.paper = ClipSegMetrics(phrase_classes) if paper_metrics else None
        self.without_support = SumMetric()

    @classmethod
    def of_data(cls, data: Any, threshold: float = 0.5, phrase_mode: str = "alone", form: PromptForm | None = None) -> Self:
        """The evaluator that suits a data module."""
        given = {name: getattr(data, name) for name in OF_DATA if hasattr(data, name)}
        return cls(data.vocabulary, threshold=threshold, phrase_mode=phrase_mode, form=form, **given)

    @torch.no_grad()
    def update(self, network: Network, text: TextEncoder, batch: dict[str, Any], region: RegionStage | None = None) -> None:
        """Adds one batch; its answers are scored at the size of its labels, the image's own."""
        image, size = batch["image"].float() / 255, tuple(batch["labels"].shape[-2:])
        image_size = tuple(image.shape[-2:])
        features, names = network.encode(image), self.vocabulary.names
        is_class_list = all(row == names for row in batch.get("prompts", ())) and self.form.form == "text"
        by_class = None
        if self.classes is not None:
            words = with_synonyms(names, self.vocabulary)
            prediction = ask_together(network, features, text.encode(words), region.ask(image, words) if region else None)
            self.classes.update(semantic_labels(prediction, image_size, size, factors=self.class_factors), batch["labels"])
            by_class = soft_masks(prediction) if is_class_list and "prompt_masks" in batch else None  # (B, C, h, w) and (B, C)
        if "prompt_masks" not in batch:
            return
        for i, (row, truth) in enumerate(zip(batch["prompts"], batch["prompt_masks"], strict=True)):
            leaky = self.phrase_mode == "own" and not is_class_list
            asked = [k for k, phrase in enumerate(row) if phrase and (not leaky or truth[k].any())]
            asked = self._with_examples(batch, i, asked)
            if not asked:
                continue
            if by_class is None:
                words = with_synonyms([row[k] for k in asked], self.vocabulary)
                regions = region.ask(image[i, None], words) if region else None
                prompts = self._prompts(network, text, words, batch, i, asked)
                soft, scores = self._ask(network, features.select(i), prompts, regions)
            else:
                soft, scores = (x[i, None] for x in by_class)
            soft = upsample(soft, image_size, size, network.stride)
            self._score(answers(soft, scores, network.by_pixel)[0], batch, i, asked)

    def _with_examples(self, batch: dict[str, Any], i: int, asked: list[int]) -> list[int]:
        """Those of ``asked`` that have an example, where examples are asked with; the others are counted, and left out."""
        if self.form.form == "text":
            return asked
        if "support_image" not in batch:
            raise InputError("the data gives no support images: set its shots, or supports, to 1 or more, or ask with text")
        having = [k for k in asked if batch["support_valid"][i, k].any()]
        self.without_support.update(len(asked) - len(having))
        return having

    def _prompts(
        self, network: Network, text: TextEncoder, words: list[str | list[str]], batch: dict[str, Any], i: int, asked: list[int]
    ) -> Prompts:
        """The prompts ``asked`` of image i in the form that this evaluator asks in."""
        prompts = text.encode(words)
        if self.form.form == "text":
            return prompts
        image, mask, valid = (batch[f"support_{key}"][i, asked][None] for key in ("image", "mask", "valid"))
        return self.form(prompts, image, mask, valid, text.normalize)

    def _score(self, found: Tensor, batch: dict[str, Any], i: int, asked: list[int]) -> None:
        """Adds the phrases ``asked`` of image i, which were answered with the scores ``found`` (K, H, W)."""
        truth = batch["prompt_masks"][i, asked]
        ignored = (batch["labels"][i] == IGNORE).expand_as(truth) if self.ignore_labels else None
        if ignored is not None:
            found, truth = found.masked_fill(ignored, 0), truth & ~ignored
        kinds = [self._kinds(batch["phrase_kind"][i][k]) for k in asked] if self.phrases.kinds else None
        self.phrases.update(found, truth, kinds)
        if self.paper is not None:
            classes = batch["phrase_class"][i, asked] if self.phrase_classes else None
            self.paper.update(found, truth, ignored, classes)

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
        """Single numbers under their metric's names, those of phrases as ``phrase_*`` and of the paper as ``clipseg_*``; ``iou``
        (C,) of a class list, ``phrase_curve`` and ``clipseg_curve`` beside.

        Counts (``phrase_n_*``) are integers, among them ``phrase_n_without_support``, left out for want of an example. What is
        undefined (no unseen class, no phrase) is left out. All ranks must call it.
        """
        scores: dict[str, Any] = {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*was called before the ``update``")  # data, or a rank, without phrases
            by_class = {} if self.classes is None else self.classes.compute()
            by_phrase: dict[str, Any] = dict(self.phrases.compute())  # a copy: torchmetrics keeps what it returned
            by_paper: dict[str, Any] = {} if self.paper is None else dict(self.paper.compute())
            without_support = int(self.without_support.compute())
        scores |= {k: float(v) for k, v in by_class.items() if k != "iou" and not math.isnan(v)}
        if by_class:
            scores["iou"] = by_class["iou"].cpu()
        if not math.isnan(by_phrase["iou_with_absent"]):  # some rank had a phrase
            scores["phrase_curve"] = by_phrase.pop("curve")
            scores |= {f"phrase_{k}": v.item() for k, v in by_phrase.items() if not math.isnan(v)}
            if self.form.form != "text":
                scores["phrase_n_without_support"] = without_support
            if by_paper:
                scores["clipseg_curve"] = by_paper.pop("curve")
            scores |= {f"clipseg_{k}": v.item() for k, v in by_paper.items() if not math.isnan(v)}
        return scores

    def reset(self) -> None:
        for metric in (self.classes, self.phrases, self.paper, self.without_support):
            if metric is not None:
                metric.reset()


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
    """The threshold at which present and absent phrases are answered best together; None where no phrase is present.

    Choose it on a validation split. It maximises the harmonic mean of the IoU on present phrases and the accuracy on absent ones:
    their sum would have a weak model answer nothing at all. Where no phrase is absent it is the best IoU's.
    """
    if "phrase_curve" not in scores or scores["phrase_curve"]["iou"].isnan().all():
        return None
    curve = scores["phrase_curve"]
    iou, absent = curve["iou"], curve["absent_accuracy"]
    both = iou if absent.isnan().all() else 2 * iou * absent / (iou + absent).clamp(min=1e-9)
    return round(float(curve["threshold"][both.argmax()]), 4)


def table(scores: dict[str, Any], vocabulary: Vocabulary) -> str:
    """IoU by class ("-" where a class is absent), phrase IoU by kind and group, then every other number; all in percent."""
    lines = []
    if "iou" in scores:
        unseen = set(vocabulary.unseen)
        names = [name + "*" * (i in unseen) for i, name in enumerate(vocabulary.names)]
        lines = _in_columns(dict(zip(names, scores["iou"].reshape(-1).tolist(), strict=True)), 4)
        lines += ["(* held out of training)", ""] if unseen else [""]
    others = numbers(scores)
    crossed = {k: k.removeprefix("phrase_iou_").split("_") for k in others}
    crossed = {k: words for k, words in crossed.items() if len(words) == 2 and all(f"phrase_iou_{w}" in others for w in words)}
    if crossed:
        columns = list(dict.fromkeys(words[1] for words in crossed.values()))
        lines += [f"{'phrase IoU':12}" + "".join(f"{c:>14}" for c in columns)]
        for kind in dict.fromkeys(words[0] for words in crossed.values()):
            row = [others.get(f"phrase_iou_{kind}_{c}", math.nan) for c in columns]
            lines.append(f"{kind:12}" + "".join(f"{_percent(v):>14}" for v in row))
        lines.append("")
    return "\n".join([*lines, *_in_columns({k: v for k, v in others.items() if k not in crossed}, 3)])


def _in_columns(values: dict[str, float], columns: int) -> list[str]:
    width = max(map(len, values)) + 2
    cells = [f"{name:<{width}}{_percent(value):>5}" for name, value in values.items()]
    rows = -(-len(cells) // max(1, min(columns, 118 // (width + 8))))
    return ["   ".join(cells[row::rows]) for row in range(rows)]


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"
