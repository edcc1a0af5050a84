"""The parts of PhraseCut+ that are plain functions: prefixes, the crop that keeps the object, absent phrases, groups.

Source: Lueddecke & Ecker, "Image Segmentation Using Text and Image Prompts", CVPR 2022, sec. 3.1, and its released data set.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from .removal import RULES, words_of

_SHUFFLE = ("a photo of a {}.", "a photograph of a {}.", "an image of a {}.", "{}.")
PREFIXES = {
    "plain": ("{}",),
    "fixed": ("a photo of a {}.",),
    "shuffle": _SHUFFLE,
    "shuffle+": (
        *_SHUFFLE,
        "a cropped photo of a {}.",
        "a good photo of a {}.",
        "a photo of one {}.",
        "a bad photo of a {}.",
        "a photo of the {}.",
    ),
}
SIZES = ("small", "medium", "large")
SIZE_BOUNDS = (0.02, 0.2)  # shares of the image: PhraseCut's own subsets
CROP_TRIES = 50
CROP_SHARE = 0.05  # of the whole image's area
UNSAID = frozenset(("a", "an", "the", "s"))  # s is that of "man's"
PLURAL_ENDS = (*RULES, ("ves", "fe"), ("oes", "o"))
_IRREGULAR = {"child": "children", "foot": "feet", "goose": "geese", "mouse": "mice", "person": "people", "tooth": "teeth"}
IRREGULAR = _IRREGULAR | {plural: word for word, plural in _IRREGULAR.items()}


def object_crop(mask: np.ndarray, rng: np.random.Generator) -> tuple[slice, slice]:
    """A square of side min(H, W), as rows and columns, that shows the object of ``mask`` (H, W) bool.

    Of up to 50 random places the first is taken where more pixels of the mask lie inside than 5 % of the whole image has;
    where none is so good, the best one.
    """
    height, width = mask.shape
    side = min(height, width)
    starts = rng.integers(0, max(height, width) - side + 1, CROP_TRIES)
    along = mask.sum(axis=0 if width > height else 1)  # pixels in each column, or row, of the long side
    upto = np.concatenate([[0], np.cumsum(along)])
    inside = upto[starts + side] - upto[starts]
    good = inside > CROP_SHARE * mask.size
    start = int(starts[good.argmax() if good.any() else inside.argmax()])
    whole, part = slice(0, side), slice(start, start + side)
    return (whole, part) if width > height else (part, whole)


def size_word(mask: np.ndarray) -> str:
    """How much of the image a mask covers, in a word; "" where it is empty."""
    return SIZES[int(np.searchsorted(SIZE_BOUNDS, mask.mean(), side="right"))] if mask.any() else ""


def is_absent(phrase: str, present: Sequence[str]) -> bool:
    """Whether none of the phrases ``present`` on an image says that ``phrase`` is there too.

    "red car" says so of "a red car" and of "cars"; of "blue car" it does not. Plurals are told by their endings, without a
    dictionary: what is wrongly taken for one costs a negative, no more.
    """
    words = _words(phrase)
    return not any(words <= frozenset().union(*map(_in_any_number, _words(other))) for other in present)


def _words(phrase: str) -> frozenset[str]:
    return frozenset(words_of(phrase)) - UNSAID


@lru_cache(maxsize=8192)  # a data set may have more words, but few of them often
def _in_any_number(word: str) -> frozenset[str]:
    """A word, what may be its plural, and what it may be the plural of."""
    ends = [*PLURAL_ENDS, *(end[::-1] for end in PLURAL_ENDS)]
    others = (word.removesuffix(old) + new for old, new in ends if word.endswith(old))
    return frozenset((word, IRREGULAR.get(word, word), *others))


class Groups:
    """Members 0..N-1 by the group each belongs to: ``groups[g]`` are the members of group g, in order.

    ``group_of`` (N,) says which; members that ``kept`` (N,) bool leaves out are in none.
    """

    def __init__(self, group_of: np.ndarray, count: int, kept: np.ndarray | None = None) -> None:
        members = np.arange(len(group_of)) if kept is None else np.flatnonzero(kept)
        self._order = members[np.argsort(group_of[members], kind="stable")]
        self._starts = np.searchsorted(group_of[self._order], np.arange(count + 1))

    def __getitem__(self, group: int) -> np.ndarray:
        return self._order[self._starts[group] : self._starts[group + 1]]

    def filled(self) -> np.ndarray:
        """The groups that have a member."""
        return np.flatnonzero(np.diff(self._starts))
