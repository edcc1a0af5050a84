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
    Answer,
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
from .models.prompts import PixelPrediction, Prompts
from .models.region import Regions
from .oracle import name_by_truth, name_true_masks
from .paper_metrics import ClipSegMetrics
from .region_stage import RegionStage
from .supports import PromptForm
from .views import Views, look, merged_labels
from .vocabulary import Vocabulary

PHRASE_MODES = ("alone", "mixed", "own")
OF_DATA = ["class_groups", "class_list", "class_factors", "ignore_index", "ignore_labels"]
OF_DATA += ["paper_metrics", "phrase_classes", "phrase_kinds"]
ORACLES = ("masks", "classes")


class Evaluator(nn.Module):
    """Both metrics of a data set: the class list as a label map, and phrases (or overlapping classes) as one mask each.

    Phrases are asked ``alone``, as ``Segmenter.segment`` does; the whole class list, whose answer is at hand, is asked together.
    ``mixed`` asks an image's phrases together with its absent ones, ``own`` asks and scores only those that are there: this
    leaks the ground truth through the list, and is offered to measure by how much.

    The other arguments are attributes that a data module may have (see ``of_data``):

    - ``class_list`` False: the vocabulary is not asked as a list, there is no label map
    - ``class_factors``: of the scores of some classes in the label map, before the best is taken
    - ``ignore_index``: the label of pixels that count nowhere
    - ``ignore_labels``: nor do they for phrases (a phrase's answer counts as empty there)
    - ``paper_metrics`` "clipseg": ``ClipSegMetrics`` beside, of ``phrase_classes`` classes, or of each phrase by itself (None).
      The paper's code resizes scores to the labels with corners aligned; here they are resized as everywhere

    ``form``: what phrases are asked with; other than text it wants supports in the batches. The class list is asked by words.

    ``views``: the looks that the class list's map is made of, all of which are kept until then (masks of queries are small; a
    CLIPSeg's logits are not: B x C x H x W a look). Phrases are asked once, of the whole image.
    ``chunk``: classes whose scores are there together, at the answer's size; it changes nothing but the memory.
    ``unseen``: the classes without training labels, where they are not the vocabulary's.
    ``oracle``: the truth takes one stage's place, to see what the other one loses: the ``masks`` are the truth's and the second
    stage names them, or proposals have the ``classes`` of the truth (see ``oracle``). No other evaluation sees the truth before
    it has answered.
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
        ignore_index: int = 255,
        views: Views | None = None,
        unseen: Sequence[int] | None = None,
        oracle: str | None = None,
        chunk: int = 64,
    ) -> None:
        super().__init__()
        if phrase_mode not in PHRASE_MODES:
            raise ValueError(f"phrase_mode: got {phrase_mode!r}, want one of {', '.join(PHRASE_MODES)}")
        if paper_metrics not in (None, "clipseg"):
            raise ValueError(f"paper_metrics: got {paper_metrics!r}, want None or 'clipseg'")
        if oracle not in (None, *ORACLES):
            raise ValueError(f"oracle: got {oracle!r}, want None or one of {', '.join(ORACLES)}")
        if chunk < 1:
            raise InputError(f"class chunk: got {chunk}, want 1 class or more")
        self.views, self.oracle, self.ignore_index, self.chunk = views or Views(), oracle, ignore_index, chunk
        if not class_list and not (self.views.is_plain and oracle is None):
            raise InputError("windows, scales, flips and oracles are for class lists, and this data has phrases only")
        if oracle and not self.views.is_plain:
            raise ValueError("an oracle looks once: got views and an oracle, want one of them")
        self.vocabulary, self.phrase_mode, self.form = vocabulary, phrase_mode, form or PromptForm()
        self.class_factors, self.ignore_labels, self.phrase_classes = class_factors, ignore_labels, phrase_classes
        self.classes = None
        if class_list:
            unseen = vocabulary.unseen if unseen is None else unseen
            self.classes = ConfusionMetrics(len(vocabulary), ignore_index, unseen or None, class_groups or None)
        self.phrases = PhraseMetrics(threshold, kinds=phrase_kinds)
        self.paper = ClipSegMetrics(phrase_classes) if paper_metrics else None
        self.without_support = SumMetric()

    @classmethod
    def of_data(cls, data: Any, threshold: float = 0.5, **options: Any) -> Self:
        """The evaluator that suits a data module. ``options``: the arguments that are not the data's."""
        given = {name: getattr(data, name) for name in OF_DATA if hasattr(data, name)}
        return cls(data.vocabulary, threshold=threshold, **(given | options))

    @torch.no_grad()
    def update(
        self, network: Network, text: TextEncoder, batch: dict[str, Any], region: RegionStage | None = None
    ) -> Tensor | None:
        """Adds one batch; its answers are scored at the size of its labels, the image's own. Returns the class map, if any."""
        image, size = batch["image"].float() / 255, tuple(batch["labels"].shape[-2:])
        image_size = tuple(image.shape[-2:])
        names, looks_once = self.vocabulary.names, self.views.is_plain and self.oracle != "masks"
        features = network.encode(image) if looks_once or "prompt_masks" in batch else None
        is_class_list = all(row == names for row in batch.get("prompts", ())) and self.form.form == "text"
        by_class = labels = None
        if self.classes is not None:
            labels, prediction = self._class_map(network, text, batch, image, features, region)
            self.classes.update(labels, batch["labels"])
            by_class = soft_masks(prediction) if prediction and is_class_list and "prompt_masks" in batch else None
        if "prompt_masks" not in batch or features is None:
            return labels
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
        return labels

    def _class_map(
        self,
        network: Network,
        text: TextEncoder,
        batch: dict[str, Any],
        image: Tensor,
        features: Encoded | None,
        region: RegionStage | None,
    ) -> tuple[Tensor, Answer | None]:
        """The best class of every pixel (B, H, W), and the answer (B, C, ...) if there is a single one."""
        words = with_synonyms(self.vocabulary.names, self.vocabulary)
        image_size, size = ((x.shape[-2], x.shape[-1]) for x in (image, batch["labels"]))
        if self.oracle == "masks":
            if region is None:
                raise InputError("the oracle's masks are named by a second stage: give one with --region")
            return name_true_masks(region, image, batch["labels"], words, self.ignore_index), None
        prompts = text.encode(words)
        if self.oracle == "classes":
            region = None  # the truth names, and no CLIP

        def ask(part: Tensor, encoded: Encoded | None = None) -> Answer:
            encoded = network.encode(part) if encoded is None else encoded
            return ask_together(network, encoded, prompts, region.ask(part, words) if region else None)

        if not self.views.is_plain:
            if self.views.scales != (1.0,) and "scaled" not in batch:
                raise InputError("scales: this data gives its images at one scale only: leave --scales out")
            images = [scaled.float() / 255 for scaled in batch["scaled"]] if "scaled" in batch else [image]
            return merged_labels(list(look(images, self.views, ask)), size, self.chunk, self.class_factors), None
        prediction = ask(image, features)
        if self.oracle == "classes":
            if isinstance(prediction, PixelPrediction):
                raise InputError("the oracle names proposals, and this model has none: give a model with queries")
            return name_by_truth(prediction.mask_logits, image_size, batch["labels"], self.ignore_index), None
        return semantic_labels(prediction, image_size, size, self.chunk, factors=self.class_factors), prediction

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
        ignored = (batch["labels"][i] == self.ignore_index).expand_as(truth) if self.ignore_labels else None
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
            by_class = {} if self.classes is None else dict(self.classes.compute())
            by_phrase: dict[str, Any] = dict(self.phrases.compute())  # a copy: torchmetrics keeps what it returned
            by_paper: dict[str, Any] = {} if self.paper is None else dict(self.paper.compute())
            without_support = int(self.without_support.compute())
        if self.classes is not None and not self.classes.unseen:
            by_class.pop("miou_seen")  # which would be another name of miou
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
