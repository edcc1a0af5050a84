"""Scoring a network on batches of a data module: the same code in validation and in ``python -m pmpseg.evaluate``."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .inference import ask_one_by_one, ask_together, semantic_labels, upsample
from .metrics import ConfusionMetrics, PhraseMetrics
from .models.clip import TextEncoder
from .models.pmp import PMP
from .vocabulary import Vocabulary

PHRASE_MODES = ("alone", "mixed", "own")


class Evaluator(nn.Module):
    """Both metrics of a data set: the class list as a label map, and phrases (or overlapping classes) as one mask each.

    Phrases are asked ``alone``. ``mixed`` asks an image's phrases together with its absent ones, ``own`` with only those that are
    there: this leaks the ground truth through the list, and is offered to measure by how much.
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
    def update(self, network: PMP, text: TextEncoder, batch: dict[str, Any]) -> None:
        """Adds one batch; its answers are scored at the size of its labels, the image's own."""
        image, size = batch["image"].float() / 255, tuple(batch["labels"].shape[-2:])
        image_size = tuple(image.shape[-2:])
        features = network.encode(image)
        class_list = text.encode(self.vocabulary.synonyms).expand(len(image))
        self.classes.update(semantic_labels(network.decode(features, class_list), image_size, size), batch["labels"])
        if "prompt_masks" not in batch:
            return
        prompts, truth = text.encode_batch(batch["prompts"]), batch["prompt_masks"]
        real = prompts.valid.clone()
        is_class_list = bool((batch["prompt_class"] >= 0).all())
        if self.phrase_mode == "own" and not is_class_list:
            prompts.valid &= truth.flatten(2).any(-1)
        ask = ask_one_by_one if self.phrase_mode == "alone" and not is_class_list else ask_together
        masks = upsample(ask(network, features, prompts)[0], image_size, size)
        kinds = None
        if self.phrases.kinds:
            flat = [kind for image_kinds in batch["phrase_kind"] for kind in image_kinds]
            kinds = [kind.split() for kind, ok in zip(flat, real.flatten().tolist(), strict=True) if ok]
        self.phrases.update(masks[real], truth[real], kinds)

    def compute(self) -> dict[str, Any]:
        """Single numbers under their metric's names, phrase scores as ``phrase_*``; ``iou`` (C,) and ``phrase_curve`` beside.

        What is undefined (no unseen class, no phrase) is left out.
        """
        by_class = self.classes.compute()
        scores: dict[str, Any] = {k: float(v) for k, v in by_class.items() if k != "iou" and not math.isnan(v)}
        scores["iou"] = by_class["iou"].cpu()
        if int(self.phrases.present + self.phrases.absent):
            by_phrase = dict(self.phrases.compute())  # a copy: torchmetrics keeps what it returned
            scores["phrase_curve"] = by_phrase.pop("curve")
            scores |= {f"phrase_{k}": float(v) for k, v in by_phrase.items() if not math.isnan(v)}
        return scores

    def reset(self) -> None:
        self.classes.reset()
        self.phrases.reset()


def numbers(scores: dict[str, Any]) -> dict[str, float]:
    """The single numbers among ``Evaluator.compute``'s, without counts: what goes into logs."""
    return {k: v for k, v in scores.items() if isinstance(v, float) and not k.startswith("phrase_n_")}


def best_threshold(scores: dict[str, Any]) -> float | None:
    """The threshold at which present and absent phrases are answered best together; None without phrases.

    Choose it on a validation split. It maximises the mean of IoU on present phrases and accuracy on absent ones.
    """
    if "phrase_curve" not in scores:
        return None
    curve = scores["phrase_curve"]
    both = torch.nan_to_num(curve["iou"]) + torch.nan_to_num(curve["absent_accuracy"])
    return round(float(curve["threshold"][both.argmax()]), 4)


def table(scores: dict[str, Any], vocabulary: Vocabulary, columns: int = 4) -> str:
    """IoU by class in columns ("-" where a class is absent), then every single number, in percent."""
    width = max(len(n) for n in vocabulary.names) + 2
    values = scores["iou"].reshape(-1).tolist()
    unseen = set(vocabulary.unseen)
    cells = [
        f"{name + ('*' if i in unseen else ''):<{width}}{'-' if math.isnan(v) else f'{100 * v:.1f}':>5}"
        for i, (name, v) in enumerate(zip(vocabulary.names, values, strict=True))
    ]
    columns = max(1, min(columns, 118 // (width + 8)))
    rows = -(-len(cells) // columns)
    lines = ["   ".join(cells[row::rows]) for row in range(rows)]
    if unseen:
        lines.append("(* held out of training)")
    names = numbers(scores)
    width = max(map(len, names)) + 2
    pairs = [f"{name:<{width}}{100 * value:>5.1f}" for name, value in names.items()]
    rows = -(-len(pairs) // 3)
    return "\n".join([*lines, "", *("   ".join(pairs[row::rows]) for row in range(rows))])
