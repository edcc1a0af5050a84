"""Mined pairs of a region and a noun (OVSeg, arXiv 2210.04150, sec. 3.2), as ``scripts/mine_pairs.py`` writes them.

The file is CSV, one row a pair, with the columns of ``COLUMNS``: the image's name below its folder, the noun, the CLIP's cosine,
the box and area of the region in pixels, the image's size, the caption, and the mask as COCO's compressed run lengths.
"""

import csv
import zlib
from pathlib import Path

import numpy as np
import torch

from pmpseg import rle
from pmpseg.errors import InputError
from pmpseg.images import read_image
from pmpseg.vocabulary import Vocabulary

from .base import SegmentationDataset
from .regions import RegionData, cut

COLUMNS = ("image", "noun", "score", "x", "y", "width", "height", "area", "image_width", "image_height", "caption", "counts")


class Pairs(RegionData):
    """Regions of the photographs below ``images``, named by nouns of their captions.

    Args:
        pairs: the CSV file.
        images: the folder that its image names are relative to.
        val_fraction: of the images, chosen by their names, for validation: which of all nouns is it? Also the test split.
        min_score: rows with a lower score are left out.
        expand, scale: see ``RegionData``.
        batch_size, eval_batch_size, num_workers, seed: see ``SegmentationData``; OVSeg trains on batches of 256.
    """

    def __init__(
        self,
        pairs: str,
        images: str,
        val_fraction: float = 0.1,
        min_score: float = -1.0,
        expand: float = 1.0,
        scale: float = 0.9,
        batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__(expand, scale, batch_size, eval_batch_size, num_workers, seed)
        if not 0 < val_fraction < 1:
            raise InputError(f"val_fraction: got {val_fraction}, want above 0 to below 1")
        self.images = Path(images)
        rows = [row for row in read_pairs(pairs) if float(row["score"]) >= min_score]
        if not rows:
            raise InputError(f"{pairs}: no pair has a score of {min_score} or more: lower min_score")
        absent = next((row["image"] for row in rows if not (self.images / row["image"]).is_file()), None)
        if absent is not None:
            raise InputError(f"{pairs}: no image {self.images / absent}: give the folder of the images (data.images)")
        self.vocabulary = Vocabulary.of(sorted({row["noun"] for row in rows}))
        held = {name: zlib.crc32(name.encode()) / 2**32 < val_fraction for name in {row["image"] for row in rows}}
        self.rows = {split: [row for row in rows if held[row["image"]] == (split == "val")] for split in ("train", "val")}
        if not all(self.rows.values()):
            few = next(split for split, some in self.rows.items() if not some)
            raise InputError(f"{pairs}: {len(held)} images leave none for {few}: mine more, or change val_fraction")

    def dataset(self, split: str) -> "PairDataset":
        return PairDataset(self, split)


class PairDataset(SegmentationDataset):
    """One pair an item."""

    def __init__(self, data: Pairs, split: str) -> None:
        self.data, self.training = data, split == "train"
        self.rows = data.rows["train" if self.training else "val"]
        self.index = {noun: i for i, noun in enumerate(data.vocabulary.names)}

    def __len__(self) -> int:
        return len(self.rows)

    def item(self, index: int, epoch: int) -> dict:
        row, data = self.rows[index], self.data
        image = torch.from_numpy(np.array(read_image(data.images / row["image"]))).permute(2, 0, 1)
        mask = torch.from_numpy(rle.decode(region_of(row)))
        if image.shape[1:] != mask.shape:
            got = f"{image.shape[2]} x {image.shape[1]} pixels, its pair says {mask.shape[1]} x {mask.shape[0]}"
            raise InputError(f"{data.images / row['image']}: {got}: give the images that were mined")
        rng = np.random.default_rng([data.seed, index, epoch, 3]) if self.training else None
        image, mask = cut(image, mask, data.expand, data.scale, rng)
        return {"images": [image], "masks": [mask], "nouns": [row["noun"]], "classes": [self.index[row["noun"]]]}


def read_pairs(path: str | Path) -> list[dict[str, str]]:
    """The rows of a file of pairs, all checked. Raises InputError, with the line, where one is not whole."""
    path = Path(path)
    if not path.is_file():
        part = path.with_suffix(".part.csv")
        mend = f"run scripts/mine_pairs.py again to finish {part}" if part.is_file() else "make it with scripts/mine_pairs.py"
        raise InputError(f"{path}: no such file: {mend}")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise InputError(f"{path}: not a file of pairs: got columns {reader.fieldnames}, want {', '.join(COLUMNS)}")
        rows = []
        for row in reader:
            if problem := broken(row):
                raise InputError(f"{path}, line {reader.line_num}: {problem}: remove the line, or mine the pairs again")
            rows.append(row)
    if not rows:
        raise InputError(f"{path}: holds no pair: mine images whose captions have nouns")
    return rows


def region_of(row: dict[str, str]) -> dict:
    """The mask of a row, for ``rle.decode``."""
    return {"size": [int(row["image_height"]), int(row["image_width"])], "counts": row["counts"]}


def broken(row: dict) -> str:
    """What is wrong with a row, or ""."""
    if None in row or None in row.values():
        return f"it has not {len(COLUMNS)} columns"
    if not row["noun"].strip():
        return "the noun is empty"
    try:
        if not np.isfinite(float(row["score"])):
            return f"the score is {row['score']}"
        if not rle.decode(region_of(row)).any():
            return "the mask is empty"
    except ValueError as error:
        return " ".join(str(error).split())
    return ""
