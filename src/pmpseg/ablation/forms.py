"""Scoring by prompt form: the same phrases asked by text and by example, as in CLIPSeg's ablation (arXiv 2112.10003, table 9).

There the threshold is the best one on the test split; here it is chosen on the validation split.
"""

from typing import Any

import torch

from pmpseg.errors import InputError
from pmpseg.evaluate import evaluate


def score_forms(segmenter: Any, data: Any) -> dict[str, float]:
    """``text_*`` and, of a network that takes examples, ``image_*``: iou, ap, iou_at_50, absent_accuracy; the class list's mIoU.

    A network that takes none (a PMP that learned without) has no ``image_*``. Raises InputError for data without examples.
    """
    if not getattr(data, "supports", 0):
        raise InputError("asked: forms wants examples: set data.supports to 1 or more")
    asks_list = getattr(data, "class_list", True)
    numbers: dict[str, float] = {}
    for form in ("text", "image") if segmenter.takes_examples else ("text",):
        data.class_list = False
        chosen = evaluate(segmenter, data, "val", prompt_form=form)["phrase_curve"]
        data.class_list = asks_list and form == "text"  # the list is asked by words
        found = evaluate(segmenter, data, "test", prompt_form=form)
        curve = found["phrase_curve"]
        best, half = int(chosen["iou"].argmax()), at_half(chosen["absent_accuracy"])
        numbers |= {f"{form}_iou": float(curve["iou"][best]), f"{form}_ap": found["phrase_ap"]}
        numbers |= {f"{form}_iou_at_50": float(curve["iou"][half])}
        numbers |= {f"{form}_absent_accuracy": float(curve["absent_accuracy"][half])}
        numbers |= {name: found[name] for name in ("miou", "miou_seen") if name in found}
        numbers |= {f"{form}_n_without_support": found[name] for name in ("phrase_n_without_support",) if name in found}
    data.class_list = asks_list
    return numbers


def at_half(absent_accuracy: torch.Tensor) -> int:
    """The first of rising thresholds that answers half of the absent phrases with nothing; the last if none does."""
    enough = (absent_accuracy >= 0.5).nonzero()
    return int(enough[0]) if len(enough) else len(absent_accuracy) - 1
