"""COCO's captions by the name of their image, kept as one text and offsets: 590,000 captions take some 40 MB, not 100."""

from array import array
from collections.abc import Iterator, Mapping

import numpy as np

from pmpseg.errors import InputError

from .json_lists import visit_lists


class Captions(Mapping[str, list[str]]):
    """Image name -> its captions, in the JSON's order, for the images of a captions JSON that have any."""

    def __init__(self, content: bytes, where: str) -> None:
        names: dict[int, bytes] = {}
        text, ends, owner = bytearray(), array("q", [0]), array("q")

        def image(entry: dict) -> None:
            names[entry["id"]] = entry["file_name"].rpartition("/")[2].encode()

        def caption(entry: dict) -> None:
            owner.append(entry["image_id"])
            text.extend(" ".join(entry["caption"].split()).encode())
            ends.append(len(text))

        visit_lists(content, {"images": image, "annotations": caption}, where)
        unknown = set(owner) - names.keys()
        if unknown:
            raise InputError(f"{where} has a caption of image id {min(unknown)}, which is not in its list of images")
        owners = np.array([names[key] for key in owner], dtype=bytes)
        self._text, self._ends = bytes(text), np.array(ends)
        self._names, place = np.unique(owners, return_inverse=True)
        self._order = np.argsort(place, kind="stable")
        self._first = np.searchsorted(place[self._order], np.arange(len(self._names) + 1))

    def __getitem__(self, name: str) -> list[str]:
        key = name.encode()
        at = int(np.searchsorted(self._names, key))
        if at == len(self._names) or self._names[at] != key:
            raise KeyError(name)
        rows = self._order[self._first[at] : self._first[at + 1]]
        return [self._text[self._ends[row] : self._ends[row + 1]].decode() for row in rows]

    def __iter__(self) -> Iterator[str]:
        return (name.decode() for name in self._names)

    def __len__(self) -> int:
        return len(self._names)
