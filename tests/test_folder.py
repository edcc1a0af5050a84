"""FolderData and what it shares with other data: layouts, splits, prompts, batches, and clear errors."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pmpseg.data import FolderData
from pmpseg.data.base import EpochSampler, UnpaddedSampler, choose_prompts, collate
from pmpseg.errors import InputError
from pmpseg.images import read_image
from pmpseg.vocabulary import Vocabulary

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools
CLASSES = "sky, heaven\nroad\ncar [unseen]\ntree\n"
LABELS = np.kron([[0, 1, 2], [3, 255, 9]], np.ones((20, 20))).astype(np.uint8)  # 9 is the ignore_label


def save(folder: Path, stem: str, labels: np.ndarray = LABELS, mode: str = "L") -> None:
    """An image whose red channel is 20 x its label, and its mask."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    image = np.stack([np.minimum(labels.astype(int) * 20, 255), *[np.full(labels.shape, 99)] * 2], -1)
    Image.fromarray(image.astype(np.uint8)).save(folder / "images" / f"{stem}.png")
    mask = Image.fromarray(labels)
    if mode == "P":
        mask = mask.convert("P")
        mask.putpalette([7] * 768)
    mask.save(folder / "masks" / f"{stem}.png")


def make_folder(folder: Path, count: int = 10) -> Path:
    for index in range(count):
        save(folder, f"{index:02}", np.roll(LABELS, index, axis=1), "P" if index % 2 else "L")
    (folder / "classes.txt").write_text(CLASSES)
    return folder


def make(folder: Path, **changes) -> FolderData:
    return FolderData(
        str(folder), **{"ignore_label": 9, "image_size": 32, "batch_size": 3, "num_workers": 0} | changes
    )


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        for key, value in one.items()
    )


def epoch_of(loader: torch.utils.data.DataLoader, epoch: int) -> list[dict]:
    loader.sampler.set_epoch(epoch)
    return list(loader)


def test_batches_follow_the_contract(tmp_path):
    data = make(make_folder(tmp_path), num_prompts=6)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (3, 3, 32, 32) and batch["image"].dtype == torch.uint8
    assert batch["labels"].shape == (3, 32, 32) and batch["labels"].dtype == torch.int64
    assert batch["prompt_class"].shape == (3, 6) and batch["prompt_class"].dtype == torch.int64
    assert [len(prompts) for prompts in batch["prompts"]] == [6, 6, 6]
    assert len(batch["name"]) == 3 and batch["index"].shape == (3,) and "prompt_masks" not in batch


def test_pairing_holds_after_augmentation(tmp_path):
    data = make(make_folder(tmp_path), colour=0.0)
    for epoch in range(3):
        for batch in epoch_of(data.train_dataloader(), epoch):
            labels, red = batch["labels"], batch["image"][:, 0].float() / 20
            inside = labels != 255
            assert inside.any() and ((red.round() != labels) & inside).sum() < 0.15 * inside.sum()


def test_unseen_classes_are_no_part_of_training(tmp_path):
    data = make(make_folder(tmp_path))
    assert data.vocabulary.unseen == [2]
    words = set()
    for batch in (batch for epoch in range(4) for batch in epoch_of(data.train_dataloader(), epoch)):
        assert set(batch["labels"].unique().tolist()) <= {0, 1, 3, 255}
        assert all(sorted(row.tolist()) == [0, 1, 3] for row in batch["prompt_class"])
        words |= {word for prompts in batch["prompts"] for word in prompts}
    assert words == {"sky", "heaven", "road", "tree"}
    for batch in data.val_dataloader():
        assert batch["prompts"] == [["sky", "road", "car", "tree"]]
        assert batch["labels"].unique().tolist() == [0, 1, 2, 3, 255]
        assert batch["labels"].shape == (1, 40, 60) and batch["image"].shape == (1, 3, 32, 48)


def test_resized_labels_and_larger_batches_in_evaluation(tmp_path):
    data = make(make_folder(tmp_path), resize_labels=True, eval_batch_size=4, val_fraction=1.0)
    batches = list(data.test_dataloader())
    assert [len(batch["name"]) for batch in batches] == [4, 4, 2]
    assert batches[0]["labels"].shape == batches[0]["image"][:, 0].shape == (4, 32, 48)
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(10))


def test_workers_change_nothing_and_epochs_everything(tmp_path):
    data = make(make_folder(tmp_path))
    alone = data.train_dataloader()
    data.num_workers = 2
    shared = data.train_dataloader()
    assert shared.persistent_workers
    first = epoch_of(alone, 0)
    for epoch in (0, 1, 0):  # the workers live on, and still hear of the epoch
        ours, theirs = epoch_of(alone, epoch), epoch_of(shared, epoch)
        assert len(ours) == 3 and all(same(one, other) for one, other in zip(ours, theirs, strict=True))
        assert same(ours[0], first[0]) == (epoch == 0)
    assert not same(epoch_of(make(tmp_path, seed=1).train_dataloader(), 0)[0], first[0])


def test_data_sets_can_be_sent_to_spawned_workers(tmp_path):
    data = make(make_folder(tmp_path))
    for split in ("train", "val"):
        dataset = data.dataset(split)
        assert same(pickle.loads(pickle.dumps(dataset))[0], dataset[0])


def test_one_image_looks_different_in_each_epoch(tmp_path):
    dataset = make(make_folder(tmp_path)).dataset("train")
    assert same(dataset[0, 0], dataset[0]) and same(dataset[5, 0], dataset[5, 0])
    assert not torch.equal(dataset[0, 0]["image"], dataset[1, 0]["image"])


def test_lightning_passes_the_epoch_on(tmp_path):
    from lightning import LightningModule, Trainer

    class Recorder(LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.seen = []

        def training_step(self, batch, _):
            self.seen.append(batch)
            return self.weight * 0

        def validation_step(self, batch, _):
            assert batch["labels"].shape == (1, 40, 60)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    data, module = make(make_folder(tmp_path)), Recorder()
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, datamodule=data)
    loader = data.train_dataloader()
    expected = [batch for epoch in range(2) for batch in epoch_of(loader, epoch)]
    assert len(module.seen) == 6 and all(map(same, module.seen, expected))


@pytest.mark.parametrize("sampler", [EpochSampler, UnpaddedSampler])
def test_ranks_share_the_images_without_repeats(monkeypatch, sampler):
    found = []
    for rank in range(3):
        monkeypatch.setattr("pmpseg.data.base._rank_and_world_size", lambda rank=rank: (rank, 3))
        made = sampler(range(10), 0) if sampler is EpochSampler else sampler(range(10))
        indices = [key[1] if isinstance(key, tuple) else key for key in made]
        assert len(indices) == len(made)
        found += indices
    assert len(set(found)) == len(found) == (9 if sampler is EpochSampler else 10)


def test_missing_splits_are_made_up_the_same_way_each_time(tmp_path):
    names = {}
    for seed in (0, 1):
        data = make(make_folder(tmp_path, 20), val_fraction=0.25, seed=seed)
        names[seed] = {
            split: [item["name"] for item in data.dataset(split)] for split in ("train", "val", "test")
        }
    assert names[0] == names[1] and names[0]["val"] == names[0]["test"]
    assert len(names[0]["val"]) == 5
    assert sorted(names[0]["train"] + names[0]["val"]) == [f"{index:02}.png" for index in range(20)]


def test_images_are_read_as_predict_reads_them(tmp_path):
    make_folder(tmp_path)
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: lies on its side
    Image.fromarray(rng.integers(0, 256, (60, 40, 3), np.uint8)).save(tmp_path / "images/00.png", exif=exif)
    Image.fromarray(np.linspace(0, 65535, 40 * 60).reshape(40, 60).astype(np.uint16)).save(
        tmp_path / "images/01.png"
    )
    Image.new("RGBA", (60, 40), (255, 0, 0, 0)).save(tmp_path / "images/02.png")
    data = make(tmp_path, image_size=40, val_fraction=1.0)
    items = {item["name"]: item["image"].permute(1, 2, 0).numpy() for item in data.dataset("val")}
    for name, image in items.items():
        assert np.array_equal(image, np.array(read_image(tmp_path / "images" / name)))
    assert items["00.png"].shape == (40, 60, 3)  # upright, as its mask is
    assert items["01.png"].mean() == pytest.approx(127.5, abs=1)  # clipped it would be nearly white
    assert (items["02.png"] == 255).all()


def test_a_mask_may_say_too_that_it_lies_on_its_side(tmp_path):
    make_folder(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("images", "masks"):
        path = tmp_path / kind / "00.png"
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    data = make(tmp_path, val_fraction=1.0)
    assert np.array_equal(data.dataset("val")[0]["labels"], np.where(LABELS == 9, 255, LABELS))


def test_split_folders(tmp_path):
    for split, count in (("training", 3), ("validation", 2)):
        flat = make_folder(tmp_path / split, count)
        for kind in ("images", "masks"):
            (tmp_path / kind).mkdir(exist_ok=True)
            (flat / kind).rename(tmp_path / kind / split)
    (tmp_path / "classes.txt").write_text(CLASSES)
    data = make(tmp_path, split_names=("training", "validation", "testing"))
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [3, 2, 2]
    (tmp_path / "images/training").rename(tmp_path / "images/spare")
    with pytest.raises(InputError, match="no images for train: it has val and test"):
        make(tmp_path, split_names=("training", "validation", "testing")).train_dataloader()


def break_missing_mask(folder):
    (folder / "masks/03.png").unlink()


def break_missing_image(folder):
    (folder / "images/04.png").unlink()


def break_size(folder):
    Image.new("L", (60, 41)).save(folder / "masks/05.png")


def break_colour(folder):
    Image.new("RGB", (60, 40)).save(folder / "masks/05.png")


def break_label(folder):
    save(folder, "00", np.full((40, 60), 7, np.uint8))


def break_image(folder):
    (folder / "images/02.png").write_text("no picture")


def break_pixels(folder):
    content = (folder / "masks/00.png").read_bytes()
    (folder / "masks/00.png").write_bytes(content[: len(content) * 2 // 3])


def break_twins(folder):
    Image.new("RGB", (60, 40)).save(folder / "images/06.jpg")


def break_classes(folder):
    (folder / "classes.txt").unlink()


def break_folder(folder):
    (folder / "masks").rename(folder / "labels")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_missing_mask, "no mask in .*masks for 03.png"),
        (break_missing_image, "no image in .*images for 04.png"),
        (break_size, "05.png is 60x41, its image 60x40"),
        (break_colour, "05.png is a RGB picture"),
        (break_label, "00.png has label 7: the labels of 4 classes are 0..3, ignored is 9 and 255"),
        (break_image, "02.png: cannot be read as an image"),
        (break_pixels, "masks/00.png: cannot be read as an image"),
        (break_twins, "06.png and 06.jpg differ by suffix only"),
        (break_classes, "classes.txt"),
        (break_folder, "has neither a folder masks/ nor a file annotations/instances_train.json"),
    ],
)
def test_what_is_wrong_is_said_with_the_name(tmp_path, damage, message):
    damage(make_folder(tmp_path))
    with pytest.raises(InputError, match=message) as caught:
        make(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_wrong_label_not_among_the_first_checked(tmp_path):
    make_folder(tmp_path, 30)
    save(tmp_path, "01", np.full((40, 60), 7, np.uint8))
    data = make(tmp_path, val_fraction=1.0)
    with pytest.raises(InputError, match=r"01\.png has label 7"):
        list(data.val_dataloader())


def test_batches_that_cannot_be(tmp_path):
    make_folder(tmp_path)
    with pytest.raises(InputError, match="9 training images make no batch of 16"):
        make(tmp_path, batch_size=16).train_dataloader()
    for index in range(10):
        save(tmp_path, f"{index:02}", LABELS[:, : 50 + index])
    data = make(tmp_path, eval_batch_size=2, val_fraction=1.0)
    with pytest.raises(InputError, match="set eval_batch_size to 1"):
        list(data.val_dataloader())
    (tmp_path / "classes.txt").write_text("\n".join(f"class {index}" for index in range(256)))
    with pytest.raises(InputError, match="256 classes"):
        make(tmp_path)


def test_prompts_of_a_training_image():
    vocabulary = Vocabulary(list("abcdef"), [["a", "A2"], *([letter] for letter in "bcdef")], [5])
    rng = np.random.default_rng(0)
    kept, orders, words = [], set(), set()
    for _ in range(60):
        prompts, classes = choose_prompts([1, 3, 5, 255], vocabulary, 4, rng)
        assert len(set(prompts)) == len(prompts) == 4 and {1, 3} <= set(classes) <= {0, 1, 2, 3, 4}
        kept += [index for index in classes if index not in (1, 3)]
        orders.add(tuple(classes))
        words |= set(prompts)
        assert all(
            prompt in vocabulary.synonyms[index] for prompt, index in zip(prompts, classes, strict=True)
        )
    assert set(kept) == {0, 2, 4} and len(orders) > 20 and words == {"a", "A2", "b", "c", "d", "e"}
    assert sorted(choose_prompts([], vocabulary, None, rng)[1]) == [0, 1, 2, 3, 4]
    prompts, classes = choose_prompts([0], vocabulary, 7, rng)
    assert (
        prompts[5:] == ["", ""]
        and classes[5:].tolist() == [-1, -1]
        and sorted(classes[:5]) == [0, 1, 2, 3, 4]
    )
    assert len(set(choose_prompts([0, 1, 2, 3], vocabulary, 2, rng)[1]) & {0, 1, 2, 3}) == 2


def test_collate_of_phrases():
    item = {
        "image": torch.zeros(3, 4, 5, dtype=torch.uint8),
        "labels": torch.zeros(4, 5, dtype=torch.int64),
        "name": "n",
        "index": 3,
        "prompts": ["red", ""],
        "prompt_class": np.array([-1, -1]),
        "prompt_masks": torch.zeros(2, 4, 5, dtype=torch.bool),
        "phrase_kind": ["attributes", ""],
    }
    batch = collate([item, item])
    assert batch["prompt_masks"].shape == (2, 2, 4, 5) and batch["phrase_kind"] == [["attributes", ""]] * 2
    assert batch["prompts"] == [["red", ""]] * 2 and batch["index"].tolist() == [3, 3]


def test_collate_pads_to_the_most_prompts():
    def item(count: int) -> dict:
        one = {"image": torch.full((3, 4, 5), count, dtype=torch.uint8), "labels": torch.zeros(4, 5)}
        one |= {"name": str(count), "index": count, "prompts": ["x"] * count, "phrase_kind": ["class"] * count}
        one |= {"prompt_class": torch.full((count,), 7), "phrase_class": torch.full((count,), 8)}
        one |= {"prompt_masks": torch.ones(count, 4, 5, dtype=torch.bool), "support_valid": torch.ones(count, 2) > 0}
        one["support_image"] = torch.full((count, 2, 3, 6, 6), 9, dtype=torch.uint8)
        return one | {"support_mask": torch.ones(count, 2, 6, 6, dtype=torch.bool)}

    batch = collate([item(1), item(3)])
    assert batch["prompts"] == [["x", "", ""], ["x"] * 3] and batch["phrase_kind"] == [["class", "", ""], ["class"] * 3]
    assert batch["prompt_class"].tolist() == [[7, -1, -1], [7] * 3] and batch["phrase_class"].tolist() == [[8, -1, -1], [8] * 3]
    for key in ("prompt_masks", "support_valid", "support_image", "support_mask"):
        assert batch[key].shape[:2] == (2, 3) and batch[key].dtype == item(1)[key].dtype
        assert batch[key][0, 0].all() and not batch[key][0, 1:].any() and batch[key][1].all()
    assert batch["image"].shape == (2, 3, 4, 5) and batch["image"][1].eq(3).all()


def make_coco(folder: Path, images: int = 4) -> dict:
    """Two squares of a "dog" (id 7), a "cat" (id 3) on the first, and "far" (id 20), which never occurs."""
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    squares = [[[0, 0, 20, 0, 20, 20, 0, 20]], [[30, 0, 40, 0, 40, 10, 30, 10]]]
    run_lengths = {"size": [30, 50], "counts": [30 * 10, *[5, 25] * 4, 5, 25 + 30 * 35]}
    annotations = []
    for image in range(1, images + 1):
        Image.new("RGB", (50, 30), (0, 9 * image, 0)).save(folder / "images" / f"{image}.jpg")
        for square in squares:
            annotations.append({"image_id": image, "category_id": 7, "segmentation": square, "iscrowd": 0})
        annotations.append({"image_id": image, "category_id": 3, "segmentation": run_lengths, "iscrowd": 1})
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": 50, "height": 30} for i in range(1, images + 1)
        ],
        "annotations": [{"id": 100 + index, **annotation} for index, annotation in enumerate(annotations)],
        "categories": [{"id": 7, "name": "dog"}, {"id": 20, "name": "far"}, {"id": 3, "name": "cat"}],
    }
    (folder / "annotations/instances_train.json").write_text(json.dumps(content))
    return content


def test_coco_classes_labels_and_masks(tmp_path):
    make_coco(tmp_path)
    data = make(tmp_path, image_size=15, val_fraction=0.5)
    assert data.vocabulary.names == ["cat", "dog", "far"]  # by category id, gaps closed
    batch = next(iter(data.val_dataloader()))
    assert batch["prompts"] == [["cat", "dog", "far"]] and batch["prompt_class"].tolist() == [[0, 1, 2]]
    assert batch["phrase_kind"] == [["class"] * 3] and batch["image"].shape == (1, 3, 15, 25)
    masks, labels = batch["prompt_masks"][0], batch["labels"][0]
    cat, dog = torch.zeros(30, 50, dtype=torch.bool), torch.zeros(30, 50, dtype=torch.bool)
    cat[:5, 10:15] = True
    dog[:20, :20] = dog[:10, 30:40] = True
    assert torch.equal(masks, torch.stack([cat, dog, torch.zeros_like(cat)]))  # the dog's mask has no hole
    assert torch.equal(labels == 0, cat) and torch.equal(labels == 1, dog & ~cat)
    assert torch.equal(labels == 255, ~(dog | cat))


def test_coco_images_that_lie_on_their_side(tmp_path):
    make_coco(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (30, 50)).save(tmp_path / "images/1.jpg", exif=exif)
    item = make(tmp_path, image_size=30, val_fraction=1.0).dataset("val")[0]
    assert item["image"].shape == (3, 30, 50) and item["labels"].shape == (30, 50)


def test_coco_training_items_agree(tmp_path):
    make_coco(tmp_path)
    (tmp_path / "classes.txt").write_text("dog, hound\nfar [unseen]\ncat\n")
    data = make(tmp_path, num_prompts=3, batch_size=2)
    names = set()
    for batch in (batch for epoch in range(6) for batch in epoch_of(data.train_dataloader(), epoch)):
        assert batch["prompt_masks"].shape == (2, 3, 32, 32)
        for labels, masks, classes, prompts in zip(
            batch["labels"], batch["prompt_masks"], batch["prompt_class"], batch["prompts"], strict=True
        ):
            assert sorted(classes.tolist()) == [-1, 0, 2]
            for mask, index, prompt in zip(masks, classes.tolist(), prompts, strict=True):
                names.add(prompt)
                assert not ((labels == index) & ~mask).any()  # a pixel's label is one of its masks
                assert (index == -1) == (prompt == "") and (index >= 0 or not mask.any())
    assert names == {"dog", "hound", "cat", ""}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"][1].update(file_name="gone.jpg"), "lists gone.jpg, which is not in"),
        (lambda c: c["images"][2].update(width=51), "3.jpg is 50x30 .*, but .*instances_train.json says 51x30"),
        (lambda c: c["annotations"][0].update(image_id=99), "image id 99"),
        (lambda c: c["annotations"][4].update(category_id=8), "annotation 104 has category 8"),
        (lambda c: c["annotations"][2]["segmentation"].update(counts=[7]), "annotation 102 has a bad mask"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3]]), "annotation 100 has a bad mask"),
        (
            lambda c: c.pop("categories"),
            "instances_train.json is no COCO instances file: 'categories' is missing",
        ),
    ],
)
def test_coco_errors_name_the_file(tmp_path, change, message):
    content = make_coco(tmp_path)
    change(content)
    (tmp_path / "annotations/instances_train.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as caught:
        make(tmp_path)
    assert ".json" in str(caught.value)


def test_coco_category_not_in_the_list_and_no_json(tmp_path):
    make_coco(tmp_path)
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    with pytest.raises(InputError, match="category 'far' is not in the class list"):
        make(tmp_path)
    (tmp_path / "annotations/instances_train.json").write_text("{")
    with pytest.raises(InputError, match=r"instances_train\.json is not a JSON file"):
        make(tmp_path)


def test_camvid(shared):
    root, classes = str(shared("data", "camvid")), str(ROOT / "conf/vocab/camvid.txt")
    data = FolderData(root, classes, ignore_label=11, image_size=180, num_workers=0)
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [367, 101, 233]
    item = data.dataset("val")[0]
    assert item["image"].shape == (3, 180, 240) and item["labels"].shape == (360, 480)
    assert set(item["labels"].unique().tolist()) <= {*range(11), 255}
    with pytest.raises(InputError, match=r"masks/train/\S+png has label 11"):
        FolderData(root, classes)


def test_coco_small_against_pycocotools(shared):
    reference = pytest.importorskip("pycocotools.coco", reason="pycocotools is the reference")
    root = shared("data", "coco_small")
    data = FolderData(str(root), str(ROOT / "conf/vocab/coco_instances.txt"), num_workers=0)
    dataset = data.dataset("val")
    assert len(data.dataset("train")) == 335 and len(dataset) == 79
    theirs = reference.COCO(str(root / "annotations/instances_val.json"))
    names = {category["id"]: category["name"] for category in theirs.loadCats(theirs.getCatIds())}
    for index in (0, 20, 40):
        item = dataset[index]
        masks = np.zeros(item["prompt_masks"].shape, bool)
        for annotation in theirs.loadAnns(theirs.getAnnIds(int(Path(item["name"]).stem))):
            masks[item["prompts"].index(names[annotation["category_id"]])] |= theirs.annToMask(annotation) > 0
        ours = item["prompt_masks"].numpy()
        assert np.array_equal(ours.any((1, 2)), masks.any((1, 2)))
        assert (ours & masks).sum() / (ours | masks).sum() > 0.98
