"""COCO's run-length codes and polygons, against pycocotools where it is installed."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from pmpseg.data.coco import polygon_mask
from pmpseg.rle import decode as decode_rle
from pmpseg.rle import encode as encode_rle
from pmpseg.errors import InputError

SHARED = Path(os.environ.get("PMPSEG_SHARED", Path(__file__).parents[2] / "shared" / "data"))
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools


def masks() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    made = [np.zeros((5, 7), bool), np.ones((5, 7), bool), np.ones((1, 1), bool), np.eye(9, dtype=bool)]
    made += [
        rng.random((rng.integers(1, 60), rng.integers(1, 60))) < p
        for p in (0.01, 0.2, 0.5, 0.9)
        for _ in range(5)
    ]
    blocks = np.zeros((500, 400), bool)
    blocks[100:450, 50:390] = True  # runs above 31 and above 1023: several groups of 5 bits
    blocks[200:210, 100:300] = False
    return [*made, blocks, ~blocks]


@pytest.mark.parametrize("mask", masks(), ids=lambda mask: "x".join(map(str, mask.shape)))
def test_round_trip(mask):
    decoded = decode_rle(encode_rle(mask))
    assert decoded.dtype == bool and np.array_equal(decoded, mask)


def test_known_code():
    mask = np.array([[0, 1], [1, 1]])
    assert decode_rle({"size": [2, 2], "counts": [1, 3]}).tolist() == mask.astype(bool).tolist()
    assert encode_rle(mask) == {"size": [2, 2], "counts": "13"}


def test_same_as_pycocotools():
    reference = pytest.importorskip("pycocotools.mask", reason="pycocotools is the reference")
    for mask in masks():
        theirs = reference.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert encode_rle(mask)["counts"].encode() == theirs["counts"]
        assert np.array_equal(decode_rle(theirs), mask)
        assert np.array_equal(reference.decode(encode_rle(mask)).astype(bool), mask)


def test_wrong_length_is_named():
    with pytest.raises(InputError, match=r"add up to 4 pixels.*2 x 3"):
        decode_rle({"size": [2, 3], "counts": [1, 3]})


def test_polygon_by_pixel_centres():
    square = polygon_mask(np.array([[1, 1], [4, 1], [4, 3], [1, 3]]), 5, 6)
    expected = np.zeros((5, 6), bool)
    expected[1:3, 1:4] = True
    assert np.array_equal(square, expected)
    assert np.array_equal(
        polygon_mask(np.array([[-9, -9], [20, -9], [20, 20], [-9, 20]]), 5, 6), np.ones((5, 6), bool)
    )
    assert not polygon_mask(np.array([[2, 2], [2.2, 2], [2.2, 2.2]]), 5, 6).any()
    assert not polygon_mask(np.array([[7, 1], [9, 1], [9, 4]]), 5, 6).any()


def test_polygon_against_a_slow_reference():
    rng = np.random.default_rng(1)
    for _ in range(20):
        points = rng.uniform(-3, 15, (rng.integers(3, 9), 2))
        expected = np.zeros((11, 13), bool)
        for row, column in np.ndindex(11, 13):
            for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
                if (y0 <= row + 0.5) != (y1 <= row + 0.5):
                    crossing = x0 + (row + 0.5 - y0) * (x1 - x0) / (y1 - y0)
                    expected[row, column] ^= crossing <= column + 0.5
        assert np.array_equal(polygon_mask(points, 11, 13), expected)


@pytest.mark.skipif(not (SHARED / "coco_small").is_dir(), reason=f"no coco_small in {SHARED}")
def test_real_annotations_against_pycocotools():
    reference = pytest.importorskip("pycocotools.mask", reason="pycocotools is the reference")
    content = json.loads((SHARED / "coco_small/annotations/instances_val.json").read_text())
    shapes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    scores = []
    for annotation in content["annotations"]:
        shape, segmentation = shapes[annotation["image_id"]], annotation["segmentation"]
        theirs = reference.frPyObjects(segmentation, *shape)
        if annotation["iscrowd"]:
            assert np.array_equal(decode_rle(segmentation), reference.decode(theirs).astype(bool))
            continue
        theirs = reference.decode(theirs).any(axis=-1)
        ours = np.any(
            [polygon_mask(np.reshape(polygon, (-1, 2)), *shape) for polygon in segmentation], axis=0
        )
        if theirs.sum() >= 20:
            scores.append((ours & theirs).sum() / (ours | theirs).sum())
    assert np.mean(scores) > 0.98
