"""Data sets whose sample is one phrase on one image, and all of the "+" of PhraseCut+ for them.

Source: Lueddecke & Ecker, "Image Segmentation Using Text and Image Prompts", CVPR 2022, sec. 3.1: negative phrases, support
images of the same phrase, prefixes, crops around the object. Where its code differs from what is meant (a negative may be on
the image, a support may be the query itself), ours is what is meant and the code's is an option.

A training item is an image (3, S, S) with K phrases. In evaluation it is an image with all its phrases; labels (all 255: phrases
have no class map) and prompt_masks keep the image's own size.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch

from pmpseg.errors import InputError

from .base import IGNORE, SegmentationData, SegmentationDataset
from .phrase_parts import PREFIXES, SIZES, Groups, is_absent, object_crop, size_word
from .transforms import eval_transform, nearest, resize

FORMS = ("name", "attribute", "relation")
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


class PhraseData(SegmentationData):
    """Phrases with a mask each; a subclass gives ``read_source(split)``, ``vocabulary`` and its own arguments.

    Args:
        image_size: S, the side of the training square, and in evaluation of the square or the short side.
        negatives: share of training phrases that are replaced by another one of the data set, with an empty mask.
        check_negatives: take only phrases that no phrase of the image says to be there ("car" where it has "red car"); the
            paper's code makes sure only that it is not the sample's own phrase (False).
        supports: how many other samples of the same phrase, S, come along as images with masks; in evaluation too, from the same
            split. Phrases with too few are filled up with zeros, and support_valid False.
        support_may_be_query: draw them from all samples of the phrase, the query itself too, as the paper's code does; a
            phrase with one sample has none even so.
        prefixes: what a training phrase is put into: nothing (plain), "a photo of a" (fixed), one of 4 (shuffle) or of 9.
        crop: a training square of side min(H, W) that keeps the object in view, or none: the whole image squashed.
        square: in evaluation squash the whole image to a square, as the paper's code does; False keeps its aspect.
        prompts_per_image: K. With 1 an epoch shows each phrase once; with more it shows each image once, with K of its phrases
            drawn anew, padded with "", and the crop is about the first of them.
        phrases_at_once: in evaluation at most so many phrases of an image make one item; null for all.
        eval_absent: in evaluation as many phrases that are not on the image are asked beside its own, with an empty mask.
        remove_classes: leave out the training and validation phrases that name one of these classes, or a kind of it.
        batch_size, eval_batch_size, num_workers, seed: see ``SegmentationData``.
    """

    class_list = False  # the vocabulary has no class map here: only phrases are scored
    paper_metrics = "clipseg"
    phrase_kinds: tuple[str, ...] = (*SIZES, *FORMS)

    def __init__(
        self,
        image_size: int = 352,
        negatives: float = 0.2,
        check_negatives: bool = True,
        supports: int = 0,
        support_may_be_query: bool = False,
        prefixes: Literal["plain", "fixed", "shuffle", "shuffle+"] = "shuffle+",
        crop: Literal["object", "none"] = "object",
        square: bool = True,
        prompts_per_image: int = 1,
        phrases_at_once: int | None = None,
        eval_absent: int = 0,
        remove_classes: Sequence[str] = (),
        batch_size: int = 32,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__(image_size, prompts_per_image, batch_size, eval_batch_size, num_workers, seed)
        if not 0 <= negatives <= 1:
            raise InputError(f"negatives: got {negatives}, want 0 to 1, a share of the training phrases")
        for name, value in {"supports": supports, "eval_absent": eval_absent}.items():
            if value < 0:
                raise InputError(f"{name}: got {value}, want 0 or more")
        if phrases_at_once is not None and phrases_at_once < 1:
            raise InputError(f"phrases_at_once: got {phrases_at_once}, want 1 or more, or null for all")
        for name, word, known in (("prefixes", prefixes, tuple(PREFIXES)), ("crop", crop, ("object", "none"))):
            if word not in known:
                raise InputError(f"{name}: got {word!r}, want one of {', '.join(known)}")
        self.negatives, self.check_negatives = negatives, check_negatives
        self.supports, self.support_may_be_query = supports, support_may_be_query
        self.prefixes, self.crop, self.square = PREFIXES[prefixes], crop, square
        self.prompts_per_image, self.phrases_at_once, self.eval_absent = prompts_per_image, phrases_at_once, eval_absent
        self.remove_classes = tuple(remove_classes)
        self._sources: dict[str, PhraseSource] = {}

    def read_source(self, split: str) -> PhraseSource:
        raise NotImplementedError

    def source(self, split: str) -> PhraseSource:
        """The phrases of "train", "val" or "test", read once."""
        if split not in self._sources:
            self._sources[split] = self.read_source(split)
        return self._sources[split]

    def dataset(self, split: str) -> "PhraseDataset":
        return PhraseDataset(self, self.source(split), split)


class PhraseDataset(SegmentationDataset):
    """One split. ``unique`` are its U different phrases, ``phrase_of`` (N,) which of them a sample has."""

    def __init__(self, data: PhraseData, source: PhraseSource, split: str) -> None:
        self.data, self.source, self.train = data, source, split == "train"
        number: dict[str, int] = {}
        self.phrase_of = np.array([number.setdefault(phrase, len(number)) for phrase in source.phrases], dtype=np.int64)
        self.unique = list(number)
        kept = np.ones(len(self.phrase_of), dtype=bool)
        if data.remove_classes and split != "test":
            from .removal import removed

            kept = ~np.array([removed(phrase, data.remove_classes) for phrase in self.unique], dtype=bool)[self.phrase_of]
        if not kept.any():
            raise InputError(f"no {split} phrase is left of {len(kept)} without {', '.join(data.remove_classes)}: remove fewer")
        self.kept = np.flatnonzero(kept)  # the samples that are left
        self.samples_of = Groups(self.phrase_of, len(number), kept)  # of a phrase
        self.pool = self.samples_of.filled()  # phrases to take negatives from
        self.all_on = Groups(source.image_of, len(source.names))  # samples of an image, removed ones too: they are on it
        self.kept_on = Groups(source.image_of, len(source.names), kept)
        self.items = self.kept[:, None] if self.train and data.prompts_per_image == 1 else list(self._by_image())

    def __len__(self) -> int:
        return len(self.items)

    def item(self, index: int, epoch: int) -> dict:
        rng = np.random.default_rng([self.data.seed, epoch, index])
        samples = self.items[index]
        if self.train:
            samples = rng.permutation(samples)[: self.data.prompts_per_image]
        image = int(self.source.image_of[samples[0]])
        asked = [int(p) for p in self.phrase_of[samples]]
        photo, masks = self.source.image(image), np.stack([self.source.mask(sample) for sample in samples])
        if self.train:
            photo, masks = self._training_view(photo, masks, rng)
            absent = self._replace(asked, image, rng)
            masks[absent] = False
            texts = [str(rng.choice(self.data.prefixes)).format(self.unique[p]) for p in asked]
            padding = self.data.prompts_per_image - len(asked)
        else:
            absent = []
            for _ in range(self.data.eval_absent):
                other = self._absent(asked, image, rng)
                if other is not None:
                    absent.append(len(asked))
                    asked.append(other)
            masks = np.concatenate([masks, np.zeros((len(absent), *masks.shape[1:]), dtype=bool)])
            photo = self._evaluation_view(photo)
            texts = [self.unique[p] for p in asked]
            padding = 0
        kinds = ["" if k in absent else self._kind(samples[k], masks[k]) for k in range(len(asked))]
        item = {
            "image": torch.from_numpy(np.ascontiguousarray(photo.transpose(2, 0, 1))),
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
        if self.data.supports:
            item |= self._supports([*asked, *[-1] * padding], image, np.random.default_rng([self.data.seed, epoch, index, 1]))
        return item

    def _by_image(self) -> Iterator[np.ndarray]:
        """The samples of each image, in evaluation in portions of at most ``phrases_at_once``."""
        for image in self.kept_on.filled():
            samples = self.kept_on[image]
            step = len(samples) if self.train else self.data.phrases_at_once or len(samples)
            yield from (samples[start : start + step] for start in range(0, len(samples), step))

    def _kind(self, sample: int, mask: np.ndarray) -> str:
        return " ".join(word for word in (size_word(mask), self.source.forms[sample]) if word)

    # ---- negatives

    def _replace(self, asked: list[int], image: int, rng: np.random.Generator) -> list[int]:
        """Puts other phrases in the place of some of ``asked``; which ones."""
        absent = []
        for k, drawn in enumerate(rng.random(len(asked)) < self.data.negatives):
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
            if phrase not in asked and (not self.data.check_negatives or is_absent(self.unique[phrase], present)):
                return phrase
        return None

    # ---- images

    def _training_view(self, photo: np.ndarray, masks: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Photo (H, W, 3) and masks (K, H, W) -> a square of side ``image_size``, cropped about the first mask."""
        if self.data.crop == "object":
            rows, columns = object_crop(masks[0], rng)
            photo, masks = photo[rows, columns], masks[:, rows, columns]
        square = (self.data.image_size, self.data.image_size)
        return resize(photo, square), nearest(masks, square)

    def _evaluation_view(self, photo: np.ndarray) -> np.ndarray:
        if self.data.square:
            return resize(photo, (self.data.image_size, self.data.image_size))
        return eval_transform(self.data.image_size)({"image": photo})["image"]

    def _supports(self, asked: list[int], image: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """Other samples of the phrases, seen as training images are, in evaluation squashed; phrase -1 has none."""
        shape, side = (len(asked), self.data.supports), self.data.image_size
        images = np.zeros((*shape, 3, side, side), dtype=np.uint8)
        masks = np.zeros((*shape, side, side), dtype=bool)
        valid = np.zeros(shape, dtype=bool)
        for k, phrase in enumerate(asked):
            for s, sample in enumerate(self._support_samples(phrase, image, rng)):
                photo, mask = self.source.image(int(self.source.image_of[sample])), self.source.mask(int(sample))[None]
                if self.train:
                    photo, mask = self._training_view(photo, mask, rng)
                else:
                    photo, mask = resize(photo, (side, side)), nearest(mask, (side, side))
                images[k, s], masks[k, s], valid[k, s] = photo.transpose(2, 0, 1), mask[0], True
        return {
            "support_image": torch.from_numpy(images),
            "support_mask": torch.from_numpy(masks),
            "support_valid": torch.from_numpy(valid),
        }

    def _support_samples(self, phrase: int, image: int, rng: np.random.Generator) -> np.ndarray:
        samples = self.samples_of[phrase] if phrase >= 0 else np.zeros(0, dtype=np.int64)
        if not self.data.support_may_be_query:
            samples = samples[self.source.image_of[samples] != image]
        elif len(samples) == 1:
            samples = samples[:0]
        return rng.permutation(samples)[: self.data.supports]
