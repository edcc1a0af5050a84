"""Vocabulary: the classes of a data set or a model as words, and prompts as typed on a command line.

The text format, one class a line (empty lines and ``# comments`` are skipped)::

    0: sky
    3: road, street      # the first word is the class's name, the others are synonyms
    8: car [unseen]      # no mask of an unseen class is used in training

The ids are all there (0..C-1, each once, in any order) or all left out, and then count from 0.
A word stands for one class only, whatever its case: a prompt must have one answer.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pmpseg.errors import InputError

UNSEEN = "[unseen]"
# Phrases that a prompt is put into, by name; of several the embeddings are averaged.
TEMPLATES = {
    "plain": ("{}",),
    "photo": ("a photo of a {}.",),
    "vild": (  # ViLD's (arXiv 2104.13921), which OVSeg and others ask with
        "a photo of a {}.",
        "This is a photo of a {}",
        "There is a {} in the scene",
        "There is the {} in the scene",
        "a photo of a {} in the scene",
        *(f"{start} a {size} {{}}." for start in ("a photo of", "This is a photo of") for size in ("small", "medium", "large")),
        *(f"There is a {size} {{}} in the scene." for size in ("small", "medium", "large")),
    ),
}


@dataclass
class Vocabulary:
    """The C classes that labels 0..C-1 stand for.

    ``names`` has C names, ``synonyms`` the words of each class, its name first (the names alone by default),
    and ``unseen`` the indices of classes that are kept out of training. Raises ``InputError`` where a word
    stands for two classes, is empty, or could not be written to the text format.
    """

    names: list[str]
    synonyms: list[list[str]] = field(default_factory=list)
    unseen: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.synonyms = self.synonyms or [[name] for name in self.names]
        self.unseen = sorted(set(self.unseen))
        if not self.names:
            raise InputError("the vocabulary has no classes: give at least one name")
        if [words[:1] for words in self.synonyms] != [[name] for name in self.names]:
            raise InputError(
                "the synonyms of each class must begin with its name, one list for each of the names"
            )
        if self.unseen and not 0 <= self.unseen[0] <= self.unseen[-1] < len(self):
            raise InputError(f"unseen classes {self.unseen} must lie in 0..{len(self) - 1}")
        if len(self.unseen) == len(self):
            raise InputError("every class is marked [unseen]: at least one must be left to train on")
        owner: dict[str, int] = {}
        for index, word in ((i, word) for i, words in enumerate(self.synonyms) for word in words):
            if not word.strip() or word != word.strip() or re.search(r"[,#\r\n]|\[unseen\]$", word):
                raise InputError(f"class {index}: {word!r} is no usable name: give words without , or #")
            if word.casefold() in owner:
                first = owner[word.casefold()]
                classes = f"class {first} ({self.names[first]}) and class {index} ({self.names[index]})"
                raise InputError(
                    f"{word!r} stands for {classes}: it must stand for one, once; rename or remove it"
                )
            owner[word.casefold()] = index

    def __len__(self) -> int:
        return len(self.names)

    @property
    def seen(self) -> list[int]:
        """The indices of the classes to train on: all but the unseen ones."""
        return [index for index in range(len(self)) if index not in set(self.unseen)]

    @classmethod
    def of(cls, names: Sequence[str], unseen: Sequence[int] = ()) -> "Vocabulary":
        """A vocabulary of names without synonyms."""
        return cls(list(names), unseen=list(unseen))

    @classmethod
    def read(cls, path: str | Path) -> "Vocabulary":
        """Read the text format above. Raises ``InputError``, with the file's name, where it does not hold."""
        lines = _read_lines(Path(path))
        if not lines:
            raise InputError(f"{path} names no class: write one class a line, as 'name, synonym, ...'")
        entries: dict[int, tuple[list[str], bool]] = {}
        numbered = ":" in lines[0][1]
        for number, line in lines:
            head, colon, rest = line.partition(":")
            if bool(colon) != numbered:
                raise InputError(f"{path}, line {number}: give an id to every class ('id: name') or to none")
            index = _parse_id(head, f"{path}, line {number}") if colon else len(entries)
            if index in entries:
                raise InputError(f"{path}, line {number}: id {index} is given twice")
            words, unseen = _parse_words(rest if colon else line)
            if not all(words):
                raise InputError(f"{path}, line {number}: a name or a synonym is empty: {line!r}")
            entries[index] = (words, unseen)
        missing = sorted(set(range(len(entries))) - set(entries))
        if missing:
            wanted = f"the ids of {len(entries)} classes must be 0..{len(entries) - 1}"
            raise InputError(f"{path}: {wanted}: {missing[0]} is missing, {max(entries)} is too high")
        ordered = [entries[index] for index in range(len(entries))]
        try:
            return cls(
                [words[0] for words, _ in ordered],
                [words for words, _ in ordered],
                [index for index, (_, unseen) in enumerate(ordered) if unseen],
            )
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def write(self, path: str | Path) -> None:
        """Write the text format, with ids; ``read`` gives back an equal vocabulary."""
        lines = [
            f"{index}: {', '.join(words)}" + (f" {UNSEEN}" if index in self.unseen else "")
            for index, words in enumerate(self.synonyms)
        ]
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def parse_prompts(text: str) -> list[str]:
    """``"red circle; stripes"`` -> ``["red circle", "stripes"]``.

    A repeated prompt is kept once, at its first place, so that the answers have the order in which they were
    asked. Raises ``InputError`` where no prompt is left.
    """
    prompts = list(dict.fromkeys(" ".join(part.split()) for part in text.split(";") if part.strip()))
    if not prompts:
        raise InputError(f"no prompt in {text!r}: give some, as in 'red circle; stripes'")
    return prompts


def _read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines that say something, with their numbers and without comments."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: some editors begin a file with a byte-order mark
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"cannot read the class list {path}: {error.strerror}") from None
    lines = [(number, line.split("#")[0].strip()) for number, line in enumerate(text.splitlines(), start=1)]
    return [(number, line) for number, line in lines if line]


def _parse_id(text: str, where: str) -> int:
    if not text.strip().isdecimal():
        raise InputError(f"{where}: {text.strip()!r} is no class id: write 'id: name, synonym, ...'")
    return int(text)


def _parse_words(text: str) -> tuple[list[str], bool]:
    unseen = text.endswith(UNSEEN)
    return [" ".join(word.split()) for word in text.removesuffix(UNSEEN).split(",")], unseen
