"""PhraseCut in its official layout, as it is and as PhraseCut+ (the options of ``PhraseData``).

Source: Wu et al., "PhraseCut: Language-based Image Segmentation in the Wild", CVPR 2020, and the README of its repository.

    refer_{train,val,test,miniv}.json   tasks: image_id, phrase, phrase_structure, Polygons[instance][polygon] = [[x, y], ...]
    image_data_split.json               image_id, width, height, split of every image
    images/                             ID.jpg; or VG_100K/ and VG_100K_2/, or images.zip and images2.zip of Visual Genome

A phrase's mask is the union of its polygons: of all instances, and of several polygons an instance may have.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

from pmpseg.errors import InputError
from pmpseg.vocabulary import Vocabulary

from .phrasecut_files import (
    WRONG_SIZE,
    PhraseCutSource,
    find_images,
    no_garbage_collection,
    read_list,
    read_sizes,
    read_wrong_size,
)
from .phrases import PhraseData

SPLITS = ("train", "val", "test", "miniv")
VOCABULARY_SIZE = 100


class PhraseCut(PhraseData):
    """PhraseCut and PhraseCut+.

    ``root`` is the folder of the official files; ``images`` is where Visual Genome's images lie (as above), by default there
    too. ``split_names`` are the official splits that serve as train, val and test; "val_miniv" is the whole validation split,
    which is kept in two files. The other arguments are explained at ``PhraseData``.

    Left out are the images of ``WRONG_SIZE`` and of ``root/wrong_size.json``, and phrases without a word. The vocabulary, which
    is only a list of words to start from, are the 100 most frequent nouns. A split is read when it is asked for.
    Raises ``InputError`` with the file's name for what is missing or wrong.
    """

    def __init__(
        self,
        root: str,
        images: str | None = None,
        split_names: tuple[str, str, str] = ("train", "val", "test"),
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
        super().__init__(
            image_size=image_size,
            negatives=negatives,
            check_negatives=check_negatives,
            supports=supports,
            support_may_be_query=support_may_be_query,
            prefixes=prefixes,
            crop=crop,
            square=square,
            resize_labels=resize_labels,
            prompts_per_image=prompts_per_image,
            phrases_at_once=phrases_at_once,
            eval_absent=eval_absent,
            remove_classes=remove_classes,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.root = Path(root)
        self.split_names = dict(zip(("train", "val", "test"), split_names, strict=True))
        if wrong := [part for name in split_names for part in name.split("_") if part not in SPLITS]:
            raise InputError(f"split_names: got {wrong[0]!r}, want {', '.join(SPLITS)}, or several joined by _")
        self.sizes = read_sizes(self.root)
        self.wrong_size = WRONG_SIZE | read_wrong_size(self.root)
        self.store = find_images(Path(images) if images else self.root)
        if not any(self._files(split)[0].is_file() for split in self.split_names):
            wanted = " or ".join(dict.fromkeys(str(self._files(split)[0]) for split in self.split_names))
            raise InputError(f"there is no {wanted}: scripts/prepare_phrasecut.py says where PhraseCut's files come from")

    def read_source(self, split: str) -> "PhraseCutSource":
        with no_garbage_collection():
            tasks = [(path, task) for path in self._files(split) for task in read_list(path)]
            return PhraseCutSource(tasks, self.sizes, self.store, self.wrong_size)

    @cached_property
    def vocabulary(self) -> Vocabulary:  # type: ignore[override]
        """The most frequent nouns of the first of val, test and train that is there: train takes long to read."""
        split = next(split for split in ("val", "test", "train") if self._files(split)[0].is_file())
        source = self.source(split)
        assert isinstance(source, PhraseCutSource)
        return Vocabulary.of(frequent(source.nouns))

    def _files(self, split: str) -> list[Path]:
        return [self.root / f"refer_{name}.json" for name in self.split_names[split].split("_")]


def frequent(nouns: Sequence[str]) -> list[str]:
    """The ``VOCABULARY_SIZE`` most frequent ones that a vocabulary can hold; equals in alphabetical order."""
    counts = Counter(" ".join(noun.split()).casefold() for noun in nouns)
    usable = [noun for noun in counts if noun and not set(noun) & set(",#")]
    return sorted(usable, key=lambda noun: (-counts[noun], noun))[:VOCABULARY_SIZE] or ["object"]
