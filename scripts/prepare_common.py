"""What the scripts that prepare benchmarks share: folders of label maps that are whole or not there, and runs that go on."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from pmpseg import cli
from pmpseg.errors import InputError

SETTINGS = "made_with.json"


@contextmanager
def whole_folder(folder: Path, settings: dict) -> Iterator[Path]:
    """Gives a folder ``.NAME.part`` beside ``folder``, which takes its place when the block ends without an error.

    Where the block fails it stays, and the next call gives it again, with the files that were made: for a run that was stopped.
    ``settings`` are written into it, and must then be the same. InputError where ``folder`` is there, or the settings differ.
    """
    part = folder.with_name(f".{folder.name}.part")
    if folder.exists():
        raise InputError(f"{folder} is there already: remove it to make it anew")
    part.mkdir(parents=True, exist_ok=True)
    note = part / SETTINGS
    wanted = json.dumps(settings, indent=1) + "\n"
    if note.is_file() and note.read_text(encoding="utf-8") != wanted:
        raise InputError(f"{part} was begun with other settings (see its {SETTINGS}): remove it, or give the same")
    note.write_text(wanted, encoding="utf-8")
    yield part
    part.replace(folder)


def digest(stems: Sequence[str]) -> str:
    """Of a list of names: another list of the same length must not go on where this one stopped."""
    return hashlib.sha256("\n".join(stems).encode()).hexdigest()[:16]


def make_all(stems: Sequence[str], make: Callable[[str], None], done: Callable[[str], bool], title: str) -> int:
    """Call ``make`` for each name that is not ``done``; how many were done before."""
    todo = [stem for stem in stems if not done(stem)]
    for stem in tqdm(todo, desc=title, disable=None):
        make(stem)
    return len(stems) - len(todo)


def save_map(labels: np.ndarray, path: Path) -> None:
    """(H, W) of uint8 or uint16 as a PNG of one channel, whole or not at all."""
    with cli.whole_file(path) as temporary:
        Image.fromarray(labels).save(temporary, "PNG")


def read_pixels(path: Path, mode: str | None = None) -> np.ndarray:
    """An image as it is stored, not turned by its EXIF: label maps were drawn on the stored pixels."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert(mode) if mode else image)
    except FileNotFoundError:
        raise InputError(f"there is no {path}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "not an image that PIL reads" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(f"{path}: cannot be read as an image ({reason})") from None


def mapped_share(maps: Sequence[Path], num_classes: int, ignored: int) -> tuple[float, int]:
    """The share of pixels with a class, and how many classes occur; InputError for a value that is neither class nor ignored."""
    counts = np.zeros(ignored + 1, dtype=np.int64)
    for path in tqdm(maps, desc="checking what was written", disable=None):
        counts += np.bincount(read_pixels(path).ravel(), minlength=ignored + 1)
        if counts[num_classes:ignored].any():
            raise InputError(f"{path} has value {num_classes + int(np.flatnonzero(counts[num_classes:ignored])[0])}: remove it")
    return float(counts[:num_classes].sum() / max(1, counts.sum())), int((counts[:num_classes] > 0).sum())
