"""COCO's polygons: pixels by their centres, against a slow reference and pycocotools."""

import json

import numpy as np
import pytest

from pmpseg.data.coco import polygon_mask

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools


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


def test_real_polygons_against_pycocotools(shared):
    reference = pytest.importorskip("pycocotools.mask", reason="pycocotools is the reference")
    content = json.loads(shared("data", "coco_small", "annotations", "instances_val.json").read_text())
    shapes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    scores = []
    for annotation in content["annotations"]:
        if annotation["iscrowd"]:
            continue
        shape, polygons = shapes[annotation["image_id"]], annotation["segmentation"]
        theirs = reference.decode(reference.frPyObjects(polygons, *shape)).any(axis=-1)
        ours = np.any([polygon_mask(np.reshape(polygon, (-1, 2)), *shape) for polygon in polygons], axis=0)
        if theirs.sum() >= 20:
            scores.append((ours & theirs).sum() / (ours | theirs).sum())
    assert np.mean(scores) > 0.98
