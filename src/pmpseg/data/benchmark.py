"""Benchmark: any of ``pmpseg.benchmarks`` as a DataModule, from folders in the official layouts.

Images are read as ``predict`` reads them. Labels are class numbers at the label map's own size, at which answers are scored.
"""

import itertools
from pathlib import Path

import numpy as np

from pmpseg.benchmarks import BENCHMARKS, BenchmarkSpec, Layout
from pmpseg.cli import did_you_mean
from pmpseg.data.base import SegmentationData, SegmentationDataset
from pmpseg.data.items import class_list_item
from pmpseg.data.sources import IMAGE_SUFFIXES, INDEX_MODES, by_stem, check_pairs, read_indices
from pmpseg.data.transforms import eval_transform, square_transform
from pmpseg.errors import InputError
from pmpseg.images import read_image
from pmpseg.vocabulary import Vocabulary

CHECKED_MAPS = 8  # read in full at start; the others when their turn comes
LABEL_SUFFIXES = (".png", ".tif", ".tiff")


class Benchmark(SegmentationData):
    """The images of a benchmark, each asked for all its classes; for evaluation only.

    ``name`` is a key of ``pmpseg.benchmarks.BENCHMARKS``, ``root`` the folder that all its layouts are below. ``image_size`` is
    the short side at which the network works, ``max_size`` a bound of the long one; ``square`` squashes images to ``image_size``.
    Labels keep their own size unless ``resize_labels``.

    ``remark`` says what must stand beside the scores, such as "3 of 2,000 images"; None where the benchmark is whole.

    Raises ``InputError`` for missing folders, for images without label map and the other way, and for wrong sizes; wrong values
    are found in some label maps at start, in the others when they are read.
    """

    def __init__(
        self,
        name: str,
        root: str = "../data",
        image_size: int = 512,
        max_size: int | None = None,
        square: bool = False,
        resize_labels: bool = False,
        eval_batch_size: int = 1,
        num_workers: int = 2,
    ) -> None:
        super().__init__(image_size, None, eval_batch_size=eval_batch_size, num_workers=num_workers)
        if max_size is not None and (max_size < 1 or square):
            wanted = "nothing beside square: the image's sides are image_size" if square else "1 or more"
            raise InputError(f"max_size: got {max_size}, want {wanted}")
        if name not in BENCHMARKS:
            raise InputError(f"name: got {name!r}, want one of {', '.join(BENCHMARKS)}{did_you_mean(name, BENCHMARKS)}")
        self.spec = BENCHMARKS[name]
        self.title = self.spec.title
        self.ignore_index = self.spec.ignore_index
        self.vocabulary = Vocabulary.read(self.spec.class_list)
        self.max_size, self.square, self.resize_labels = max_size, square, resize_labels
        self.source = LabelMaps(self.spec, Path(root), len(self.vocabulary))
        self.remark = self.source.remark
        self.source.check_sizes()
        for index in np.linspace(0, len(self.source) - 1, min(CHECKED_MAPS, len(self.source))).astype(int):
            self.source.labels(index)

    def dataset(self, split: str) -> "BenchmarkDataset":
        """The images of the benchmark, which "val" and "test" both mean."""
        if split == "train":
            raise InputError(f"{self.title} is for evaluation only: train on other data, such as COCO-Stuff")
        return BenchmarkDataset(self)


class BenchmarkDataset(SegmentationDataset):
    """Images of a benchmark with all its classes as prompts."""

    def __init__(self, data: Benchmark) -> None:
        self.source, self.vocabulary = data.source, data.vocabulary
        if data.square:
            self.transform = square_transform(data.image_size, resize_labels=data.resize_labels, scales=data.eval_scales)
        else:
            self.transform = eval_transform(data.image_size, data.resize_labels, data.max_size, data.eval_scales)

    def __len__(self) -> int:
        return len(self.source)

    def item(self, index: int, epoch: int) -> dict:
        sample = self.transform(self.source.read(index))
        return class_list_item(sample, self.vocabulary, self.source.files[index].name, index)


class LabelMaps:
    """The files of a benchmark: ``files``, ``maps``, ``layout``, ``remark``, and ``read(i)``, a sample.

    The first of the benchmark's layouts whose folders there are counts.
    """

    def __init__(self, spec: BenchmarkSpec, root: Path, num_classes: int) -> None:
        self.spec, self.num_classes = spec, num_classes
        self.layout = find_layout(spec, root)
        self.files, self.maps = list_files(self.layout, root)
        whole = len(self) in spec.counts
        self.remark = None if whole else f"{len(self):,} of {spec.counts[0]:,} images"

    def __len__(self) -> int:
        return len(self.files)

    def check_sizes(self) -> None:
        """Compare every image with its label map (headers only)."""
        check_pairs(self.files, self.maps, (*INDEX_MODES, "I;16B"))

    def labels(self, index: int) -> np.ndarray:
        """(H, W) int32: classes 0..C-1, and the benchmark's ``ignore_index``."""
        values = read_indices(self.maps[index])
        first, ignored = self.layout.first, self.spec.ignore_index
        classes = values - first
        # Below the first class is what counts nowhere; where that is so, 255 is none of the format's values, but of a map that
        # has been made to begin at 0, unless the format has both, as VOC's.
        has_ignored = first == 0 or self.layout.also_ignored
        unlabelled = (values == ignored) & has_ignored | (values < first)
        wrong = ~unlabelled & (classes >= self.num_classes) | (values < 0)
        if wrong.any():
            found = ", ".join(map(str, np.unique(values[wrong])[:5]))
            ignored = ignored if has_ignored else 0
            wanted = f"{self.spec.title} has {first}..{self.num_classes - 1 + first} here, and {ignored} for ignore"
            raise InputError(f"{self.maps[index]} has value {found}: {wanted}; is it of another data set, or prepared otherwise?")
        return np.where(unlabelled, ignored, classes)

    def read(self, index: int) -> dict:
        """A sample: image (H, W, 3) uint8 and labels (H, W) int32."""
        return {"image": np.array(read_image(self.files[index])), "labels": self.labels(index)}


def find_layout(spec: BenchmarkSpec, root: Path) -> Layout:
    """The first layout whose folders are below ``root``. Raises ``InputError`` in one line where there is none."""
    for layout in spec.layouts:
        if (root / layout.images).is_dir() and (root / layout.labels).is_dir():
            return layout
    first = spec.layouts[0]
    lacking = [folder for folder in (first.images, first.labels) if not (root / folder).is_dir()]
    missing = f"{root} has no folder {' and no '.join(lacking)} (nor another known layout)"
    raise InputError(f"{spec.title}: {missing}: see {spec.script} --help")


def list_files(layout: Layout, root: Path) -> tuple[list[Path], list[Path]]:
    """Images and their label maps, by name. Raises ``InputError`` for one without the other."""
    images, labels = root / layout.images, root / layout.labels
    image_of, map_of = by_stem(images, IMAGE_SUFFIXES), by_stem(labels, LABEL_SUFFIXES)
    if layout.names in ("pairs", "labels"):
        stems, listed = sorted(map_of), f"{labels} has"
        if layout.names == "pairs":
            stems = sorted(image_of.keys() | map_of.keys())
            listed = f"{images.parent} has"
    else:
        stems, listed = read_names(root / layout.names), f"{root / layout.names} lists"
    for stem, (found, what, folder) in itertools.product(stems, ((image_of, "image", images), (map_of, "label map", labels))):
        if stem not in found:
            raise InputError(f"{listed} {stem}, but there is no {what} of that name in {folder}")
    return [image_of[stem] for stem in stems], [map_of[stem] for stem in stems]


def read_names(path: Path) -> list[str]:
    """The first word of each line, without folder and suffix."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: it should list one image a line") from None
    except OSError as error:
        raise InputError(f"cannot read the list of images {path}: {error.strerror}") from None
    stems = [Path(line.split()[0]).stem for line in lines if line.strip()]
    if not stems:
        raise InputError(f"{path} lists no image")
    if len(set(stems)) < len(stems):
        twice = next(stem for number, stem in enumerate(stems) if stem in stems[:number])
        raise InputError(f"{path} lists {twice} twice: its pixels would count twice")
    return stems
