"""Data sets whose sample is one phrase on one image, and all of the "+" of PhraseCut+ for them.

Source: Lueddecke & Ecker, "Image Segmentation Using Text and Image Prompts", CVPR 2022, sec. 3.1: negative phrases, support
images of the same phrase, prefixes, crops around the object. Where its code differs from what is meant (a negative may be on
the image, a support may be the query itself), ours is what is meant and the code's is an option.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pmpseg.errors import InputError

from .base import SegmentationData
from .phrase_dataset import PhraseDataset, PhraseOptions, PhraseSource
from .phrase_parts import PREFIXES, SIZES

FORMS = ("name", "attribute", "relation")


class PhraseData(SegmentationData):
    """Phrases with a mask each; a subclass gives ``read_source(split)``, ``vocabulary`` and its own arguments.

    Args:
        image_size: S, the side of the training square, and in evaluation of the square or the short side.
        negatives: share of training phrases that are replaced by another one of the data set, with an empty mask.
        check_negatives: take only phrases that no phrase of the image says to be there ("cars" where it has "red car"); the
            paper's code makes sure only that it is not the sample's own phrase (False).
        supports: how many other samples of the same phrase, S, come along as images with masks; in evaluation too, from the same
            split, unless ``supports_in_evaluation`` is False. What is missing is zeros, and support_valid False.
        support_may_be_query: draw them from all samples of the phrase, the query itself too, as the paper's code does; a
            phrase with one sample has none even so.
        prefixes: what a training phrase is put into: nothing (plain), "a photo of a" (fixed), one of 4 (shuffle) or of 9.
        crop: a training square of side min(H, W) that keeps the object in view, or none: the whole image squashed.
        square: in evaluation squash the whole image to a square, as the paper's code does; False keeps its aspect.
        resize_labels: in evaluation resize masks as the image, and score there, as the paper's code does (a mask that vanishes
            counts as absent); False scores at the image's own size.
        prompts_per_image: K. With 1 an epoch shows each phrase once; with more it shows each image once, with K of its phrases
            drawn anew, padded with "", and the crop is about the first of them.
        phrases_at_once: in evaluation at most so many phrases of an image make one item; null for all.
        eval_absent: in evaluation as many phrases that are not on the image are asked beside its own, with an empty mask.
        remove_classes: leave out the training and validation phrases that name one of these classes, or a kind of it. Classes
            are Pascal's 20; pascal5i-0 to pascal5i-3 are those of a fold, zero-shot-1 to zero-shot-5 those of the first pairs.
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
        resize_labels: bool = False,
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
        self.supports, self.square = supports, square
        self.options = PhraseOptions(
            image_size=image_size,
            negatives=negatives,
            check_negatives=check_negatives,
            supports=supports,
            support_may_be_query=support_may_be_query,
            prefixes=PREFIXES[prefixes],
            crop=crop,
            square=square,
            resize_labels=resize_labels,
            prompts_per_image=prompts_per_image,
            phrases_at_once=phrases_at_once,
            eval_absent=eval_absent,
            remove_classes=tuple(remove_classes),
            seed=seed,
        )
        self._sources: dict[str, PhraseSource] = {}

    def read_source(self, split: str) -> PhraseSource:
        raise NotImplementedError

    def source(self, split: str) -> PhraseSource:
        """The phrases of "train", "val" or "test", read once."""
        if split not in self._sources:
            self._sources[split] = self.read_source(split)
        return self._sources[split]

    def dataset(self, split: str) -> "PhraseDataset":
        options = self.options if self.has_supports(split) else replace(self.options, supports=0)
        return PhraseDataset(self.source(split), options, split)
