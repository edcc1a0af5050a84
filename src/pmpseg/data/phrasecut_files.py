"""Reading PhraseCut's files, whose layout is told in ``phrasecut.py``.

Source: the README of github.com/ChenyunWu/PhraseCutDataset, and the code of CLIPSeg for the images to leave out.
"""

import gc
import json
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np

from pmpseg.errors import InputError

from .coco import polygon_mask
from .image_store import ImageStore
from .phrase_dataset import PhraseSource

# Images whose size is not what image_data_split.json says, so that polygons do not fit: CLIPSeg's code leaves them out.
WRONG_SIZE = frozenset(
    {61530, 61564, 150333, 150344, 150417, 150516, 285665, 285743, 285761, 285814, 286065, 286093}
    | {498010, 498042, 498187, 498246, 498269}
)
WRONG_SIZE_FILE = "wrong_size.json"  # more of them, as scripts/prepare_phrasecut.py finds them
PLACES = ("images", "VG_100K", "VG_100K_2", "images/VG_100K", "images/VG_100K_2", "images.zip", "images2.zip")
CHECKED_IMAGES = 8  # of each split, compared with their listed sizes at start; the others when their turn comes


class PhraseCutSource(PhraseSource):
    """The phrases of some files.

    300,000 phrases as Python lists would be gigabytes, copied into every worker bit by bit: polygons are kept in one array,
    ``points`` (P, 2), cut at ``polygon_ends`` (G + 1,), and these at ``sample_ends`` (N + 1,).
    """

    def __init__(
        self,
        tasks: list[tuple[Path, dict]],
        sizes: dict[int, tuple[int, int]],
        store: ImageStore,
        wrong_size: frozenset[int],
    ) -> None:
        """``tasks`` with the file that each is from; they are taken out of the list on the way."""
        self.store = store
        phrases: list[str] = []
        forms: list[str] = []
        self.nouns: list[str] = []
        numbers: dict[int, int] = {}  # id -> number of an image
        image_of: list[int] = []
        points = array("f")
        polygon_ends, sample_ends = [0], [0]
        path = Path()
        tasks.reverse()
        while tasks:
            path, task = tasks.pop()
            try:
                identity, phrase = task["image_id"], " ".join(task["phrase"].split())
                if identity in wrong_size or not phrase:
                    continue
                if identity not in sizes:
                    raise InputError(f"{path}: task {task['task_id']} is on image {identity}, which image_data_split.json lacks")
                structure = task["phrase_structure"]
                for polygon in (polygon for instance in task["Polygons"] for polygon in instance):
                    if set(map(len, polygon)) - {2}:
                        raise ValueError("a polygon is a list of points [x, y]")
                    points.extend(chain.from_iterable(polygon))
                    polygon_ends.append(len(points) // 2)
                phrases.append(phrase)
                forms.append(form_of(structure))
                self.nouns.append(sys.intern(structure["name"]))
                image_of.append(numbers.setdefault(identity, len(numbers)))
                sample_ends.append(len(polygon_ends) - 1)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                name = task.get("task_id", "without task_id") if isinstance(task, dict) else task
                raise InputError(f"{path}: task {name} is no PhraseCut task: {_reason(error)}") from None
        if not phrases:
            raise InputError(f"{path} holds no phrase on an image that can be used")
        self.phrases, self.forms, self.classes = phrases, forms, None
        self.image_of = np.array(image_of, dtype=np.int64)
        self.names = [f"{identity}.jpg" for identity in numbers]
        self.sizes = np.array([sizes[identity] for identity in numbers], dtype=np.int64)
        self.points = np.array(points).reshape(-1, 2)
        if not np.isfinite(self.points).all():
            raise InputError(f"{path} is not PhraseCut's: a polygon of it has a point that is no number")
        self.polygon_ends, self.sample_ends = np.array(polygon_ends), np.array(sample_ends)
        missing = [name for name in self.names if name not in store]
        if missing:
            count = f"{len(missing)} of the {len(self.names)} images of {path}"
            raise InputError(f"{count} are not in {store.described}, as {missing[0]}: see scripts/prepare_phrasecut.py")
        for image in np.linspace(0, len(self.names) - 1, min(CHECKED_IMAGES, len(self.names))).astype(int):
            self._check_size(int(image), store.size(self.names[image]))

    def image(self, image: int) -> np.ndarray:
        pixels = self.store.read(self.names[image])
        self._check_size(image, (pixels.shape[1], pixels.shape[0]))
        return pixels

    def mask(self, sample: int) -> np.ndarray:
        width, height = (int(side) for side in self.sizes[self.image_of[sample]])
        mask = np.zeros((height, width), dtype=bool)
        for polygon in range(self.sample_ends[sample], self.sample_ends[sample + 1]):
            mask |= polygon_mask(self.points[self.polygon_ends[polygon] : self.polygon_ends[polygon + 1]], height, width)
        return mask

    def _check_size(self, image: int, found: tuple[int, int]) -> None:
        width, height = (int(side) for side in self.sizes[image])
        if found != (width, height):
            where = self.store.where(self.names[image])
            raise InputError(
                f"{where} is {found[0]}x{found[1]}, but image_data_split.json says {width}x{height}: "
                f"scripts/prepare_phrasecut.py finds all such images and leaves them out, in {WRONG_SIZE_FILE}"
            )


def form_of(structure: dict) -> str:
    """relation, attribute or name: the most that a phrase says of its noun."""
    if structure["relation_descriptions"]:
        return "relation"
    return "attribute" if structure["attributes"] else "name"


def find_images(root: Path) -> ImageStore:
    """Visual Genome's images below ``root``: itself if it is a zip or holds them, else what it has of ``PLACES``."""
    if root.is_file():
        return ImageStore([root])
    places = [root / place for place in PLACES if (root / place).exists()]
    if root.is_dir() and next(root.glob("*.jpg"), None):
        places.insert(0, root)
    if not places:
        raise InputError(f"{root.resolve()} has no images: want one of {', '.join(PLACES)} in it, or give images")
    return ImageStore(places)


def read_sizes(root: Path) -> dict[int, tuple[int, int]]:
    """Image id -> (width, height), of image_data_split.json."""
    path = root / "image_data_split.json"
    try:
        return {entry["image_id"]: (entry["width"], entry["height"]) for entry in read_list(path)}
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is not PhraseCut's: {_reason(error)}") from None


def read_wrong_size(root: Path) -> frozenset[int]:
    path = root / WRONG_SIZE_FILE
    return frozenset(read_list(path)) if path.exists() else frozenset()


def read_list(path: Path) -> list:
    """A JSON file that holds a list."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"there is no {path}: scripts/prepare_phrasecut.py says where PhraseCut's files come from") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a JSON file: {error}") from None
    if not isinstance(content, list):
        raise InputError(f"{path} is not PhraseCut's: it holds a {type(content).__name__}, not a list")
    return content


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Searching millions of new lists for garbage, again and again, takes twice as long as reading them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _reason(error: Exception) -> str:
    return f"{error} is missing in it" if isinstance(error, KeyError) else str(error)
