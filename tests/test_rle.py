"""RLE against pycocotools, and what happens with counts that are wrong."""

import time

import numpy as np
import pytest

from pmpseg import rle
from pmpseg.errors import InputError

RNG = np.random.default_rng(0)


def masks() -> list[np.ndarray]:
    """Empty, full, thin, noisy and blocky masks of several shapes."""
    shapes = [(1, 1), (1, 7), (7, 1), (5, 8), (64, 48), (333, 517)]
    made = [np.zeros(shape, bool) for shape in shapes] + [np.ones(shape, bool) for shape in shapes]
    made += [RNG.random(shape) < density for shape in shapes for density in (0.02, 0.5, 0.98)]
    y, x = np.mgrid[:333, :517]
    return [*made, (y - 150) ** 2 + (x - 200) ** 2 < 90**2, (x // 20) % 2 == 0, (y // 20) % 2 == 1]


@pytest.mark.parametrize("mask", masks(), ids=lambda mask: f"{mask.shape}-{mask.sum()}")
def test_same_as_pycocotools(mask: np.ndarray) -> None:
    reference = pytest.importorskip("pycocotools.mask")
    wanted = reference.encode(np.asfortranarray(mask.astype(np.uint8)))
    ours = rle.encode(mask)
    assert ours == {"size": list(mask.shape), "counts": wanted["counts"].decode()}
    assert np.array_equal(rle.decode(ours), mask)
    assert np.array_equal(rle.decode(wanted), mask)  # bytes, as pycocotools gives them


def test_uncompressed() -> None:
    mask = rle.decode({"size": [2, 3], "counts": [1, 2, 3]})
    assert mask.dtype == bool
    assert mask.tolist() == [[False, True, False], [True, False, False]]
    assert rle.decode({"size": [0, 4], "counts": []}).shape == (0, 4)
    assert rle.decode(rle.encode(np.zeros((0, 4), bool))).shape == (0, 4)


@pytest.mark.parametrize(
    "counts", [[1, 2], [7], [-1, 7], "f", "PQ", "é", "\x01", "o" * 20 + "0", None, [["a"]]], ids=repr
)
def test_wrong_counts(counts: object) -> None:
    with pytest.raises(InputError):
        rle.decode({"size": [2, 3], "counts": counts})


def test_wrong_shapes() -> None:
    with pytest.raises(InputError, match=r"\(H, W\), got \(1, 2, 3\)"):
        rle.encode(np.zeros((1, 2, 3)))
    with pytest.raises(InputError, match="not a COCO RLE"):
        rle.decode({"counts": [6]})


def test_is_vectorised() -> None:
    """Half a million runs in well under the seconds that a Python loop over them takes."""
    mask = RNG.random((1000, 1000)) < 0.5
    started = time.perf_counter()
    assert np.array_equal(rle.decode(rle.encode(mask)), mask)
    assert time.perf_counter() - started < 2
