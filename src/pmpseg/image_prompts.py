"""Prompts by example as users give them: images from files or memory, with masks that show what is meant, alone or with words.

How an example is brought before an encoder's eyes is in ``visual_prompts``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .errors import InputError
from .images import read_image


@dataclass(eq=False)
class ImagePrompt:
    """An example: what the mask shows in the image.

    ``image``: anything that ``read_image`` takes. ``mask``: (H, W) bool, or integers with 0 outside; or a picture or the path of
    one, in which all that is not black is the object, or, where it has transparent pixels, all that is not transparent; None for
    the whole image.
    """

    image: "str | Path | Image.Image | np.ndarray"
    mask: "str | Path | Image.Image | np.ndarray | None" = None

    def tensors(self) -> tuple[Tensor, Tensor]:
        """The image (1, 3, H, W), float in [0, 1], and its mask (1, H, W) bool, read from their files now.

        Raises InputError for what cannot be read, and for a mask that is empty or of another size than the image.
        """
        pixels = np.asarray(read_image(self.image), np.float32) / 255
        mask = np.ones(pixels.shape[:2], bool) if self.mask is None else read_mask(self.mask)
        name = self.mask if isinstance(self.mask, str | Path) else "mask"
        if mask.shape != pixels.shape[:2]:
            (h, w), (height, width) = mask.shape, pixels.shape[:2]
            raise InputError(f"{name}: got {w} x {h} pixels for an image of {width} x {height}: give a mask of the image's size")
        if not mask.any():
            raise InputError(f"{name}: got an empty mask: mark the object with anything but black, or leave the mask out")
        return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous(), torch.from_numpy(mask)[None]


@dataclass(eq=False)
class MixedPrompt:
    """Words and examples that mean the same thing.

    The embeddings of the ``images`` are averaged; then ``text_weight`` is the text's share in the sum. It has no part where there
    is only text, or there are only images.
    """

    text: str | None
    images: Sequence[ImagePrompt]
    text_weight: float = 0.5

    def __post_init__(self) -> None:
        wrong = [x for x in self.images if not isinstance(x, ImagePrompt)] if isinstance(self.images, Sequence) else [self.images]
        if wrong:
            got = type(wrong[0]).__name__
            raise InputError(f"images: got {got}, want a list of ImagePrompt, as in [ImagePrompt('a.jpg', 'a.png')]")
        if self.text is not None and (not isinstance(self.text, str) or not self.text.strip()):
            raise InputError(f"text: got {self.text!r}, want a phrase that is not blank, or None for images only")
        if self.text is None and not self.images:
            raise InputError("a mixed prompt got neither text nor images: give one of them, or both")
        if not 0 <= self.text_weight <= 1:
            raise InputError(f"text_weight: got {self.text_weight}, want a number from 0 (images only) to 1 (text only)")


def read_mask(mask: "str | Path | Image.Image | np.ndarray") -> np.ndarray:
    """(H, W) bool of what ``ImagePrompt`` takes for a mask."""
    if isinstance(mask, str | Path):
        picture = _open_mask(Path(mask))
    elif isinstance(mask, Image.Image):
        picture = mask
    else:
        array = np.asarray(mask)
        if array.ndim != 2 or 0 in array.shape or not (array.dtype == bool or np.issubdtype(array.dtype, np.integer)):
            raise InputError(f"mask: got an array {array.shape} of {array.dtype}, want (H, W) of bool or integers, 0 outside")
        return array != 0
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        alpha = np.asarray(picture)[..., 3]
        if alpha.min() < 255:  # where all is opaque, as editors write it, the colours say more
            return alpha > 0
    if picture.mode not in ("1", "L", "F") and not picture.mode.startswith("I"):  # PIL clips 16 bits, and floats
        picture = picture.convert("RGB")  # a palette's numbers mean nothing, its black does
    pixels = np.asarray(picture) != 0
    return pixels.any(-1) if pixels.ndim == 3 else pixels


def _open_mask(path: Path) -> Image.Image:
    if not path.exists():
        raise InputError(f"{path}: no such mask")
    try:
        with Image.open(path) as picture:
            picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise InputError(f"{path}: cannot be read as a mask: give a PNG of the image's size, black outside the object") from None
    if picture.format in ("JPEG", "MPO"):
        raise InputError(f"{path}: JPEG leaves specks around a mask's edges: save it as a PNG")
    return picture
