"""PhraseCut in its official layout, as it is and as PhraseCut+ (the options of ``PhraseData``).

Source: Wu et al., "PhraseCut: Language-based Image Segmentation in the Wild", CVPR 2020, and the README of its repository.

    refer_{train,val,test,miniv}.json   tasks: image_id, phrase, phrase_structure, Polygons[instance][polygon] = [[x, y], ...]
    image_data_split.json               image_id, width, height, split of every image
    images/                             ID.jpg; or VG_100K/ and VG_100K_2/, or images.zip and images2.zip of Visual Genome

A phrase's mask is the union of its polygons: of all instances, and of several polygons an instance may have.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from pmpseg.errors import InputError
from pmpseg.vocabulary import Vocabulary

from .coco import polygon_mask
from .image_store import ImageStore
from .phrases import PhraseData, PhraseSource

# Images whose size is not what image_data_split.json says, so that polygons do not fit: CLIPSeg's code leaves them out.
WRONG_SIZE = frozenset(
    {61530, 61564, 150333, 150344, 150417, 150516, 285665, 285743, 285761, 285814, 286065, 286093}
    | {498010, 498042, 498187, 498246, 498269}
)
WRONG_SIZE_FILE = "wrong_size.json"  # more of them, as scripts/prepare_phrasecut.py finds them
SPLITS = ("train", "val", "test", "miniv")
PLACES = ("images", "VG_100K", "VG_100K_2", "images/VG_100K", "images/VG_100K_2", "images.zip", "images2.zip")
CHECKED_IMAGES = 8  # of each split, compared with their listed sizes at start; the others when their turn comes
VOCABULARY_SIZE = 100


class PhraseCut(PhraseData):
    """PhraseCut and PhraseCut+.

    ``root`` is the folder of the official files; ``images`` is where Visual Genome's images lie (as above), by default there
    too. ``split_names`` are the official splits that serve as train, val and test; "val_miniv" is the whole validation split,
    which is kept in two files. The other arguments are explained at ``PhraseData``.

    Left out are the images of ``WRONG_SIZE`` and of ``root/wrong_size.json``, and phrases without a word. The vocabulary, which
    is only a list of words to start from, are the 100 most frequent nouns. A split is read when it is asked for.
    Raises ``InputError`` with the file's name for what is missing or wrong.
    """

    def __init__(
        self,
        root: str,
        images: str | None = None,
        split_names: tuple[str, str, str] = ("train", "val", "test"),
        image_size: int = 352,
        negatives: float = 0.2,
        check_negatives: bool = True,
        supports: int = 0,
        support_may_be_query: bool = False,
        prefixes: Literal["plain", "fixed", "shuffle", "shuffle+"] = "shuffle+",
        crop: Literal["object", "none"] = "object",
        square: bool = True,
        prompts_per_image: int = 1,
        phrases_at_once: int | None = None,
        eval_absent: int = 0,
        remove_classes: Sequence[str] = (),
        batch_size: int = 32,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__(
            image_size=image_size,
            negatives=negatives,
            check_negatives=check_negatives,
            supports=supports,
            support_may_be_query=support_may_be_query,
            prefixes=prefixes,
            crop=crop,
            square=square,
            prompts_per_image=prompts_per_image,
            phrases_at_once=phrases_at_once,
            eval_absent=eval_absent,
            remove_classes=remove_classes,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.root = Path(root)
        self.split_names = dict(zip(("train", "val", "test"), split_names, strict=True))
        if wrong := [part for name in split_names for part in name.split("_") if part not in SPLITS]:
            raise InputError(f"split_names: got {wrong[0]!r}, want {', '.join(SPLITS)}, or several joined by _")
        self.sizes = read_sizes(self.root)
        self.wrong_size = WRONG_SIZE | read_wrong_size(self.root)
        self.store = find_images(Path(images) if images else self.root)
        if not any(self._files(split)[0].is_file() for split in self.split_names):
            wanted = " or ".join(dict.fromkeys(str(self._files(split)[0]) for split in self.split_names))
            raise InputError(f"there is no {wanted}: scripts/prepare_phrasecut.py says where PhraseCut's files come from")

    def read_source(self, split: str) -> "PhraseCutSource":
        tasks = [(path, task) for path in self._files(split) for task in read_list(path)]
        return PhraseCutSource(tasks, self.sizes, self.store, self.wrong_size)

    @cached_property
    def vocabulary(self) -> Vocabulary:  # type: ignore[override]
        """The most frequent nouns of the first of val, test and train that is there: train takes long to read."""
        split = next(split for split in ("val", "test", "train") if self._files(split)[0].is_file())
        source = self.source(split)
        assert isinstance(source, PhraseCutSource)
        return Vocabulary.of(frequent(source.nouns))

    def _files(self, split: str) -> list[Path]:
        return [self.root / f"refer_{name}.json" for name in self.split_names[split].split("_")]


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
        points: list[np.ndarray] = []
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
                    corners = np.asarray(polygon, dtype=np.float32)
                    if corners.shape == (0,):
                        continue
                    if corners.ndim != 2 or corners.shape[1] != 2 or not np.isfinite(corners).all():
                        raise ValueError(f"a polygon of shape {corners.shape}, not of points [x, y]")
                    points.append(corners)
                    polygon_ends.append(polygon_ends[-1] + len(corners))
                phrases.append(phrase)
                forms.append(form_of(structure))
                self.nouns.append(sys.intern(structure["name"]))
                image_of.append(numbers.setdefault(identity, len(numbers)))
                sample_ends.append(len(points))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                name = task.get("task_id", "without task_id") if isinstance(task, dict) else task
                raise InputError(f"{path}: task {name} is no PhraseCut task: {_reason(error)}") from None
        if not phrases:
            raise InputError(f"{path} holds no phrase on an image that can be used")
        self.phrases, self.forms, self.classes = phrases, forms, None
        self.image_of = np.array(image_of, dtype=np.int64)
        self.names = [f"{identity}.jpg" for identity in numbers]
        self.sizes = np.array([sizes[identity] for identity in numbers], dtype=np.int64)
        self.points = np.concatenate(points) if points else np.zeros((0, 2), np.float32)
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


def frequent(nouns: Sequence[str]) -> list[str]:
    """The ``VOCABULARY_SIZE`` most frequent ones that a vocabulary can hold; equals in alphabetical order."""
    counts = Counter(" ".join(noun.split()).casefold() for noun in nouns)
    usable = [noun for noun in counts if noun and not set(noun) & set(",#")]
    return sorted(usable, key=lambda noun: (-counts[noun], noun))[:VOCABULARY_SIZE] or ["object"]


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


def _reason(error: Exception) -> str:
    return f"{error} is missing in it" if isinstance(error, KeyError) else str(error)
