"""Visual prompts: how an example's mask is brought before a CLIP's eyes.

Source: CLIPSeg (arXiv 2112.10003, sec. 4, "visual prompt engineering"; code, ``datasets/utils.py``, ``evaluation_utils.py``). A
CLIP takes no mask, so the image is changed: what is outside the mask is blurred and darkened, and its box is cut out. There it
is done to the normalised image, which pulls the background towards the mean colour; here to the image itself, towards black,
unless ``mean`` is given. Letters: N images, H x W their size, S the side of the result.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .cli import did_you_mean
from .errors import InputError
from .models.region import boxes_of

KERNEL = 15  # of the blur, in pixels of the image, as the paper's code has it for every sigma
RED = (1.0, 0.0, 0.0)


@dataclass(frozen=True)
class VisualPrompt:
    """What is done to an image, in this order; the defaults do nothing.

    sigma, background: what is outside the mask is blurred (sigma in pixels, 0 for none), then multiplied by ``background``.
    dye: the share of red that is mixed into the object.
    outline: the width of a red line around the object, as a share of the image's longer side (0 for none, else at least 1 px).
    context: a crop to the mask's box, grown on each side by this share of its width and height; None for no crop.
    """

    sigma: float = 0.0
    background: float = 1.0
    dye: float = 0.0
    outline: float = 0.0
    context: float | None = None


# Those with "highlight" in their names, and crop_blur1, are modes of the paper's code, which calls the first one
# "crop_blur_highlight352" and crop_blur1 "crop". The others are rows of its Table 2; how it dyes and outlines is our reading.
PRESETS: dict[str, VisualPrompt] = {
    "crop_blur_highlight": VisualPrompt(sigma=3, background=0.1, context=0.1),
    "blur3_highlight01": VisualPrompt(sigma=3, background=0.1),
    "blur3_highlight": VisualPrompt(sigma=3, background=0.5),
    "blur_highlight": VisualPrompt(sigma=1, background=0.5),
    "highlight": VisualPrompt(background=0.15),
    "blur3": VisualPrompt(sigma=3),
    "darken50": VisualPrompt(background=0.5),  # the number is the percentage of light that is left
    "darken10": VisualPrompt(background=0.1),
    "darken0": VisualPrompt(background=0.0),
    "crop": VisualPrompt(context=0.1),
    "crop_large": VisualPrompt(context=0.5),
    "crop_blur1": VisualPrompt(sigma=1, context=0.1),
    "crop_blur3": VisualPrompt(sigma=3, context=0.1),
    "crop_darken10": VisualPrompt(background=0.1, context=0.1),
    "outline": VisualPrompt(outline=0.015),
    "dye": VisualPrompt(dye=0.5),
    "none": VisualPrompt(),
}


def visual_prompt(
    images: Tensor,
    masks: Tensor,
    preset: str | VisualPrompt = "crop_blur_highlight",
    size: int = 352,
    mean: Sequence[float] | None = None,
    nearest: bool = False,
) -> Tensor:
    """Images (N, 3, H, W), float in [0, 1], with masks (N, H, W) bool -> (N, 3, S, S) in [0, 1], of the images' type.

    The crop, or the whole image where the preset has none, is padded to a square about its middle (an odd pixel goes to the
    right or below) and resized: bilinear, antialiased where it shrinks; ``nearest`` is how the paper's code does it. An empty
    mask means the whole image, as does one that covers all of it: nothing is then outside to be changed, or to be cut off.

    ``mean``: None darkens and pads towards black. Three numbers give what comes of doing it to the image normalised with this
    mean (and whatever deviation) and undoing the normalisation afterwards: the background and the padding go towards the mean.
    Red is red in both cases. The arithmetic is float32 for any type, and under autocast.

    The blur counts in pixels of the images as they come, which in the paper are 352 on a side: a photo of thousands is hardly
    blurred unless it is made smaller first.
    """
    settings = settings_of(preset)
    _check(images, masks, size, mean)
    with torch.autocast(images.device.type, enabled=False):
        nothing = torch.tensor([0.0] * 3 if mean is None else list(mean), device=images.device).view(3, 1, 1)
        inside = masks | ~masks.flatten(1).any(1).view(-1, 1, 1)  # (N, H, W)
        shown = _show(images.float(), inside, settings, nothing)
        out = images.new_empty(len(images), 3, size, size, dtype=torch.float32)
        for n, (x0, y0, x1, y1) in enumerate(_boxes(inside, settings.context)):
            square = _to_square(shown[n, :, y0:y1, x0:x1], nothing)[None]
            mode = {"mode": "nearest"} if nearest else {"mode": "bilinear", "antialias": True}
            out[n] = F.interpolate(square, (size, size), **mode)[0]
    return out.clamp(0, 1).to(images.dtype)


def settings_of(preset: str | VisualPrompt) -> VisualPrompt:
    """Raises InputError for an unknown name."""
    if isinstance(preset, VisualPrompt):
        return preset
    if preset not in PRESETS:
        hint = did_you_mean(preset, PRESETS) or f", want one of {', '.join(PRESETS)}"
        raise InputError(f"visual prompt: got {preset!r}{hint}")
    return PRESETS[preset]


def _check(images: Tensor, masks: Tensor, size: int, mean: Sequence[float] | None) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise InputError(f"images: got {tuple(images.shape)} of {images.dtype}, want (N, 3, H, W), float in [0, 1]")
    if masks.dtype != torch.bool or masks.shape != images[:, 0].shape:
        raise InputError(f"masks: got {tuple(masks.shape)} of {masks.dtype}, want {tuple(images[:, 0].shape)} of bool")
    if size < 1 or (mean is not None and len(mean) != 3):
        raise InputError(f"size, mean: got {size}, {mean}, want 1 or more pixels, and None or three numbers")


def _show(images: Tensor, inside: Tensor, settings: VisualPrompt, nothing: Tensor) -> Tensor:
    """The whole images (N, 3, H, W) with their objects set apart; ``nothing`` (3, 1, 1) is what darkness tends to."""
    inside = inside.unsqueeze(1)  # (N, 1, H, W)
    background = images
    if settings.sigma and settings.background:
        background = _blur(images, settings.sigma)
    if settings.background != 1:
        background = nothing + settings.background * (background - nothing)
    red = torch.tensor(RED, device=images.device).view(3, 1, 1)
    thing = images + settings.dye * (red - images) if settings.dye else images
    shown = torch.where(inside, thing, background)
    if settings.outline:
        reach = max(1, round(settings.outline * max(images.shape[-2:])))
        near = F.max_pool2d(inside.float(), 2 * reach + 1, stride=1, padding=reach) > 0
        shown = torch.where(near & ~inside, red, shown)
    return shown


def _blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur; beyond its borders the image is mirrored without repeating the outermost pixels, as OpenCV has it."""
    offset = torch.arange(KERNEL, device=images.device) - KERNEL // 2
    weights = torch.exp(-((offset / sigma) ** 2) / 2)
    weights = (weights / weights.sum()).expand(3, 1, 1, KERNEL)
    height, width = images.shape[-2:]
    images = F.conv2d(images[..., _mirrored(width, images)], weights, groups=3)
    return F.conv2d(images[..., _mirrored(height, images), :], weights.transpose(2, 3), groups=3)


def _mirrored(length: int, like: Tensor) -> Tensor:
    """Indices of a line of ``length`` pixels with half a kernel more at either end, mirrored as often as it takes."""
    period = max(2 * (length - 1), 1)
    index = torch.arange(-(KERNEL // 2), length + KERNEL // 2, device=like.device) % period
    return torch.minimum(index, period - index) if length > 1 else index


def _boxes(inside: Tensor, context: float | None) -> list[tuple[int, int, int, int]]:
    """x0, y0, x1, y1 of each crop, the ends excluded, within the image."""
    height, width = inside.shape[-2:]
    if context is None or len(inside) == 0:
        return [(0, 0, width, height)] * len(inside)
    boxes = []
    for x0, y0, x1, y1 in boxes_of(inside).tolist():  # one wait for the GPU
        dx, dy = (math.ceil(context * side - 1e-6) for side in (x1 - x0, y1 - y0))  # 0.07 * 100 is 7.000000000000001
        boxes.append((max(x0 - dx, 0), max(y0 - dy, 0), min(x1 + dx, width), min(y1 + dy, height)))
    return boxes


def _to_square(image: Tensor, nothing: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    side = max(height, width)
    if height == width:
        return image
    top, left = (side - height) // 2, (side - width) // 2
    square = nothing.repeat(1, side, side)
    square[:, top : top + height, left : left + width] = image
    return square
