"""The embedded data: deterministic, honest about what is held out, and phrases that mean what they say."""

import re
from itertools import pairwise

import numpy as np
import pytest
import torch

from pmpseg.data.scene_drawing import (
    KINDS,
    SHAPES,
    STUFF,
    UNSEEN_COMBINATIONS,
    UNSEEN_SHAPES,
    UNSEEN_STUFF,
    Scene,
    Thing,
    draw_scene,
)
from pmpseg.data.scene_phrases import PHRASE_KINDS, Description, Phrase, absent_phrase, present_phrase
from pmpseg.data.scenes import CLASS_GROUP, CLASSES, Scenes, label_map

RED, CIRCLE, SQUARE = Description(colour="red"), Description(shape="circle"), Description(shape="square")


def scene_of(*things: Thing, ground: tuple[str, ...] = ()) -> Scene:
    """A 40 x 40 scene whose things are drawn as 5 x 5 blocks at their centres, each with one row of marks."""
    owner, pattern = np.zeros((40, 40), np.uint8), np.zeros((40, 40), bool)
    for i, t in enumerate(things):
        x, y = int(t.x), int(t.y)
        owner[y - 2 : y + 3, x - 2 : x + 3] = i + 1
        pattern[y, x - 2 : x + 3] = t.pattern != "plain"
    stuff = np.full((40, 40), STUFF.index("grass"), np.uint8)
    return Scene(np.zeros((40, 40, 3), np.uint8), stuff, owner, pattern, things, ground or ("grass",) * len(things))


def thing(shape: str, colour: str, x: float, y: float, pattern: str = "plain", size: str = "small") -> Thing:
    return Thing(shape, colour, pattern, size, x, y, 2.0)


SCENE = scene_of(
    thing("circle", "red", 5, 20),
    thing("circle", "blue", 30, 20, "striped"),
    thing("square", "red", 18, 20, "striped"),
    thing("cross", "red", 18, 5, "plain", "large"),
    ground=("grass", "sand", "grass", "grass"),
)


@pytest.mark.parametrize(
    ("phrase", "text", "things"),
    [
        (Phrase("thing", Description(shape="circle")), "circle", [0, 1]),
        (Phrase("attributes", Description(colour="red", shape="circle"), definite=True), "the red circle", [0]),
        (Phrase("group", Description(colour="red")), "everything red", [0, 2, 3]),
        (Phrase("group", Description(shape="circle"), count=2), "the two circles", [0, 1]),
        (Phrase("group", Description(shape="cross"), count=2), "the two crosses", []),
        (Phrase("relation", CIRCLE, relation="left of", reference=SQUARE), "the circle left of the square", [0]),
        (Phrase("relation", CIRCLE, relation="right of", reference=SQUARE), "the circle right of the square", [1]),
        (Phrase("relation", RED, relation="above", reference=SQUARE), "the red above the square", [3]),
        (Phrase("relation", Description(shape="circle"), stuff="sand"), "the circle on the sand", [1]),
        (Phrase("attributes", Description("large", "plain", "red", "cross")), "large plain red cross", [3]),
    ],
)  # fmt: skip
def test_a_phrase_finds_the_things_that_it_names(phrase, text, things):
    assert phrase.text == text
    expected = np.isin(SCENE.owner, [i + 1 for i in things])
    assert np.array_equal(phrase.mask(SCENE), expected)


def test_a_part_is_the_marks_of_its_owner_only():
    mask = Phrase("part", Description(shape="square"), marks="stripes").mask(SCENE)
    assert mask.sum() == 5 and mask[20, 16:21].all()
    assert Phrase("part", marks="stripes").mask(SCENE).sum() == 10
    assert not Phrase("part", Description(shape="square"), marks="dots").mask(SCENE).any()


def test_a_relation_without_a_clear_answer_is_not_judged():
    two_squares = scene_of(thing("circle", "red", 5, 20), thing("square", "red", 20, 20), thing("square", "blue", 30, 20))
    left = Phrase("relation", Description(shape="circle"), relation="left of", reference=Description(shape="square"))
    assert left.mask(two_squares) is None
    nearly = scene_of(thing("circle", "red", 15, 20), thing("square", "red", 20, 20))
    assert left.mask(nearly) is None  # 5 px: neither clearly left nor clearly not


def test_scenes_are_deterministic_and_differ_by_index_and_seed():
    a, b = draw_scene(3, 7), draw_scene(3, 7)
    assert np.array_equal(a.image, b.image) and a.things == b.things
    assert not np.array_equal(a.image, draw_scene(3, 8).image)
    assert not np.array_equal(a.image, draw_scene(4, 7).image)


def test_items_do_not_depend_on_workers():
    def images(workers: int) -> torch.Tensor:
        data = Scenes(train_length=8, batch_size=4, num_workers=workers)
        return torch.cat([batch["image"] for batch in data.train_dataloader()])

    assert torch.equal(images(0), images(2))


def test_epochs_show_new_scenes():
    dataset = Scenes(num_workers=0).dataset("train")
    assert not torch.equal(dataset[0, 0]["image"], dataset[1, 0]["image"])


def _held_out(text: str) -> bool:
    words = text.split()
    pairs = set(pairwise(words))
    pairs |= {(c, s.removesuffix("s").removesuffix("e")) for c, s in pairs} | {(c, s.removesuffix("s")) for c, s in pairs}
    singular = {w.removesuffix("s") for w in words}
    return bool(pairs & UNSEEN_COMBINATIONS or singular & set(UNSEEN_SHAPES) or set(words) & set(UNSEEN_STUFF))


def test_training_and_validation_hold_out_every_unseen_word_and_pair():
    data = Scenes(train_length=120, val_length=40)
    for split, count in (("train", 120), ("val", 40)):
        dataset = data.dataset(split)
        for index in range(count):
            scene, item = dataset.scene(index), dataset[index]
            assert all(CLASS_GROUP[t.name] == "seen" for t in scene.things)
            assert not set(np.unique(scene.stuff)) & {STUFF.index(s) for s in UNSEEN_STUFF}
            assert not [p for p in item["prompts"] if _held_out(p)]
            assert {CLASS_GROUP[CLASSES[c]] for c in item["prompt_class"].tolist() if c >= 0} <= {"seen"}


def test_the_check_above_would_notice_held_out_phrases():
    dataset = Scenes(test_length=60).dataset("test")
    assert sum(_held_out(p) for i in range(60) for p in dataset[i]["prompts"]) > 50


def test_present_phrases_have_the_distractors_that_they_promise():
    rng = np.random.default_rng(0)
    counts = dict.fromkeys(PHRASE_KINDS, 0)
    for index in range(60):
        scene = draw_scene(11, index, KINDS[index % 3])
        for kind in PHRASE_KINDS:
            phrase = present_phrase(scene, kind, rng, seen_only=False)
            if phrase is None:
                continue
            counts[kind] += 1
            mask = phrase.mask(scene)
            assert mask.any()
            if kind == "relation":  # ignoring the relation gives more
                assert phrase.ignoring_relation(scene).sum() > mask.sum()
            if kind == "group":
                assert len(phrase.things(scene)) < len(scene.things)
            if kind == "attributes":  # leaving one attribute out, some other thing would do as well
                named = [a for a in ("size", "pattern", "colour", "shape") if getattr(phrase.target, a)]
                wider = [Description(**{**phrase.target.__dict__, a: None}) for a in named]
                assert any(sum(map(d.fits, scene.things)) > sum(map(phrase.target.fits, scene.things)) for d in wider)
    assert min(counts.values()) > 30, counts


def test_absent_phrases_find_nothing():
    rng = np.random.default_rng(1)
    for index in range(40):
        scene = draw_scene(12, index)
        phrase = absent_phrase(scene, rng)
        assert phrase is None or not phrase.mask(scene).any()


def test_class_view_and_phrase_view_agree():
    dataset = Scenes().dataset("train")
    for index in range(20):
        item = dataset[index]
        for prompt, c, mask in zip(item["prompts"], item["prompt_class"].tolist(), item["prompt_masks"], strict=True):
            if c >= 0:
                assert prompt == CLASSES[c]
                assert torch.equal(mask, item["labels"] == c)
            elif prompt in SHAPES:
                named = torch.tensor([re.fullmatch(rf"\w+ {prompt}", name) is not None for name in CLASSES])
                assert torch.equal(mask, named[item["labels"]])


def test_labels_name_what_is_on_top():
    scene = draw_scene(5, 1)
    labels = label_map(scene)
    for i, t in enumerate(scene.things):
        assert (labels[scene.owner == i + 1] == CLASSES.index(t.name)).all()
    free = scene.owner == 0
    assert [CLASSES[c] for c in labels[free][:50]] == [STUFF[s] for s in scene.stuff[free][:50]]


@pytest.mark.parametrize("size", [128, 160, 192])
def test_sizes(size):
    item = Scenes(image_size=size).dataset("val")[0]
    assert item["image"].shape == (3, size, size) and item["labels"].shape == (size, size)
    assert item["prompt_masks"].shape == (12, size, size)
