"""Write a generated data set in COCO-Stuff-164k's official layout and formats, in folders or as zips named as the official ones.

    python scripts/make_coco_stuff.py data/coco --count 2000 --val-count 200            # folders; some 3 minutes on two cores
    python scripts/make_coco_stuff.py data/coco --count 2000 --val-count 200 --zips     # zips instead; --both for both

For trying out and timing what reads COCO-Stuff where the 20 GB are not at hand. What is on the images are the scenes of
``pmpseg.data.scene_drawing`` under the names of 55 of the 171 classes, 8 unseen ones of the usual 15 among them (red circles
are persons, sand is sand). Images of COCO's sizes, JPEG of quality 90; label maps of ids less one, and 255; instances with
polygons, crowds with run lengths; panoptic JSONs and PNGs; five captions each.
"""

import argparse
import io
import json
import shutil
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from pmpseg import cli, rle
from pmpseg.data.scene_drawing import COLOURS, KINDS, SHAPES, STUFF, Scene, draw_scene, group_of
from pmpseg.errors import InputError

SPLITS = {"train": "train2017", "val": "val2017"}
SHAPES_OF_IMAGES = ((3, 4), (3, 4), (2, 3), (4, 3), (3, 2))  # height to width
# category id and name; what scenes hold out has unseen names first
HELD_OUT = "21 cow,25 giraffe,33 suitcase,34 frisbee,41 skateboard,57 carrot,87 scissors,88 teddy bear,89 hair drier"
HELD_OUT += ",90 toothbrush,77 cell phone,78 microwave,79 oven,80 toaster,81 sink,82 refrigerator,84 book,85 clock"
SEEN = "1 person,2 bicycle,3 car,4 motorcycle,5 airplane,6 bus,7 train,8 truck,9 boat,10 traffic light,11 fire hydrant"
SEEN += ",13 stop sign,14 parking meter,15 bench,16 bird,17 cat,18 dog,19 horse,20 sheep,22 elephant,23 bear,24 zebra"
SEEN += ",27 backpack,28 umbrella,31 handbag,32 tie,35 skis,36 snowboard,37 sports ball,38 kite"
# id of the label maps, id and name in panoptic JSONs, which merge some kinds of stuff
STUFF_IDS = {"grass": (124, 193, "grass-merged"), "water": (155, 155, "sea"), "sand": (154, 154, "sand")}
STUFF_IDS |= {"brick": (171, 175, "wall-brick"), "sky": (157, 187, "sky-other-merged"), "wood": (118, 118, "floor-wood")}
STUFF_IDS |= {"gravel": (125, 125, "gravel")}
SEED_OF_SPLIT = {"train": 11, "val": 12}


def _thing_ids() -> dict[tuple[str, str], tuple[int, str]]:
    names = {group: iter(listed.split(",")) for group, listed in (("seen", SEEN), ("held out", HELD_OUT))}
    found = {}
    for colour, shape in ((colour, shape) for shape in SHAPES for colour in COLOURS):
        number, _, name = next(names["seen" if group_of(colour, shape) == "seen" else "held out"]).partition(" ")
        found[colour, shape] = int(number), name
    return found


THING_IDS = _thing_ids()  # (colour, shape) -> (category id, name)


@dataclass
class Drawn:
    """One image with all that is said of it; files as their bytes."""

    id: int
    size: tuple[int, int]  # width, height
    jpeg: bytes
    labels: bytes
    panoptic: bytes
    segments: list[dict]
    instances: list[dict]
    captions: list[str]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder, which must not have such a set yet")
    parser.add_argument("--count", type=cli.positive, default=2000, help="training images; default: 2000")
    parser.add_argument("--val-count", type=cli.positive, default=200, help="validation images; default: 200")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--zips", action="store_true", help="zips in place of folders")
    form.add_argument("--both", action="store_true", help="zips beside the folders")
    parser.add_argument("--side", type=int, default=640, help="the longer side of an image, 96 to 840; default: 640")
    parser.add_argument("--workers", type=cli.positive, default=2, help="processes that draw; default: 2")
    args = parser.parse_args(arguments)
    make(args.out, args.count, args.val_count, not args.zips, args.zips or args.both, args.side, args.workers)
    print(f"{args.out}: {args.count} training and {args.val_count} validation images")


def make(
    out: Path, count: int, val_count: int, folders: bool = True, zips: bool = False, side: int = 640, workers: int = 0
) -> None:
    """The whole set; ``workers`` 0 draws in this process."""
    if not 96 <= side <= 840:
        raise InputError(f"side: got {side}, want 96 to 840")
    for taken in ("train2017", "val2017", "train2017.zip", "val2017.zip", "stuffthingmaps", "annotations"):
        if (out / taken).exists():
            raise InputError(f"{out / taken} is there already: remove it, or write to another folder")
    counts = {split: n for split, n in (("train", count), ("val", val_count)) if n}
    part = out / ".part"  # of which nothing is seen before all is there
    shutil.rmtree(part, ignore_errors=True)
    with ExitStack() as stack:
        sink = Sink(part, folders, zips, stack)
        pool = stack.enter_context(ProcessPoolExecutor(workers)) if workers else None
        for split, n in counts.items():
            work = partial(draw, split, side=side)
            drawn = pool.map(work, range(n), chunksize=8) if pool else map(work, range(n))
            write_split(sink, SPLITS[split], tqdm(drawn, SPLITS[split], n, disable=None if workers else True))
    for made in sorted(part.iterdir()):
        made.rename(out / made.name)
    part.rmdir()


class Sink:
    """Where files go: folders, zips, or both. Zips are whole when ``stack`` ends."""

    def __init__(self, out: Path, folders: bool, zips: bool, stack: ExitStack) -> None:
        self.out, self.folders, self.zips, self.stack = out, folders, zips, stack
        self._open: dict[str, zipfile.ZipFile] = {}
        out.mkdir(parents=True, exist_ok=True)

    def to_folder(self, path: str, content: bytes) -> None:
        if self.folders:
            (self.out / path).parent.mkdir(parents=True, exist_ok=True)
            (self.out / path).write_bytes(content)

    def to_zip(self, name: str, path: str, content: bytes, packed: bool = False) -> None:
        if not self.zips:
            return
        if name not in self._open:
            temporary = self.stack.enter_context(cli.whole_file(self.out / name))
            self._open[name] = self.stack.enter_context(zipfile.ZipFile(temporary, "w"))
        self._open[name].writestr(path, content, zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)


def write_split(sink: Sink, split: str, drawn: Iterable[Drawn]) -> None:
    """One split's images, maps and JSONs."""
    images: list[dict] = []
    panoptic: list[dict] = []
    instances: list[dict] = []
    captions: list[dict] = []
    inner = io.BytesIO()  # the zip of panoptic PNGs, which lies in another
    with zipfile.ZipFile(inner, "w") as pngs:
        for one in drawn:
            stem = f"{one.id:012d}"
            sink.to_folder(f"{split}/{stem}.jpg", one.jpeg)
            sink.to_zip(f"{split}.zip", f"{split}/{stem}.jpg", one.jpeg)
            sink.to_folder(f"stuffthingmaps/{split}/{stem}.png", one.labels)
            sink.to_zip("stuffthingmaps_trainval2017.zip", f"{split}/{stem}.png", one.labels, packed=True)
            sink.to_folder(f"annotations/panoptic_{split}/{stem}.png", one.panoptic)
            pngs.writestr(f"panoptic_{split}/{stem}.png", one.panoptic)
            width, height = one.size
            images.append({"id": one.id, "file_name": f"{stem}.jpg", "width": width, "height": height, "license": 1})
            panoptic.append({"image_id": one.id, "file_name": f"{stem}.png", "segments_info": one.segments})
            owned = {"image_id": one.id}
            instances += [instance | owned | {"id": len(instances) + k} for k, instance in enumerate(one.instances, 1)]
            captions += [owned | {"id": len(captions) + k, "caption": caption} for k, caption in enumerate(one.captions, 1)]
    sink.to_zip("panoptic_annotations_trainval2017.zip", f"annotations/panoptic_{split}.zip", inner.getvalue())
    things = [{"id": number, "name": name, "supercategory": "thing"} for number, name in sorted(THING_IDS.values())]
    kinds = [thing | {"isthing": 1} for thing in things]
    kinds += [{"id": i, "name": name, "supercategory": "stuff", "isthing": 0} for _, i, name in STUFF_IDS.values()]
    info = {"info": {"description": "generated by pmpseg's make_coco_stuff.py"}, "licenses": [], "images": images}
    jsons = {
        "instances": info | {"annotations": instances, "categories": things},
        "captions": info | {"annotations": captions},
        "panoptic": info | {"annotations": panoptic, "categories": kinds},
    }
    for kind, content in jsons.items():
        path, text = f"annotations/{kind}_{split}.json", json.dumps(content).encode()
        sink.to_folder(path, text)
        sink.to_zip(f"{'panoptic_' * (kind == 'panoptic')}annotations_trainval2017.zip", path, text, packed=True)


def draw(split: str, index: int, side: int = 640) -> Drawn:
    """Image ``index`` of a split, whatever was drawn before it."""
    seed = SEED_OF_SPLIT[split]
    rng = np.random.default_rng([seed, index])
    enlarge = 2 if side > 320 else 1
    height, width = SHAPES_OF_IMAGES[index % len(SHAPES_OF_IMAGES)]
    size = side // enlarge
    many = max(3, size * size // 6000)
    scene = draw_scene(seed, index, KINDS[(0, 0, 1, 2)[index % 4]], size, (many // 2, many))
    shape = (round(size * height / max(height, width)), round(size * width / max(height, width)))
    box = slice(0, shape[0]), slice(0, shape[1])
    image = Image.fromarray(scene.image[box]).resize((shape[1] * enlarge, shape[0] * enlarge), Image.Resampling.BICUBIC)
    owner, stuff = (np.kron(a[box], np.ones((enlarge, enlarge), np.uint8)) for a in (scene.owner, scene.stuff))
    labels = np.array([STUFF_IDS[name][0] for name in STUFF])[stuff] - 1
    ids = np.array([0, *(THING_IDS[t.colour, t.shape][0] for t in scene.things)])
    labels = np.where(owner > 0, ids[owner] - 1, labels)
    shown = [n for n in range(1, len(ids)) if (owner == n).any()]
    crowd = {n for n in shown if ids[n] == ids[shown[0]]} if shown and index % 10 == 9 else set()
    labels[: int(rng.integers(0, 1 + labels.shape[0] // 12)) * int(rng.random() < 0.5)] = 255  # a strip that nobody annotated
    number = index * (40 if split == "train" else 70) + int(rng.integers(1, 40))
    panoptic, segments = _panoptic(rng, owner, stuff, labels == 255, ids, crowd)
    return Drawn(
        id=number,
        size=image.size,
        jpeg=_bytes(image, "JPEG", quality=90),
        labels=_bytes(Image.fromarray(labels.astype(np.uint8)), "PNG"),
        panoptic=panoptic,
        segments=segments,
        instances=_instances(owner, ids, shown, crowd),
        captions=_captions(rng, scene, shown),
    )


def _instances(owner: np.ndarray, ids: np.ndarray, shown: list[int], crowd: set[int]) -> list[dict]:
    """Polygons around what is seen of each thing, as COCO has them: without holes, and somewhat simpler than the pixels."""
    import cv2

    found = []
    for n in shown:
        mask = np.isin(owner, list(crowd)) if n in crowd else owner == n
        if n in crowd and n != min(crowd):
            continue
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = [int(columns[0]), int(rows[0]), int(np.ptp(columns) + 1), int(np.ptp(rows) + 1)]
        shape: Any
        if n in crowd:
            runs = rle.run_lengths(rle.encode(mask))
            shape = {"size": list(mask.shape), "counts": runs.tolist()}  # COCO's crowds are written so
        else:
            contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            simple = (cv2.approxPolyDP(contour, 0.7, True).reshape(-1, 2) + 0.5 for contour in contours)
            shape = [polygon.ravel().tolist() for polygon in simple if len(polygon) > 2]
            if not shape:
                continue
        found.append({"category_id": int(ids[n]), "iscrowd": int(n in crowd), "area": float(mask.sum()), "bbox": box})
        found[-1]["segmentation"] = shape
    return found


def _panoptic(
    rng: np.random.Generator, owner: np.ndarray, stuff: np.ndarray, void: np.ndarray, ids: np.ndarray, crowd: set[int]
) -> tuple[bytes, list[dict]]:
    """The PNG of ids and what it says of each."""
    masks = [(owner == n, int(ids[n]), 0) for n in range(1, len(ids)) if n not in crowd]
    if crowd:
        masks.append((np.isin(owner, list(crowd)), int(ids[min(crowd)]), 1))
    masks += [((owner == 0) & (stuff == k), STUFF_IDS[name][1], 0) for k, name in enumerate(STUFF)]
    numbers = rng.choice(2**24 - 1, len(masks), replace=False) + 1
    picture = np.zeros(owner.shape, dtype=np.int64)
    segments = []
    for number, (mask, category, is_crowd) in zip(numbers.tolist(), masks, strict=True):
        mask = mask & ~void
        if mask.any():
            picture[mask] = number
            segments.append({"id": number, "category_id": category, "iscrowd": is_crowd, "area": int(mask.sum())})
    colours = np.stack([picture & 255, picture >> 8 & 255, picture >> 16], axis=-1).astype(np.uint8)
    return _bytes(Image.fromarray(colours), "PNG"), segments


def _captions(rng: np.random.Generator, scene: Scene, shown: list[int]) -> list[str]:
    """Five sentences about one or two of the things and what they lie on."""
    forms = ("A {0} and a {1} on {2}.", "A {0} beside a {1}.", "There is a {0} on the {2}.", "A photo of a {1} and {2}.")
    forms += ("A {1} near a {0}.",)
    named = [(THING_IDS[scene.things[n - 1].colour, scene.things[n - 1].shape][1], scene.ground[n - 1]) for n in shown]
    named = named or [("scene", "ground")]
    picked = [[named[int(k)] for k in rng.integers(0, len(named), 2)] for _ in forms]
    return [form.format(one[0], other[0], one[1]) for form, (one, other) in zip(forms, picked, strict=True)]


def _bytes(image: Image.Image, kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


if __name__ == "__main__":
    cli.run(main)
