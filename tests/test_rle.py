"""Run lengths against pycocotools, round trips and known codes without it, and counts that are wrong."""

import json
import time

import numpy as np
import pytest

from pmpseg import rle
from pmpseg.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools
RNG = np.random.default_rng(0)


def masks() -> list[np.ndarray]:
    """Empty, full, thin, noisy and blocky masks of several shapes."""
    shapes = [(1, 1), (1, 7), (7, 1), (5, 8), (64, 48), (333, 517)]
    made = [np.zeros(shape, bool) for shape in shapes] + [np.ones(shape, bool) for shape in shapes]
    made += [RNG.random(shape) < density for shape in shapes for density in (0.02, 0.5, 0.98)]
    made += [RNG.random(RNG.integers(1, 60, 2)) < density for density in (0.01, 0.2, 0.5, 0.9) for _ in range(5)]
    y, x = np.mgrid[:333, :517]
    made += [(y - 150) ** 2 + (x - 200) ** 2 < 90**2, (x // 20) % 2 == 0, (y // 20) % 2 == 1]
    blocks = np.zeros((500, 400), bool)
    blocks[100:450, 50:390] = True  # runs above 31 and above 1023: several groups of 5 bits
    blocks[200:210, 100:300] = False
    return [*made, np.eye(9, dtype=bool), blocks, ~blocks]


def test_round_trip() -> None:
    for mask in masks():
        decoded = rle.decode(rle.encode(mask))
        assert decoded.dtype == bool and np.array_equal(decoded, mask)


def test_same_as_pycocotools() -> None:
    reference = pytest.importorskip("pycocotools.mask", reason="pycocotools is the reference")
    for mask in masks():
        wanted = reference.encode(np.asfortranarray(mask.astype(np.uint8)))
        ours = rle.encode(mask)
        assert ours == {"size": list(mask.shape), "counts": wanted["counts"].decode()}
        assert np.array_equal(rle.decode(wanted), mask)  # bytes, as pycocotools gives them
        assert np.array_equal(reference.decode(ours).astype(bool), mask)


def test_known_code() -> None:
    assert rle.encode(np.array([[0, 1], [1, 1]])) == {"size": [2, 2], "counts": "13"}
    assert rle.decode({"size": [2, 2], "counts": "13"}).tolist() == [[False, True], [True, True]]


def test_uncompressed() -> None:
    mask = rle.decode({"size": [2, 3], "counts": [1, 2, 3]})
    assert mask.dtype == bool
    assert mask.tolist() == [[False, True, False], [True, False, False]]
    assert rle.decode({"size": [0, 4], "counts": []}).shape == (0, 4)
    assert rle.decode(rle.encode(np.zeros((0, 4), bool))).shape == (0, 4)


def test_real_crowds_against_pycocotools(shared) -> None:
    reference = pytest.importorskip("pycocotools.mask", reason="pycocotools is the reference")
    content = json.loads(shared("data", "coco_small", "annotations", "instances_val.json").read_text())
    crowds = [a["segmentation"] for a in content["annotations"] if a["iscrowd"]]
    assert crowds
    for crowd in crowds:
        theirs = reference.decode(reference.frPyObjects(crowd, *crowd["size"]))
        assert np.array_equal(rle.decode(crowd), theirs.astype(bool))


@pytest.mark.parametrize(
    "counts", [[1, 2], [7], [-1, 7], "f", "PQ", "é", "\x01", "o" * 20 + "0", None, [["a"]]], ids=repr
)
def test_wrong_counts(counts: object) -> None:
    with pytest.raises(InputError):
        rle.decode({"size": [2, 3], "counts": counts})


def test_wrong_length_is_named() -> None:
    with pytest.raises(InputError, match=r"add up to 4 pixels.*2 x 3"):
        rle.decode({"size": [2, 3], "counts": [1, 3]})


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
