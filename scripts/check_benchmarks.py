"""Say of each benchmark what is on the disk, what is missing, and where to get it; read every image and label map.

    python scripts/check_benchmarks.py ../data
    python scripts/check_benchmarks.py ../data --benchmarks ade20k_150,PAS-20

Where all of the table are asked for, a last line says whether COCO-Stuff, the training data, is in ROOT/coco, as folders or zips:
its names and a few label maps are looked at, and it does not change the exit status.

Read-only. A-150 and Pascal VOC need no preparation: unpack them and they are read as they lie. The exit status is 0 where all the
benchmarks asked for are there, whole, and as expected, else 1.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pmpseg import cli
from pmpseg.benchmarks import BenchmarkSpec, parse_benchmarks
from pmpseg.errors import InputError

_CONTEXT = (
    "VOCtrainval_03-May-2010.tar (1.3 GB) from host.robots.ox.ac.uk/pascal/VOC/voc2010, unpacked in ROOT, and Pascal Context's "
    "trainval.tar.gz (roozbehm.info/pascal-context), unpacked in ROOT/VOCdevkit/VOC2010; then "
    "python scripts/prepare_pascal_context.py ROOT/VOCdevkit/VOC2010"
)
_VOC = "VOCtrainval_11-May-2012.tar (2 GB) from host.robots.ox.ac.uk/pascal/VOC/voc2012, unpacked in ROOT"
SOURCES = {
    "ade20k_847": "ADE20K_2021_17_01.zip (ade20k.csail.mit.edu, after registration), unpacked in ROOT; then "
    "python scripts/prepare_ade20k_full.py ROOT/ADE20K_2021_17_01",
    "pascal_context_459": _CONTEXT,
    "ade20k_150": "ADEChallengeData2016.zip (0.9 GB) from data.csail.mit.edu/places/ADEchallenge, unpacked in ROOT",
    "pascal_context_59": _CONTEXT,
    "pascal_voc_20": _VOC,
    "pascal_voc_21": _VOC,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="the folder that ADEChallengeData2016, ADE20K_2021_17_01 and VOCdevkit lie in")
    parser.add_argument("--benchmarks", default="all", help="names or titles with commas between; default: the five of the table")
    args = parser.parse_args(arguments)
    specs = parse_benchmarks(args.benchmarks)
    if not args.root.is_dir():
        raise InputError(f"there is no folder {args.root}: give the one that holds all data sets")
    whole = [check(spec, args.root) for spec in specs]  # all of them, also after one that is not
    if args.benchmarks == "all":
        print(f"COCO-Stuff: {coco_stuff(args.root / 'coco')}")
    return int(not all(whole))


def coco_stuff(root: Path) -> str:
    """What there is of the training data, in one line."""
    from pmpseg.data.coco_files import CocoFiles  # after --help

    found = []
    try:
        for split in ("train2017", "val2017"):
            files = CocoFiles(root, split)
            files.check()
            found.append(f"{len(files):,} images of {split}")
    except InputError as error:
        return f"MISSING or WRONG. {error}"
    return f"{' and '.join(found)} in {root}; the whole set has 118,287 and 5,000"


def check(spec: BenchmarkSpec, root: Path) -> bool:
    """Print what there is of a benchmark; whether it is whole and as expected."""
    from pmpseg.data.benchmark import LabelMaps, find_layout  # seconds of lightning, after --help
    from pmpseg.vocabulary import Vocabulary

    try:
        find_layout(spec, root)
    except InputError as error:
        what = str(error).removeprefix(f"{spec.title}: ")
        print(f"{spec.title}: MISSING. {what}. Get {SOURCES[spec.name].replace('ROOT', str(root))}")
        return False
    names = Vocabulary.read(spec.class_list).names
    counts = np.zeros(len(names), dtype=np.int64)
    ignored = 0
    try:
        source = LabelMaps(spec, root, len(names))
        source.check_sizes()
        for index in tqdm(range(len(source)), desc=spec.title, disable=None):
            labels = source.read(index)["labels"]  # the photograph, too, which may be cut short
            valid = labels != spec.ignore_index
            counts += np.bincount(labels[valid], minlength=len(names))
            ignored += int((~valid).sum())
    except InputError as error:
        print(f"{spec.title}: WRONG. {error}")
        return False
    share = ignored / max(1, ignored + int(counts.sum()))
    what = f"{int((counts > 0).sum())} of {len(names)} classes occur, {share:.1%} of the pixels are ignored"
    number = source.remark or f"{len(source):,} images"
    print(f"{spec.title}: {number} in {root / source.layout.labels}; {what}")
    return source.remark is None


if __name__ == "__main__":
    cli.run(main)
