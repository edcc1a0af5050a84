"""Reading whatever a user calls an image: a path, a PIL image or an array becomes an RGB PIL image."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import InputError


def read_image(image: "str | Path | Image.Image | np.ndarray") -> Image.Image:
    """An RGB image, upright as its EXIF says.

    ``image``: a path; a PIL image of any mode; or an array (H, W) or (H, W, 1, 3 or 4), uint8, uint16, bool, or float in
    [0, 1]. Transparent pixels are shown on white. Raises InputError for anything else, or a file that cannot be read.
    """
    if isinstance(image, (str, Path)):
        image = _open(Path(image))
    elif not isinstance(image, Image.Image):
        image = _from_array(np.asarray(image))
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits and more: PIL's own conversion clips at 255
        image = _from_array(np.asarray(image).astype(np.float32).clip(0) / (65535 if image.mode != "F" else 1))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _open(path: Path) -> Image.Image:
    if not path.exists():
        raise InputError(f"{path}: no such image")
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not an image that PIL reads" if isinstance(error, UnidentifiedImageError) else str(error)
        raise InputError(f"{path}: cannot be read as an image ({reason})") from None


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or 0 in array.shape:
        raise InputError(f"image: got an array {array.shape}, want (H, W), (H, W, 3) or (H, W, 4)")
    if array.dtype == np.uint16:
        array = array / 65535
    elif array.dtype == bool:
        array = array.astype(np.float32)
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise InputError("image: got a float array with values outside [0, 1]; divide by 255, or pass uint8")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise InputError(f"image: got an array of {array.dtype}, want uint8, uint16, bool, or float in [0, 1]")
    return Image.fromarray(array)
