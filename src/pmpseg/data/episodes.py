"""Where the episodes of ``data/one_shot.py`` come from: which images show which classes, in VOC and in COCO instances."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from pmpseg.data.base import IGNORE
from pmpseg.data.sources import CocoInstances
from pmpseg.data.voc import VocImages
from pmpseg.errors import InputError
from pmpseg.images import read_image
from pmpseg.vocabulary import Vocabulary

MIN_PIXELS = 2 * 32 * 32  # two cells of a network's map at 1/32


class Source(Protocol):
    """Images by number. ``queries``: images, each with the classes to ask for; ``shows``: of each class the images of it."""

    files: list[Path]
    queries: list[tuple[int, list[int]]]
    shows: dict[int, list[int]]

    def read(self, image: int, label: int) -> dict:
        """A sample: image (H, W, 3) uint8, labels (H, W) uint8 of 0, 1 and 255."""


class VocEpisodes:
    """Which images of VOC show which of ``classes`` (0..19, one less than the labels); see ``Source`` and ``Pascal5i``."""

    def __init__(self, voc: VocImages, classes: Sequence[int], min_pixels: int, small_targets: bool) -> None:
        self.voc, self.files = voc, voc.files
        self.queries: list[tuple[int, list[int]]] = []
        self.shows: dict[int, list[int]] = defaultdict(list)
        for image, given in enumerate(voc.classes):
            if given is not None:
                here = large = [given - 1] if given - 1 in classes else []
            else:
                pixels = np.bincount(voc.labels(image).ravel(), minlength=IGNORE + 1)[1:]
                here = [label for label in classes if pixels[label]]
                large = [label for label in here if pixels[label] >= min_pixels]
            if large:
                self.queries.append((image, here if small_targets else large))
            for label in large:
                self.shows[label].append(image)
        if not self.queries:
            raise InputError(f"{voc.path} lists no image with {min_pixels} pixels of a class of this fold")

    def read(self, image: int, label: int) -> dict:
        sample = self.voc.read(image)
        labels = sample["labels"]
        return sample | {"labels": np.where(labels == IGNORE, IGNORE, labels == label + 1).astype(np.uint8)}


class CocoEpisodes:
    """Which images of an instances JSON show which of ``classes``; see ``Source`` and ``Coco20i``."""

    def __init__(
        self,
        path: Path,
        content: dict,
        root: Path,
        images: str,
        vocabulary: Vocabulary,
        classes: Sequence[int],
        min_pixels: int,
    ) -> None:
        label_of = {category["id"]: index for index, category in enumerate(content["categories"])}
        own = [a for a in content["annotations"] if label_of.get(a["category_id"]) in classes]
        area: dict[tuple[int, int], float] = defaultdict(float)
        for annotation in own:
            if "area" not in annotation:
                raise InputError(f"{path}: annotation {annotation['id']} has no area, as COCO's have")
            area[annotation["image_id"], label_of[annotation["category_id"]]] += annotation["area"]
        large = {key for key, pixels in area.items() if pixels >= min_pixels}
        if not large:
            raise InputError(f"{path} has no image with {min_pixels} pixels of a class of this fold")
        used = {image for image, _ in large}
        # Only what the fold needs: the files of other images need not be there, and are not looked for.
        entries = [entry for entry in content["images"] if entry["id"] in used]
        needed = {"images": entries, "annotations": [a for a in own if a["image_id"] in used]}
        self.instances = CocoInstances(path, needed | {"categories": content["categories"]}, root, images, vocabulary)
        self.files = self.instances.files
        of_image = [[label for label in classes if (entry["id"], label) in large] for entry in entries]
        self.queries = list(enumerate(of_image))
        self.shows: dict[int, list[int]] = defaultdict(list)
        for image, labels in self.queries:
            for label in labels:
                self.shows[label].append(image)

    def read(self, image: int, label: int) -> dict:
        pixels = np.array(read_image(self.files[image]))
        return {"image": pixels, "labels": self.instances.class_mask(image, label).astype(np.uint8)}
