"""Phrases that name a class, to drop them from training (CLIPSeg, arXiv 2112.10003, sec. 5.2): zero-shot and one-shot protocols.

A phrase is removed for a class if one of its words, or several in a row, is a word of the class: a lemma of the class's synset in
WordNet or of a hyponym's, in the singular or the plural. ``scripts/make_removal_list.py`` makes the lists from WordNet.
Words count and not their senses, as in the paper: horse removes what is gray (a gray horse is a gray), car what is electric.

Plurals are those of WordNet's morphy: its rules of detachment, here turned round so that they make plurals, and its exceptions.
Where this differs from the paper's code it removes more: men are persons (NLTK leaves them, as men is a lemma too), signs and
hyphens divide words (it divides at spaces only: "cat's", "cat-shaped"), and potted plants, all but "pot plant" in its list, go.
It removes less in one thing: a lemma of several words must stand there as words, where theirs may be any part of the phrase.
"""

import re
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path

from pmpseg.errors import InputError

ASSETS = Path(__file__).parents[1] / "assets" / "removal"

PASCAL_CLASSES = (  # in the order of VOC's labels 1..20
    *("aeroplane", "bicycle", "bird", "boat", "bottle"),
    *("bus", "car", "cat", "chair", "cow"),
    *("dining table", "dog", "horse", "motorbike", "person"),
    *("potted plant", "sheep", "sofa", "train", "tv monitor"),
)
PASCAL_FOLDS = tuple(PASCAL_CLASSES[start : start + 5] for start in range(0, 20, 5))  # Pascal-5i: the test classes of each fold
# generalised zero-shot on Pascal: the first 1, 2, ... 5 pairs are the 2, 4, ... 10 unseen classes
ZERO_SHOT_PAIRS = (
    ("cow", "motorbike"),
    ("aeroplane", "sofa"),
    ("cat", "tv monitor"),
    ("train", "bottle"),
    ("chair", "potted plant"),
)
PROTOCOLS = {f"pascal5i-{fold}": names for fold, names in enumerate(PASCAL_FOLDS)}  # what a model for them is trained without
PROTOCOLS |= {f"zero-shot-{pairs}": sum(ZERO_SHOT_PAIRS[:pairs], ()) for pairs in range(1, len(ZERO_SHOT_PAIRS) + 1)}
# other names in use; spaces and signs do not count, so that VOC's own diningtable, pottedplant and tvmonitor are names too
ALIASES = {"airplane": "aeroplane", "motorcycle": "motorbike", "tv": "tv monitor", "television": "tv monitor"}

WORD = re.compile(r"[^\W_]+")
# morphy's rules for nouns: a word that ends in the first may be the plural of the word that ends in the second instead
RULES = (
    *(("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z")),
    *(("ches", "ch"), ("shes", "sh"), ("men", "man"), ("ies", "y")),
)


def removed(phrase: str, classes: Sequence[str]) -> bool:
    """Whether the phrase names one of the classes, or of a protocol's (``PROTOCOLS``). Raises InputError where one is unknown."""
    singles, starts, several, lengths = _matcher(tuple(classes))
    words = words_of(phrase)
    if not singles.isdisjoint(words):
        return True
    if starts.isdisjoint(words):
        return False
    return any(tuple(words[i : i + n]) in several for n in lengths for i in range(len(words) - n + 1))


def removal_words(class_name: str) -> list[str]:
    """The words of a class, in lower case and the singular; some have several words. Raises InputError where it is unknown."""
    known = {_key(name): name for name in PASCAL_CLASSES}
    known |= {alias: known[_key(name)] for alias, name in ALIASES.items()}
    if _key(class_name) not in known:
        known_names = ", ".join((*PASCAL_CLASSES, *PROTOCOLS))
        raise InputError(f"class {class_name!r} has no removal list, want one of {known_names}")
    return list(_read("pascal.txt")[known[_key(class_name)]])


def words_of(text: str) -> list[str]:
    """The words of a text in lower case; hyphens, apostrophes and other signs divide words."""
    return WORD.findall(text.lower())


def plurals(word: str) -> list[str]:
    """The words that morphy could take for the plural of a word, which are words or not: bus -> buss, buses."""
    regular = [word.removesuffix(singular) + plural for plural, singular in RULES if word.endswith(singular)]
    return regular + list(_read("irregular.txt").get(word, ()))


@lru_cache(maxsize=64)
def _matcher(classes: tuple[str, ...]) -> tuple[frozenset[str], frozenset[str], frozenset[tuple[str, ...]], tuple[int, ...]]:
    """The classes' single words, the first words of those of several, these as tuples of words, and their lengths.

    A dictionary of tuples, because a regular expression of a thousand alternatives tries them all at each place of each phrase.
    """
    names = {name for given in classes for name in PROTOCOLS.get(given, (given,))}
    texts = {form for name in names for word in removal_words(name) for form in (word, *plurals(word))}
    found = {tuple(words_of(text)) for text in texts}
    # the plural of several words is mostly that of the last one; plurals(word) above finds the others: men-of-war
    found |= {(*words[:-1], last) for words in found if len(words) > 1 for last in plurals(words[-1])}
    several = frozenset(words for words in found if len(words) > 1)
    singles = frozenset(words[0] for words in found if len(words) == 1)
    return singles, frozenset(words[0] for words in several), several, tuple(sorted({len(words) for words in several}))


@cache
def _read(name: str) -> dict[str, tuple[str, ...]]:
    """A file of lines ``key: word, word, ...``, and comments."""
    lines = (ASSETS / name).read_text(encoding="utf-8").splitlines()
    entries = (line.partition(": ") for line in lines if not line.startswith("#"))
    return {key: tuple(words.split(", ")) for key, _, words in entries}


def _key(name: str) -> str:
    return "".join(words_of(name))
