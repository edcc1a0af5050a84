"""Where FolderData's samples come from: a folder of masks, or a COCO instances JSON.

A source has ``files`` (its images), ``check_sizes()`` and ``read(i)``, which gives a dict of image (H, W, 3)
uint8, labels (H, W) uint8 with 255 = ignore and, where classes may overlap, masks (N, H, W) bool with their
classes (N,). All of them raise ``InputError`` with the file's name for what is wrong.

Images are read by ``read_image``, as ``predict`` reads them: upright, 16 bits scaled, transparency on white.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from pmpseg import rle
from pmpseg.data.base import IGNORE
from pmpseg.data.coco import polygon_mask
from pmpseg.errors import InputError
from pmpseg.images import read_image
from pmpseg.vocabulary import Vocabulary

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
INDEX_MODES = ("1", "L", "P", "I", "I;16")  # one channel, read as class indices
ON_ITS_SIDE = (5, 6, 7, 8)  # EXIF orientations that swap width and height


class MaskFolder:
    """Images with PNG masks of class indices, paired by name; ``ignore_label`` means ignore, as 255 does."""

    def __init__(self, images: Path, masks: Path, num_classes: int, ignore_label: int) -> None:
        self.files, self.masks = _pairs(images, masks)
        self.num_classes = num_classes
        self.ignore_label = ignore_label

    def __len__(self) -> int:
        return len(self.files)

    def check_sizes(self) -> None:
        """Compare every image with its mask (headers only)."""
        check_pairs(self.files, self.masks)

    def read(self, index: int) -> dict:
        labels = read_indices(self.masks[index])
        labels[labels == self.ignore_label] = IGNORE
        wrong = (labels != IGNORE) & ((labels < 0) | (labels >= self.num_classes))
        if wrong.any():
            found = ", ".join(map(str, np.unique(labels[wrong])[:5]))
            ignored = " and ".join(map(str, sorted({self.ignore_label, IGNORE})))
            raise InputError(
                f"{self.masks[index]} has label {found}: the labels of {self.num_classes} classes are 0.."
                f"{self.num_classes - 1}, ignored is {ignored}; mend the class list, the mask or ignore_label"
            )
        return {"image": np.array(read_image(self.files[index])), "labels": labels.astype(np.uint8)}


class CocoInstances:
    """The images of an instances JSON, with one mask for each class that occurs in an image.

    ``read(i)`` gives image (H, W, 3) uint8, labels (H, W) uint8 (instances painted from large to small; 255
    where there is none), masks (N, H, W) bool (the union of a class's instances, crowds included; they may
    overlap) and classes (N,). Categories are matched to the vocabulary by name. Raises ``InputError`` with
    the file's name for what is wrong.
    """

    def __init__(self, path: Path, content: dict, images: Path, split: str, vocabulary: Vocabulary) -> None:
        """``content`` is what ``read_instances(path)`` gave; images lie in ``images`` or its ``split``."""
        self.path = path
        class_of = {name: index for index, name in enumerate(vocabulary.names)}
        self._class_of = {}
        for category in content["categories"]:
            if category["name"] not in class_of:
                raise InputError(
                    f"{path}: category {category['name']!r} is not in the class list: add it there"
                )
            self._class_of[category["id"]] = class_of[category["name"]]
        self._images = content["images"]
        self.files = [_find(image["file_name"], [images / split, images], path) for image in self._images]
        self._annotations = defaultdict(list)
        for annotation in content["annotations"]:
            if annotation["category_id"] not in self._class_of:
                number, category = annotation["id"], annotation["category_id"]
                raise InputError(f"{path}: annotation {number} has category {category}, which is not listed")
            self._annotations[annotation["image_id"]].append(annotation)
        unknown = set(self._annotations) - {image["id"] for image in self._images}
        if unknown:
            raise InputError(f"{path} annotates image id {min(unknown)}, which is not in its list of images")

    def __len__(self) -> int:
        return len(self.files)

    def check_sizes(self) -> None:
        """Compare every image's size with the JSON's (headers only)."""
        for file, entry in zip(self.files, self._images, strict=True):
            with open_image(file) as image:
                width, height = upright_size(image)
            if (width, height) != (entry["width"], entry["height"]):
                wanted = f"{entry['width']}x{entry['height']}"
                raise InputError(
                    f"{file} is {width}x{height} (turned as its EXIF says), but {self.path} says {wanted}: "
                    "they must agree"
                )

    def read(self, index: int) -> dict:
        entry = self._images[index]
        shape = (entry["height"], entry["width"])
        masks: dict[int, np.ndarray] = {}
        instances = []
        for annotation in self._annotations[entry["id"]]:
            mask, label = self._mask(annotation, shape), self._class_of[annotation["category_id"]]
            masks[label] = masks[label] | mask if label in masks else mask
            instances.append((int(mask.sum()), label, mask))
        labels = np.full(shape, IGNORE, dtype=np.uint8)
        for _, label, mask in sorted(instances, key=lambda instance: -instance[0]):
            labels[mask] = label
        classes = sorted(masks)
        return {
            "image": np.array(read_image(self.files[index])),
            "labels": labels,
            "masks": np.array([masks[label] for label in classes], dtype=bool).reshape(-1, *shape),
            "classes": np.array(classes, dtype=np.int64),
        }

    def classes(self, index: int) -> list[int]:
        """The classes that are annotated in an image, without reading anything."""
        return sorted({self._class_of[a["category_id"]] for a in self._annotations[self._images[index]["id"]]})

    def class_mask(self, index: int, label: int) -> np.ndarray:
        """(H, W) bool: the instances of one class in an image, united, crowds included."""
        entry = self._images[index]
        mask = np.zeros((entry["height"], entry["width"]), dtype=bool)
        for annotation in self._annotations[entry["id"]]:
            if self._class_of[annotation["category_id"]] == label:
                mask |= self._mask(annotation, mask.shape)
        return mask

    def _mask(self, annotation: dict, shape: tuple[int, int]) -> np.ndarray:
        segmentation = annotation["segmentation"]
        try:
            if isinstance(segmentation, list):
                mask = np.zeros(shape, dtype=bool)
                for polygon in segmentation:
                    mask |= polygon_mask(np.reshape(polygon, (-1, 2)), *shape)
                return mask
            mask = rle.decode(segmentation)
        except (ValueError, KeyError, IndexError) as error:
            raise InputError(f"{self.path}: annotation {annotation['id']} has a bad mask: {error}") from None
        if mask.shape != shape:
            wrong = f"a {mask.shape} mask for an image of {shape} pixels"
            raise InputError(f"{self.path}: annotation {annotation['id']} has {wrong}")
        return mask


def read_instances(path: Path) -> dict:
    """The three lists of an instances JSON, the categories in the order of their ids."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            "images": content["images"],
            "annotations": content["annotations"],
            "categories": sorted(content["categories"], key=lambda category: category["id"]),
        }
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a JSON file: {error}") from None
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is no COCO instances file: {error} is missing in it") from None


def _find(name: str, folders: list[Path], path: Path) -> Path:
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{path} lists {name}, which is not in {' or '.join(map(str, folders))}")


def open_image(path: Path) -> Image.Image:
    """Open an image without reading its pixels. Raises ``InputError`` with the file's name."""
    try:
        return Image.open(path)
    except (OSError, Image.DecompressionBombError) as error:
        reason = "not an image that PIL reads" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(f"{path}: cannot be read as an image ({reason})") from None


def check_pairs(images: Sequence[Path], masks: Sequence[Path], modes: Sequence[str] = INDEX_MODES) -> None:
    """Compare every image with its mask, by their headers. Raises ``InputError`` for a mask of another size, or of colours."""
    for image_file, mask_file in zip(images, masks, strict=True):
        with open_image(image_file) as image, open_image(mask_file) as mask:
            if mask.mode not in modes:
                raise InputError(
                    f"{mask_file} is a {mask.mode} picture: a mask has one channel of class indices"
                )
            (width, height), (mask_width, mask_height) = upright_size(image), upright_size(mask)
        if (width, height) != (mask_width, mask_height):
            sizes = f"{mask_file} is {mask_width}x{mask_height}, its image {width}x{height}"
            raise InputError(f"{sizes}: a mask must have the size of its image (turned as its EXIF says)")


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) after the turn that the EXIF asks for, without reading pixels."""
    width, height = image.size
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return width, height  # PIL turns the one itself, and searches the other's pixels for an EXIF
    turned = image.getexif().get(ExifTags.Base.Orientation) in ON_ITS_SIDE
    return (height, width) if turned else (width, height)


def read_indices(path: Path) -> np.ndarray:
    """The pixels of a mask (H, W) int32 as they are: palettes and 16 bits are indices, not colours."""
    with open_image(path) as mask:
        try:
            return np.array(ImageOps.exif_transpose(mask)).astype(np.int32)
        except (OSError, SyntaxError) as error:  # PIL's ways to say that a file is cut short or broken
            raise InputError(f"{path}: cannot be read as an image ({error})") from None


def _pairs(images: Path, masks: Path) -> tuple[list[Path], list[Path]]:
    """Images and their masks, by name without suffix; neither may be alone."""
    image_of, mask_of = by_stem(images, IMAGE_SUFFIXES), by_stem(masks, (".png",))
    directions = ((image_of, mask_of, f"mask in {masks}"), (mask_of, image_of, f"image in {images}"))
    for one, other, wanted in directions:
        alone = [one[stem].name for stem in sorted(one.keys() - other.keys())]
        if alone:
            listed = ", ".join(alone[:3]) + (f" and {len(alone) - 3} more" if len(alone) > 3 else "")
            raise InputError(f"no {wanted} for {listed}: the names must agree up to the suffix")
    stems = sorted(image_of)
    return [image_of[stem] for stem in stems], [mask_of[stem] for stem in stems]


def by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Files by their names without suffix. Raises ``InputError`` for two that differ by suffix only, no file, or no folder."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            if path.stem in files:
                raise InputError(f"{path} and {files[path.stem].name} differ by suffix only: rename one")
            files[path.stem] = path
    if not files:
        raise InputError(f"{folder} has no file that ends in {', '.join(suffixes)}")
    return files
