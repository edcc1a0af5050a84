"""COCO run-length encoding of masks, without pycocotools (which the tests compare it with).

A mask is read column by column; the counts are the lengths of its runs of 0, 1, 0, 1, ... (the first may be
0). In the compressed form each count from the fourth on is written as its difference to the count two before
it, so that neighbouring columns give small numbers, and each number as a string of characters with five bits
each, lowest first: ``chr(48 + bits + 32 * more)``, the highest bit of the last character being the sign.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pmpseg.errors import InputError

BITS, MORE, SIGN = 31, 32, 16  # of one character


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Mask (H, W), bool or 0/1 -> ``{"size": [H, W], "counts": str}``. Raises ``InputError`` for another
    shape.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2:
        raise InputError(f"a mask to encode must have shape (H, W), got {mask.shape}")
    pixels = mask.astype(bool).ravel(order="F")
    # Has 0 where a mask begins with 1: the first run is empty then.
    changes = np.flatnonzero(np.diff(pixels, prepend=False))
    counts = np.diff(changes, prepend=0, append=pixels.size)
    return {"size": [int(side) for side in mask.shape], "counts": _to_string(counts)}


def decode(rle: Mapping[str, Any]) -> np.ndarray:
    """``{"size": [H, W], "counts": ...}`` -> mask (H, W) bool. Counts may be a string, bytes or a list of run
    lengths.

    Raises ``InputError`` where the counts are malformed or do not add up to H x W.
    """
    runs = run_lengths(rle)
    height, width = (int(side) for side in rle["size"])
    if (runs < 0).any() or runs.sum() != height * width:
        raise InputError(
            f"the runs of an RLE add up to {runs.sum()} pixels, but its size is {height} x {width}"
        )
    values = np.arange(len(runs)) % 2 == 1  # runs of 0 and 1 in turn
    return np.repeat(values, runs).reshape(height, width, order="F")


def run_lengths(rle: Mapping[str, Any]) -> np.ndarray:
    """The lengths of the runs of 0, 1, 0, ... (N,) int64, however they are written. Raises ``InputError`` as ``decode`` does, but
    for their sum.
    """
    try:
        _, _ = (int(side) for side in rle["size"])
        counts = rle["counts"]
        return _from_string(counts) if isinstance(counts, str | bytes) else np.asarray(counts, dtype=np.int64)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"not a COCO RLE, which is {{'size': [H, W], 'counts': ...}}: {error!r}") from None


def _to_string(counts: np.ndarray) -> str:
    numbers = counts.copy()
    numbers[3:] -= counts[1:-2]
    columns, used = [], []  # the first character of every number, the second of every number, ...
    more = np.ones(len(numbers), dtype=bool)
    while more.any():
        used.append(more)
        bits = numbers & BITS
        numbers = numbers >> 5
        more = more & (numbers != np.where(bits & SIGN, -1, 0))  # until only the sign is left
        columns.append(48 + bits + MORE * more)
    if not columns:
        return ""
    characters = np.stack(columns, axis=1)[np.stack(used, axis=1)]
    return characters.astype(np.uint8).tobytes().decode("ascii")


def _from_string(text: str | bytes) -> np.ndarray:
    codes = np.frombuffer(text.encode("ascii") if isinstance(text, str) else text, dtype=np.uint8)
    characters = codes.astype(np.int64) - 48
    last = characters & MORE == 0
    if (characters < 0).any() or (characters > 63).any() or not last[-1:].all():
        raise ValueError("a character of the counts is out of range, or their end is missing")
    ends = np.flatnonzero(last)
    lengths = np.diff(ends, prepend=-1)
    if (lengths > 12).any():
        raise ValueError("a count is larger than 64 bits")
    # The place of each character in its number.
    place = np.arange(len(characters)) - np.repeat(ends - lengths + 1, lengths)
    numbers = np.zeros(len(ends), dtype=np.int64)
    np.add.at(numbers, np.repeat(np.arange(len(ends)), lengths), (characters & BITS) << (5 * place))
    numbers -= np.where(characters[ends] & SIGN, 1 << (5 * lengths), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])  # undo the differences; the first count stands alone
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers
