"""The class list's text format, its errors, and prompts as typed."""

from pathlib import Path

import pytest

from pmpseg.errors import InputError
from pmpseg.vocabulary import Vocabulary, parse_prompts

ROOT = Path(__file__).parents[1]


def write(tmp_path, text: str) -> Path:
    path = tmp_path / "classes.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_names_synonyms_comments_and_unseen(tmp_path):
    path = write(tmp_path, "\ufeff# things\n\nsky\nroad,  paved   street # and lanes\ncar, auto [unseen]\n")
    vocabulary = Vocabulary.read(path)
    assert vocabulary.names == ["sky", "road", "car"]
    assert vocabulary.synonyms == [["sky"], ["road", "paved street"], ["car", "auto"]]
    assert vocabulary.unseen == [2] and vocabulary.seen == [0, 1] and len(vocabulary) == 3


def test_ids_in_any_order(tmp_path):
    assert Vocabulary.read(write(tmp_path, "2: c\n0: a\n1 : b, bee")).names == ["a", "b", "c"]


def test_round_trips(tmp_path):
    vocabulary = Vocabulary(["a", "b: b", "é"], [["a"], ["b: b", "bee"], ["é", "e"]], [2])
    vocabulary.write(tmp_path / "out.txt")
    assert Vocabulary.read(tmp_path / "out.txt") == vocabulary


def test_of_names():
    assert Vocabulary.of(["a", "b"], unseen=[0]) == Vocabulary(["a", "b"], [["a"], ["b"]], [0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# nothing\n\n", "names no class"),
        ("a\nb\nA", "'A' stands for class 0 .a. and class 2"),
        ("road, street\nlane, street", "'street' stands for"),
        ("a, a", "'a' stands for"),
        ("x: a", "line 1: 'x' is no class id"),
        ("0: a\n-1: b", "line 2: '-1' is no class id"),
        ("0: a\n\n0: b", "line 3: id 0 is given twice"),
        ("0: a\n2: b", "must be 0..1: 1 is missing, 2 is too high"),
        ("0: a\nb", "line 2: give an id to every class"),
        ("a\n1: b", "line 2: give an id to every class"),
        ("a\nb,,c", "line 2: a name or a synonym is empty"),
        ("[unseen]", "line 1: a name or a synonym is empty"),
        ("a [unseen]", "every class is marked"),
    ],
)
def test_bad_text_is_named(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(InputError, match=message) as caught:
        Vocabulary.read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_not_utf8(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.txt"):
        Vocabulary.read(tmp_path / "nowhere.txt")
    path = tmp_path / "latin.txt"
    path.write_bytes("café".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt is not UTF-8"):
        Vocabulary.read(path)


@pytest.mark.parametrize(
    "arguments",
    [([],), (["a, b"],), (["a#"],), ([""],), (["a"], [["b"]]), (["a", "b"], [["a"]]), (["a"], [], [1])],
)
def test_bad_values(arguments):
    with pytest.raises(InputError):
        Vocabulary(*arguments)


def test_prompts():
    assert parse_prompts(" red  circle; stripes;;red circle ; grass") == ["red circle", "stripes", "grass"]
    with pytest.raises(InputError, match="no prompt"):
        parse_prompts(" ; ")


@pytest.mark.parametrize("name", ["camvid", "coco_instances"])
def test_shipped_lists(name):
    vocabulary = Vocabulary.read(ROOT / "conf" / "vocab" / f"{name}.txt")
    assert len(vocabulary) == {"camvid": 11, "coco_instances": 80}[name] and not vocabulary.unseen


def test_coco_list_is_the_official_one(shared):
    official = shared("data", "labels", "coco_stuff_171.txt").read_text().split("\n")[:80]
    assert Vocabulary.read(ROOT / "conf/vocab/coco_instances.txt").names == official
