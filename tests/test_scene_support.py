"""Supports of scenes: they show the phrase, are never the query, hold nothing back and give nothing away."""

import re

import numpy as np
import pytest
import torch

from pmpseg.data.base import collate
from pmpseg.data.scene_drawing import COLOURS, PATTERNS, SHAPES, SIZES, STUFF, UNSEEN_SHAPES, UNSEEN_STUFF, Scene, Thing, group_of
from pmpseg.data.scene_phrases import MARKS, NUMBERS, SMALLEST, Description, Phrase
from pmpseg.data.scene_support import POOL, SupportPool, class_phrase, support_pool
from pmpseg.data.scenes import CLASSES, Scenes, label_map
from pmpseg.errors import InputError

KEYS = ("support_image", "support_mask", "support_valid")


def scenes(**options) -> Scenes:
    return Scenes(train_length=60, val_length=40, test_length=60, num_workers=0, **options)


def shown(item: dict, split: str):
    """(prompt, support scene, support mask) of each valid support; the scene is found by its pixels."""
    pool = support_pool(0, 128, split == "test")
    by_pixels = {scene.image.tobytes(): scene for scene in pool.scenes.values()}
    for k, prompt in enumerate(item["prompts"]):
        for s in torch.nonzero(item["support_valid"][k]).flatten().tolist():
            pixels = item["support_image"][k, s].permute(1, 2, 0).contiguous().numpy().tobytes()
            yield prompt, by_pixels[pixels], item["support_mask"][k, s].numpy()


def things_named(words: str, scene: Scene) -> list[Thing]:
    """The things with all the attributes among the words, in the singular or the plural."""
    attributes = {*SIZES, *PATTERNS, *COLOURS, *SHAPES}
    said = {next((a for a in (w, w[:-1], w[:-2]) if a in attributes), "") for w in words.split()} - {""}
    return [t for t in scene.things if said <= {t.size, t.pattern, t.colour, t.shape}]


def pixels_of(things: list[Thing], scene: Scene) -> np.ndarray:
    return np.isin(scene.owner, [scene.things.index(t) + 1 for t in things])


def mask_by_words(prompt: str, scene: Scene) -> np.ndarray:
    """The mask of a prompt, read from its words; by no code of the package."""
    if prompt in STUFF:
        return (scene.stuff == STUFF.index(prompt)) & (scene.owner == 0)
    if mark := next((m for m in MARKS if m in prompt.split()), ""):
        owners = [t for t in things_named(prompt.partition(" of ")[2], scene) if t.pattern == MARKS[mark]]
        return pixels_of(owners, scene) & scene.pattern
    if " on the " in prompt:
        name, _, ground = prompt.partition(" on the ")
        return pixels_of([t for t in things_named(name, scene) if scene.ground[scene.things.index(t)] == ground], scene)
    if where := re.fullmatch(r"(.+) (left of|right of|above|below) the (.+)", prompt):
        (anchor,) = things_named(where[3], scene)
        away = {
            "left of": lambda t: anchor.x - t.x,
            "right of": lambda t: t.x - anchor.x,
            "above": lambda t: anchor.y - t.y,
            "below": lambda t: t.y - anchor.y,
        }[where[2]]
        return pixels_of([t for t in things_named(where[1], scene) if t is not anchor and away(t) >= 2], scene)  # px
    things = things_named(prompt, scene)
    for number, word in NUMBERS.items():
        if word in prompt.split() and len(things) != number:
            return np.zeros(scene.owner.shape, bool)
    return pixels_of(things, scene)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_support_shows_what_the_prompt_says(split):
    dataset = scenes(supports=1).dataset(split)
    kinds: dict[str, int] = {}
    for index in range(40):
        for prompt, scene, mask in shown(dataset[index], split):
            is_part, is_relation = set(prompt.split()) & set(MARKS), re.search(" of | on |above|below", prompt)
            kind = "part" if is_part else "relation" if is_relation else "other"
            kinds[kind] = kinds.get(kind, 0) + 1
            assert mask.sum() >= SMALLEST
            assert np.array_equal(mask, mask_by_words(prompt, scene)), prompt
    assert min(kinds.values()) > 25 and len(kinds) == 3, kinds


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_most_prompts_have_a_support_absent_ones_too(split):
    dataset = scenes(supports=1).dataset(split)
    share: dict[bool, list[bool]] = {True: [], False: []}
    for index in range(40):
        item = dataset[index]
        for prompt, mask, valid in zip(item["prompts"], item["prompt_masks"], item["support_valid"], strict=True):
            assert prompt or not valid.any()
            if prompt:
                share[bool(mask.any())].append(bool(valid))
    assert np.mean(share[True]) > 0.9 and np.mean(share[False]) > 0.9


def test_no_scene_of_the_pool_is_a_scene_of_a_split():
    data = scenes(supports=1)
    keys = [(split, i, epoch) for split in data.lengths for i in range(40) for epoch in (0, 1)]
    queries = {data.dataset(split).scene(i, epoch).image.tobytes() for split, i, epoch in keys}
    assert len(queries) == 3 * 2 * 40
    for held_out in (False, True):
        pool = support_pool(0, 128, held_out)
        own = {pool.scene(i).image.tobytes() for i in range(60)}
        assert len(own) == 60 and not own & queries


@pytest.mark.parametrize("split", ["train", "val"])
def test_supports_of_training_and_validation_show_nothing_that_is_held_out(split):
    dataset = scenes(supports=2).dataset(split)
    for index in range(40):
        for _, scene, _ in shown(dataset[index], split):
            assert all(group_of(t.colour, t.shape) == "seen" for t in scene.things)
            assert not set(np.unique(scene.stuff)) & {STUFF.index(s) for s in UNSEEN_STUFF}


def test_supports_of_the_test_split_show_what_is_held_out():
    dataset = scenes(supports=1).dataset("test")
    found = [(p, s) for i in range(40) for p, s, _ in shown(dataset[i], "test")]
    words = [scene for prompt, scene in found if set(prompt.split()) & {*UNSEEN_SHAPES, *UNSEEN_STUFF}]
    assert len(words) > 10 and all(
        {t.shape for t in s.things} & set(UNSEEN_SHAPES) or STUFF.index("gravel") in s.stuff for s in words
    )


def test_supports_are_a_function_of_seed_epoch_and_index():
    def item(key, seed: int = 0) -> dict:
        return scenes(supports=2, seed=seed).dataset("train")[key]

    first = item((1, 5))
    support_pool.cache_clear()
    item((0, 3))  # other scenes are drawn first
    again = item((1, 5))
    assert all(torch.equal(first[key], again[key]) for key in KEYS)
    for other in (item((0, 5)), item((1, 6)), item((1, 5), seed=1)):
        assert not torch.equal(first["support_image"], other["support_image"])


def test_an_epoch_draws_anew():
    """The first prompts of the same index in two epochs would often get the same scene, if they searched in the same order."""
    dataset = scenes(supports=1, num_prompts=5).dataset("train")
    pairs = [[dataset[epoch, i]["support_image"][0] for epoch in (0, 1)] for i in range(60)]
    assert sum(torch.equal(a, b) for a, b in pairs) <= 2


def test_supports_do_not_depend_on_workers():
    def batches(workers: int) -> list[dict]:
        data = Scenes(train_length=8, batch_size=4, num_prompts=6, supports=1, num_workers=workers)
        return list(data.train_dataloader())

    for here, there in zip(batches(0), batches(2), strict=True):
        assert all(torch.equal(here[key], there[key]) for key in KEYS)


def test_an_item_is_otherwise_the_same_with_and_without_supports():
    without, given = scenes().dataset("train")[3], scenes(supports=1).dataset("train")[3]
    assert set(given) - set(without) == set(KEYS)
    assert without["prompts"] == given["prompts"] and torch.equal(without["prompt_masks"], given["prompt_masks"])


def test_evaluation_without_supports():
    data = scenes(supports=1)
    data.supports_in_evaluation = False
    for split in ("val", "test"):
        assert not set(KEYS) & set(data.dataset(split)[0])
    assert set(KEYS) <= set(data.dataset("train")[0])


def test_several_supports_are_different_scenes_and_missing_ones_are_zeros():
    dataset = scenes(supports=3).dataset("test")
    missing = 0
    for index in range(30):
        item = dataset[index]
        for k, prompt in enumerate(item["prompts"]):
            valid = item["support_valid"][k]
            images = {image.numpy().tobytes() for image in item["support_image"][k][valid]}
            assert len(images) == valid.sum()
            assert not item["support_image"][k][~valid].any() and not item["support_mask"][k][~valid].any()
            assert torch.equal(valid, valid.sort(descending=True).values)  # the missing ones are the last
            missing += bool(prompt) and not valid.all()
    assert missing > 0


def test_shapes_and_a_batch():
    dataset = scenes(supports=2, image_size=160, num_prompts=7).dataset("train")
    items = [dataset[0], dataset[1]]
    batch = collate(items)
    assert batch["support_image"].shape == (2, 7, 2, 3, 160, 160) and batch["support_image"].dtype == torch.uint8
    assert batch["support_mask"].shape == (2, 7, 2, 160, 160) and batch["support_mask"].dtype == torch.bool
    assert batch["support_valid"].shape == (2, 7, 2) and batch["support_valid"].dtype == torch.bool
    assert torch.equal(batch["support_image"][1], items[1]["support_image"])
    assert not set(KEYS) & set(collate([scenes().dataset("val")[0]]))


def test_a_class_is_the_phrase_of_its_name():
    pool = support_pool(0, 128, True)
    for index in range(15):
        labels = label_map(pool.scene(index))
        for c, name in enumerate(CLASSES):
            assert class_phrase(name).text == name
            assert np.array_equal(class_phrase(name).mask(pool.scene(index)), labels == c)


def small_scene(*things: Thing) -> Scene:
    owner = np.zeros((40, 40), np.uint8)
    for i, t in enumerate(things):
        owner[int(t.y) - 2 : int(t.y) + 3, int(t.x) - 2 : int(t.x) + 3] = i + 1
    stuff = np.zeros((40, 40), np.uint8)
    return Scene(np.full((40, 40, 3), len(things), np.uint8), stuff, owner, stuff > 0, things, ("grass",) * len(things))


def test_scenes_without_a_clear_answer_or_with_too_few_pixels_do_not_count():
    circle, square = Thing("circle", "red", "plain", "small", 5, 20, 2), Thing("square", "red", "plain", "small", 30, 20, 2)
    clear = small_scene(circle, square)
    near = small_scene(Thing("circle", "red", "plain", "small", 25, 20, 2), square)  # 5 px apart: no clear side
    two = small_scene(circle, square, Thing("square", "blue", "plain", "small", 20, 5, 2))  # which square?
    hidden = small_scene(circle, square)
    hidden.owner[hidden.owner == 1] *= np.arange(25, dtype=np.uint8) < SMALLEST - 1
    pool = SupportPool(0, 40, False, length=4)
    pool.scenes = dict(enumerate([near, two, hidden, clear]))
    phrase = Phrase("relation", Description(shape="circle"), relation="left of", reference=Description(shape="square"))
    (found,) = pool.search(phrase, 4, np.random.default_rng(0))
    assert found[0] is clear and np.array_equal(found[1], clear.owner == 1)
    assert pool.search(Phrase("thing", Description(shape="star")), 1, np.random.default_rng(0)) == []


def test_all_scenes_of_the_pool_are_used_alike():
    pool = support_pool(0, 128, False)
    phrase, rng = Phrase("thing", Description(shape="circle")), np.random.default_rng(0)
    drawn = [pool.search(phrase, 1, rng)[0][0].image.tobytes() for _ in range(600)]
    having = sum(any(t.shape == "circle" for t in pool.scene(i).things) for i in range(POOL))
    assert len(set(drawn)) > 0.8 * min(having, 600) * (1 - np.exp(-600 / having))
    assert max(map(drawn.count, set(drawn))) < 15


def test_a_negative_number_is_refused():
    with pytest.raises(InputError, match="supports: got -1, want 0 or more"):
        Scenes(supports=-1)
