"""Regions of generated scenes by their true masks: what a second stage tunes on, and what its accuracy is measured on."""

from typing import Literal

import numpy as np
import torch

from pmpseg.errors import InputError

from .base import SegmentationDataset
from .regions import RegionData, cut
from .scene_phrases import PHRASE_KINDS, SMALLEST, present_phrase
from .scenes import CLASSES, Scenes, label_map


class SceneRegions(RegionData):
    """True masks of ``Scenes`` with their names. Training and validation know seen classes only; the test split asks all.

    Args:
        names: ``class`` pairs masks with names of the class list ("red circle"), ``phrase`` with phrases of any granularity
            ("the small striped red circle"), as captions would; in evaluation always the class list.
        regions: of each training scene; all of them, in evaluation.
        expand, scale: see ``RegionData``.
        image_size, train_length, val_length, test_length: see ``Scenes``.
        batch_size, eval_batch_size: scenes, not regions.
        num_workers, seed: see ``SegmentationData``.
    """

    def __init__(
        self,
        names: Literal["class", "phrase"] = "class",
        regions: int = 4,
        expand: float = 1.0,
        scale: float = 0.9,
        image_size: int = 128,
        train_length: int = 8000,
        val_length: int = 96,
        test_length: int = 240,
        batch_size: int = 16,
        eval_batch_size: int = 16,
        num_workers: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(expand, scale, batch_size, eval_batch_size, num_workers, seed)
        if names not in ("class", "phrase") or regions < 1:
            raise InputError(f"names, regions: got {names!r}, {regions}, want 'class' or 'phrase', and 1 or more")
        self.names, self.regions = names, regions
        self.scenes = Scenes(image_size, train_length, val_length, test_length, seed=seed)
        self.vocabulary, self.class_groups, self.image_size = self.scenes.vocabulary, self.scenes.class_groups, image_size

    def dataset(self, split: str) -> "SceneRegionDataset":
        return SceneRegionDataset(self, split)


class SceneRegionDataset(SegmentationDataset):
    """One scene's regions an item; in training ``regions`` of them, the same ones again where it has fewer."""

    def __init__(self, data: SceneRegions, split: str) -> None:
        self.data, self.split, self.scenes = data, split, data.scenes.dataset(split)

    def __len__(self) -> int:
        return len(self.scenes)

    def item(self, index: int, epoch: int) -> dict:
        scene, training = self.scenes.scene(index, epoch), self.split == "train"
        rng = np.random.default_rng([self.scenes.seed, index, epoch, 2])
        if training and self.data.names == "phrase":
            asked = [p for kind in PHRASE_KINDS if (p := present_phrase(scene, kind, rng)) is not None]
            found = [(p.text, -1, m) for p in asked if (m := p.mask(scene)) is not None]
        else:
            labels = label_map(scene)
            found = [(CLASSES[c], int(c), labels == c) for c in np.unique(labels)]
            found = [region for region in found if region[2].sum() >= SMALLEST]
        if training:
            found = [found[i] for i in np.resize(rng.permutation(len(found)), self.data.regions)]
        image = torch.from_numpy(scene.image).permute(2, 0, 1)
        window = rng if training else None
        cuts = [cut(image, torch.from_numpy(mask), self.data.expand, self.data.scale, window) for _, _, mask in found]
        return {
            "images": [image for image, _ in cuts],
            "masks": [mask for _, mask in cuts],
            "nouns": [noun for noun, _, _ in found],
            "classes": [c for _, c, _ in found],
        }
