"""Visual support for the prompts of scenes: other scenes that show what a phrase means, each with the mask of it.

CLIPSeg's PhraseCut+ (arXiv 2112.10003, sec. 3.1) draws the support of a phrase from all images of that phrase. Here it comes
from a pool of scenes that no split holds, so it is never the query itself. A phrase's mask is computed in any scene by the rule
that judges it in the query's (``scene_phrases.py``), so phrases that the query does not show have supports too.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from torch import Tensor

from .items import stack_supports
from .scene_drawing import KINDS, STUFF, Scene, draw_scene
from .scene_phrases import SMALLEST, Description, Phrase

POOL = 400  # scenes; some 40 MB at 128 px, in each process that draws supports
_POOL_SEED = {False: 3_000_003, True: 4_000_003}  # beside those of the splits


class SupportPool:
    """Scenes to search in, each drawn when first looked at: of the test split's kinds if ``held_out``, else of seen things."""

    def __init__(self, seed: int, size: int, held_out: bool, length: int = POOL) -> None:
        self.seed, self.size, self.held_out, self.length = seed + _POOL_SEED[held_out], size, held_out, length
        self.scenes: dict[int, Scene] = {}

    def scene(self, index: int) -> Scene:
        if index not in self.scenes:
            kind = KINDS[index % 3] if self.held_out else "seen"
            self.scenes[index] = draw_scene(self.seed, index, kind, self.size)
        return self.scenes[index]

    def search(self, phrase: Phrase, count: int, rng: np.random.Generator) -> list[tuple[Scene, np.ndarray]]:
        """Up to ``count`` scenes, in any order, in which the phrase clearly has at least SMALLEST pixels, with the masks."""
        found: list[tuple[Scene, np.ndarray]] = []
        for index in rng.permutation(self.length):
            if len(found) == count:
                break
            scene = self.scene(int(index))
            mask = _mask(phrase, scene)
            if mask is not None and np.count_nonzero(mask) >= SMALLEST:
                found.append((scene, mask))
        return found

    def supports(self, asked: Sequence[Phrase | None], count: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """K phrases -> support_image (K, S, 3, H, W) uint8, support_mask (K, S, H, W) and support_valid (K, S) bool.

        None has no support, nor has a phrase that the pool never shows; with fewer than S the last are missing.
        """
        found = [[] if phrase is None else self.search(phrase, count, rng) for phrase in asked]
        return stack_supports([[(scene.image, mask) for scene, mask in pairs] for pairs in found], count, self.size)


@lru_cache(maxsize=4)
def support_pool(seed: int, size: int, held_out: bool) -> SupportPool:
    """One for a process: a worker keeps it between epochs."""
    return SupportPool(seed, size, held_out)


def class_phrase(name: str) -> Phrase:
    """The phrase that has a class's pixels: "red circle" or "grass"."""
    if name in STUFF:
        return Phrase("stuff", stuff=name)
    colour, shape = name.split()
    return Phrase("attributes", Description(colour=colour, shape=shape))


def _mask(phrase: Phrase, scene: Scene) -> np.ndarray | None:
    """The phrase's mask, where a look at the list of things does not already say that there is none."""
    return phrase.mask(scene) if phrase.kind == "stuff" or phrase.things(scene) else None
