"""Images by name from folders and zip files, without unpacking: Visual Genome's two zips are read as they came.

Each process that reads opens a zip for itself, once: a handle shared by a loader's workers would share one file position.
"""

import io
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from pmpseg.errors import InputError
from pmpseg.images import read_image

from .sources import IMAGE_SUFFIXES, open_image, upright_size


class ImageStore:
    """The images in ``places``, folders or zip files; where two have one name, the first place counts.

    ``names`` are the images' names without their folders. Raises ``InputError``, with the file's name, for a place that is
    neither a folder nor a zip, and for images that cannot be read.
    """

    def __init__(self, places: Sequence[Path]) -> None:
        self.places = list(places)
        self._found: dict[str, tuple[int, str]] = {}  # name -> place, path inside it
        self._open: dict[tuple[int, int], zipfile.ZipFile] = {}  # (process, place) -> its handle
        for number, place in enumerate(self.places):
            for path in self._listed(place):
                name = PurePosixPath(path).name
                if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                    self._found.setdefault(name, (number, path))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._found)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def read(self, name: str) -> np.ndarray:
        """(H, W, 3) uint8, as ``predict`` reads it: upright."""
        place, path = self._at(name)
        if place.is_dir():
            return np.array(read_image(place / path))
        with self._from_zip(name) as image:
            return np.array(read_image(image))

    def size(self, name: str) -> tuple[int, int]:
        """(width, height), upright, without reading pixels."""
        place, path = self._at(name)
        with open_image(place / path) if place.is_dir() else self._from_zip(name) as image:
            return upright_size(image)

    def where(self, name: str) -> str:
        """The file's name for a message."""
        place, path = self._at(name)
        return str(place / path)

    def _at(self, name: str) -> tuple[Path, str]:
        if name not in self._found:
            raise InputError(f"there is no image {name} in {self.described}")
        number, path = self._found[name]
        return self.places[number], path

    @property
    def described(self) -> str:
        return ", ".join(map(str, self.places))

    @contextmanager
    def _from_zip(self, name: str) -> Iterator[Image.Image]:
        number, path = self._found[name]
        key = os.getpid(), number
        try:
            if key not in self._open:
                self._open[key] = zipfile.ZipFile(self.places[number])
            with Image.open(io.BytesIO(self._open[key].read(path))) as image:
                yield image
        except (OSError, SyntaxError, ValueError, zlib.error, zipfile.BadZipFile, Image.DecompressionBombError) as error:
            raise InputError(f"{self.places[number]}: {path} in it cannot be read as an image ({error})") from None

    @staticmethod
    def _listed(place: Path) -> list[str]:
        if place.is_dir():
            return sorted(os.listdir(place))
        try:
            with zipfile.ZipFile(place) as file:
                return file.namelist()
        except (OSError, zipfile.BadZipFile) as error:
            reason = "no zip file, or only a part of one" if isinstance(error, zipfile.BadZipFile) else error
            raise InputError(f"{place}: cannot be read as images ({reason})") from None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}
