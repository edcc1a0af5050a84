"""Phrases that name a class, the committed lists, and the script that makes them, on small databases in WordNet's format."""

import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pmpseg import fit
from pmpseg.data.removal import (
    ASSETS,
    PASCAL_CLASSES,
    PASCAL_FOLDS,
    ZERO_SHOT_PAIRS,
    removal_words,
    removed,
)
from pmpseg.errors import InputError

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_removal_list.py"
MAKE = runpy.run_path(str(SCRIPT))
FILES = ("pascal.txt", "irregular.txt", "LICENSE.txt")
LICENCE = ["This software and database is being provided to you, the LICENSEE", "", "WordNet 9.5 Copyright 2099 by Nobody."]


@pytest.mark.parametrize(
    "name, phrase",
    [
        ("cow", "brown cows"),
        ("cow", "an ox"),
        ("cow", "two oxen."),
        ("person", "men"),
        ("person", "Women in hats"),
        ("person", "child's umbrella"),
        ("person", "three children"),
        ("person", "babies"),
        ("tv monitor", "black TV set"),
        ("tv monitor", "two TVs"),
        ("tv monitor", "computer with tv monitors"),
        ("car", "sports car"),
        ("car", "yellow taxis"),
        ("car", "a limousine, parked"),
        ("bus", "bus stop"),
        ("bus", "buses"),
        ("bus", "a double decker"),  # the lemma is double-decker
        ("dog", "cute puppies"),
        ("dog", "basset hounds"),
        ("bird", "geese"),
        ("bird", "flamingoes"),
        ("boat", "portuguese men-of-war"),
        ("chair", "chaises longues"),
        ("sheep", "rams"),
        ("potted plant", "potted plants"),
        ("potted plant", "large pot plant"),
        ("dining table", "round dining tables"),
        ("bottle", "water bottle"),
        ("aeroplane", "propeller planes"),
        ("train", "railroad train"),
        ("horse", "gray wall"),  # a gray is a horse: the rule looks at words, not at senses
    ],
)
def test_named(phrase, name):
    assert removed(phrase, [name])


@pytest.mark.parametrize(
    "name, phrase",
    [
        ("car", "oxcart"),
        ("car", "red carpet"),
        ("car", "scar"),
        ("cat", "cattle"),
        ("cow", "coward"),
        ("cow", "cat"),
        ("dog", "hot doughnut"),
        ("person", "mannequin"),
        ("person", "people"),  # not in the paper's list
        ("bus", "bush"),
        ("bus", "decker"),
        ("bus", "double glass"),
        ("potted plant", "plant"),
        ("potted plant", "pot"),
        ("tv monitor", "set"),
        ("tv monitor", "televisionary"),
        ("dining table", "tab"),
        ("chair", "captain"),
        ("chair", "chairman"),
        ("boat", ""),
        ("boat", "..."),
    ],
)
def test_not_named(phrase, name):
    assert not removed(phrase, [name])


def test_several_classes_are_the_union_and_none_removes_nothing():
    phrases = ["cows", "red cat", "sports car", "blue sky", "TV set on a table", "tall tree"]
    for phrase in phrases:
        assert removed(phrase, ["cow", "cat", "tv monitor"]) == any(removed(phrase, [n]) for n in ("cow", "cat", "tv monitor"))
        assert not removed(phrase, [])
    assert [removed(p, PASCAL_CLASSES) for p in phrases] == [True, True, True, False, True, False]


def test_every_class_has_words_and_answers_to_each_of_them():
    for name in PASCAL_CLASSES:
        words = removal_words(name)
        assert len(words) == len(set(words)) > 7, name
        assert all(word == word.lower().strip() and "_" not in word for word in words)
        assert all(removed(f"the big {word} there", [name]) for word in words), name
        if name != "person":
            assert removed(name, [name]) and removed(f"two {name}s", [name])


def test_sizes_of_the_lists():
    """What WordNet 3.0 gives, and 3.1 too: another number says that the list was made from something else."""
    sizes = {name: len(removal_words(name)) for name in PASCAL_CLASSES}
    assert sizes == {
        **{"aeroplane": 58, "bicycle": 16, "bird": 1737, "boat": 260, "bottle": 54},
        **{"bus": 15, "car": 79, "cat": 86, "chair": 49, "cow": 51},
        **{"dining table": 77, "dog": 281, "horse": 130, "motorbike": 8, "person": 9},
        **{"potted plant": 33, "sheep": 22, "sofa": 18, "train": 17, "tv monitor": 11},
    }


def test_person_is_the_fixed_list_of_the_paper():
    assert removal_words("person") == ["person", "human", "man", "woman", "toddler", "baby", "body", "child", "infant"]


def test_folds_and_pairs():
    assert [len(fold) for fold in PASCAL_FOLDS] == [5] * 4 and sum(PASCAL_FOLDS, ()) == PASCAL_CLASSES
    assert PASCAL_FOLDS[1] == ("bus", "car", "cat", "chair", "cow")
    unseen = [name for pair in ZERO_SHOT_PAIRS for name in pair]
    assert len(set(unseen)) == 10 and set(unseen) <= set(PASCAL_CLASSES) and unseen[:2] == ["cow", "motorbike"]


def test_protocols():
    """By their names, in CLIPSeg's paper and in ZS3Net's."""
    told = {"pascal5i-0": "aeroplane bicycle bird boat bottle", "pascal5i-3": "potted_plant sheep sofa train tv_monitor"}
    told |= {"zero-shot-1": "cow motorbike", "zero-shot-2": "cow motorbike aeroplane sofa"}
    told["zero-shot-5"] = "cow motorbike aeroplane sofa cat tv_monitor train bottle chair potted_plant"
    for protocol, words in told.items():
        names = [word.replace("_", " ") for word in words.split()]
        assert [removed(name, [protocol]) for name in PASCAL_CLASSES] == [removed(name, names) for name in PASCAL_CLASSES]
        assert removed(f"two {names[0]}s", ["dog", protocol]) and removed("puppies", ["dog", protocol])
        assert not removed("puppies", [protocol]) and not removed("blue sky", [protocol])
    for wrong in ("pascal5i-4", "zero-shot-0", "zero-shot-6"):
        with pytest.raises(InputError, match=rf"class '{wrong}' has no removal list, want .*pascal5i-3, zero-shot-1, .*-5"):
            removed("a cat", [wrong])


@pytest.mark.parametrize("name, protocol", [("pascal5i", "pascal5i-0"), ("pascal_zero_shot", "zero-shot-5")])
def test_what_the_configs_say_of_training_for_them(name, protocol, capsys):
    conf = Path(__file__).parents[1] / "conf"
    (line,) = (line for line in (conf / "eval" / f"{name}.yaml").read_text().splitlines() if "pmpseg.fit" in line)
    options = shlex.split(line.partition("pmpseg.fit ")[2])
    options[options.index("-c") + 1] = str(conf.parent / options[options.index("-c") + 1])
    with pytest.raises(SystemExit):
        fit.main([*options, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["remove_classes"] == [protocol]


@pytest.mark.parametrize("other, name", [("tvmonitor", "tv monitor"), ("tv/monitor", "tv monitor"), ("TV", "tv monitor"),
                                         ("diningtable", "dining table"), ("pottedplant", "potted plant"),
                                         ("motorcycle", "motorbike"), ("Airplane", "aeroplane")])  # fmt: skip
def test_other_names_of_a_class(other, name):
    assert removal_words(other) == removal_words(name)


def test_unknown_class():
    with pytest.raises(InputError, match=r"class 'zebra' has no removal list, want one of aeroplane, .*tv monitor"):
        removed("a zebra", ["cat", "zebra"])


def test_what_is_returned_can_be_changed():
    removal_words("cat").clear()
    assert "cat" in removal_words("cat")


def detached(word: str) -> set[str]:
    """A word and what morphy's rules for nouns make of it, as its manual (morphy(7WN)) has them, written the other way round."""
    endings = "s: ses:s ves:f xes:x zes:z ches:ch shes:sh men:man ies:y"
    rules = [rule.split(":") for rule in endings.split()]
    return {word} | {word[: -len(old)] + new for old, new in rules if word.endswith(old)}


@pytest.mark.parametrize("name", ["bird", "boat", "dog", "person"])
def test_regular_plurals_are_those_that_morphy_takes_apart(name):
    singles = {word for word in removal_words(name) if word.isalpha()}
    irregular = {word for line in lists(ASSETS, "irregular.txt") for word in line.partition(": ")[2].split(", ")}
    ends = ("", "s", "es", "ses", "ies", "ves", "xes", "men", "man", "e")
    tried = {word[: len(word) - cut] + end for word in singles for cut in range(4) for end in ends} - irregular
    found = {word for word in tried if removed(word, [name])}
    assert found == {word for word in tried if detached(word) & singles} and len(singles) < len(found) < len(tried) / 2


# The script, on databases in the format of WordNet's files


Synsets = list[tuple[list[str], str, list[str]]]


def write_database(folder: Path, synsets: Synsets, senses: dict[str, list[int]], exceptions: list[str]) -> Path:
    """``synsets``: words, gloss and pointers (``~3`` for the synset at index 3); ``senses``: lemma -> its synsets in order."""
    folder.mkdir(exist_ok=True)
    notice = [f"  {n} {line}  " for n, line in enumerate(LICENCE, start=1)]
    data = []
    for n, (words, gloss, pointers) in enumerate(synsets):
        fields = [f"{n:08d} 05 n {len(words):02x}", *(f"{word} 0" for word in words), f"{len(pointers):03d}"]
        fields += [f"{p.rstrip('0123456789')} {int(p.lstrip('@~#%pi+')):08d} n 0000" for p in pointers]
        data.append(" ".join(fields) + f" | {gloss}  ")
    index = [f"{lemma} n {len(s)} 2 @ ~ {len(s)} 1 {' '.join(f'{n:08d}' for n in s)}  " for lemma, s in senses.items()]
    for name, content in (("index.noun", notice + sorted(index)), ("data.noun", notice + data), ("noun.exc", exceptions)):
        (folder / name).write_text("\n".join(content) + "\n")
    return folder


def lists(folder: Path, name: str) -> list[str]:
    return [line for line in (folder / name).read_text().splitlines() if not line.startswith("#")]


def small_database(folder: Path) -> Path:
    """Each class's synset alone, but cats, which have hyponyms."""
    synsets, senses = [(["entity"], "nothing of these", [])], {}
    for lemma, sense, gloss in (synset for some in MAKE["SYNSETS"].values() for synset in some):
        senses[lemma] = [0] * (sense - 1) + [len(synsets)]
        synsets.append(([lemma], f"{gloss} and more; \"quoted | ~ 00000001\"", ["@0"]))
    (cat,) = senses["cat"]
    more = len(synsets)
    synsets[cat] = (["cat", "True_Cat"], synsets[cat][1], ["@0", f"~{more}", f"~{more + 1}", f"~i{more + 3}", f"#p{more + 4}"])
    synsets += [
        (["house_cat", "tabby"], "indoors", [f"@{cat}", f"~{more + 2}"]),
        (["wildcat", "cat"], "outdoors", [f"@{cat}", f"~{more + 2}"]),  # a synset below two others counts once
        (["Siamese", "moggy-man"], "two ways down", [f"@{more}", f"@{more + 1}"]),
        (["Garfield"], "an instance, not a hyponym", [f"@i{cat}"]),
        (["fur"], "a part", []),
    ]
    exceptions = "moggy-men moggy-man/men man/tabbae tabby/house_cattes house_cat/catten kitten cat/lice louse/cat cat".split("/")
    return write_database(folder, synsets, senses, exceptions)


def test_script_on_a_database_made_by_hand(tmp_path, capsys):
    MAKE["main"](["--dict", str(small_database(tmp_path / "dict")), "--out", str(tmp_path / "out")])
    words = dict(line.split(": ") for line in lists(tmp_path / "out", "pascal.txt"))
    assert list(words) == list(PASCAL_CLASSES)
    assert words["cat"] == "cat, true cat, house cat, tabby, siamese, moggy-man, wildcat"
    assert words["boat"] == "vessel" and words["dining table"] == "table" and words["tv monitor"].startswith("television, ")
    assert words["potted plant"] == "pot plant, houseplant, potted plant"
    assert lists(tmp_path / "out", "irregular.txt") == [
        "cat: catten", "house cat: house cattes", "man: men", "moggy-man: moggy-men", "tabby: tabbae",
    ]  # fmt: skip
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "\n".join(LICENCE) + "\n"
    assert "WordNet 9.5" in (tmp_path / "out" / "pascal.txt").read_text().splitlines()[0]
    assert "cat: 7 words" in capsys.readouterr().out


def test_script_makes_the_committed_lists_again(tmp_path):
    """From a database with the committed words: those before a class's lemma are its synset's, each later one a hyponym below."""
    synsets, senses = [(["entity"], "nothing of these", [])], {}
    for name, roots in MAKE["SYNSETS"].items():
        waiting = [word.replace(" ", "_") for word in removal_words(name) if word not in MAKE["FIXED"].get(name, ())]
        for at, (lemma, sense, gloss) in enumerate(roots):
            senses[lemma] = [0] * (sense - 1) + [len(synsets)]
            split = waiting.index(lemma) + 1
            end = waiting.index(roots[at + 1][0]) if at + 1 < len(roots) else len(waiting)
            chain = [waiting[:split], *([word] for word in waiting[split:end])]
            below = [[f"~{len(synsets) + n}"] for n in range(1, len(chain))] + [[]]
            synsets += [(words, gloss, ["@0", *pointer]) for words, pointer in zip(chain, below, strict=True)]
            waiting = waiting[end:]
    entries = (line.partition(": ") for line in lists(ASSETS, "irregular.txt"))
    pairs = [(plural, word) for word, _, some in entries for plural in some.split(", ")]
    exceptions = [" ".join(text.replace(" ", "_") for text in pair) for pair in pairs]
    folder = write_database(tmp_path / "dict", synsets, senses, [*exceptions, "lice louse"])
    MAKE["main"](["--dict", str(folder), "--out", str(tmp_path / "out")])
    for name in FILES[:2]:
        assert lists(tmp_path / "out", name) == lists(ASSETS, name)


def test_the_licence_lies_beside_the_lists():
    text = (ASSETS / "LICENSE.txt").read_text()
    assert "Permission to use, copy, modify and distribute" in text and "WordNet 3.0 Copyright 2006 by Princeton" in text
    assert sorted(path.name for path in ASSETS.iterdir()) == sorted(FILES)
    assert all("WordNet 3.0" in (ASSETS / name).read_text().splitlines()[0] for name in FILES[:2])


@pytest.mark.parametrize("case", ["another gloss", "too few senses", "no noun.exc", "no licence"])
def test_script_says_what_is_wrong_and_writes_nothing(case, tmp_path):
    folder = small_database(tmp_path / "dict")
    data, index = folder / "data.noun", folder / "index.noun"
    if case == "another gloss":
        data.write_text(data.read_text().replace("feline mammal", "a canine"))
        want = "sense 1 of 'cat' is 'a canine"
    elif case == "too few senses":
        index.write_text(index.read_text().replace("vessel n 2 2 @ ~ 2 1 00000000", "vessel n 1 2 @ ~ 1 1"))
        want = "'vessel' has 1 senses, want sense 2"
    elif case == "no noun.exc":
        (folder / "noun.exc").unlink()
        want = "cannot read"
    else:
        data.write_text("\n".join(line for line in data.read_text().splitlines() if not line.startswith("  ")))
        want = "does not begin with WordNet's licence"
    command = [sys.executable, str(SCRIPT), "--dict", str(folder), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2 and done.stderr.startswith("pmpseg: error: ") and done.stderr.count("\n") == 1
    assert want in done.stderr and not (tmp_path / "out").exists()


def test_exceptions_of_another_folder(tmp_path):
    folder = small_database(tmp_path / "dict")
    (folder / "noun.exc").rename(tmp_path / "other.exc")
    MAKE["main"](["--dict", str(folder), "--exceptions", str(tmp_path / "other.exc"), "--out", str(tmp_path / "out")])
    assert "man: men" in lists(tmp_path / "out", "irregular.txt")
