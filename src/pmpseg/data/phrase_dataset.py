"""Items of phrases with a mask each: which phrases of which image, what is asked instead, what supports them, and the crop.

A training item is an image (3, S, S) with K phrases. In evaluation it is an image with all its phrases; labels (all 255: phrases
have no class map) and prompt_masks keep the image's own size, unless resize_labels. ``PhraseData`` explains the options.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pmpseg.errors import InputError

from .base import IGNORE, SegmentationDataset
from .items import chw, stack_supports
from .phrase_parts import Groups, is_absent, object_crop, size_word
from .transforms import eval_transform, nearest, resize, square_transform

NEGATIVE_TRIES = 50


class PhraseSource:
    """N phrases on M images; no image is read, and no mask made, before it is asked for.

    ``forms`` has a word of ``data.phrase_kinds`` for each phrase, or "". ``classes`` (N,) int64 are its class, where it has one.
    """

    phrases: Sequence[str]
    image_of: np.ndarray  # (N,) which image
    names: Sequence[str]  # M file names
    forms: Sequence[str]
    classes: np.ndarray | None

    def image(self, image: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        raise NotImplementedError

    def mask(self, sample: int) -> np.ndarray:
        """(H, W) bool."""
        raise NotImplementedError


@dataclass(frozen=True)
class PhraseOptions:
    """What a ``PhraseData`` was given, for its data sets: these go to the workers without the module and its trainer."""

    image_size: int
    negatives: float
    check_negatives: bool
    supports: int
    support_may_be_query: bool
    prefixes: tuple[str, ...]
    crop: str
    square: bool
    resize_labels: bool
    prompts_per_image: int
    phrases_at_once: int | None
    eval_absent: int
    remove_classes: tuple[str, ...]
    seed: int


class PhraseDataset(SegmentationDataset):
    """One split. ``unique`` are its U different phrases, ``phrase_of`` (N,) which of them a sample has."""

    def __init__(self, source: PhraseSource, options: PhraseOptions, split: str) -> None:
        self.source, self.options, self.train = source, options, split == "train"
        number: dict[str, int] = {}
        self.phrase_of = np.array([number.setdefault(phrase, len(number)) for phrase in source.phrases], dtype=np.int64)
        self.unique = list(number)
        kept = np.ones(len(self.phrase_of), dtype=bool)
        if options.remove_classes and split != "test":
            from .removal import removed

            kept = ~np.array([removed(phrase, options.remove_classes) for phrase in self.unique], dtype=bool)[self.phrase_of]
        if not kept.any():
            classes = ", ".join(options.remove_classes)
            raise InputError(f"no {split} phrase is left of {len(kept)} without {classes}: remove fewer")
        self.kept = np.flatnonzero(kept)  # the samples that are left
        self.samples_of = Groups(self.phrase_of, len(number), kept)  # of a phrase
        self.pool = self.samples_of.filled()  # phrases to take negatives from
        self.all_on = Groups(source.image_of, len(source.names))  # samples of an image, removed ones too: they are on it
        self.kept_on = Groups(source.image_of, len(source.names), kept)
        self.items = self.kept[:, None] if self.train and options.prompts_per_image == 1 else list(self._by_image())

    def __len__(self) -> int:
        return len(self.items)

    def item(self, index: int, epoch: int) -> dict:
        rng = np.random.default_rng([self.options.seed, epoch, index])
        samples = self.items[index]
        if self.train:
            samples = rng.permutation(samples)[: self.options.prompts_per_image]
        image = int(self.source.image_of[samples[0]])
        asked = [int(p) for p in self.phrase_of[samples]]
        photo, masks = self.source.image(image), np.stack([self.source.mask(sample) for sample in samples])
        if self.train:
            photo, masks = self._training_view(photo, masks, rng)
            absent = self._replace(asked, image, rng)
            masks[absent] = False
            texts = [str(rng.choice(self.options.prefixes)).format(self.unique[p]) for p in asked]
            padding = self.options.prompts_per_image - len(asked)
        else:
            absent = []
            for _ in range(self.options.eval_absent):
                other = self._absent(asked, image, rng)
                if other is not None:
                    absent.append(len(asked))
                    asked.append(other)
            masks = np.concatenate([masks, np.zeros((len(absent), *masks.shape[1:]), dtype=bool)])
            texts = [self.unique[p] for p in asked]
            padding = 0
        kinds = ["" if k in absent else self._kind(samples[k], masks[k]) for k in range(len(asked))]
        if not self.train:
            photo, masks = self._evaluation_view(photo, masks)
        item = {
            "image": chw(photo),
            "labels": torch.full(masks.shape[1:], IGNORE, dtype=torch.int64),
            "name": self.source.names[image],
            "index": index,
            "prompts": texts + [""] * padding,
            "prompt_class": torch.full((len(texts) + padding,), -1, dtype=torch.int64),
            "prompt_masks": torch.from_numpy(np.concatenate([masks, np.zeros((padding, *masks.shape[1:]), dtype=bool)])),
            "phrase_kind": kinds + [""] * padding,
        }
        if self.source.classes is not None:
            classes = [int(self.source.classes[self.samples_of[p][0]]) for p in asked]
            item["phrase_class"] = torch.tensor(classes + [-1] * padding, dtype=torch.int64)
        if self.options.supports:
            item |= self._supports([*asked, *[-1] * padding], image, np.random.default_rng([self.options.seed, epoch, index, 1]))
        return item

    def _by_image(self) -> Iterator[np.ndarray]:
        """The samples of each image, in evaluation in portions of at most ``phrases_at_once``."""
        for image in self.kept_on.filled():
            samples = self.kept_on[image]
            step = len(samples) if self.train else self.options.phrases_at_once or len(samples)
            yield from (samples[start : start + step] for start in range(0, len(samples), step))

    def _kind(self, sample: int, mask: np.ndarray) -> str:
        return " ".join(word for word in (size_word(mask), self.source.forms[sample]) if word)

    # ---- negatives

    def _replace(self, asked: list[int], image: int, rng: np.random.Generator) -> list[int]:
        """Puts other phrases in the place of some of ``asked``; which ones."""
        absent = []
        for k, drawn in enumerate(rng.random(len(asked)) < self.options.negatives):
            other = self._absent(asked, image, rng) if drawn else None
            if other is not None:
                asked[k] = other
                absent.append(k)
        return absent

    def _absent(self, asked: list[int], image: int, rng: np.random.Generator) -> int | None:
        """A phrase to find nothing by; None where many tries find none."""
        present = [self.source.phrases[sample] for sample in self.all_on[image]]
        for _ in range(NEGATIVE_TRIES):
            phrase = int(self.pool[rng.integers(len(self.pool))])
            if phrase not in asked and (not self.options.check_negatives or is_absent(self.unique[phrase], present)):
                return phrase
        return None

    # ---- images

    def _training_view(self, photo: np.ndarray, masks: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Photo (H, W, 3) and masks (K, H, W) -> a square of side ``image_size``, cropped about the first mask."""
        if self.options.crop == "object":
            rows, columns = object_crop(masks[0], rng)
            photo, masks = photo[rows, columns], masks[:, rows, columns]
        return self._squashed(photo, masks)

    def _squashed(self, photo: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        square = (self.options.image_size, self.options.image_size)
        return resize(photo, square), nearest(masks, square)

    def _evaluation_view(self, photo: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Photo (H, W, 3) and masks (K, H, W) -> the photo as it is asked, the masks as they are scored."""
        size, resize_labels = self.options.image_size, self.options.resize_labels
        view = square_transform(size, False, resize_labels) if self.options.square else eval_transform(size, resize_labels)
        sample = view({"image": photo, "masks": masks})
        return sample["image"], sample["masks"]

    def _supports(self, asked: list[int], image: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """Other samples of the phrases, seen as training images are, in evaluation squashed; phrase -1 has none."""

        def seen(sample: int) -> tuple[np.ndarray, np.ndarray]:
            photo, mask = self.source.image(int(self.source.image_of[sample])), self.source.mask(sample)[None]
            photo, mask = self._training_view(photo, mask, rng) if self.train else self._squashed(photo, mask)
            return photo, mask[0]

        found = (map(seen, self._support_samples(phrase, image, rng).tolist()) for phrase in asked)
        return stack_supports(found, self.options.supports, self.options.image_size)

    def _support_samples(self, phrase: int, image: int, rng: np.random.Generator) -> np.ndarray:
        """Those that a phrase's supports may be, in the order in which they are drawn."""
        samples = self.samples_of[phrase] if phrase >= 0 else np.zeros(0, dtype=np.int64)
        if not self.options.support_may_be_query:
            samples = samples[self.source.image_of[samples] != image]
        elif len(samples) == 1:
            samples = samples[:0]
        return rng.permutation(samples)
