"""The parts of an item that several data sets make alike: images as tensors, items of a class list, and supports."""

from collections.abc import Iterable
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from pmpseg.vocabulary import Vocabulary


def chw(image: np.ndarray) -> Tensor:
    """(H, W, 3) -> (3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def class_list_item(sample: dict, vocabulary: Vocabulary, name: str, index: int) -> dict:
    """An item of evaluation that asks for all classes, unseen ones too: the list tells nothing of the image.

    ``sample``: image (H, W, 3) uint8, labels (H, W), perhaps ``scaled``, what ``eval_transform`` makes of several scales.
    """
    item = {
        "image": chw(sample["image"]),
        "labels": torch.from_numpy(sample["labels"].astype(np.int64)),
        "name": name,
        "index": index,
        "prompts": list(vocabulary.names),
        "prompt_class": torch.arange(len(vocabulary)),
    }
    if "scaled" in sample:
        item["scaled"] = [chw(image) for image in sample["scaled"]]
    return item


def stack_supports(found: Iterable[Iterable[tuple[np.ndarray, np.ndarray]]], count: int, side: int) -> dict[str, Tensor]:
    """Images (s, s, 3) uint8 with masks (s, s) bool for each of K prompts -> support_image (K, S, 3, s, s), _mask and _valid.

    The first ``count`` (S) with a mask that is not empty are taken, and no more are made: a mask may vanish in a crop, or when it
    is made smaller, and would then show nothing, or all of the image. Where there are too few, the last are zeros and not valid.
    """
    rows = [list(islice((pair for pair in pairs if pair[1].any()), count)) for pairs in found]
    image = torch.zeros(len(rows), count, 3, side, side, dtype=torch.uint8)
    mask = torch.zeros(len(rows), count, side, side, dtype=torch.bool)
    valid = torch.zeros(len(rows), count, dtype=torch.bool)
    for k, row in enumerate(rows):
        for s, (photo, pixels) in enumerate(row):
            image[k, s], mask[k, s], valid[k, s] = chw(photo), torch.from_numpy(pixels), True
    return {"support_image": image, "support_mask": mask, "support_valid": valid}
