"""Files by name from folders and zip files, without unpacking: Visual Genome's and COCO's zips are read as they came.

What lies where is read once, and kept as a few arrays (some 70 bytes a file, and nothing that a worker would have to copy);
a zip's own list of 118,287 files as Python's ``zipfile`` keeps it takes 70 MB and a second, in every worker. Each process opens
a zip for itself, once: a handle shared by a loader's workers would share one file position.
"""

import io
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import ExifTags, Image, ImageOps

from pmpseg.errors import InputError
from pmpseg.images import read_image

from .sources import IMAGE_SUFFIXES, INDEX_MODES, open_image, upright_size

LOCAL_HEADER = 30  # bytes before a file's name in a zip; how long the name and the extra field are, stands at 26 and 28
UNREADABLE = (OSError, SyntaxError, ValueError, zlib.error, zipfile.BadZipFile, Image.DecompressionBombError)


class ImageStore:
    """The files in ``places``, folders or zip files; where two have one name, the first place counts.

    A place may lie in a zip, as ``panoptic.zip/annotations/train.zip``, if it is stored there without compression. Of a zip's
    files only those in a folder named ``under`` count, in whatever folder that is (by default all). ``suffixes``: what names end
    in.

    ``names`` are the files' names without their folders. Raises ``InputError``, with the file's name, for a place that is
    neither a folder nor a zip, and for files that cannot be read.
    """

    def __init__(self, places: Sequence[Path], under: str | None = None, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> None:
        self.places = list(places)
        self._files: list[Path] = []  # of each place: itself, or the zip that it lies in
        self._open: dict[tuple[int, Path], int] = {}  # (process, zip) -> its handle
        rows: dict[bytes, tuple] = {}
        for number, place in enumerate(self.places):
            self._files.append(_file_of(place))
            for path, *entry in _listed(place):
                parents, _, name = path.rpartition("/")
                inside = under is None or place.is_dir() or PurePosixPath(parents).name == under
                if inside and name.lower().endswith(suffixes) and not name.startswith("."):
                    rows.setdefault(name.encode(), (number, path.encode(), *entry))
        self._names = np.array(sorted(rows), dtype=bytes)
        columns = list(zip(*(rows[name] for name in sorted(rows)), strict=True)) or [()] * 6
        self._place = np.array(columns[0], dtype=np.int16)
        self._paths = np.array(columns[1], dtype=bytes)
        self._start, self._packed, self._crc = (np.array(column, dtype=np.int64) for column in columns[2:5])
        self._method = np.array(columns[5], dtype=np.int8)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.sorted_names)

    @property
    def sorted_names(self) -> list[str]:
        return [name.decode() for name in self._names.tolist()]

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def read(self, name: str) -> np.ndarray:
        """(H, W, 3) uint8, as ``predict`` reads it: upright."""
        with self.opened(name) as image:
            # read_image copies the pixels twice, a third of the time of a photograph
            plain = image.format == "JPEG" and image.mode == "RGB" and ExifTags.Base.Orientation not in image.getexif()
            return np.array(image if plain else read_image(image))

    def read_indices(self, name: str) -> np.ndarray:
        """The pixels of a label map (H, W) as they are, upright: palettes and 16 bits are indices, not colours."""
        with self.opened(name) as image:
            if image.mode not in INDEX_MODES:
                raise InputError(f"{self.where(name)} is a {image.mode} picture: a label map has one channel of class indices")
            return np.array(ImageOps.exif_transpose(image))

    def read_bytes(self, name: str) -> bytes:
        """The file as it is."""
        place, path = self._at(name)
        if place.is_dir():
            return (place / path).read_bytes()
        try:
            return self._unpacked(name)
        except UNREADABLE as error:
            raise InputError(f"{place}: {path} in it cannot be read ({error})") from None

    def size(self, name: str) -> tuple[int, int]:
        """(width, height), upright, without reading pixels."""
        place, path = self._at(name)
        with open_image(place / path) if place.is_dir() else self._from_zip(name) as image:
            return upright_size(image)

    @contextmanager
    def opened(self, name: str) -> Iterator[Image.Image]:
        """The image as PIL opens it, pixels not yet read."""
        place, path = self._at(name)
        if not place.is_dir():
            with self._from_zip(name) as image:
                yield image
            return
        with open_image(place / path) as image:
            try:
                yield image
            except InputError:
                raise
            except UNREADABLE as error:
                raise InputError(f"{place / path}: cannot be read as an image ({error})") from None

    def where(self, name: str) -> str:
        """The file's name for a message."""
        place, path = self._at(name)
        return str(place / path)

    @property
    def described(self) -> str:
        return ", ".join(map(str, self.places))

    def _find(self, name: str) -> int | None:
        key = name.encode()
        row = int(np.searchsorted(self._names, key)) if len(self._names) else 0
        return row if row < len(self._names) and self._names[row] == key else None

    def _row(self, name: str) -> int:
        row = self._find(name)
        if row is None:
            raise InputError(f"there is no image {name} in {self.described}")
        return row

    def _at(self, name: str) -> tuple[Path, str]:
        row = self._row(name)
        return self.places[self._place[row]], self._paths[row].decode()

    @contextmanager
    def _from_zip(self, name: str) -> Iterator[Image.Image]:
        place, path = self._at(name)
        try:
            with Image.open(io.BytesIO(self._unpacked(name))) as image:
                yield image
        except InputError:
            raise
        except UNREADABLE as error:
            raise InputError(f"{place}: {path} in it cannot be read as an image ({error})") from None

    def _unpacked(self, name: str) -> bytes:
        row = self._row(name)
        file = self._files[self._place[row]]
        key = os.getpid(), file
        if key not in self._open:
            self._open[key] = os.open(file, os.O_RDONLY)
        start, length = int(self._start[row]), int(self._packed[row])
        content = _pread(self._open[key], length, start + _header(self._open[key], start))
        if self._method[row] == zipfile.ZIP_DEFLATED:
            content = zlib.decompress(content, wbits=-zlib.MAX_WBITS)
        elif self._method[row] != zipfile.ZIP_STORED:
            raise zipfile.BadZipFile(f"compressed in way {self._method[row]} of zip files, want stored or deflated")
        if zlib.crc32(content) != self._crc[row]:
            raise zipfile.BadZipFile("its check sum is wrong")
        return content

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}

    def __del__(self) -> None:
        for (process, _), handle in getattr(self, "_open", {}).items():
            if process == os.getpid():
                os.close(handle)


def exists(place: Path) -> bool:
    """Whether there is such a place: a folder, a zip, or a zip in a zip."""
    file = _file_of(place)
    if file == place:
        return place.exists()
    inside = place.relative_to(file).as_posix()
    return any(path == inside for path, *_ in _listed(file))


def _file_of(place: Path) -> Path:
    """The zip that a place lies in, or itself."""
    return next((parent for parent in place.parents if parent.suffix == ".zip" and parent.is_file()), place)


def _listed(place: Path) -> list[tuple[str, int, int, int, int]]:
    """(path, start, packed size, check sum, method) of each file; zeros in a folder."""
    if place.is_dir():
        return [(name, 0, 0, 0, 0) for name in sorted(os.listdir(place))]
    file = _file_of(place)
    try:
        with open(file, "rb") as handle:
            part = _Part(handle, 0, file.stat().st_size)
            if file != place:
                part = _inner(part, place.relative_to(file).as_posix(), place)
            with zipfile.ZipFile(part) as archive:
                entries = archive.infolist()
    except (OSError, zipfile.BadZipFile) as error:
        reason = "no zip file, or only a part of one" if isinstance(error, zipfile.BadZipFile) else error
        raise InputError(f"{place}: cannot be read as images ({reason})") from None
    base = part.start
    return [(e.filename, base + e.header_offset, e.compress_size, e.CRC, e.compress_type) for e in entries if not e.is_dir()]


def _inner(part: "_Part", path: str, place: Path) -> "_Part":
    """The bytes of a zip that lies in another one."""
    with zipfile.ZipFile(part) as outer:
        try:
            entry = outer.getinfo(path)
        except KeyError:
            raise InputError(f"there is no {path} in {place.parent}") from None
    if entry.compress_type != zipfile.ZIP_STORED:
        raise InputError(f"{place} is compressed once more, and cannot be read in place: unpack the outer zip, not this one")
    start = entry.header_offset + _header(part.handle.fileno(), entry.header_offset)
    return _Part(part.handle, start, entry.file_size)


def _header(handle: int, start: int) -> int:
    """How many bytes of a zip's entry stand before its content."""
    header = _pread(handle, LOCAL_HEADER, start)
    if header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile("nothing begins where the list of files says it does")
    return LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def _pread(handle: int, length: int, start: int) -> bytes:
    content = os.pread(handle, length, start)
    while len(content) < length:  # the system gives 2 GB at most at once
        more = os.pread(handle, length - len(content), start + len(content))
        if not more:
            raise zipfile.BadZipFile("the file ends before it")
        content += more
    return content


class _Part(io.RawIOBase):
    """``length`` bytes of an open file from ``start`` on, as a file."""

    def __init__(self, handle: io.BufferedReader, start: int, length: int) -> None:
        self.handle, self.start, self.length, self.position = handle, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        if self.position < 0:
            raise OSError("a place before the file's begin")
        return self.position

    def readinto(self, buffer) -> int:
        count = max(0, min(len(buffer), self.length - self.position))
        content = os.pread(self.handle.fileno(), count, self.start + self.position)
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)
