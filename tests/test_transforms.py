"""Augmentation: image, labels and masks stay together, and the seed decides everything."""

import os
import subprocess
import sys

import numpy as np
import pytest

from pmpseg.data.transforms import eval_transform, nearest, ssd_colour, train_transform


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


@pytest.mark.parametrize("seed", range(8))
def test_segments_go_where_labels_go(seed):
    sample = scene() | {"segments": np.where(scene()["labels"] == 3, -1, 70_000 + scene()["labels"].astype(np.int64))}
    result = train_transform(64, scale=(0.5, 2.0))(sample, seed)
    labels, segments = result["labels"].astype(int), result["segments"]
    assert segments.dtype == np.int64
    assert np.array_equal(segments, np.where(np.isin(labels, (3, 255)), -1, 70_000 + labels))


def test_sizes_are_chosen_from_a_list_with_a_longest_side():
    """The image is a ramp, so that its slope tells how far it was resized."""
    ramp = np.arange(100, dtype=np.int32)[None].repeat(50, axis=0)  # 50 x 100, short side 50
    sample = {"image": np.zeros((50, 100, 3), np.uint8), "labels": ramp}
    for max_size, wanted in ((None, {25, 50, 100}), (120, {25, 50, 60})):
        transform = train_transform(24, flip=0, colour=0, sizes=[25, 50, 100], max_size=max_size)
        steps = [np.diff(transform(sample, seed)["labels"][5]).sum() / 23 for seed in range(40)]
        short = {min(wanted, key=lambda side, step=step: abs(50 / side - step)) for step in steps}
        assert short == wanted
        assert all(min(abs(50 / side - step) for side in wanted) < 0.1 for step in steps)


def test_an_enlarged_crop_is_the_crop_of_the_enlarged_image():
    """Only the crop is made; it must be what resizing all of the picture gives there."""
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8), (0, 0), 2)
    labels = np.arange(4800, dtype=np.int32).reshape(60, 80)
    for factor in (0.7, 1.0, 1.3, 2.0):
        short = round(60 * factor)
        whole = round(80 * short / 60), short
        way = cv2.INTER_LINEAR if factor > 1 else cv2.INTER_AREA
        images = cv2.resize(image, whole, interpolation=way)
        maps = nearest(labels, whole[::-1])
        for seed in range(5):
            result = train_transform(40, flip=0, colour=0, sizes=[short])({"image": image, "labels": labels}, seed)
            places = [(y, x) for y, x in np.argwhere(maps == result["labels"][0, 0]) if y + 40 <= short and x + 40 <= whole[0]]
            there = [(images[y : y + 40, x : x + 40], maps[y : y + 40, x : x + 40]) for y, x in places]
            found = [crop for crop, of_labels in there if np.array_equal(of_labels, result["labels"])]
            assert found and min(np.abs(crop.astype(int) - result["image"]).max() for crop in found) <= 4


def test_a_crop_that_one_class_fills_is_drawn_anew():
    labels = np.zeros((60, 240), dtype=np.uint8)
    labels[:, 200:] = 1
    labels[:, :8] = 255
    sample = {"image": np.zeros((60, 240, 3), np.uint8), "labels": labels}

    def filled(share: float) -> float:
        transform = train_transform(60, scale=(1.0, 1.0), max_class_share=share)
        results = [transform(sample, seed)["labels"] for seed in range(60)]
        shares = [np.bincount(r[r != 255]).max() / (r != 255).sum() for r in results]
        return float(np.mean(np.array(shares) > 0.75))

    assert filled(1.0) > 0.6 and filled(0.75) < 0.4 * filled(1.0)
    all_one = {"image": sample["image"], "labels": np.zeros_like(labels)}
    assert (train_transform(60, max_class_share=0.5)(all_one, 0)["labels"] == 0).any()  # the last try is taken
    nothing = {"image": sample["image"], "labels": np.full_like(labels, 255)}
    assert (train_transform(60, max_class_share=0.5)(nothing, 0)["labels"] == 255).all()


def test_ssd_colours_stay_within_their_ranges():
    """On grey nothing but brightness and contrast shows; on a pure colour hue and saturation can be read off."""
    import colorsys

    grey = np.full((4, 4, 3), 100, np.uint8)
    values = np.array([ssd_colour(grey, np.random.default_rng(seed))[0, 0] for seed in range(400)]).astype(int)
    assert (values.max(1) == values.min(1)).all()
    assert values.min() >= 33 and values.max() <= 198 and values.min() < 50 and values.max() > 170  # (100 -+ 32) x 0.5, 1.5
    assert 0.15 < (values[:, 0] == 100).mean() < 0.35  # neither of the two, with probability 1/4
    blue = np.full((4, 4, 3), (60, 60, 180), np.uint8)
    turned = []
    for seed in range(400):
        hue, _, _ = colorsys.rgb_to_hsv(*(ssd_colour(blue, np.random.default_rng(seed))[0, 0] / 255.0))
        turned.append(360 * hue - 240)
    assert -39 < min(turned) < -30 and 30 < max(turned) < 39 and 0.35 < (np.abs(turned) < 1.1).mean() < 0.7
    assert np.array_equal(blue[0, 0], (60, 60, 180))  # the input is left as it was
    assert np.array_equal(ssd_colour(blue, np.random.default_rng(3)), ssd_colour(blue, np.random.default_rng(3)))


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
