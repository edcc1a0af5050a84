"""Visual prompts against numpy, OpenCV and PIL by hand; image prompts from files and arrays, and one-line errors."""

import dataclasses

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from pmpseg.errors import InputError
from pmpseg.image_prompts import ImagePrompt, MixedPrompt
from pmpseg.visual_prompts import PRESETS, VisualPrompt, visual_prompt

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
# sigma, background, context, as papers.md 3.4 gives them; not read from PRESETS
BY_HAND = {
    "crop_blur_highlight": (3, 0.1, 0.1),
    "blur3_highlight01": (3, 0.1, None),
    "blur3_highlight": (3, 0.5, None),
    "blur_highlight": (1, 0.5, None),
    "blur3": (3, 1, None),
    "darken50": (0, 0.5, None),
    "darken10": (0, 0.1, None),
    "darken0": (0, 0, None),
    "crop": (0, 1, 0.1),
    "crop_large": (0, 1, 0.5),
    "crop_blur1": (1, 1, 0.1),
    "crop_blur3": (3, 1, 0.1),
    "crop_darken10": (0, 0.1, 0.1),
    "none": (0, 1, None),
}
MASKS = {  # name: (H, W, rows, columns)
    "inside": (40, 56, slice(12, 25), slice(20, 33)),
    "wide at a border": (40, 56, slice(30, 40), slice(10, 47)),
    "one pixel in a corner": (40, 56, slice(0, 1), slice(55, 56)),
    "tall": (61, 33, slice(3, 60), slice(4, 9)),
    "smaller than the kernel": (6, 9, slice(1, 3), slice(2, 7)),
    "a line": (1, 20, slice(0, 1), slice(4, 9)),
}


def example(name: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3) float and a mask (H, W) with a hole, so that its box is not all of it."""
    height, width, rows, columns = MASKS[name]
    image = np.random.default_rng(seed).random((height, width, 3)).astype(np.float32)
    mask = np.zeros((height, width), bool)
    mask[rows, columns] = True
    mask[(rows.start + rows.stop) // 2, columns.start + 1 : columns.stop - 1] = False
    return image, mask


def crop_by_hand(image: np.ndarray, mask: np.ndarray, context: float | None) -> np.ndarray:
    ys, xs = np.nonzero(mask)
    if context is None:
        return image
    y0, y1, x0, x1 = ys.min(), ys.max() + 1, xs.min(), xs.max() + 1
    dy, dx = int(np.ceil(round(context * (y1 - y0), 9))), int(np.ceil(round(context * (x1 - x0), 9)))
    return image[max(0, y0 - dy) : y1 + dy, max(0, x0 - dx) : x1 + dx]


def square_by_hand(image: np.ndarray, size: int) -> np.ndarray:
    side = max(image.shape[:2])
    top, left = (side - image.shape[0]) // 2, (side - image.shape[1]) // 2
    square = np.zeros((side, side, 3), np.float32)
    square[top : top + image.shape[0], left : left + image.shape[1]] = image
    channels = [Image.fromarray(square[..., c]).resize((size, size), Image.Resampling.BILINEAR) for c in range(3)]
    return np.stack([np.asarray(c) for c in channels], -1)


def prompt_by_hand(image: np.ndarray, mask: np.ndarray, sigma: float, background: float, context: float | None, size: int):
    """In the order of the paper, for pixels of any range; 0 is what the background is darkened and padded to."""
    blurred = cv2.GaussianBlur(image, (15, 15), sigma) if sigma else image
    shown = np.where(mask[..., None], image, np.float32(background) * blurred)
    return square_by_hand(crop_by_hand(shown, mask, context), size)


def run(image: np.ndarray, mask: np.ndarray, preset, size: int, **options) -> np.ndarray:
    out = visual_prompt(torch.from_numpy(image).permute(2, 0, 1)[None], torch.from_numpy(mask)[None], preset, size, **options)
    assert out.shape == (1, 3, size, size)
    return out[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("size", [24, 64])  # most crops grow to 64, most images shrink to 24
@pytest.mark.parametrize("preset", BY_HAND)
def test_presets_are_what_opencv_and_pil_give(preset, size, name):
    image, mask = example(name)
    expected = prompt_by_hand(image, mask, *BY_HAND[preset], size)
    assert np.abs(run(image, mask, preset, size) - expected).max() < 2e-5


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("preset", BY_HAND)
def test_with_a_mean_it_is_done_to_the_normalised_image(preset, name):
    image, mask = example(name)
    normalised = ((image - MEAN) / STD).astype(np.float32)
    expected = prompt_by_hand(normalised, mask, *BY_HAND[preset], 32) * STD + MEAN
    given = run(image, mask, preset, 32, mean=MEAN.tolist())
    assert np.abs(given - expected).max() < 2e-5
    if BY_HAND[preset][1] < 1:
        assert np.abs(given - run(image, mask, preset, 32)).max() > 0.05


def test_highlight_is_the_formula_of_the_papers_code():
    image, mask = example("inside")
    expected = image * 0.15 + 0.85 * image * mask[..., None]
    assert np.abs(run(image, mask, "highlight", 56) - square_by_hand(expected, 56)).max() < 2e-5


@pytest.mark.parametrize("longer, reach", [(40, 1), (140, 2), (352, 5)])
def test_outline_is_red_around_the_object_and_leaves_the_rest(longer, reach):
    image = np.random.default_rng(0).random((longer, longer, 3)).astype(np.float32) * 0.9
    mask = np.zeros((longer, longer), bool)
    mask[10:20, 0:15] = mask[30:31, 30:31] = True
    given = run(image, mask, "outline", longer)
    ys, xs = np.nonzero(mask)
    far = np.maximum(np.abs(np.arange(longer)[:, None, None] - ys), np.abs(np.arange(longer)[:, None] - xs)).min(-1)
    line = (far > 0) & (far <= reach)
    assert (given[line] == [1, 0, 0]).all() and np.allclose(given[~line], image[~line], atol=1e-6)


def test_dye_mixes_red_into_the_object_only():
    image, mask = example("inside")
    expected = np.where(mask[..., None], image / 2 + np.float32([0.5, 0, 0]), image)
    assert np.abs(run(image, mask, "dye", 56) - square_by_hand(expected, 56)).max() < 2e-5
    assert np.abs(run(image[:40, :40], mask[:40, :40], "dye", 40, mean=MEAN.tolist()) - expected[:40, :40]).max() < 2e-5


def test_every_preset_is_tested_and_no_two_are_the_same():
    assert set(PRESETS) == set(BY_HAND) | {"highlight", "outline", "dye"}
    assert len(set(PRESETS.values())) == len(PRESETS)


def test_nearest_takes_pixels_as_they_are():
    image, mask = example("inside")
    crop = crop_by_hand(image, mask, 0.1)
    side = max(crop.shape[:2])
    assert crop.shape[0] == crop.shape[1] == 17
    pick = np.floor(np.arange(40) * side / 40).astype(int)
    assert np.array_equal(run(image, mask, "crop", 40, nearest=True), crop[pick][:, pick])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_batch_is_its_images_one_by_one(preset):
    pairs = [example(name, seed) for seed, name in enumerate(["inside", "wide at a border", "one pixel in a corner"])]
    images = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image, _ in pairs])
    masks = torch.stack([torch.from_numpy(mask) for _, mask in pairs])
    together = visual_prompt(images, masks, preset, 32)
    for n, (image, mask) in enumerate(pairs):
        assert np.allclose(together[n].permute(1, 2, 0), run(image, mask, preset, 32), atol=1e-6)
    # none of them is a neighbour's
    assert (together[0] - together[1]).abs().max() > 0.1 < (together[1] - together[2]).abs().max()


@pytest.mark.parametrize("preset", PRESETS)
def test_flips_commute(preset):
    """Where the box's sides differ by an even number: an odd pixel of padding has to go to one side."""
    image, mask = example("inside")
    out = run(image, mask, preset, 33)
    for axis in (0, 1):
        flipped = run(np.flip(image, axis).copy(), np.flip(mask, axis).copy(), preset, 33)
        assert np.abs(flipped - np.flip(out, axis)).max() < 1e-5
    assert np.abs(out - np.flip(out, 1)).max() > 0.1


@pytest.mark.parametrize("context, side, grow", [(0.1, 10, 1), (0.1, 30, 3), (0.1, 61, 7), (0.5, 7, 4), (0.07, 100, 7)])
def test_a_crop_grows_by_whole_pixels(context, side, grow):
    """Outwards; 0.07 * 100 is a little more than 7, and that must not cost a pixel."""
    image = np.random.default_rng(0).random((200, 200, 3)).astype(np.float32)
    mask = np.zeros((200, 200), bool)
    mask[18 : 18 + side, 18 : 18 + side] = True
    expected = image[18 - grow : 18 + side + grow, 18 - grow : 18 + side + grow]
    given = run(image, mask, VisualPrompt(context=context), expected.shape[0])
    assert np.abs(given - expected).max() < 1e-6


@pytest.mark.parametrize("preset", PRESETS)
def test_an_empty_mask_and_a_full_one_mean_the_whole_image(preset):
    image, _ = example("inside")
    empty, full = np.zeros((40, 56), bool), np.ones((40, 56), bool)
    assert np.array_equal(run(image, empty, preset, 24), run(image, full, preset, 24))
    if preset != "dye":
        assert np.array_equal(run(image, full, preset, 24), run(image, full, "none", 24))


@pytest.mark.parametrize("mean", [None, (0.5, 0.4, 0.3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_and_autocast(dtype, mean):
    image, mask = example("inside")
    images, masks = torch.from_numpy(image).permute(2, 0, 1)[None].to(dtype), torch.from_numpy(mask)[None]
    expected = visual_prompt(images.float(), masks, size=32, mean=mean)
    with torch.autocast("cpu", torch.bfloat16):
        given = visual_prompt(images, masks, size=32, mean=mean)
    assert given.dtype == dtype and torch.equal(given, expected.to(dtype))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("preset", PRESETS)
def test_a_gpu_gives_the_same(preset):
    image, mask = example("wide at a border")
    images, masks = torch.from_numpy(image).permute(2, 0, 1)[None], torch.from_numpy(mask)[None]
    given = visual_prompt(images.cuda(), masks.cuda(), preset, 32).cpu()
    assert (given - visual_prompt(images, masks, preset, 32)).abs().max() < 1e-3  # cuDNN's convolutions may be TF32


def test_no_images_give_none():
    assert visual_prompt(torch.zeros(0, 3, 8, 8), torch.zeros(0, 8, 8, dtype=torch.bool), size=16).shape == (0, 3, 16, 16)


def test_settings_of_ones_own():
    image, mask = example("inside")
    given = run(image, mask, dataclasses.replace(PRESETS["crop"], context=0.3, background=0.2), 32)
    assert np.abs(given - prompt_by_hand(image, mask, 0, 0.2, 0.3, 32)).max() < 2e-5


IMAGES, INSIDE = torch.zeros(2, 3, 8, 8), torch.ones(2, 8, 8, dtype=torch.bool)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((IMAGES, INSIDE, "crop_blur_higlight"), "did you mean 'crop_blur_highlight'"),
        ((IMAGES, INSIDE, "zzz"), "want one of crop_blur_highlight, blur3_highlight01"),
        ((IMAGES.byte(), INSIDE), "float in [0, 1]"),
        ((IMAGES[0], INSIDE), "want (N, 3, H, W)"),
        ((IMAGES, INSIDE.float()), "want (2, 8, 8) of bool"),
        ((IMAGES, INSIDE[:1]), "want (2, 8, 8) of bool"),
        ((IMAGES, INSIDE, "crop", 0), "want 1 or more pixels"),
        ((IMAGES, INSIDE, "crop", 8, (0.5,)), "three numbers"),
    ],
)
def test_what_cannot_be_prompted(arguments, said):
    with pytest.raises(InputError) as error:
        visual_prompt(*arguments)
    assert said in str(error.value) and "\n" not in str(error.value)


# ---- ImagePrompt and MixedPrompt

MASK = np.zeros((6, 8), bool)
MASK[1:4, 2:7] = True
PIXELS = np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def save(folder, name: str, picture: Image.Image, **options):
    picture.save(folder / name, **options)
    return folder / name


def painted(mask: np.ndarray, value: int = 255) -> np.ndarray:
    return np.where(mask, np.uint8(value), np.uint8(0))


def mask_pictures() -> dict[str, Image.Image]:
    grey, faint = painted(MASK), painted(MASK, 1)
    colour = np.zeros((6, 8, 3), np.uint8)
    colour[MASK] = (0, 0, 200)
    palette = Image.fromarray(painted(~MASK, 1)).convert("P")
    palette.putpalette([255, 255, 255, 0, 0, 0])  # number 0 is white here, and black is 1
    transparent = np.dstack([np.full((6, 8, 3), 90, np.uint8), grey])
    opaque = np.dstack([colour, np.full((6, 8), 255, np.uint8)])
    return {
        "one bit": Image.fromarray(MASK),
        "grey": Image.fromarray(grey),
        "faint": Image.fromarray(faint),
        "16 bits": Image.fromarray(painted(MASK).astype(np.uint16) * 256),
        "colour": Image.fromarray(colour),
        "palette": palette,
        "transparent": Image.fromarray(transparent),
        "grey with alpha": Image.fromarray(np.dstack([np.full((6, 8), 7, np.uint8), grey]), "LA"),
        "opaque": Image.fromarray(opaque),
    }


@pytest.mark.parametrize("kind", mask_pictures())
def test_masks_from_pictures(tmp_path, kind):
    picture = mask_pictures()[kind]
    path = save(tmp_path, "mask.png", picture)
    for mask in (path, str(path), picture):
        image, read = ImagePrompt(PIXELS, mask).tensors()
        assert read.shape == (1, 6, 8) and read.dtype == torch.bool and np.array_equal(read[0].numpy(), MASK)
    assert image.shape == (1, 3, 6, 8) and image.dtype == torch.float32
    assert np.array_equal((image[0] * 255).round().byte().permute(1, 2, 0).numpy(), PIXELS)


@pytest.mark.parametrize("mask", [MASK, MASK.astype(np.uint8), MASK.astype(np.int64) * 3, torch.from_numpy(MASK)])
def test_masks_from_arrays(mask):
    assert np.array_equal(ImagePrompt(PIXELS, mask).tensors()[1][0], MASK)


def test_no_mask_means_the_whole_image(tmp_path):
    image, mask = ImagePrompt(save(tmp_path, "image.png", Image.fromarray(PIXELS))).tensors()
    assert mask.all() and mask.shape == (1, 6, 8) and torch.equal(image, ImagePrompt(PIXELS).tensors()[0])


def test_a_prompt_from_files_goes_through_a_preset(tmp_path):
    prompt = ImagePrompt(PIXELS, save(tmp_path, "mask.png", Image.fromarray(MASK)))
    expected = prompt_by_hand(PIXELS.astype(np.float32) / 255, MASK, 3, 0.1, 0.1, 24)
    assert np.abs(visual_prompt(*prompt.tensors(), size=24)[0].permute(1, 2, 0).numpy() - expected).max() < 2e-5


def bad_prompts(folder) -> list[tuple[ImagePrompt, str]]:
    (folder / "text.png").write_text("no picture")
    small = save(folder, "small.png", Image.fromarray(MASK[:3]))
    black = save(folder, "black.png", Image.fromarray(np.zeros((6, 8), np.uint8)))
    jpeg = save(folder, "mask.jpg", Image.fromarray(painted(MASK)), format="JPEG")
    whole = save(folder, "whole.png", Image.fromarray(painted(MASK)))
    (folder / "half.png").write_bytes(whole.read_bytes()[:60])
    return [
        (ImagePrompt(folder / "none.jpg"), "none.jpg: no such image"),
        (ImagePrompt(PIXELS, folder / "none.png"), "none.png: no such mask"),
        (ImagePrompt(PIXELS, folder / "text.png"), "text.png: cannot be read as a mask: give a PNG"),
        (ImagePrompt(PIXELS, folder / "half.png"), "half.png: cannot be read as a mask: give a PNG"),
        (ImagePrompt(PIXELS, folder), "cannot be read as a mask"),
        (ImagePrompt(PIXELS, small), "small.png: got 8 x 3 pixels for an image of 8 x 6"),
        (ImagePrompt(PIXELS, MASK.T), "mask: got 6 x 8 pixels for an image of 8 x 6"),
        (ImagePrompt(PIXELS, black), "black.png: got an empty mask"),
        (ImagePrompt(PIXELS, np.zeros((6, 8), bool)), "mask: got an empty mask"),
        (ImagePrompt(PIXELS, jpeg), "mask.jpg: JPEG leaves specks"),
        (ImagePrompt(PIXELS, MASK.astype(float)), "float64, want (H, W) of bool or integers"),
        (ImagePrompt(PIXELS, MASK[None]), "(1, 6, 8) of bool, want (H, W)"),
    ]


@pytest.mark.parametrize("number", range(12))
def test_prompts_that_cannot_be_read(tmp_path, number):
    prompt, said = bad_prompts(tmp_path)[number]
    with pytest.raises(InputError) as error:
        prompt.tensors()
    assert said in str(error.value) and "\n" not in str(error.value)


def test_mixed_prompts_are_checked():
    prompt = ImagePrompt(PIXELS, MASK)
    assert MixedPrompt("a circle", [prompt]).text_weight == 0.5
    assert MixedPrompt(None, [prompt, prompt], 0).text is None and not MixedPrompt("a circle", [], 1).images
    for arguments, said in (
        ((None, []), "neither text nor images"),
        ((" ", [prompt]), "a phrase that is not blank"),
        (("a", [prompt], 1.5), "text_weight: got 1.5, want a number from 0"),
        (("a", [prompt], float("nan")), "text_weight: got nan"),
        (("a", prompt), "want a list of ImagePrompt"),
        (("a", ["image.png"]), "want a list of ImagePrompt"),
    ):
        with pytest.raises(InputError) as error:
            MixedPrompt(*arguments)
        assert said in str(error.value) and "\n" not in str(error.value)


def test_the_defaults_do_nothing():
    assert VisualPrompt() == PRESETS["none"]
