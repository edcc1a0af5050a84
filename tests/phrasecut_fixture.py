"""A small PhraseCut in its official layout, from generated scenes or from COCO: for tests and for whole training runs.

Its polygons are exact: they follow pixel edges, so that a reader must give back the very mask they were made from.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pmpseg.data import CocoPhrases, PhraseCut
from pmpseg.data.scene_drawing import STUFF, Scene, draw_scene
from pmpseg.data.scene_phrases import Phrase, present_phrase

KINDS = ("thing", "thing", "attributes", "attributes", "relation", "stuff")


def write_phrasecut(folder: Path, scenes: int = 12, size: int = 128, seed: int = 0) -> Path:
    """``scenes`` training images, a third of that (two at least) each for val, test and miniv; returns the folder.

    Image ids count from 1; ``scene_of`` and ``phrases_of`` of an id give again what was written.
    """
    few = max(2, scenes // 3)
    splits = ["train"] * scenes + ["val"] * few + ["test"] * few + ["miniv"] * few
    images: list[dict] = []
    tasks: dict[str, list[dict]] = {split: [] for split in splits}
    (folder / "images").mkdir(parents=True)
    for identity, split in enumerate(splits, start=1):
        scene = scene_of(identity, size, seed)
        save(folder, scene.image, identity, split, images)
        for number, phrase in enumerate(phrases_of(scene, identity)):
            tasks[split].append(task_of(identity, number, phrase.text, structure_of(phrase), instances_of(phrase, scene)))
    return write_lists(folder, images, tasks)


def write_phrasecut_of_coco(folder: Path, coco: Path, count: int = 20) -> Path:
    """The first images of ``coco``, a folder in COCO's layout, with a phrase for each class; half train, half val."""
    content = json.loads((coco / "annotations/instances_train.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    images: list[dict] = []
    tasks: dict[str, list[dict]] = {"train": [], "val": []}
    (folder / "images").mkdir(parents=True)
    for number, entry in enumerate(content["images"][:count]):
        split = ("train", "val")[number % 2]
        with Image.open(coco / "images" / entry["file_name"]) as image:
            save(folder, np.array(image.convert("RGB")), entry["id"], split, images)
        of_class: dict[str, list] = {}
        for annotation in content["annotations"]:
            if annotation["image_id"] == entry["id"] and isinstance(annotation["segmentation"], list):
                polygons = [np.reshape(flat, (-1, 2)).tolist() for flat in annotation["segmentation"]]
                of_class.setdefault(names[annotation["category_id"]], []).append(polygons)
        for k, (name, polygons) in enumerate(of_class.items()):
            structure = {"name": name, "attributes": [], "relation_ids": [], "relation_descriptions": [], "type": "name"}
            tasks[split].append(task_of(entry["id"], k, name, structure, polygons))
    return write_lists(folder, images, tasks)


def scene_of(identity: int, size: int = 128, seed: int = 0) -> Scene:
    return draw_scene(seed + 7, identity, size=size)


def phrases_of(scene: Scene, identity: int) -> list[Phrase]:
    """A few different phrases that the scene has, of PhraseCut's three forms."""
    rng = np.random.default_rng([identity, 5])
    found = [present_phrase(scene, kind, rng) for kind in KINDS]
    return list({phrase.text: phrase for phrase in found if phrase is not None}.values())


def instances_of(phrase: Phrase, scene: Scene) -> list[list[list[list[int]]]]:
    """Polygons[instance][polygon]: each thing of the phrase is an instance; stuff is one."""
    if phrase.kind == "stuff":
        return [polygons_of((scene.stuff == STUFF.index(phrase.stuff)) & (scene.owner == 0))]
    return [polygons_of(scene.owner == thing + 1) for thing in phrase.things(scene) or ()]


def structure_of(phrase: Phrase) -> dict:
    target = phrase.target
    attributes = [word for word in (target.size, target.pattern, target.colour) if word]
    where = [[phrase.relation or "on", phrase.reference.text if phrase.reference else phrase.stuff]]
    relations = where if phrase.kind == "relation" else []
    kind = "relation" if relations else "attribute" if attributes else "name"
    ids = list(range(len(relations)))
    name = phrase.stuff if phrase.kind == "stuff" else str(target.shape)
    return {"name": name, "attributes": attributes, "relation_ids": ids, "relation_descriptions": relations, "type": kind}


def task_of(identity: int, number: int, phrase: str, structure: dict, instances: list) -> dict:
    corners = [np.concatenate([np.asarray(polygon, float) for polygon in polygons]) for polygons in instances]
    boxes = [[*low.min(0).tolist(), *np.ptp(low, axis=0).tolist()] for low in corners]
    return {
        "task_id": f"{identity}__{1000 * identity + number}",
        "image_id": identity,
        "ann_ids": [1000 * identity + number],
        "instance_boxes": boxes,
        "Polygons": instances,
        "phrase": phrase,
        "phrase_structure": structure,
    }


def save(folder: Path, image: np.ndarray, identity: int, split: str, images: list[dict]) -> None:
    Image.fromarray(image).save(folder / "images" / f"{identity}.jpg", quality=92)
    url = f"https://example.org/VG_100K/{identity}.jpg"
    size = {"width": image.shape[1], "height": image.shape[0]}
    images.append({"image_id": identity, "coco_id": None, "flickr_id": None, "url": url, "split": split, **size})


def write_lists(folder: Path, images: list[dict], tasks: dict[str, list[dict]]) -> Path:
    (folder / "image_data_split.json").write_text(json.dumps(images))
    for split, some in tasks.items():
        (folder / f"refer_{split}.json").write_text(json.dumps(some))
    return folder


def polygons_of(mask: np.ndarray) -> list[list[list[int]]]:
    """Polygons [[x, y], ...] along pixel edges whose union is exactly ``mask`` (H, W) bool; none of them has a hole.

    The runs of each row are chained downwards for as long as one run touches one run: each chain is a polygon.
    """
    chains: list[list[tuple[int, int, int]]] = []  # (row, left, right)
    open_chains: list[list[tuple[int, int, int]]] = []
    for row in range(mask.shape[0]):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], mask[row], [False]]).astype(np.int8)))
        runs = [(row, int(left), int(right)) for left, right in zip(edges[::2], edges[1::2], strict=True)]
        above = {id(chain): touching(chain[-1], runs) for chain in open_chains}
        following = []
        for run in runs:
            chains_above = [chain for chain in open_chains if run in above[id(chain)]]
            if len(chains_above) == 1 and len(above[id(chains_above[0])]) == 1:
                chains_above[0].append(run)
                following.append(chains_above[0])
            else:
                chains.append([run])
                following.append(chains[-1])
        open_chains = following
    return [outline(chain) for chain in chains]


def touching(run: tuple[int, int, int], others: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    return [other for other in others if other[1] < run[2] and run[1] < other[2]]


def outline(chain: list[tuple[int, int, int]]) -> list[list[int]]:
    down = [[left, y] for row, left, _ in chain for y in (row, row + 1)]
    up = [[right, y] for row, _, right in reversed(chain) for y in (row + 1, row)]
    return down + up


# ---- what tests of phrases share


def write_squares(folder: Path) -> Path:
    """Images of 100 x 60 pixels. 1 has a "red car" and a "dog"; 2 a "car"; 3 a "dog" and a "cat"."""
    told = {1: {"red car": (0, 10), "dog": (80, 100)}, 2: {"car": (40, 60)}, 3: {"dog": (0, 30), "cat": (90, 91)}}
    images, tasks = [], []
    (folder / "images").mkdir(parents=True)
    for identity, phrases in told.items():
        rng = np.random.default_rng(identity)
        Image.fromarray(rng.integers(0, 256, (60, 100, 3), np.uint8)).save(folder / f"images/{identity}.jpg", quality=95)
        images.append({"image_id": identity, "width": 100, "height": 60, "split": "train", "url": ""})
        for number, (phrase, (left, right)) in enumerate(phrases.items()):
            *attributes, name = phrase.split()
            structure = {"name": name, "attributes": attributes, "relation_ids": [], "relation_descriptions": []}
            box = [[left, 0], [right, 0], [right, 30], [left, 30]]
            tasks.append(task_of(identity, number, phrase, structure | {"type": "name"}, [[box]]))
    return write_lists(folder, images, {"train": tasks, "val": tasks, "test": tasks})


def make(root: Path, **changes) -> PhraseCut:
    plain = {"image_size": 64, "negatives": 0.0, "prefixes": "plain", "num_workers": 0, "batch_size": 4}
    return PhraseCut(str(root), **plain | changes)


def items_of(data: PhraseCut | CocoPhrases, split: str = "train", epochs: int = 1) -> list[dict]:
    dataset = data.dataset(split)
    return [dataset[(epoch, index)] for epoch in range(epochs) for index in range(len(dataset))]


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        for key, value in one.items()
    )
