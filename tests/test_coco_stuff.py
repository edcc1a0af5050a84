"""CocoStuff: the same items from folders and from zips, right classes, segments, bad input, and the seed decides everything."""

import json
import pickle
import runpy
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_stuff_fixture import MAKE, make
from PIL import ExifTags, Image

from pmpseg import rle
from pmpseg.data import CocoStuff
from pmpseg.data.base import EpochSampler
from pmpseg.data.coco_captions import Captions
from pmpseg.data.coco_files import IDS, class_of_thing, class_of_value
from pmpseg.data.coco_things import InstanceThings, PanopticThings, Things, part
from pmpseg.data.image_store import ImageStore
from pmpseg.data.json_lists import visit_lists
from pmpseg.errors import InputError
from pmpseg.inference import with_synonyms

SCRIPTS = Path(__file__).parents[1] / "scripts"
SPLIT_156 = Path(__file__).parents[1] / "src" / "pmpseg" / "assets" / "vocab" / "coco_stuff_156.txt"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def zips(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("zips"), folders=False, zips=True)


@pytest.fixture
def own(folders, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(folders, tmp_path / "own"))


def data(root: Path, **options) -> CocoStuff:
    given = {"image_size": 96, "num_prompts": 24, "batch_size": 4, "num_workers": 0}
    return CocoStuff(str(root), **given | options)


def same(one: dict, other: dict) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(v, other[k]) if isinstance(v, torch.Tensor) else v == other[k] for k, v in one.items())


# ---- classes


def test_ids_are_those_of_coco(shared):
    listed = shared("data", "labels", "coco_stuff_182_ids.txt").read_text().splitlines()
    name_of = dict(line.split(": ", 1) for line in listed)
    names = shared("data", "labels", "coco_stuff_171.txt").read_text().splitlines()
    assert len(IDS) == 171 and [name_of[str(number)] for number in IDS] == names


def test_values_become_classes(shared):
    table, things = class_of_value(), class_of_thing()
    assert table[255] == 255 and (table[182:255] == 254).all()
    for number in range(1, 183):
        assert table[number - 1] == (IDS.index(number) if number in IDS else 254)
    listed = json.loads(shared("data", "samples", "coco_panoptic", "panoptic_coco_categories.json").read_text())
    theirs = [category["id"] for category in listed if category["isthing"]]
    assert [things[number] for number in theirs] == list(range(80)) and (things >= 0).sum() == 80


# ---- the same from everywhere


@pytest.mark.parametrize("segments", ["class", "things"])
def test_folders_and_zips_give_the_same_items(folders, zips, segments):
    one, other = (data(root, segments=segments, captions=True) for root in (folders, zips))
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        pair = one.dataset(split), other.dataset(split)
        assert len(pair[0]) == len(pair[1]) == count
        assert all(same(pair[0][1, index], pair[1][1, index]) for index in range(count))
    assert dict(one.captions("val")) == dict(other.captions("val"))
    assert ("segments" in one.dataset("train")[0]) == (segments == "things") and "segments" not in one.dataset("val")[0]


def test_an_evaluation_item_is_the_file(folders):
    item = data(folders).dataset("val")[2]
    values = np.array(Image.open(folders / "stuffthingmaps" / "val2017" / item["name"].replace("jpg", "png"))).astype(int)
    by_hand = [[IDS.index(value + 1) if value != 255 else 255 for value in row] for row in values.tolist()]
    assert item["labels"].tolist() == by_hand and item["prompt_class"].tolist() == list(range(171))
    assert item["labels"].unique().numel() > 2 and min(item["image"].shape[1:]) == 96


def test_scales_and_the_longest_side_in_evaluation(folders):
    held = data(folders, max_size=100)
    held.eval_scales = (1.0, 0.5)
    item = held.dataset("test")[0]
    assert max(item["image"].shape[1:]) == 100 and [max(image.shape[1:]) for image in item["scaled"]] == [100, 50]


def test_each_process_opens_a_zip_for_itself(zips):
    held = data(zips, num_workers=2)
    items = [held.dataset("val")[index] for index in range(4)]
    images = held.files["val"].images
    assert len(images._open) == 1 and not pickle.loads(pickle.dumps(images))._open
    for index, batch in enumerate(held.val_dataloader()):  # in workers forked while the handle is open
        assert batch["name"] == [items[index]["name"]] and torch.equal(batch["image"][0], items[index]["image"])
    assert len(images._open) == 1


# ---- determinism


@pytest.mark.parametrize("root", ["folders", "zips"])
def test_a_batch_is_the_same_for_any_number_of_workers(root, request):
    root = request.getfixturevalue(root)
    batches = {}
    for workers in (0, 1, 2):
        options = {"segments": "things", "colour": "ssd", "max_class_share": 0.75, "seed": 5}
        loader = data(root, num_workers=workers, **options).train_dataloader()
        loader.sampler.set_epoch(3)
        batches[workers] = list(loader)
    assert len(batches[0]) == 3
    for workers in (1, 2):
        assert all(same(one, other) for one, other in zip(batches[0], batches[workers], strict=True))


def test_two_ranks_share_an_epoch_and_each_image_is_as_on_one(folders, monkeypatch):
    dataset = data(folders).dataset("train")
    alone = {key: dataset[key] for key in EpochSampler(dataset, seed=0, epoch=2)}
    keys = []
    for rank in (0, 1):
        monkeypatch.setattr("pmpseg.data.base._rank_and_world_size", lambda rank=rank: (rank, 2))
        of_rank = data(folders).dataset("train")
        keys.append(list(EpochSampler(of_rank, seed=0, epoch=2)))
        assert all(same(of_rank[key], alone[key]) for key in keys[-1])
    assert sorted(keys[0] + keys[1]) == sorted(alone) and not set(keys[0]) & set(keys[1])


def test_epochs_and_seeds_differ(folders):
    dataset = data(folders).dataset("train")
    assert not torch.equal(dataset[0, 3]["image"], dataset[1, 3]["image"])
    assert not torch.equal(dataset[0, 3]["image"], data(folders, seed=1).dataset("train")[0, 3]["image"])


def test_crops_that_a_class_fills_are_drawn_anew(folders):
    any_crop, other = (data(folders, max_class_share=share).dataset("train")[0]["image"] for share in (1.0, 0.01))
    assert not torch.equal(any_crop, other)


# ---- unseen classes


def test_unseen_classes_are_ignored_and_never_asked_in_training(folders):
    held = data(folders, classes=str(SPLIT_156), segments="things", num_prompts=None)
    unseen = set(held.vocabulary.unseen)
    words = {word for index in unseen for word in held.vocabulary.synonyms[index]}
    dataset, every = held.dataset("train"), data(folders).dataset("train")
    met = 0
    for index in range(len(dataset)):
        item, labels = dataset[0, index], every[0, index]["labels"]
        held_out = torch.isin(labels, torch.tensor(sorted(unseen)))
        met += int(held_out.sum())
        assert torch.equal(item["labels"], torch.where(held_out, 255, labels))
        assert (item["segments"][held_out] == -1).all() and len(item["prompts"]) == 156
        assert not unseen & set(item["prompt_class"].tolist()) and not words & set(item["prompts"])
        assert (item["segment_prompt"] >= 0).all()
    assert met > 1000
    evaluated = [set(held.dataset("val")[index]["labels"].unique().tolist()) for index in range(4)]
    assert unseen & set.union(*evaluated)


# ---- synonyms


def test_classes_may_go_by_their_names_only(folders):
    """In training and in validation; which classes, and which are unseen, stays as it is."""
    every, named = (data(folders, classes=str(SPLIT_156), num_prompts=None, synonyms=kept) for kept in (True, False))
    names = every.vocabulary.names
    assert named.vocabulary.names == names and named.vocabulary.unseen == every.vocabulary.unseen
    assert with_synonyms(names, named.vocabulary) == [[name] for name in names]  # what the evaluator asks
    asked = {}
    for held in (every, named):
        items = [held.dataset("train")[0, index] for index in range(4)]
        asked[held] = [(item["prompt_class"].tolist(), item["prompts"]) for item in items]
    assert [classes for classes, _ in asked[every]] == [classes for classes, _ in asked[named]]
    assert all(prompts == [names[index] for index in classes] for classes, prompts in asked[named])
    assert any(prompts != [names[index] for index in classes] for classes, prompts in asked[every])
    assert named.dataset("val")[0]["prompts"] == names


# ---- segments


def segments_by_hand(labels: np.ndarray, panoptic: np.ndarray, entry: dict, things: dict) -> list[tuple[int, frozenset]]:
    """(class, pixels) of each segment, pixel by pixel in sets."""
    pixels: dict[tuple, set] = {}
    of_id = {segment["id"]: segment for segment in entry["segments_info"] if segment["category_id"] in things}
    parted = {things[segment["category_id"]] for segment in of_id.values() if not segment["iscrowd"]}
    for place in np.ndindex(labels.shape):
        label, number = int(labels[place]), sum(int(v) << 8 * k for k, v in enumerate(panoptic[place]))
        segment = of_id.get(number)
        if label == 255:
            continue
        if segment and things[segment["category_id"]] == label:
            key = ("class", label) if segment["iscrowd"] else ("thing", number)
        elif label in parted:
            continue
        else:
            key = ("class", label)
        pixels.setdefault((label, *key), set()).add(place)
    return [(key[0], frozenset(found)) for key, found in pixels.items()]


def test_segments_are_those_of_an_independent_decoding(folders):
    held = data(folders, segments="things")
    content = json.loads((folders / "annotations" / "panoptic_train2017.json").read_text())
    entries = {entry["file_name"]: entry for entry in content["annotations"]}
    things = {number: IDS.index(number) for number in IDS if number < 92}
    crowds = 0
    for index in range(12):
        stem, labels = held.files["train"].stem(index), held.files["train"].labels(index)
        segments, classes = part(labels, held.things.read(stem, labels.shape))
        entry = entries[f"{stem}.png"]
        crowds += sum(segment["iscrowd"] for segment in entry["segments_info"])
        picture = np.array(Image.open(folders / "annotations" / "panoptic_train2017" / f"{stem}.png"))
        got = {(int(label), frozenset(zip(*np.nonzero(segments == k), strict=True))) for k, label in enumerate(classes)}
        assert got == set(segments_by_hand(labels, picture, entry, things)) and len(got) == len(classes)
    assert crowds


def test_things_of_the_two_jsons_agree(folders, zips):
    held = data(folders, segments="things")
    instances = InstanceThings((folders / "annotations" / "instances_train2017.json").read_bytes(), "instances", class_of_thing())
    overlaps = []
    for index in range(12):
        labels = held.files["train"].labels(index)
        (one, classes), (other, also) = (
            part(labels, source.read(held.files["train"].stem(index), labels.shape)) for source in (held.things, instances)
        )
        for k, label in enumerate(classes):
            ious = [np.sum((one == k) & (other == j)) / np.sum((one == k) | (other == j)) for j in np.flatnonzero(also == label)]
            overlaps.append(max(ious, default=0))
    assert np.mean(np.array(overlaps) > 0.85) > 0.9 and len(overlaps) > 40


def test_instances_do_where_there_is_no_panoptic_json(own):
    for path in (own / "annotations").glob("panoptic*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    item = data(own, segments="things").dataset("train")[0]
    assert isinstance(data(own, segments="things").things, InstanceThings) and int(item["segments"].max()) >= 2


def test_segments_of_an_item_belong_to_its_labels_and_prompts(folders):
    dataset = data(folders, segments="things", num_prompts=3).dataset("train")
    asked, not_asked = 0, 0
    for index in range(12):
        item = dataset[4, index]
        numbers = item["segments"].unique().tolist()
        assert [n for n in numbers if n >= 0] == list(range(len(item["segment_prompt"])))
        for number, place in enumerate(item["segment_prompt"].tolist()):
            labels = item["labels"][item["segments"] == number].unique().tolist()
            assert len(labels) == 1 and labels[0] != 255
            if place >= 0:
                assert item["prompt_class"][place] == labels[0] and item["prompts"][place]
                asked += 1
            else:
                assert labels[0] not in item["prompt_class"].tolist()
                not_asked += 1
    assert asked and not_asked


def test_part_by_hand():
    labels = np.array([[0, 0, 0, 0, 90], [0, 7, 7, 255, 90]], dtype=np.uint8)
    numbers = np.array([[0, 1, 1, -1, 0], [0, 2, -1, 1, -1]], dtype=np.int32)
    things = Things(numbers, np.array([0, 0, 7]), np.array([False, False, True]))
    segments, classes = part(labels, things)
    # the sliver of class 0 in no thing is nothing; the crowd is one with what else is of its class; stuff stays whole
    assert segments.tolist() == [[0, 1, 1, -1, 3], [0, 2, 2, -1, 3]] and classes.tolist() == [0, 0, 7, 90]
    segments, classes = part(np.full((2, 2), 255, np.uint8), Things(np.full((2, 2), -1), np.zeros(0, int), np.zeros(0, bool)))
    assert (segments == -1).all() and len(classes) == 0


def test_real_panoptic_samples(shared):
    root = shared("data", "samples", "coco_panoptic")
    maps = ImageStore([root / "panoptic_examples"], suffixes=(".png",))
    content = (root / "panoptic_examples.json").read_bytes()
    source = PanopticThings(content, "panoptic_examples.json", maps, class_of_thing())
    source.check([name.removesuffix(".png") for name in maps.sorted_names])
    kinds = {category["id"]: category for category in json.loads(content)["categories"]}
    for entry in json.loads(content)["annotations"]:
        picture = np.array(Image.open(root / "panoptic_examples" / entry["file_name"])).astype(np.uint32)
        things = source.read(entry["file_name"].removesuffix(".png"), picture.shape[:2], strict=True)
        wanted = [segment for segment in entry["segments_info"] if kinds[segment["category_id"]]["isthing"]]
        assert len(wanted) == len(things.classes) > 2
        areas = {(IDS.index(segment["category_id"]), segment["area"], bool(segment["iscrowd"])) for segment in wanted}
        pixels = np.bincount(things.numbers.ravel() + 1)[1:].tolist()
        ours = zip(things.classes.tolist(), pixels, things.crowd.tolist(), strict=True)
        assert set(ours) == areas  # areas as COCO counted them


def test_real_instances(shared):
    pytest.importorskip("pycocotools")
    from pycocotools import mask as theirs

    path = shared("data", "coco_small", "annotations", "instances_val.json")
    content = json.loads(path.read_bytes())
    source = InstanceThings(path.read_bytes(), path.name, class_of_thing())
    size = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    of_image: dict[int, list] = {key: [] for key in size}
    for annotation in content["annotations"]:
        of_image[annotation["image_id"]].append(annotation)
    checked = 0
    for image in content["images"][:25]:
        things = source.read(image["file_name"].removesuffix(".jpg"), size[image["id"]])
        listed = of_image[image["id"]]
        assert things.classes.tolist() == [IDS.index(a["category_id"]) for a in listed]
        assert things.crowd.tolist() == [bool(a["iscrowd"]) for a in listed]
        painted = np.zeros(size[image["id"]], bool)
        for annotation in listed:
            shape = annotation["segmentation"]
            as_rle = theirs.frPyObjects(shape, *size[image["id"]])
            painted |= theirs.decode(theirs.merge(as_rle) if isinstance(shape, list) else as_rle).astype(bool)
        either = ((things.numbers >= 0) | painted).sum()
        checked += bool(either)
        assert not either or ((things.numbers >= 0) & painted).sum() > 0.97 * either
    assert checked > 20


SIX = {"id": 5, "file_name": "5.jpg", "height": 4, "width": 6}
GOOD = {"id": 1, "image_id": 5, "category_id": 3, "iscrowd": 0, "segmentation": [[0, 0, 6, 0, 6, 3, 0, 3]]}


def instances(*annotations, images=(SIX,)):
    return InstanceThings(json.dumps({"images": images, "annotations": annotations}).encode(), "x.json", class_of_thing())


def test_an_image_of_another_size_than_the_json_says():
    with pytest.raises(InputError, match=r"image 5 in x\.json is 6x4"):
        instances(GOOD).read("5", (6, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": -1}, r"^x\.json: annotation 1 has category -1, none of COCO-Stuff's things"),
        ({"category_id": 3.5}, r"^x\.json: annotation 1 has category 3\.5, none of COCO-Stuff's things"),
        ({"iscrowd": 300}, r"^x\.json is not as COCO's files are: a number in it is too large"),
        ({"segmentation": None}, r"^x\.json"),
        ({"segmentation": []}, r"^x\.json: annotation 1 has no polygon of three points or more"),
        ({"segmentation": [[]]}, r"^x\.json: annotation 1 has no polygon of three points or more"),
        ({"segmentation": {"size": [6, 4], "counts": [0, 24]}}, r"^x\.json: annotation 1 is 4x6, its image 6x4"),
        ({"segmentation": {"size": [4, 6], "counts": [10**11]}}, r"^x\.json is not as COCO's files are: a number in it is too"),
    ],
)
def test_a_damaged_annotation(change, message):
    assert instances(GOOD).read("5", (4, 6)).classes.tolist() == [2]
    with pytest.raises(InputError, match=message) as raised:
        instances(GOOD | change)
    assert str(raised.value).count("x.json") == 1


def test_no_things_at_all():
    with pytest.raises(InputError, match=r"^x\.json lists no things$"):
        instances()


@pytest.mark.parametrize(
    ("change", "things", "message"),
    [
        ({"id": 2**40}, {3}, r"^p\.json is not as COCO's files are: a number in it is too large"),
        ({"category_id": 100000}, {3}, r"^p\.json is not as COCO's files are: a number in it is too large"),
        ({"category_id": -1}, {3}, r"^p\.json: a segment has category -1, which is not in its list of categories"),
        ({}, {-3, 3}, r"^p\.json: category -3 is a thing, but none of COCO-Stuff's classes"),
        ({}, set(), r"^p\.json lists no category with isthing"),
    ],
)
def test_a_damaged_panoptic_json(folders, change, things, message):
    maps = ImageStore([folders / "annotations" / "panoptic_train2017"], suffixes=(".png",))
    segment = {"id": 9, "category_id": 3, "iscrowd": 0}

    def read(segment: dict, things: set[int]) -> None:
        kinds = [{"id": number, "isthing": int(number in things)} for number in {3, *things}]
        content = {"annotations": [{"file_name": "5.png", "segments_info": [segment]}], "categories": kinds}
        PanopticThings(json.dumps(content).encode(), "p.json", maps, class_of_thing())

    read(segment, {3})
    with pytest.raises(InputError, match=message):
        read(segment | change, things)


def test_an_image_that_is_listed_twice():
    with pytest.raises(InputError, match=r"x\.json lists image 5 twice"):
        instances(GOOD, images=(SIX, SIX | {"id": 6}))


def test_things_of_another_image_are_noticed(tmp_path):
    """Annotations that are moved to the next image do not lie where the labels have their classes."""
    root = make(tmp_path / "coco", 8, 2)
    shutil.rmtree(root / "annotations" / "panoptic_train2017")
    (root / "annotations" / "panoptic_train2017.json").unlink()
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    CocoStuff(str(root), segments="things")
    following: dict[int, int] = {}  # the next image of the same size
    for size in {(entry["height"], entry["width"]) for entry in content["images"]}:
        ids = [entry["id"] for entry in content["images"] if (entry["height"], entry["width"]) == size]
        following |= zip(ids, ids[1:] + ids[:1], strict=True)
    assert sum(key != value for key, value in following.items()) >= 6
    for entry in content["annotations"]:
        entry["image_id"] = following[entry["image_id"]]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="its things do not lie where the label maps have their classes"):
        CocoStuff(str(root), segments="things")


def test_what_lies_between_things_is_ignored(tmp_path):
    """A pixel with a thing's label that is in no thing is no example of what the thing is not."""
    root = make(tmp_path / "coco", 6, 2)
    data = CocoStuff(str(root), segments="things", image_size=64, num_workers=0)
    for index in range(6):
        item = data.dataset("train")[0, index]
        assert (item["labels"][item["segments"] < 0] == 255).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale": (2.0, 0.5)}, "scale: got .2.0, 0.5., want .least, most., above 0"),
        ({"scale": (0, 0)}, "scale: got"),
        ({"crop_size": (0, 64)}, "crop_size: got .0, 64., want"),
        ({"flip": 3}, "flip: got 3, want a probability"),
        ({"colour": -1}, "colour: got -1, want ssd or a number from 0 to 1"),
        ({"expect": (60,)}, "expect: got .60,., want the numbers of training and validation images"),
    ],
)
def test_settings_that_make_no_sense(wrong, message, tmp_path):
    with pytest.raises(InputError, match=message):
        CocoStuff(str(tmp_path), **wrong)


def test_a_crowd_lies_below_all_others():
    whole = np.ones((4, 6), bool)
    counts = rle.run_lengths(rle.encode(whole)).tolist()
    crowd = {"id": 1, "image_id": 5, "category_id": 1, "iscrowd": 1, "segmentation": {"size": [4, 6], "counts": counts}}
    one = {"id": 2, "image_id": 5, "category_id": 3, "iscrowd": 0, "segmentation": [[0, 0, 6, 0, 6, 3, 0, 3]]}
    small = one | {"id": 3, "segmentation": [[0, 0, 2, 0, 2, 2, 0, 2]]}
    content = {"images": [SIX], "annotations": [small, crowd, one]}
    things = InstanceThings(json.dumps(content).encode(), "x", class_of_thing()).read("5", (4, 6))
    assert things.numbers.tolist() == [[0, 0, 2, 2, 2, 2]] * 2 + [[2] * 6] + [[1] * 6]
    assert things.classes.tolist() == [2, 0, 2] and things.crowd.tolist() == [False, True, False]


# ---- captions


def test_captions(folders, shared):
    content = json.loads((folders / "annotations" / "captions_train2017.json").read_text())
    held = data(folders, captions=True)
    captions = held.captions("train")
    names = {image["id"]: image["file_name"] for image in content["images"]}
    for name in names.values():
        wanted = [a["caption"] for a in content["annotations"] if names[a["image_id"]] == name]
        assert captions[name] == wanted and len(wanted) == 5
    assert len(captions) == 12 and set(captions) == set(names.values()) and "none.jpg" not in captions
    batch = next(iter(held.train_dataloader()))
    assert batch["captions"] == [captions[name] for name in batch["name"]]
    assert "captions" not in next(iter(data(folders).train_dataloader()))
    path = shared("data", "coco_small", "annotations", "captions_val.json")
    real = Captions(path.read_bytes(), path.name)
    assert len(real) == 79 and all(len(listed) >= 5 for listed in real.values())


# ---- bad input


def first(folder: Path) -> Path:
    return sorted(folder.iterdir())[0]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def wrong_value(root: Path) -> None:
    path = first(root / "stuffthingmaps" / "train2017")
    labels = np.array(Image.open(path))
    labels[3, 4] = 11  # street sign: never annotated
    Image.fromarray(labels).save(path)


def wrong_size(root: Path) -> None:
    path = first(root / "stuffthingmaps" / "train2017")
    Image.open(path).resize((50, 40), Image.Resampling.NEAREST).save(path)


def colours(root: Path) -> None:
    path = first(root / "stuffthingmaps" / "train2017")
    Image.open(path).convert("RGB").save(path)


def panoptic_json(root: Path) -> Path:
    return root / "annotations" / "panoptic_train2017.json"


def small_panoptic(root: Path) -> None:
    path = first(root / "annotations" / "panoptic_train2017")
    Image.open(path).resize((50, 40), Image.Resampling.NEAREST).save(path)


def same_stem(root: Path) -> None:
    path = first(root / "train2017")
    shutil.copyfile(path, path.with_suffix(".jpeg"))


def other_panoptic(root: Path) -> None:
    path = first(root / "annotations" / "panoptic_train2017")
    Image.new("RGB", Image.open(path).size).save(path)


THINGS = {"segments": "things"}
BAD = [
    (lambda root: first(root / "stuffthingmaps/train2017").unlink(), {}, r"label map in \S+train2017 for 0\S+jpg \(12 im"),
    (lambda root: first(root / "val2017").unlink(), {}, r"no image in \S+val2017 for 0000\S+png \(3 images, 4 label maps\)"),
    (lambda root: shutil.rmtree(root / "stuffthingmaps"), {}, "no label maps of train2017: want one of stuffthingmaps/"),
    (lambda root: [shutil.rmtree(root / f"{s}2017") for s in ("train", "val")], {}, "has no images: want train2017 or val2017"),
    (lambda root: None, {"expect": (118287, 5000)}, r"train2017 has 12 images of train2017, want 118287"),
    (lambda root: None, {"classes": "conf/vocab/camvid.txt"}, "camvid.txt: got 11 classes, want COCO-Stuff's 171"),
    (wrong_value, {}, r"stuffthingmaps/train2017/0000\S+png has value 11: COCO-Stuff's values are"),
    (wrong_size, {}, r"stuffthingmaps/train2017/0000\S+png is 50x40, its image \d+x\d+"),
    (colours, {}, r"stuffthingmaps/train2017/0000\S+png is a RGB picture: a label map has one channel"),
    (lambda root: truncate(first(root / "stuffthingmaps/train2017")), {}, r"0000\S+png: cannot be read as an image"),
    (lambda root: first(root / "train2017").write_text("x"), {}, r"train2017/0000\S+jpg: cannot be read as an image"),
    (lambda root: truncate(panoptic_json(root)), THINGS, "train2017.json is not a whole"),
    (lambda root: panoptic_json(root).write_text("[]"), THINGS, "is not a whole JSON"),
    (lambda root: panoptic_json(root).write_text("{}"), THINGS, "has no list 'annotations'"),
    (lambda root: shutil.rmtree(root / "annotations/panoptic_train2017"), THINGS, "train2017.json, but not its PNGs"),
    (lambda root: shutil.rmtree(root / "annotations"), THINGS, "has no panoptic_train2017.json or inst"),
    (lambda root: first(root / "annotations/panoptic_train2017").unlink(), THINGS, r"has no 0000\S+png, which"),
    (same_stem, {}, "two images of train2017 differ by suffix only: remove one"),
    (small_panoptic, THINGS, r"panoptic_train2017/0000\S+png is 50x40, its image \d+x\d+"),
    (other_panoptic, THINGS, r"panoptic_train2017/0000\S+png shows no segment \d+, which"),
    (lambda root: shutil.rmtree(root / "annotations"), {"captions": True}, "has no captions_train2017.json, in annotations/ or"),
    (lambda root: None, {"colour": "dark"}, "colour: got 'dark', want ssd or a number"),
    (lambda root: None, {"max_class_share": 0.0}, "max_class_share: got 0.0"),
    (lambda root: None, {"sizes": []}, r"sizes: got \[\]"),
    (lambda root: None, {"segments": "all"}, "segments: got 'all', want class or things"),
]


@pytest.mark.parametrize(("damage", "options", "message"), BAD)
def test_what_is_wrong_is_one_line_with_the_files_name(own, damage, options, message, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    damage(own)
    with pytest.raises(InputError, match=message) as caught:
        data(own, **options)
    assert "\n" not in str(caught.value)


def test_what_is_not_checked_at_start_is_said_when_its_turn_comes(own):
    held = data(own)
    path = sorted((own / "stuffthingmaps" / "train2017").iterdir())[5]
    Image.fromarray(np.full(np.array(Image.open(path)).shape, 200, np.uint8)).save(path)
    with pytest.raises(InputError, match=rf"{path.name} has value 200"):
        held.dataset("train")[5]
    Image.fromarray(np.zeros((40, 50), np.uint8)).save(path)
    with pytest.raises(InputError, match=rf"{path.name} is 50x40, its image \d+x\d+"):
        held.dataset("train")[5]


def test_without_a_split_its_data_set_is_refused(own):
    shutil.rmtree(own / "train2017")
    held = data(own, segments="things")
    assert len(held.dataset("test")) == 4
    with pytest.raises(InputError, match="has no images for train: want train2017"):
        held.dataset("train")
    with pytest.raises(InputError, match="split: got 'train2017', want train, val, test"):
        held.dataset("train2017")


def test_zips_that_are_broken(zips, tmp_path):
    root = Path(shutil.copytree(zips, tmp_path / "own"))
    content = (root / "train2017.zip").read_bytes()
    (root / "train2017.zip").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"train2017.zip: cannot be read as images \(no zip file, or only a part of one\)"):
        data(root)
    broken = bytearray(content)
    broken[2000] ^= 255  # in the first image
    (root / "train2017.zip").write_bytes(broken)
    with pytest.raises(InputError, match=r"train2017/0\S+jpg in it cannot be read as an image \(its check sum is wrong"):
        data(root).dataset("train")[0]
    (root / "train2017.zip").write_bytes(content)
    outer = root / "panoptic_annotations_trainval2017.zip"
    with zipfile.ZipFile(outer) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(outer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, held in members.items():
            file.writestr(name, held)
    with pytest.raises(InputError, match=r"panoptic_train2017.zip is compressed once more, .*: unpack the outer"):
        data(root, segments="things")
    with zipfile.ZipFile(outer) as file:
        file.extractall(root)  # as it says: the inner zips may stay zips
    assert "segments" in data(root, segments="things").dataset("train")[0]


# ---- its parts


def test_a_store_takes_what_lies_under_a_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "maps.zip", "w") as file:
        for split, value in (("train", 1), ("val", 2)):
            file.writestr(f"top/{split}/7.png", bytes([value]))
            file.writestr(f"__MACOSX/{split}/._7.png", b"")
    for split, value in (("train", 1), ("val", 2)):
        store = ImageStore([tmp_path / "maps.zip"], under=split)
        assert store.sorted_names == ["7.png"] and store.read_bytes("7.png") == bytes([value])


def test_a_store_turns_photographs_upright(tmp_path):
    """JPEGs without EXIF are read in a shorter way."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "lies.jpg", exif=exif)
    Image.new("RGB", (30, 20)).save(tmp_path / "stands.jpg")
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as file:
        for name in ("lies.jpg", "stands.jpg"):
            file.write(tmp_path / name, name)
    for place in (tmp_path, tmp_path / "some.zip"):
        store = ImageStore([place])
        assert store.read("lies.jpg").shape == (30, 20, 3) and store.read("stands.jpg").shape == (20, 30, 3)


def test_a_set_that_was_stopped_is_not_taken_for_a_whole_one(tmp_path, monkeypatch):
    def stopped(split: str, index: int, side: int):
        if split == "val":
            raise KeyboardInterrupt
        return MAKE["draw"](split, index, side)

    monkeypatch.setitem(MAKE["make"].__globals__, "draw", stopped)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, 1, 1, zips=True)
    with pytest.raises(InputError, match="has no images: want train2017"):
        data(tmp_path)
    monkeypatch.undo()
    make(tmp_path, 1, 1, zips=True)
    assert len(data(tmp_path).dataset("val")) == 1 and not (tmp_path / ".part").exists()


def test_lists_are_visited_item_by_item():
    seen: list[dict] = []
    text = '{ "a" : [1, {"b": []}] , "images": [ {"id": 1},\n {"id": 2, "x": "}]"} ], "c": {"images": [{"id": 3}]}, "empty":[]}'
    visit_lists(text.encode(), {"images": seen.append, "empty": seen.append}, "file")
    assert seen == [{"id": 1}, {"id": 2, "x": "}]"}]
    for wrong in (text[:-1], text[:40], "", "{", '{"images" [1]}'):
        with pytest.raises(InputError, match="file is not a whole JSON file"):
            visit_lists(wrong.encode(), {"images": seen.append}, "file")
    with pytest.raises(InputError, match="'id' is missing in it"):
        visit_lists(b'{"images": [{}]}', {"images": lambda item: item["id"]}, "file")


def test_the_generated_set_has_many_classes_and_is_the_same_each_time():
    ids = {number for number, _ in MAKE["THING_IDS"].values()} | {number for number, *_ in MAKE["STUFF_IDS"].values()}
    assert len(ids) == 55 and ids <= set(IDS)
    shown: set[int] = set()
    for index in range(16):
        one = MAKE["draw"]("train", index, 480)
        shown |= {segment["category_id"] for segment in one.segments}
    assert len(shown) >= 30
    again = MAKE["draw"]("train", 15, 480)
    assert again == one


def config(root: Path, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    options = "segments: things, captions: true, image_size: 96, num_prompts: 30, batch_size: 4"
    path.write_text(f"data:\n  class_path: pmpseg.data.CocoStuff\n  init_args: {{root: {root}, {options}}}\n")
    return path


def test_show_batch_draws_what_training_sees(folders, tmp_path):
    script = runpy.run_path(str(SCRIPTS / "show_batch.py"))
    options = ["--images", "2", "--side", "96", "--out", str(tmp_path / "grid.png")]
    script["main"](["-c", str(config(folders, tmp_path)), *options, "--data.colour=0", "--data.flip", "0"])
    drawn = np.array(Image.open(tmp_path / "grid.png"))
    image = data(folders, colour=0, flip=0).dataset("train")[0]["image"].permute(1, 2, 0).numpy()
    windows = np.lib.stride_tricks.sliding_window_view(drawn, (96, 96, 3))[::, ::, 0]
    corners = np.argwhere((windows[..., 0, 0, :] == image[0, 0]).all(-1) & (windows[..., -1, -1, :] == image[-1, -1]).all(-1))
    assert any(np.array_equal(windows[y, x], image) for y, x in corners)
    with pytest.raises(InputError, match=r"unexpected argument '--model.lr': want --data.NAME VALUE"):
        script["main"](["-c", str(config(folders, tmp_path)), "--model.lr", "1"])


def test_bench_loading_compares_folders_and_zips(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    root = make(tmp_path / "both", 8, 1, folders=True, zips=True)
    options = ["-c", str(config(root, tmp_path)), "--images", "8", "--workers", "1", "--turns", "1"]
    runpy.run_path(str(SCRIPTS / "bench_loading.py"))["main"](options)
    said = capsys.readouterr().out
    for words in ("folders: ", "zips: ", "read and decode", "things", "augment", "collate", "loader with no", "loader with 1"):
        assert words in said
    assert said.count("1.00x") >= 2 and said.count("%") == 10
