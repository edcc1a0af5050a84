"""The "+" of PhraseCut+: negatives, supports, prefixes and crops; what is asked in evaluation; COCO's classes as phrases."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from phrasecut_fixture import items_of, make, same, write_phrasecut, write_squares
from PIL import Image

from pmpseg.data import CocoPhrases
from pmpseg.data.phrase_parts import PREFIXES, is_absent, object_crop, size_word
from pmpseg.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_phrasecut(tmp_path_factory.mktemp("phrasecut") / "scenes")


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return (one & other).sum() / (one | other).sum()


# ---- training items


def test_a_training_item_follows_the_contract(tmp_path):
    data = make(write_squares(tmp_path), supports=2, image_size=32)
    item = data.dataset("train")[(0, 0)]
    assert item["image"].shape == (3, 32, 32) and item["image"].dtype == torch.uint8
    assert item["labels"].shape == (32, 32) and (item["labels"] == 255).all() and item["labels"].dtype == torch.int64
    assert item["prompts"] == ["red car"] and item["prompt_class"].tolist() == [-1] and item["name"] == "1.jpg"
    assert item["prompt_masks"].shape == (1, 32, 32) and item["prompt_masks"].dtype == torch.bool
    assert item["phrase_kind"] == ["medium attribute"] and "phrase_class" not in item
    assert item["support_image"].shape == (1, 2, 3, 32, 32) and item["support_image"].dtype == torch.uint8
    assert item["support_mask"].shape == (1, 2, 32, 32) and item["support_mask"].dtype == torch.bool
    assert item["support_valid"].tolist() == [[False, False]] and not item["support_image"].any()  # the only "red car"
    assert len(data.dataset("train")) == 5 and set(" ".join(data.phrase_kinds).split()) >= {"medium", "attribute"}


def test_image_and_mask_stay_together(scenes):
    """Where the mask of a plain coloured thing is, its colour is."""
    hits = []
    for item in items_of(make(scenes), epochs=2) + items_of(make(scenes), "test") + items_of(make(scenes), "val"):
        for channel, colour in enumerate(("red", "green", "blue")):
            for k, prompt in enumerate(item["prompts"]):
                if colour not in prompt.split() or "attribute" not in item["phrase_kind"][k]:
                    continue
                mask = torch.nn.functional.interpolate(item["prompt_masks"][None, k, None].float(), (64, 64))[0, 0] > 0
                inside = item["image"][:, mask].float()
                hits.append(bool((inside[channel] - inside.mean(0)).mean() > 20))
    assert len(hits) > 10 and all(hits)


def test_crop_rule_by_hand():
    """The first of the same 50 places whose crop has more than 5 % of the image's area of mask, else the fullest."""
    firsts, bests = 0, 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        height, width = (40, 70) if seed % 2 else (70, 40)
        mask = np.zeros((height, width), bool)
        y, x, size = rng.integers(0, height - 8), rng.integers(0, width - 8), rng.integers(3, 25)
        mask[y : y + size, x : x + size] = True
        rows, columns = object_crop(mask, np.random.default_rng(seed))
        starts = np.random.default_rng(seed).integers(0, 31, 50)
        tries = [mask[:, s : s + 40] if width > height else mask[s : s + 40] for s in starts]
        counts = [int(crop.sum()) for crop in tries]
        wanted = next((i for i, count in enumerate(counts) if count > 0.05 * 40 * 70), None)
        firsts, bests = firsts + (wanted is not None), bests + (wanted is None)
        wanted = counts.index(max(counts)) if wanted is None else wanted
        assert mask[rows, columns].shape == (40, 40) and np.array_equal(mask[rows, columns], tries[wanted])
    assert firsts > 10 and bests > 10
    assert object_crop(np.ones((9, 9), bool), rng) == (slice(0, 9), slice(0, 9))


def test_no_crop_squashes_the_whole_image(tmp_path):
    data = make(write_squares(tmp_path), crop="none", image_size=50)
    item = data.dataset("train")[(3, 1)]
    photo = Image.open(tmp_path / "images/1.jpg").resize((50, 50), Image.Resampling.BILINEAR)
    assert np.array_equal(item["image"].permute(1, 2, 0), np.array(photo))
    wanted = torch.zeros(50, 50, dtype=torch.bool)
    wanted[:25, 40:] = True
    assert item["prompts"] == ["dog"] and torch.equal(item["prompt_masks"][0], wanted)
    cropped = make(tmp_path, image_size=60).dataset("train")
    pixels = {int(cropped[(epoch, 1)]["prompt_masks"].sum()) for epoch in range(20)}
    assert max(pixels) == 20 * 30 and min(pixels) > 0.05 * 6000  # the dog is at the edge, and always in view


def test_share_of_negatives_and_that_they_are_absent(scenes):
    data = make(scenes, negatives=0.2)
    dataset, own, replaced = data.dataset("train"), data.source("train").phrases, 0
    present = {}
    for phrase, image in zip(own, data.source("train").image_of, strict=True):
        present.setdefault(data.source("train").names[image], []).append(phrase)
    items = items_of(data, epochs=12)
    for item in items:
        (phrase,) = item["prompts"]
        if phrase != own[item["index"]]:
            replaced += 1
            assert phrase not in present[item["name"]] and phrase in dataset.unique
            assert not item["prompt_masks"].any() and item["phrase_kind"] == [""]
        else:
            assert item["prompt_masks"].any()
    assert abs(replaced / len(items) - 0.2) < 4 * (0.16 / len(items)) ** 0.5
    assert all(item["prompts"][0] != own[item["index"]] for item in items_of(make(scenes, negatives=1.0)))
    assert all(item["prompts"][0] == own[item["index"]] for item in items_of(make(scenes, negatives=0.0)))


def test_unchecked_negatives_may_be_there_as_in_the_papers_code(tmp_path):
    root = write_squares(tmp_path)
    first = lambda **options: [item["prompts"][0] for item in items_of(make(root, **options), epochs=40)[::5]]  # noqa: E731
    assert set(first(negatives=1.0)) == {"cat"}  # of image 1, "car" and "dog" are on it
    assert set(first(negatives=1.0, check_negatives=False)) == {"car", "dog", "cat"}


@pytest.mark.parametrize(
    ("phrase", "present"),
    [
        ("Car", ["dog", "red car"]),
        ("cars", ["red car"]),
        ("car", ["two red cars"]),
        ("car", ["red car."]),
        ("a car", ["car"]),
        ("man", ["man's shirt"]),
        ("the man", ["Men"]),
        ("man's shirt", ["shirt of a man"]),
        ("shirt", ["t-shirt"]),
        ("bus", ["buses"]),
        ("glasses", ["glass"]),
        ("women", ["old woman"]),
        ("knife", ["knives"]),
        ("tomato", ["tomatoes"]),
        ("baby", ["babies"]),
        ("tie", ["ties"]),
        ("leaf", ["green leaves"]),
        ("foot", ["feet"]),
        ("people", ["person"]),
        ("box", ["boxes"]),
        ("dishes", ["dish"]),
        ("the", ["dog"]),
    ],
)
def test_what_the_image_has_is_not_absent(phrase, present):
    assert not is_absent(phrase, present)


def test_what_the_image_has_not_is_absent():
    for phrase, present in {"blue car": "red car", "red car": "car", "car": "carpet", "cat": "cattle", "bus": "bush"}.items():
        assert is_absent(phrase, [present]) and is_absent(phrase, [present, "the dogs", "a"])
    assert is_absent("red car", ["car", "red bus"])  # no phrase alone says so


def test_negatives_of_coco_are_annotated_nowhere_in_the_image(shared):
    root = shared("data", "coco_small")
    content = json.loads((root / "annotations/instances_train.json").read_text())
    name = {category["id"]: category["name"] for category in content["categories"]}
    file = {image["id"]: image["file_name"] for image in content["images"]}
    there = {(file[a["image_id"]], name[a["category_id"]]) for a in content["annotations"]}
    data = CocoPhrases(str(root), negatives=0.5, prefixes="plain", image_size=48, num_workers=0)
    dataset, negatives = data.dataset("train"), 0
    for index in range(0, len(dataset), 5):
        item = dataset[(1, index)]
        replaced = item["prompts"][0] != data.source("train").phrases[index]
        negatives += replaced
        assert ((item["name"], item["prompts"][0]) in there) == (not replaced)
        assert not (replaced and item["prompt_masks"].any())
    assert 60 < negatives < 150  # of 206


def test_supports_are_other_images_of_the_same_phrase(scenes):
    data = make(scenes, supports=2, crop="none", image_size=128)
    source, own = data.source("train"), data.source("train").phrases
    photos = [torch.from_numpy(source.image(image)).permute(2, 0, 1) for image in range(len(source.names))]
    seen, plain = 0, items_of(make(scenes, crop="none", image_size=128))
    for item, without in zip(items_of(data), plain, strict=True):
        assert same({k: v for k, v in item.items() if not k.startswith("support")}, without)  # supports change nothing else
        others = [s for s in range(len(own)) if own[s] == item["prompts"][0] and source.names[source.image_of[s]] != item["name"]]
        valid = item["support_valid"][0]
        assert valid.tolist() == [len(others) > 0, len(others) > 1]
        found = []
        for s in torch.nonzero(valid)[:, 0].tolist():
            match = [o for o in others if torch.equal(photos[source.image_of[o]], item["support_image"][0, s])]
            assert len(match) == 1 and np.array_equal(item["support_mask"][0, s], source.mask(match[0]))
            found += match
        assert len(set(found)) == len(found) and not item["support_image"][0, ~valid].any()
        seen += len(found)
    assert seen > 20


def test_the_query_may_be_its_own_support_as_in_the_papers_code(tmp_path):
    root = write_squares(tmp_path)
    for may in (False, True):
        data = make(root, supports=1, support_may_be_query=may, crop="none", image_size=40)
        items = [item for item in items_of(data, epochs=20) if item["prompts"] != ["red car"]]
        own = [torch.equal(item["image"], item["support_image"][0, 0]) for item in items if item["support_valid"].all()]
        assert len(own) == 40 and (5 < sum(own) < 35 if may else not any(own))  # "dog" alone has two samples


def test_supports_of_a_negative_are_of_its_own_phrase(tmp_path):
    data = make(write_squares(tmp_path), supports=1, negatives=1.0, check_negatives=False, crop="none", image_size=40)
    items = [item for item in items_of(data, epochs=30) if item["prompts"] == ["dog"]]
    assert items and all(item["support_valid"].all() and item["support_mask"].any() for item in items)
    assert not any(item["prompt_masks"].any() for item in items)


def test_supports_are_cropped_as_training_images_are(tmp_path):
    data = make(write_squares(tmp_path), supports=1, image_size=60)  # a crop of 60 x 60 keeps its pixels
    source = data.source("train")
    for epoch in range(10):
        item = data.dataset("train")[(epoch, 1)]  # "dog" on image 1; the other is on image 3, 30 pixels wide
        photo, mask = source.image(2), source.mask(3)
        windows = [s for s in range(41) if np.array_equal(photo[:, s : s + 60], item["support_image"][0, 0].permute(1, 2, 0))]
        assert len(windows) == 1 and np.array_equal(mask[:, windows[0] : windows[0] + 60], item["support_mask"][0, 0])
        assert item["support_mask"].sum() > 0.05 * 6000


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_support_whose_mask_vanishes_is_none(tmp_path, split):
    """Of image 3 the cat is one column of pixels, which is not among the 20 that are left of 100."""
    root = write_squares(tmp_path)
    tasks = json.loads((root / f"refer_{split}.json").read_text())
    for cats, valid in ((("car",), [False, False]), (("car", "red car"), [True, False])):  # on image 2, and on 1
        changed = [task | {"phrase": "cat"} if task["phrase"] in cats else task for task in tasks]
        (root / f"refer_{split}.json").write_text(json.dumps(changed))
        data = make(root, supports=2, crop="none", image_size=20)
        of_2 = [item for item in items_of(data, split, epochs=8) if item["name"] == "2.jpg"]
        assert len(of_2) == 8 and all(item["support_valid"].tolist() == [valid] for item in of_2)
        one = torch.from_numpy(data.source(split).mask(0)[1::3, 2::5].copy())  # the red car on image 1
        for item in of_2:
            assert torch.equal(item["support_mask"][0, 0], one & valid[0]) and not item["support_image"][0, 1].any()


@pytest.mark.parametrize(("prefixes", "count"), [("plain", 1), ("fixed", 1), ("shuffle", 4), ("shuffle+", 9)])
def test_prefixes_are_for_training_only(tmp_path, prefixes, count):
    root = write_squares(tmp_path)
    data = make(root, prefixes=prefixes, image_size=16)
    texts = {data.dataset("train")[(epoch, 0)]["prompts"][0] for epoch in range(200)}
    assert texts == {form.format("red car") for form in PREFIXES[prefixes]} and len(texts) == count
    assert ("red car" in texts) == (prefixes == "plain")
    assert data.dataset("val")[0]["prompts"] == ["red car", "dog"]


def test_several_phrases_of_an_image(scenes):
    data = make(scenes, prompts_per_image=9, negatives=0.3, image_size=128)
    dataset, source = data.dataset("train"), data.source("train")
    assert len(dataset) == len(source.names) == 12
    orders, emptied = set(), 0
    for epoch in range(6):
        for index in range(12):
            item = dataset[(epoch, index)]
            own = {source.phrases[s]: s for s in np.flatnonzero(source.image_of == index)}
            asked = [prompt for prompt in item["prompts"] if prompt]
            assert len(item["prompts"]) == 9 and len(asked) == len(set(asked)) == len(own) and item["name"] == source.names[index]
            for k, prompt in enumerate(item["prompts"]):
                wanted = source.mask(own[prompt]) if prompt in own else np.zeros((128, 128), bool)
                assert np.array_equal(item["prompt_masks"][k], wanted)  # square scenes: no crop
                emptied += prompt != "" and prompt not in own
            orders.add((index, *item["prompts"]))
    assert len(orders) > 60 and emptied > 60
    few = make(scenes, prompts_per_image=2, phrases_at_once=1).dataset("train")
    assert len(few) == 12 and all(len(set(few[(0, index)]["prompts"]) - {""}) == 2 for index in range(12))


# ---- evaluation


def test_an_evaluation_item_is_an_image_with_all_its_phrases(tmp_path):
    root = write_squares(tmp_path)
    items = items_of(make(root, image_size=50, supports=1), "val")
    assert [item["prompts"] for item in items] == [["red car", "dog"], ["car"], ["dog", "cat"]]
    for item, identity in zip(items, (1, 2, 3), strict=True):
        photo = Image.open(root / f"images/{identity}.jpg").resize((50, 50), Image.Resampling.BILINEAR)
        assert np.array_equal(item["image"].permute(1, 2, 0), np.array(photo))
        assert item["labels"].shape == (60, 100) and item["prompt_masks"].shape == (len(item["prompts"]), 60, 100)
    assert items[0]["prompt_masks"].sum((1, 2)).tolist() == [300, 600]
    assert items[0]["phrase_kind"] == ["medium attribute", "medium name"] and items[2]["phrase_kind"][1] == "small name"
    assert items[0]["support_valid"].tolist() == [[False], [True]]
    other = Image.open(root / "images/3.jpg").resize((50, 50), Image.Resampling.BILINEAR)
    assert np.array_equal(items[0]["support_image"][1, 0].permute(1, 2, 0), np.array(other))
    assert make(root, image_size=30, square=False).dataset("val")[0]["image"].shape == (3, 30, 50)


def test_masks_are_scored_at_the_images_size_or_resized_with_it(tmp_path):
    root = write_squares(tmp_path)
    for square, shape, (rows, columns) in ((True, (20, 20), (3, 5)), (False, (12, 20), (5, 5))):
        options = {"image_size": min(shape), "square": square, "supports": 1, "eval_absent": 1}
        own, resized = (items_of(make(root, resize_labels=given, **options), "test") for given in (False, True))
        for one, other in zip(own, resized, strict=True):
            masks = one["prompt_masks"][:, rows // 2 :: rows, columns // 2 :: columns]  # each pixel from the middle of its own
            assert one["labels"].shape == (60, 100) and other["labels"].shape == shape and (other["labels"] == 255).all()
            assert torch.equal(other.pop("prompt_masks"), masks) and one.pop("prompt_masks").shape[1:] == (60, 100)
            del one["labels"], other["labels"]
            assert same(one, other)  # also phrase_kind: of a cat that vanished
    assert resized[2]["prompts"][1] == "cat" and resized[2]["phrase_kind"][1] == "small name" and not masks[1].any()


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_without_supports(tmp_path, workers):
    root = write_squares(tmp_path)
    data, bare = make(root, supports=1, num_workers=workers), make(root)
    data.supports_in_evaluation = False
    read, image = [], data.source("val").image
    if not workers:
        data.source("val").image = lambda number: (read.append(number), image(number))[1]
    for loaders in ((data.val_dataloader(), bare.val_dataloader()), (data.test_dataloader(), bare.test_dataloader())):
        assert all(same(one, other) for one, other in zip(*loaders, strict=True))
    assert workers or read == [0, 1, 2]  # an image each, and no more
    assert "support_image" in data.dataset("train")[0] and data.options.supports == 1
    data.supports_in_evaluation = True
    assert "support_image" in data.dataset("val")[0]


def test_phrases_at_once_and_absent_phrases(scenes):
    whole = items_of(make(scenes), "test")
    parts = items_of(make(scenes, phrases_at_once=2), "test")
    assert max(len(item["prompts"]) for item in parts) == 2 < max(len(item["prompts"]) for item in whole)
    assert [p for item in parts for p in item["prompts"]] == [p for item in whole for p in item["prompts"]]
    for item, plain in zip(items_of(make(scenes, eval_absent=3), "test"), whole, strict=True):
        count = len(plain["prompts"])
        assert item["prompts"][:count] == plain["prompts"] and len(item["prompts"]) == count + 3
        assert not set(item["prompts"][count:]) & set(plain["prompts"]) and len(set(item["prompts"][count:])) == 3
        assert torch.equal(item["prompt_masks"][:count], plain["prompt_masks"]) and not item["prompt_masks"][count:].any()
        assert item["phrase_kind"][count:] == [""] * 3


def test_size_words():
    mask = np.zeros((10, 100), bool)
    words = {}
    for count in (0, 1, 19, 20, 199, 200, 1000):
        mask.flat[:count] = True
        words[count] = size_word(mask)
    assert words == {0: "", 1: "small", 19: "small", 20: "medium", 199: "medium", 200: "large", 1000: "large"}


# ---- removed classes


def test_removed_phrases_are_gone_from_training_and_validation(tmp_path, monkeypatch):
    asked = []

    def removed(phrase: str, classes) -> bool:
        asked.append(phrase)
        return any(name in phrase.split() for name in classes)

    monkeypatch.setitem(sys.modules, "pmpseg.data.removal", types.SimpleNamespace(removed=removed))
    data = make(write_squares(tmp_path), remove_classes=["dog"], supports=1, negatives=0.5)
    prompts = {split: {p for item in items_of(data, split, 10) for p in item["prompts"]} for split in ("train", "val", "test")}
    assert prompts["train"] == prompts["val"] == {"red car", "car", "cat"} and prompts["test"] == {"red car", "car", "cat", "dog"}
    assert len(data.dataset("train")) == 3 and sorted(asked[:4]) == ["car", "cat", "dog", "red car"]  # each asked once
    with pytest.raises(InputError, match="no train phrase is left of 5 without dog, car, cat"):
        make(tmp_path, remove_classes=["dog", "car", "cat"]).dataset("train")
    items = items_of(make(tmp_path, remove_classes=["cat"], negatives=1.0), epochs=20)
    assert {item["prompts"][0] for item in items if item["name"] == "3.jpg"} == {"red car", "car"}
    items = items_of(make(tmp_path, remove_classes=["red"], negatives=1.0), epochs=20)  # it is still on image 1, and says "car"
    assert {item["prompts"][0] for item in items if item["name"] == "1.jpg"} == {"cat"}


def test_removal_by_the_list_of_pascal_classes(tmp_path):
    data = make(write_squares(tmp_path), remove_classes=["car", "cat"])
    assert {item["prompts"][0] for item in items_of(data)} == {"dog"}
    with pytest.raises(InputError, match="unicorn"):
        make(tmp_path, remove_classes=["unicorn"]).dataset("train")


# ---- COCO


def test_coco_phrases_against_the_json_and_pycocotools(shared):
    reference = pytest.importorskip("pycocotools.coco", reason="pycocotools is the reference")
    root = shared("data", "coco_small")
    data = CocoPhrases(str(root), num_workers=0)
    coco = reference.COCO(str(root / "annotations/instances_val.json"))
    pairs = {(a["image_id"], a["category_id"]) for a in coco.loadAnns(coco.getAnnIds())}
    names = [category["name"] for category in sorted(coco.loadCats(coco.getCatIds()), key=lambda c: c["id"])]
    dataset = data.dataset("val")
    assert data.vocabulary.names == names and len(names) == 80 and len(data.source("val").phrases) == len(pairs)
    assert data.source("test").phrases == data.source("val").phrases and not data.class_list
    for index in range(0, len(dataset), 12):
        item = dataset[index]
        for phrase, label, mask in zip(item["prompts"], item["phrase_class"].tolist(), item["prompt_masks"], strict=True):
            assert names[label] == phrase
            annotations = coco.loadAnns(coco.getAnnIds(int(Path(item["name"]).stem), coco.getCatIds([phrase])))
            other = np.any([coco.annToMask(a) > 0 for a in annotations], axis=0)
            assert iou(mask.numpy(), other) > 0.9
    resized = CocoPhrases(str(root), num_workers=0, image_size=64, resize_labels=True).dataset("val")[0]
    assert resized["labels"].shape == resized["prompt_masks"].shape[1:] == (64, 64)
    batch = next(iter(CocoPhrases(str(root), num_workers=0, batch_size=3, supports=1, image_size=64).train_dataloader()))
    assert batch["phrase_class"].shape == (3, 1) and batch["support_image"].shape == (3, 1, 1, 3, 64, 64)


def test_coco_phrases_say_what_is_missing(tmp_path):
    with pytest.raises(InputError, match=r"has no annotations/instances_train.json or annotations/instances_val.json"):
        CocoPhrases(str(tmp_path))
