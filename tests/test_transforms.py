"""Augmentation: image, labels and masks stay together, and the seed decides everything."""

import os
import subprocess
import sys

import numpy as np
import pytest

from pmpseg.data.transforms import eval_transform, train_transform


def scene(height: int = 60, width: int = 80) -> dict:
    """Large blocks; the red channel of a pixel is 10 + 20 x its label, and mask n is where the label is n."""
    labels = np.kron(np.arange(12).reshape(3, 4), np.ones((height // 3, width // 4))).astype(np.uint8)
    image = np.stack([10 + 20 * labels, np.full_like(labels, 77), 255 - 20 * labels], axis=-1)
    return {
        "image": image,
        "labels": labels,
        "masks": labels == np.arange(5)[:, None, None],
        "name": "blocks",
    }


def disagreement(sample: dict) -> float:
    """Fraction of unpadded pixels whose colour does not tell their label."""
    labels, inside = sample["labels"].astype(int), sample["labels"] != 255
    told = np.round((sample["image"][..., 0].astype(int) - 10) / 20)
    return float((told != labels)[inside].mean())


@pytest.mark.parametrize("seed", range(12))
def test_image_labels_and_masks_stay_together(seed):
    sample = train_transform((48, 64), colour=0)(scene(), seed)
    assert sample["image"].shape == (48, 64, 3) and sample["image"].dtype == np.uint8
    assert sample["labels"].shape == (48, 64) and sample["labels"].dtype == np.uint8
    assert sample["masks"].shape == (5, 48, 64) and sample["masks"].dtype == bool
    assert disagreement(sample) < 0.12  # only where two blocks blend
    assert np.array_equal(sample["masks"], sample["labels"] == np.arange(5)[:, None, None])
    assert sample["name"] == "blocks"


def test_padding_is_black_ignored_and_in_no_mask():
    original = scene()
    sample = train_transform(64, scale=(0.5, 0.5), colour=0)(original, 0)
    padding = sample["labels"] == 255
    assert 0.5 < padding.mean() < 0.9
    assert (sample["image"][padding] == 0).all() and (sample["image"][~padding][:, 1] == 77).all()
    assert not sample["masks"][:, padding].any() and sample["masks"].any()
    assert np.array_equal(original["image"], scene()["image"])  # the input is left as it was


def test_same_seed_same_sample_whatever_came_before():
    transform = train_transform(48)
    first = transform(scene(), (3, 0, 7))
    others = [transform(scene(), (3, 1, 7)), transform(scene(), (3, 0, 8)), transform(scene(), (4, 0, 7))]
    again = transform(scene(), (3, 0, 7))
    elsewhere = train_transform(48)(scene(), (3, 0, 7))
    for key in ("image", "labels", "masks"):
        assert np.array_equal(first[key], again[key]) and np.array_equal(first[key], elsewhere[key])
    assert not any(np.array_equal(first["image"], other["image"]) for other in others)


def test_steps_draw_independently():
    """With albumentations' own seeding every step gets one stream, which ties flip, scale and colour."""
    ramp = np.broadcast_to(np.arange(200, dtype=np.int32), (100, 200))
    sample = {"image": np.full((100, 200, 3), 100, np.uint8), "labels": ramp}
    transform = train_transform((100, 200), scale=(1.0, 2.0))
    drawn = []
    for seed in range(150):
        result = transform(sample, seed)
        row = result["labels"][50]
        drawn.append((row[0] > row[-1], result["image"].mean(), len(np.unique(row))))
    flipped, brightness, extent = np.array(drawn, dtype=float).T
    assert 0.35 < flipped.mean() < 0.65
    for one, other in ((flipped, brightness), (flipped, extent), (brightness, extent)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.3


def test_no_flip_keeps_left_and_right():
    transform = train_transform(32, scale=(1.0, 1.0), flip=0, colour=0)
    ramp = {"image": np.zeros((32, 32, 3), np.uint8), "labels": np.tile(np.arange(32), (32, 1))}
    assert all(np.array_equal(transform(ramp, seed)["labels"], ramp["labels"]) for seed in range(10))


def test_no_masks_in_no_masks_out():
    empty = {**scene(), "masks": np.zeros((0, 60, 80), bool)}
    assert train_transform(48)(empty, 0)["masks"].shape == (0, 48, 48)
    del empty["masks"]
    assert "masks" not in train_transform(48)(empty, 0)


def test_many_classes_survive():
    labels = np.arange(60 * 80, dtype=np.int32).reshape(60, 80)
    result = train_transform(60, scale=(1.0, 1.0))({"image": scene()["image"], "labels": labels}, 1)["labels"]
    assert result.dtype == np.int32 and result.max() > 4000


def test_evaluation_resizes_the_short_side():
    sample = scene()
    result = eval_transform(30)(sample)
    assert result["image"].shape == (30, 40, 3)
    assert result["labels"] is sample["labels"] and result["masks"] is sample["masks"]
    result = eval_transform(30, resize_labels=True)(sample)
    assert result["labels"].shape == (30, 40) and result["masks"].shape == (5, 30, 40)
    assert disagreement(result) < 0.2
    assert np.array_equal(eval_transform(60)(sample)["image"], sample["image"])
    tall = {"image": sample["image"].transpose(1, 0, 2)}
    assert eval_transform(45)(tall)["image"].shape == (60, 45, 3)


def test_albumentations_is_imported_for_training_only():
    code = (
        "import sys; from pmpseg.data.transforms import eval_transform; eval_transform(8);"
        "sys.exit('albumentations' in sys.modules or 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
