"""The benchmarks of open-vocabulary segmentation: where files lie, how label values become classes, how many images there are.

Source: OVSeg's table 1 and appendix A.3 (papers.md 2.7, 2.8) for the five and their weights, and the layouts of the official
releases, of detectron2's preparation scripts and of mmsegmentation. Facts only: ``pmpseg.data.Benchmark`` reads the files.
"""

from dataclasses import dataclass
from pathlib import Path

from pmpseg.cli import did_you_mean
from pmpseg.errors import InputError

VOCAB = Path(__file__).parent / "assets" / "vocab"


@dataclass(frozen=True)
class Layout:
    """One way in which a benchmark lies on disk, all paths below the root of all data.

    ``first`` is the value of class 0 in the label maps. Where that is 1, 0 is ignored: a background, or what nobody labelled;
    with ``also_ignored`` so is the benchmark's ``ignore_index``, as in VOC.
    ``names`` says which images count: "pairs", those of the folder, each with a label map, and the other way; "labels", those
    that have a label map; or the path of a list of names.
    """

    images: str
    labels: str
    first: int = 0
    names: str = "pairs"
    also_ignored: bool = False


@dataclass(frozen=True)
class BenchmarkSpec:
    """What is known of a benchmark before any file is read.

    ``classes`` is a file of assets/vocab; ``region_weight`` OVSeg's lambda, the weight of CLIP's answer in the ensemble;
    ``ignore_index`` the label of pixels that count nowhere, in our labels and in the files; ``layouts`` the places to look, in
    order; ``counts`` the numbers of images that are the whole of it, the official one first; ``script`` what prepares it.
    """

    name: str
    title: str
    classes: str
    region_weight: float
    ignore_index: int
    layouts: tuple[Layout, ...]
    counts: tuple[int, ...]
    script: str = "scripts/check_benchmarks.py"

    @property
    def class_list(self) -> Path:
        return VOCAB / self.classes


def parse_benchmarks(text: str) -> list[BenchmarkSpec]:
    """``"all"`` (the five of OVSeg's table), or names or titles with commas between, as in ``"ade20k_150,PAS-20"``.

    Each is kept once, at its first place. Raises ``InputError`` for a word that is none of them.
    """
    by_word = {word.casefold(): spec for spec in BENCHMARKS.values() for word in (spec.name, spec.title)}
    chosen: list[BenchmarkSpec] = []
    for word in text.split(","):
        key = word.strip().casefold()
        if key == "all":
            chosen += (BENCHMARKS[name] for name in TABLE)
        elif key in by_word:
            chosen.append(by_word[key])
        else:
            hint = did_you_mean(key, [*by_word, "all"])
            raise InputError(f"benchmark: got {word.strip()!r}, want all or some of {', '.join(BENCHMARKS)}{hint}")
    return list(dict.fromkeys(chosen))


def _ade20k(*roots: str) -> tuple[Layout, ...]:
    """SceneParsing as it was released, as detectron2 prepares it (classes from 0), and flat as in its samples."""
    whole = (
        layout
        for root in roots
        for layout in (
            Layout(f"{root}/images/validation", f"{root}/annotations/validation", first=1),
            Layout(f"{root}/images/validation", f"{root}/annotations_detectron2/validation"),
        )
    )
    return (*whole, Layout(f"{roots[-1]}/images", f"{roots[-1]}/annotations", first=1))


def _context(classes: int) -> tuple[Layout, ...]:
    """What scripts/prepare_pascal_context.py writes, and what detectron2's users have."""
    roots = ("VOCdevkit/VOC2010", "VOC2010")
    labels = (f"context_{classes}_val", f"annotations_detectron2/pc{classes}_val")
    return tuple(Layout(f"{root}/JPEGImages", f"{root}/{folder}", names="labels") for root in roots for folder in labels)


def _voc(first: int, detectron2: str | None = None) -> tuple[Layout, ...]:
    roots = ("VOCdevkit/VOC2012", "VOC2012")
    names = "ImageSets/Segmentation/val.txt"
    official = (Layout(f"{root}/JPEGImages", f"{root}/SegmentationClass", first, f"{root}/{names}", True) for root in roots)
    if detectron2 is None:
        return tuple(official)
    return (*official, *(Layout(f"{root}/JPEGImages", f"{root}/{detectron2}/val", names="labels") for root in roots))


_FULL = "ADE20K_2021_17_01"
_MMSEG = "VOCdevkit/VOC2010"  # 0 is the background, 1..59 the classes in the order of their ids
_ALL = [
    BenchmarkSpec(
        "ade20k_847",
        "A-847",
        "ade20k_847.txt",
        0.7,
        65535,
        (
            Layout(f"{_FULL}/benchmark_847/validation/images", f"{_FULL}/benchmark_847/validation/annotations"),
            Layout(f"{_FULL}/images_detectron2/validation", f"{_FULL}/annotations_detectron2/validation"),
        ),
        (2000,),
        "scripts/prepare_ade20k_full.py",
    ),
    BenchmarkSpec(
        "pascal_context_459",
        "PC-459",
        "pascal_context_459.txt",
        0.6,
        65535,
        _context(459),
        # 5,105 by the release; 5,104 by the lists of the Detail API, which mmsegmentation and detectron2's users share
        (5105, 5104),
        "scripts/prepare_pascal_context.py",
    ),
    BenchmarkSpec(
        "ade20k_150",
        "A-150",
        "ade20k_150.txt",
        0.7,
        255,
        _ade20k("ADEChallengeData2016", "ade/ADEChallengeData2016", "ade20k_sceneparsing"),
        (2000,),
    ),
    BenchmarkSpec(
        "pascal_context_59",
        "PC-59",
        "pascal_context_59.txt",
        0.6,
        255,
        (
            *_context(59),
            Layout(
                f"{_MMSEG}/JPEGImages",
                f"{_MMSEG}/SegmentationClassContext",
                1,
                f"{_MMSEG}/ImageSets/SegmentationContext/val.txt",
            ),
        ),
        (5105, 5104),
        "scripts/prepare_pascal_context.py",
    ),
    # lambda by the paper's appendix; OVSeg's GETTING_STARTED has 0.45 for it
    BenchmarkSpec("pascal_voc_20", "PAS-20", "pascal_voc_20.txt", 0.6, 255, _voc(1, "annotations_detectron2"), (1449,)),
    # not in OVSeg's table, its lambda is that of the 20
    BenchmarkSpec("pascal_voc_21", "PAS-21", "pascal_voc_21.txt", 0.6, 255, _voc(0), (1449,)),
]
BENCHMARKS = {spec.name: spec for spec in _ALL}
TABLE = tuple(BENCHMARKS)[:5]  # the columns of OVSeg's table 1, in its order
