"""COCO's things, one by one: whose pixel is it, from the panoptic maps or from the polygons of the instances JSON.

Both sources give for an image ``numbers`` (H, W) int32, the number 0..n-1 of each pixel's thing or -1, with ``classes`` (n,)
int64 and ``crowd`` (n,) bool. ``part`` makes segments of them and of the labels. What is kept of the JSONs are arrays and
offsets. Formats: https://cocodataset.org/#format-data; ids in panoptic PNGs are R + 256 G + 256^2 B (Kirillov et al., 2019).
"""

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pmpseg import rle
from pmpseg.errors import InputError

from .base import IGNORE
from .coco import polygon_mask
from .image_store import ImageStore
from .json_lists import visit_lists

LEAST_AGREEMENT = 0.5  # of the pixels of things in some images; stuff may cover most of a single one


class Things(NamedTuple):
    numbers: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray


def part(labels: np.ndarray, things: Things) -> tuple[np.ndarray, np.ndarray]:
    """Labels (H, W) and the things in them -> segments (H, W) int64, 0..N-1 or -1, and their classes (N,) int64.

    The label decides a pixel's class; things part the pixels of a class. Each thing is a segment; so is each class of stuff, and
    of things where none is told apart. A crowd is part of one segment of its class, so that no labelled crowd goes unlearned and
    none of its heads is asked for alone. Pixels whose label is that of a thing in the image, but that lie in none, are -1: at
    borders the two annotations differ by slivers, which are nothing to propose.
    """
    numbers, classes, crowd = things
    count = len(classes)
    # What a pixel belongs to depends on its number and its label: all pairs are few, and the picture is looked up once.
    label = np.arange(IGNORE + 1)
    told_apart = np.isin(label, classes[~crowd]) | (label == IGNORE)
    # (n + 1, 256): a thing's number, or count + label for what is one segment a class, or -1
    code = np.tile(np.where(told_apart, -1, count + label), (count + 1, 1))
    code[np.arange(1, count + 1), classes] = np.where(crowd, count + classes, np.arange(count))
    code = code.ravel()
    pairs = (numbers.astype(np.int32) + 1) << 8 | labels
    found = np.zeros(count + len(label) + 1, dtype=bool)  # the last for code -1
    found[code[np.bincount(pairs.ravel(), minlength=len(code)) > 0]] = True
    found = found[:-1]
    renumbered = np.append(np.where(found, np.cumsum(found) - 1, -1), -1)
    return renumbered[code][pairs], np.concatenate([classes, label])[found]


def agreement(things: Things, labels: np.ndarray) -> np.ndarray:
    """How many pixels of the things of an image have their class's label, and how many they are: (2,)."""
    inside = things.numbers >= 0
    return np.array([(things.classes[things.numbers[inside]] == labels[inside]).sum(), inside.sum()])


class PanopticThings:
    """A panoptic JSON and its PNGs. ``class_of``: the class of a category id, (C,) integers, -1 where there is none."""

    def __init__(self, content: bytes, where: str, maps: ImageStore, class_of: np.ndarray) -> None:
        self.where, self.maps = where, maps
        stems: list[bytes] = []
        things: set[int] = set()
        known: set[int] = set()
        image, number, category, crowd = array("i"), array("i"), array("h"), array("b")

        def annotation(entry: dict) -> None:
            for segment in entry["segments_info"]:
                image.append(len(stems))
                number.append(segment["id"])
                category.append(segment["category_id"])
                crowd.append(segment.get("iscrowd", 0))
            stems.append(_stem(entry["file_name"]))

        def listed(entry: dict) -> None:
            known.add(entry["id"])
            if entry["isthing"]:
                things.add(entry["id"])

        visit_lists(content, {"annotations": annotation, "categories": listed}, where)
        for thing in sorted(things):
            if not 0 <= thing < len(class_of) or class_of[thing] < 0:
                raise InputError(f"{where}: category {thing} is a thing, but none of COCO-Stuff's classes")
        if not things:
            raise InputError(f"{where} lists no category with isthing: it is no panoptic JSON of COCO")
        unknown = np.setdiff1d(np.array(category), list(known))
        if len(unknown):
            raise InputError(f"{where}: a segment has category {unknown[0]}, which is not in its list of categories")
        is_thing = np.isin(np.array(category), list(things))
        self._images = _Images(stems, where)
        self._first = self._images.first(np.array(image)[is_thing])
        order = self._images.order
        self._id = np.array(number, dtype=np.int32)[is_thing][order]
        self._class = class_of[np.array(category, dtype=np.int64)[is_thing]][order].astype(np.int16)
        self._crowd = np.array(crowd, dtype=bool)[is_thing][order]

    def check(self, stems: list[str]) -> None:
        """Every image is listed and has its PNG."""
        self._images.check(stems, self.where)
        for stem in stems:
            if f"{stem}.png" not in self.maps:
                raise InputError(f"{self.maps.described} has no {stem}.png, which {self.where} lists")

    def read(self, stem: str, shape: tuple[int, int], strict: bool = False) -> Things:
        """``strict``: a thing that the JSON lists and the PNG does not show is an error (a check of a few at start)."""
        name = f"{stem}.png"
        with self.maps.opened(name) as image:
            colours = np.asarray(image.convert("RGBA"))
        if colours.shape[:2] != shape:
            raise InputError(_wrong_size(self.maps.where(name), colours.shape[:2], shape))
        ids = colours.view("<u4")[..., 0] & 0xFFFFFF  # R + 256 G + 256^2 B
        rows = self._images.rows(stem, self._first)
        numbers = np.full(shape, -1, dtype=np.int32)
        for number, wanted in enumerate(self._id[rows]):
            here = ids == wanted
            if strict and not here.any():
                raise InputError(f"{self.maps.where(name)} shows no segment {wanted}, which {self.where} lists for it")
            numbers[here] = number
        return Things(numbers, self._class[rows].astype(np.int64), self._crowd[rows])


class InstanceThings:
    """An instances JSON: polygons and run lengths, painted from large to small; crowds lie below all others."""

    def __init__(self, content: bytes, where: str, class_of: np.ndarray) -> None:
        self.where = where
        stems: list[bytes] = []
        row_of: dict[int, int] = {}  # id of an image -> row
        heights, widths = array("i"), array("i")
        owner, label, crowd, number = array("q"), array("h"), array("b"), array("q")
        all_points, polygon_ends, polygons = array("f"), array("q", [0]), array("q", [0])
        all_runs, runs_ends, runs_sizes = array("i"), array("q", [0]), array("i")
        class_of_id = {number: int(found) for number, found in enumerate(class_of) if found >= 0}

        def image(entry: dict) -> None:
            row_of[entry["id"]] = len(stems)
            stems.append(_stem(entry["file_name"]))
            heights.append(entry["height"])
            widths.append(entry["width"])

        def annotation(entry: dict) -> None:
            category = entry["category_id"]
            if category not in class_of_id:
                raise InputError(f"{where}: annotation {entry['id']} has category {category}, none of COCO-Stuff's things")
            owner.append(entry["image_id"])
            label.append(class_of_id[category])
            crowd.append(entry.get("iscrowd", 0))
            number.append(entry["id"])
            shape = entry["segmentation"]
            if isinstance(shape, list) and max(map(len, shape), default=0) < 6:
                raise InputError(f"{where}: annotation {entry['id']} has no polygon of three points or more")
            for polygon in shape if isinstance(shape, list) else ():
                all_points.extend(polygon)
                polygon_ends.append(len(all_points))
            polygons.append(len(polygon_ends) - 1)
            size = (0, 0)  # of run lengths, which have one of their own
            if not isinstance(shape, list):
                try:
                    all_runs.extend(rle.run_lengths(shape).tolist())
                    size = shape["size"]
                except InputError as error:
                    raise InputError(f"{where}: annotation {entry['id']} has a bad mask: {error}") from None
            runs_ends.append(len(all_runs))
            runs_sizes.extend(size)

        visit_lists(content, {"images": image, "annotations": annotation}, where)
        try:
            rows = np.array([row_of[key] for key in owner], dtype=np.int64)
        except KeyError as error:
            raise InputError(f"{where} annotates image id {error}, which is not in its list of images") from None
        if not len(rows):
            raise InputError(f"{where} lists no things")
        self._images = _Images(stems, where)
        self._sizes = np.stack([heights, widths], 1)
        sizes = np.array(runs_sizes).reshape(-1, 2)
        wrong = np.flatnonzero((sizes != self._sizes[rows]).any(1) & sizes.any(1))
        if len(wrong):
            own, image_size = sizes[wrong[0]].tolist(), self._sizes[rows[wrong[0]]].tolist()
            raise InputError(_wrong_size(f"{where}: annotation {number[wrong[0]]}", own, image_size))
        self._first = self._images.first(rows)
        self._at = self._images.order.astype(np.int32)  # rows of an image, in what follows
        self._class, self._crowd, self._id = np.array(label), np.array(crowd, dtype=bool), np.array(number)
        self._points, self._runs = np.array(all_points), np.array(all_runs)
        self._polygons, self._polygon_ends, self._runs_ends = np.array(polygons), np.array(polygon_ends), np.array(runs_ends)

    def check(self, stems: list[str]) -> None:
        self._images.check(stems, self.where)

    def read(self, stem: str, shape: tuple[int, int], strict: bool = False) -> Things:
        size = tuple(self._sizes[self._images.place(stem)].tolist())
        if size != shape:
            raise InputError(_wrong_size(f"image {stem} in {self.where}", size, shape))
        rows = self._at[self._images.rows(stem, self._first)]
        masks = [self._mask(row, shape) for row in rows]
        areas = [np.inf if self._crowd[row] else mask.sum() for row, mask in zip(rows, masks, strict=True)]
        numbers = np.full(shape, -1, dtype=np.int32)
        for number in np.argsort(-np.array(areas), kind="stable"):
            numbers[masks[number]] = number
        return Things(numbers, self._class[rows].astype(np.int64), self._crowd[rows])

    def _mask(self, row: int, shape: tuple[int, int]) -> np.ndarray:
        """(H, W) bool."""
        try:
            runs = self._runs[self._runs_ends[row] : self._runs_ends[row + 1]]
            if len(runs):
                return rle.decode({"size": shape, "counts": runs})
            mask = np.zeros(shape, dtype=bool)
            for polygon in range(self._polygons[row], self._polygons[row + 1]):
                points = self._points[self._polygon_ends[polygon] : self._polygon_ends[polygon + 1]]
                mask |= polygon_mask(points.reshape(-1, 2), *shape)
            return mask
        except (ValueError, InputError) as error:
            raise InputError(f"{self.where}: annotation {self._id[row]} has a bad mask: {error}") from None


class _Images:
    """The images that a JSON lists, by name without suffix, and which rows of a table belong to each."""

    def __init__(self, stems: list[bytes], where: str) -> None:
        if not stems:
            raise InputError(f"{where} lists no images")
        self._order = np.argsort(np.array(stems, dtype=bytes), kind="stable")
        self._stems = np.array(stems, dtype=bytes)[self._order]
        twice = self._stems[1:][self._stems[1:] == self._stems[:-1]]
        if len(twice):
            raise InputError(f"{where} lists image {twice[0].decode()} twice")
        self.order = np.zeros(0, dtype=np.int64)

    def first(self, owner: np.ndarray) -> np.ndarray:
        """``owner`` (n,): the place in the JSON of each row's image. Sets ``order``, in which rows of an image stand together;
        returns where those of each image begin."""
        place = np.empty(len(self._order), dtype=np.int64)
        place[self._order] = np.arange(len(self._order))
        owner = place[owner.astype(np.int64)]
        self.order = np.argsort(owner, kind="stable")
        return np.searchsorted(owner[self.order], np.arange(len(place) + 1))

    def place(self, stem: str) -> int:
        """Of an image in the JSON's list."""
        return int(self._order[np.searchsorted(self._stems, stem.encode())])

    def rows(self, stem: str, first: np.ndarray) -> slice:
        at = int(np.searchsorted(self._stems, stem.encode()))
        return slice(int(first[at]), int(first[at + 1]))

    def check(self, stems: list[str], where: str) -> None:
        missing = np.setdiff1d(np.array([stem.encode() for stem in stems]), self._stems)
        if len(missing):
            others = f", nor {len(missing) - 1} others" if len(missing) > 1 else ""
            raise InputError(f"{where} does not list image {missing[0].decode()}{others}")


def _stem(name: str) -> bytes:
    return name.rpartition("/")[2].rpartition(".")[0].encode()


def _wrong_size(where: str, got: Sequence[int], want: Sequence[int]) -> str:
    return f"{where} is {got[1]}x{got[0]}, its image {want[1]}x{want[0]}: they must have one size"
