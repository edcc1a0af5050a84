"""How often a region's best name, of a whole class list, is its own: the same code in training and in the scripts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from .models.clip import TextEncoder
from .models.region import RegionClassifier, cosines
from .vocabulary import Vocabulary


class RegionAccuracy(Metric):
    """Zero-shot accuracy on regions with true masks, as OVSeg's tuning watches it (code, ``--ade-val``).

    ``accuracy`` counts regions, ``class_accuracy`` is the mean over classes that occur, ``accuracy_GROUP`` counts the regions of
    a group's classes and ``accuracy_seen`` those of no group. What is undefined is left out.
    """

    full_state_update = False
    right: Tensor
    total: Tensor

    def __init__(self, vocabulary: Vocabulary, groups: Mapping[str, Sequence[int]] | None = None) -> None:
        super().__init__()
        self.vocabulary, self.groups = vocabulary, dict(groups or {})
        if self.groups:
            others = {c for some in self.groups.values() for c in some}
            self.groups["seen"] = [c for c in range(len(vocabulary)) if c not in others]
        for name in ("right", "total"):
            self.add_state(name, torch.zeros(len(vocabulary), dtype=torch.int64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(
        self, classifier: RegionClassifier, text: TextEncoder, batch: Mapping[str, Any], prompted: bool = True
    ) -> None:
        """Adds one batch; without the mask prompts if not ``prompted``."""
        cuts = [(image.float() / 255, mask.float()) for image, mask in zip(batch["images"], batch["masks"], strict=True)]
        regions = [
            classifier.embed_crops(*classifier.prepare(cuts[start : start + classifier.chunk]), prompted)
            for start in range(0, len(cuts), classifier.chunk)
        ]
        names = F.normalize(text.encode(self.vocabulary.synonyms).pooled[0], dim=-1)
        best = cosines(torch.cat(regions), names).argmax(1)
        classes = batch["classes"]
        self.total += torch.bincount(classes, minlength=len(self.total))
        self.right += torch.bincount(classes[best == classes], minlength=len(self.total))

    def compute(self) -> dict[str, float]:
        occurs = self.total > 0
        scores = {"accuracy": self.right.sum() / self.total.sum()}
        scores["class_accuracy"] = (self.right[occurs] / self.total[occurs]).mean()
        scores |= {f"accuracy_{g}": self.right[some].sum() / self.total[some].sum() for g, some in self.groups.items()}
        return {name: float(value) for name, value in scores.items() if not value.isnan()}
