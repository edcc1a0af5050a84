"""Pascal-5i and COCO-20i on small data in the official layouts: folds, queries, supports, and the same episodes again."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from voc_fixture import PICTURES, make_voc

from pmpseg.data import Coco20i, Pascal5i
from pmpseg.data.base import collate
from pmpseg.errors import InputError


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return make_voc(tmp_path_factory.mktemp("voc"))


def labels_of(stem):
    """(H, W) as the fixture has it, without the lines of 255."""
    size, boxes = PICTURES[stem]
    labels = np.zeros(size, int)
    for label, top, left, height, width in boxes:
        labels[top : top + height, left : left + width] = label
    return labels


def items(data):
    dataset = data.dataset("test")
    return [dataset[i] for i in range(len(dataset))]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


def test_queries_of_a_fold(voc):
    """At least 2048 pixels of a class of the fold; the class asked for is one of these."""
    names = [(item["name"][:-4], item["prompts"]) for item in items(Pascal5i(str(voc), num_workers=0, image_size=64))]
    assert [name for name, _ in names] == ["2007_000001", "2007_000002", "2007_000003", "2007_000004", "2007_000006"]
    assert names[0][1] == ["a photo of a aeroplane."] and names[3][1] == ["a photo of a bicycle."]
    assert names[4][1] == ["a photo of a bird."]  # not class 1, of 72 pixels
    asked = {items(Pascal5i(str(voc), seed=s, num_workers=0, image_size=64))[2]["prompts"][0] for s in range(8)}
    assert asked == {"a photo of a aeroplane.", "a photo of a bicycle."}
    counts = [len(Pascal5i(str(voc), fold, num_workers=0).dataset("test")) for fold in range(4)]
    assert counts == [5, 1, 2, 1]
    small = [items(Pascal5i(str(voc), seed=s, small_targets=True, num_workers=0, image_size=64))[4] for s in range(8)]
    assert {item["prompts"][0] for item in small} == {"a photo of a aeroplane.", "a photo of a bird."}


def test_the_target_is_the_class_and_255_is_kept(voc):
    for item in items(Pascal5i(str(voc), num_workers=0, image_size=64, pad=False)):
        wanted = labels_of(item["name"][:-4]) == int(item["phrase_class"]) + 1
        labels = item["labels"].numpy()
        assert ((labels == 1) == (wanted & (labels != 255))).all() and (labels == 255).any()
        assert torch.equal(item["prompt_masks"][0], item["labels"] == 1) and item["prompt_masks"].any()
        share = (labels == 1).mean()
        assert item["phrase_kind"] == ["small" if share < 0.02 else "medium" if share < 0.2 else "large"]


def test_shapes_for_each_way_to_resize(voc):
    kinds = {"squash": (True, False), "pad": (True, True), "aspect": (False, False)}
    shapes = {}
    for name, (square, pad) in kinds.items():
        item = items(Pascal5i(str(voc), num_workers=0, image_size=60, square=square, pad=pad, shots=2))[0]
        shapes[name] = tuple(item["image"].shape[1:]), tuple(item["labels"].shape)
        assert item["support_image"].shape == (1, 2, 3, 60, 60) and item["support_mask"].shape == (1, 2, 60, 60)
    assert shapes == {"squash": ((60, 60), (90, 120)), "pad": ((60, 60), (120, 120)), "aspect": ((60, 80), (90, 120))}
    padded = items(Pascal5i(str(voc), num_workers=0, image_size=60))[0]
    assert (padded["labels"][90:] == 255).all() and (padded["image"][:, 45:] == 0).all() and (padded["image"][:, :45] > 0).any()
    assert torch.equal(padded["labels"][:90], items(Pascal5i(str(voc), num_workers=0, pad=False))[0]["labels"])
    small = items(Pascal5i(str(voc), num_workers=0, image_size=90, pad=False, resize_labels=True))[0]
    assert small["labels"].shape == (90, 90) and set(small["labels"].unique().tolist()) == {0, 1, 255}


def test_supports_show_the_class_in_other_images(voc):
    data = Pascal5i(str(voc), shots=2, episodes=60, num_workers=0, image_size=64)
    dataset, supports = data.dataset("test"), Counter()
    for index in range(60):
        query, label, chosen = dataset.episode(index)
        assert query not in chosen and len(set(chosen)) == len(chosen) <= 2
        for number in chosen:
            assert (labels_of(data.source.files[number].stem) == label + 1).sum() >= 2048
        supports[query] += len(chosen) / 12
        if index < 5:
            item = dataset[index]
            valid = len(chosen)
            assert item["support_valid"].tolist() == [[True] * valid + [False] * (2 - valid)]
            assert not item["support_image"][0, valid:].any() and not item["support_mask"][0, valid:].any()
            raw = data.source.read(chosen[0], label)["image"] if valid else None
            if valid:
                seen = item["support_image"][0, 0].permute(1, 2, 0).numpy()[item["support_mask"][0, 0].numpy()]
                there = raw[labels_of(data.source.files[chosen[0]].stem) == label + 1]
                assert abs(seen.mean() - there.mean()) < 2  # the mask lies on its object
    assert supports[5] == 0  # the only image of its class
    firsts = {tuple(dataset.episode(i)[2]) for i in range(0, 60, 5) if dataset.episode(i)[1] == 0}
    assert len(firsts) > 1  # drawn


def test_a_support_whose_mask_vanishes_is_none(voc, tmp_path):
    """HSNet's lists ask whatever the pixels: 8 x 9 of 80 x 80 are none of 4 x 4."""
    (tmp_path / "fold0.txt").write_text("2007_000001__01\n2007_000006__01\n")
    for size, valid in ((4, False), (40, True)):
        data = Pascal5i(str(voc), images=str(tmp_path / "fold0.txt"), num_workers=0, image_size=size)
        item = data.dataset("test")[0]
        assert bool(item["support_valid"]) == bool(item["support_mask"].any()) == bool(item["support_image"].any()) == valid


def test_episodes_are_the_same_again(voc):
    a, b, c = (Pascal5i(str(voc), seed=s, episodes=9, image_size=48, num_workers=w) for s, w in ((0, 0), (0, 2), (1, 0)))
    one, again, other = items(a), items(b), items(c)
    assert all(equal(x, y) for x, y in zip(one, again, strict=True))
    assert not all(equal(x, y) for x, y in zip(one, other, strict=True))
    a.eval_batch_size = b.eval_batch_size = 1
    for x, y in zip(a.test_dataloader(), b.test_dataloader(), strict=True):
        assert equal(x, y) and x["support_image"].shape == (1, 1, 1, 3, 48, 48)
    assert [item["name"] for item in one] == [item["name"] for item in (one[:5] + one[:4])]  # round and round


def test_batches(voc):
    data = Pascal5i(str(voc), num_workers=0, image_size=48, pad=False, resize_labels=True)
    batch = collate(items(data)[:3])
    assert batch["phrase_class"].shape == (3, 1) and batch["support_valid"].shape == (3, 1, 1)
    assert batch["prompt_masks"].shape == (3, 1, 48, 48) and batch["phrase_kind"][0] == ["large"]
    bare = items(Pascal5i(str(voc), num_workers=0, image_size=48, shots=0))[0]
    assert not [key for key in bare if key.startswith("support")]


def test_evaluation_without_supports(voc):
    data, bare = (Pascal5i(str(voc), num_workers=0, image_size=48, shots=shots) for shots in (1, 0))
    data.supports_in_evaluation = False
    assert all(equal(one, other) for one, other in zip(items(data), items(bare), strict=True))


def test_lists_of_others(voc, tmp_path):
    """PFENet's with folders of its author's machine, DeepLab's with a leading slash, HSNet's with classes."""
    pfenet = "".join(f"JPEGImages/{s}.jpg /home/someone/masks/{s}.png\n" for s in PICTURES)
    deeplab = "".join(f"/JPEGImages/{s}.jpg /SegmentationClassAug/{s}.png\n" for s in PICTURES)
    wanted = items(Pascal5i(str(voc.parent), num_workers=0, image_size=48))
    for text in (pfenet, deeplab):
        (tmp_path / "val.txt").write_text(text)
        got = items(Pascal5i(str(voc), images=str(tmp_path / "val.txt"), num_workers=0, image_size=48))
        assert all(equal(x, y) for x, y in zip(wanted, got, strict=True))
    # HSNet's fold0.txt: an image once for each class, whatever the pixels; and lines of another fold are not asked.
    (tmp_path / "fold0.txt").write_text("2007_000003__01\n2007_000003__02\n2007_000006__01\n2007_000002__01\n2007_000007__12\n")
    data = Pascal5i(str(voc), images=str(tmp_path / "fold0.txt"), num_workers=0, image_size=48, shots=3, episodes=8)
    episodes = [data.dataset("test").episode(i) for i in range(8)]
    assert [(query, label) for query, label, _ in episodes] == [(0, 0), (1, 1), (2, 0), (3, 0)] * 2
    assert set(episodes[0][2]) == {2, 3} and episodes[1][2] == []


def test_refusals(voc, tmp_path):
    data = Pascal5i(str(voc), num_workers=0)
    for split in ("train", "val"):
        with pytest.raises(InputError, match=f"Pascal5i is for evaluation only: it has the split test, got {split}"):
            data.dataset(split)
    data.trainer = SimpleNamespace()
    with pytest.raises(InputError, match="evaluation only"):
        data.train_dataloader()
    for wrong, message in (
        ({"fold": 4}, "fold: got 4, want 0 to 3"),
        ({"template": "a photo"}, "want {label} in it"),
        ({"shots": -1}, "want 0 or more shots"),
        ({"episodes": 0}, "1 or more episodes"),
        ({"images": "trainval"}, "there is no list"),
        ({"masks": "Masks"}, "has no folder Masks"),
        ({"min_pixels": 10**6}, "no image with 1000000 pixels"),
    ):
        with pytest.raises(InputError, match=message):
            Pascal5i(str(voc), **wrong)
    with pytest.raises(InputError, match="has no JPEGImages"):
        Pascal5i(str(tmp_path))
    (tmp_path / "list.txt").write_text("2007_000001\n2007_999999\n")
    with pytest.raises(InputError, match="lists 2007_999999, but there is no"):
        Pascal5i(str(voc), images=str(tmp_path / "list.txt"))
    (tmp_path / "list.txt").write_text("2007_000001__21\n")
    with pytest.raises(InputError, match="should end in a class from __01 to __20"):
        Pascal5i(str(voc), images=str(tmp_path / "list.txt"))
    with pytest.raises(InputError, match=r"there is no .*instances_val2014"):
        Coco20i(str(voc))


def rectangle(left, top, width, height):
    return [left, top, left + width, top, left + width, top + height, left, top + height]


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """COCO 2014's layout: ids of categories with gaps, polygons and a crowd as run lengths."""
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    (root / "val2014").mkdir()
    categories = [{"id": 10 * i + 1, "name": f"thing{i}"} for i in reversed(range(80))]
    images, annotations = [], []
    for number in range(6):
        name = f"COCO_val2014_{number:012d}.jpg"
        images.append({"id": 100 + number, "file_name": name, "height": 100, "width": 80})
        if number < 5:  # the last one shows nothing of fold 1, and is not there
            pixels = np.random.default_rng(number).integers(0, 256, (100, 80, 3), np.uint8)
            Image.fromarray(pixels).save(root / "val2014" / name)

    def add(number, label, segmentation, area, crowd=0):
        entry = {"id": len(annotations), "image_id": 100 + number, "category_id": 10 * label + 1, "iscrowd": crowd}
        annotations.append(entry | {"segmentation": segmentation, "area": area})

    for number in range(4):
        add(number, 1, [rectangle(0, 0, 40, 40)], 1600)
        add(number, 1, [rectangle(20, 20, 40, 40)], 1600)  # together they have 2048 by area, and overlap
    add(4, 1, [rectangle(0, 0, 20, 20)], 400)
    add(3, 5, [rectangle(10, 10, 50, 60)], 3000)
    add(4, 5, {"size": [100, 80], "counts": [0, 4000, 4000]}, 4000, 1)
    add(5, 2, [rectangle(0, 0, 60, 60)], 3600)
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / "instances_val2014.json").write_text(json.dumps(content))
    return root


def test_coco_folds_and_episodes(coco):
    data = Coco20i(str(coco), fold=1, shots=2, episodes=40, num_workers=0, image_size=64)
    assert sorted(data.source.shows) == [1, 5]  # fold 1: 1, 5, 9, ... in the order of ids
    assert data.source.shows[1] == [0, 1, 2, 3] and data.source.shows[5] == [3, 4]
    dataset = data.dataset("test")
    episodes = [dataset.episode(i) for i in range(40)]
    asked = Counter(label for _, label, _ in episodes)
    assert asked.keys() == {1, 5} and min(asked.values()) > 10  # by class, not by image
    for query, label, supports in episodes:
        assert query not in supports and set(supports) <= set(data.source.shows[label])
        assert len(supports) == (2 if label == 1 else 1)
    assert episodes == [Coco20i(str(coco), fold=1, shots=2, num_workers=0).dataset("test").episode(i) for i in range(40)]
    assert len(Coco20i(str(coco), fold=1, num_workers=0).dataset("test")) == 1000
    with pytest.raises(InputError, match="no image with 2048 pixels of a class of this fold"):
        Coco20i(str(coco), fold=3)


def test_coco_masks(coco):
    data = Coco20i(str(coco), fold=1, episodes=12, num_workers=0, image_size=50)
    for item in items(data):
        label = int(item["phrase_class"])
        assert item["prompts"] == [f"thing{label}"] and item["image"].shape == (3, 50, 50)
        assert item["labels"].shape == (100, 80) and set(item["labels"].unique().tolist()) == {0, 1}
        mask = item["prompt_masks"][0]
        if label == 1:
            wanted = torch.zeros(100, 80, dtype=torch.bool)
            wanted[:40, :40] = True
            wanted[20:60, 20:60] = True
        elif item["name"].endswith("4.jpg"):
            wanted = torch.zeros(100, 80, dtype=torch.bool)
            wanted[:, :40] = True  # runs go down the columns
        else:
            wanted = torch.zeros(100, 80, dtype=torch.bool)
            wanted[10:70, 10:60] = True
        assert (mask ^ wanted).sum() <= 0.03 * wanted.sum()  # the edge of a polygon is pycocotools'
        assert item["support_valid"].all() and item["support_mask"].any()


def test_real_photographs(shared):
    root = shared("data", "coco_small")
    data = Coco20i(str(root), annotations="annotations/instances_val.json", images="images", episodes=6, num_workers=0)
    for item in items(data):
        assert item["image"].shape == (3, 352, 352) and item["prompt_masks"].sum() > 1500
        label = int(item["phrase_class"])
        assert label % 4 == 0 and bool(item["support_valid"].all()) == (len(data.source.shows[label]) > 1)
