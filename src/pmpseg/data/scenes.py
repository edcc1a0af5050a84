"""The embedded data: generated scenes as class maps and as phrases with a mask each. No file is read or written.

Two views of one scene. Class list: 48 colour-shape pairs ("red circle") and 7 kinds of stuff, one label a pixel, as COCO-Stuff
gives. Phrases: one pixel belongs to several right answers (``scene_phrases.py``), as PhraseCut gives.

Splits: ``train`` and ``val`` draw and ask only what is *seen*; ``test`` has as many scenes about held-out *combinations* (a
colour and a shape that never met in training) and about unseen *words* (star, heart, gravel) as about seen things.
"""

from collections.abc import Sequence

import numpy as np
import torch

from pmpseg.errors import InputError
from pmpseg.vocabulary import Vocabulary

from .base import SegmentationData, SegmentationDataset
from .scene_drawing import COLOURS, KINDS, SHAPES, STUFF, UNSEEN_STUFF, Scene, draw_scene, group_of
from .scene_phrases import GROUPS, PHRASE_KINDS, Phrase, absent_phrase, present_phrase
from .scene_support import class_phrase, support_pool

CLASSES = tuple(f"{c} {s}" for c in COLOURS for s in SHAPES) + STUFF
CLASS_GROUP = {f"{c} {s}": group_of(c, s) for c in COLOURS for s in SHAPES}
CLASS_GROUP |= {s: "word" if s in UNSEEN_STUFF else "seen" for s in STUFF}
ABSENT_AT_TEST = 6  # as many absent phrases as there are kinds of present ones
Ask = tuple[str, Phrase | int | None, int]  # text, the phrase or class it stands for, class index or -1
_SPLIT_SEED = {"train": 0, "val": 1_000_003, "test": 2_000_003}


class Scenes(SegmentationData):
    """Generated scenes of ``image_size`` x ``image_size`` pixels.

    Args:
        image_size: 128 to 192 pixels; things keep their size in pixels.
        train_length, val_length, test_length: scenes in each split.
        num_prompts: K, the prompts of a training image; null for all seen classes beside its phrases.
        batch_size, eval_batch_size, num_workers, seed: see ``SegmentationData``.
        negatives: share of training prompts with nothing to find, half of them phrases and half classes; null: what is left of
            num_prompts when all that is there is asked, which is nothing where it is small.
        supports: S, other scenes with a mask that go with each prompt to show it (see ``scene_support.py``); 0 for none.
    """

    def __init__(
        self,
        image_size: int = 128,
        train_length: int = 8000,
        val_length: int = 96,
        test_length: int = 240,
        num_prompts: int | None = 20,
        batch_size: int = 16,
        eval_batch_size: int = 16,
        num_workers: int = 1,
        seed: int = 0,
        supports: int = 0,
        negatives: float | None = None,
    ) -> None:
        if negatives is not None and not 0 <= negatives <= 1:
            raise InputError(f"negatives: got {negatives}, want 0 to 1, a share of the training prompts, or null")
        if supports < 0:
            raise InputError(f"supports: got {supports}, want 0 or more scenes a prompt")
        if not 64 <= image_size <= 256:
            raise InputError(f"image_size: got {image_size}, want 64 to 256 pixels; things do not grow with the scene")
        super().__init__(image_size, num_prompts, batch_size, eval_batch_size, num_workers, seed)
        self.supports, self.negatives = supports, negatives
        self.lengths = {"train": train_length, "val": val_length, "test": test_length}
        unseen = [i for i, name in enumerate(CLASSES) if CLASS_GROUP[name] != "seen"]
        self.vocabulary = Vocabulary(list(CLASSES), [[name] for name in CLASSES], unseen)
        self.class_groups = {g: [i for i, n in enumerate(CLASSES) if CLASS_GROUP[n] == g] for g in GROUPS[1:]}
        self.phrase_kinds = (*PHRASE_KINDS, *GROUPS, *(f"{kind}_{group}" for kind in PHRASE_KINDS for group in GROUPS))

    def dataset(self, split: str) -> "SceneDataset":
        return SceneDataset(self, split)


class SceneDataset(SegmentationDataset):
    """One split of ``Scenes``; in training every epoch shows new scenes."""

    def __init__(self, data: Scenes, split: str) -> None:
        self.data, self.split = data, split
        self.seed = data.seed + _SPLIT_SEED[split]
        self.supports = data.supports if data.has_supports(split) else 0

    def __len__(self) -> int:
        return self.data.lengths[self.split]

    def scene(self, index: int, epoch: int = 0) -> Scene:
        kind = KINDS[index % 3] if self.split == "test" else "seen"
        return draw_scene(self.seed, epoch * len(self) + index, kind, self.data.image_size)

    def item(self, index: int, epoch: int) -> dict:
        scene = self.scene(index, epoch)
        labels = label_map(scene)
        rng = np.random.default_rng([self.seed, index, epoch, 1])
        asked = self._training_prompts(scene, labels, rng) if self.split == "train" else self.test_phrases(scene, rng)
        asked += [("", None, -1)] * (self._num_prompts() - len(asked))
        masks = [_mask(ask, scene, labels) for _, ask, _ in asked]
        item = {
            "image": torch.from_numpy(scene.image).permute(2, 0, 1),
            "labels": torch.from_numpy(labels.astype(np.int64)),
            "name": f"{self.split}-{index:05d}",
            "index": index,
            "prompts": [text for text, _, _ in asked],
            "prompt_class": torch.tensor([c for _, _, c in asked]),
            "prompt_masks": torch.from_numpy(np.stack(masks)),
            "phrase_kind": [f"{ask.kind} {ask.group}" if isinstance(ask, Phrase) else "" for _, ask, _ in asked],
        }
        if self.supports:
            pool = support_pool(self.data.seed, self.data.image_size, self.split == "test")
            phrases = [class_phrase(CLASSES[ask]) if isinstance(ask, int) else ask for _, ask, _ in asked]
            item |= pool.supports(phrases, self.supports, np.random.default_rng([self.seed, index, epoch, 3]))
        return item

    def _num_prompts(self) -> int:
        if self.split != "train":
            return len(PHRASE_KINDS) + ABSENT_AT_TEST
        # Without a number, classes first: the phrases of an image, present and absent, are at most as many again as kinds.
        return self.data.num_prompts or len(self.data.vocabulary.seen) + 2 * len(PHRASE_KINDS)

    def test_phrases(self, scene: Scene, rng: np.random.Generator) -> list[Ask]:
        """One phrase of every kind that the scene has, and as many with nothing to find; none is a class, hence -1.

        Where a test scene can be asked about what is held out, it is.
        """
        seen_only = self.split != "test"
        phrases = [present_phrase(scene, kind, rng, seen_only) for kind in PHRASE_KINDS]
        phrases += [absent_phrase(scene, rng, seen_only) for _ in range(ABSENT_AT_TEST)]
        return [(text, p, -1) for text, p in {p.text: p for p in phrases if p is not None}.items()]

    def _training_prompts(self, scene: Scene, labels: np.ndarray, rng: np.random.Generator) -> list[Ask]:
        """Classes and phrases of the image, the rest absent ones, in any order."""
        size = self._num_prompts()
        here = [int(c) for c in np.unique(labels)]
        absent = rng.permutation([c for c in self.data.vocabulary.seen if c not in here])
        kinds = [k for k in (*PHRASE_KINDS, "attributes") if k != "stuff"]
        phrases = [present_phrase(scene, kind, rng) for kind in kinds]
        if self.data.negatives is not None:
            return self._shared_out(phrases, here, absent, scene, rng)
        phrases += [absent_phrase(scene, rng) for _ in range((self.data.num_prompts or 5 * len(PHRASE_KINDS)) // 5)]
        asked: list[Ask] = [(CLASSES[c], c, c) for c in here]
        asked += _as_asks(phrases)
        asked += [(CLASSES[c], int(c), int(c)) for c in absent[: max(0, size - len(asked))]]
        return [asked[i] for i in rng.permutation(len(asked))[:size]]

    def _shared_out(
        self, phrases: Sequence[Phrase | None], here: Sequence[int], absent: np.ndarray, scene: Scene, rng: np.random.Generator
    ) -> list[Ask]:
        """As many present and absent prompts as ``negatives`` says, in the mean, in any order."""
        size, share = self._num_prompts(), self.data.negatives or 0.0
        without = int(rng.binomial(size, share))
        nothing = [absent_phrase(scene, rng) for _ in range(without // 2)]
        found: list[Ask] = [(CLASSES[c], int(c), int(c)) for c in here] + _as_asks(phrases)
        missing = _as_asks(nothing)
        missing += [(CLASSES[c], int(c), int(c)) for c in absent[: without - len(missing)]]
        asked = [found[i] for i in rng.permutation(len(found))[: size - without]] + missing
        return [asked[i] for i in rng.permutation(len(asked))]


def _as_asks(phrases: Sequence[Phrase | None]) -> list[Ask]:
    """Each phrase once, without those that are classes."""
    return [(text, p, -1) for text, p in {p.text: p for p in phrases if p is not None}.items() if text not in CLASSES]


def label_map(scene: Scene) -> np.ndarray:
    """(H, W) class indices into ``CLASSES``: the thing on top, else the stuff."""
    things = [CLASSES.index(t.name) for t in scene.things]
    stuff = np.array([CLASSES.index(s) for s in STUFF])[scene.stuff]
    return np.where(scene.owner > 0, np.array([0, *things])[scene.owner], stuff)


def _mask(ask: Phrase | int | None, scene: Scene, labels: np.ndarray) -> np.ndarray:
    mask = ask.mask(scene) if isinstance(ask, Phrase) else None if ask is None else labels == ask
    return np.zeros(labels.shape, bool) if mask is None else mask
