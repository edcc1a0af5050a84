"""Make the label maps of PC-459 and PC-59 from Pascal Context's annotations over the images of VOC 2010.

    python scripts/prepare_pascal_context.py ../data/VOCdevkit/VOC2010

reads trainval/NAME.mat (key LabelMap: 1..459, 0 = nothing) and labels.txt ("1: accordion" and so on; also looked for in
trainval/), and writes context_459_val/NAME.png (16 bits, classes 0..458, 65535 = ignore) and context_59_val/NAME.png (8 bits,
classes 0..58, 255 = ignore: the pixels of the other 400 classes). Both are made at once; a run that was stopped goes on where it
was, and a folder takes its name when it is whole.

Which images: --list, by default the first that is there of pascalcontext_val.txt (that of detectron2's users),
ImageSets/SegmentationContext/val.txt (mmsegmentation's), ImageSets/Main/val.txt (VOC 2010's own, 5,105 images: the split of the
paper). The first two have 5,104.

If you have mmsegmentation's SegmentationClassContext/, PC-59 needs no preparation: it is read as it lies.
"""

import argparse
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from prepare_common import digest, make_all, mapped_share, save_map, whole_folder

from pmpseg import cli
from pmpseg.errors import InputError

LISTS = ("pascalcontext_val.txt", "ImageSets/SegmentationContext/val.txt", "ImageSets/Main/val.txt")
WHOLE = (5105, 5104)
NUMBER = 459
IGNORE = {459: 65535, 59: 255}
# The 59 in the order of their classes, by their names in labels.txt; 59_labels.txt calls the table a diningtable.
NAMES_59 = """aeroplane bag bed bedclothes bench bicycle bird boat book bottle building bus cabinet car cat ceiling chair cloth
computer cow cup curtain dog door fence floor flower food grass ground horse keyboard light motorbike mountain mouse person plate
platform pottedplant road rock sheep shelves sidewalk sign sky snow sofa table track train tree truck tvmonitor wall water window
wood""".split()


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    numbers = read_numbers(args.labels)
    stems = read_stems(args.list)
    print(f"{args.list}: {len(stems):,} images" + ("" if len(stems) in WHOLE else f"; the whole list has {WHOLE[0]:,}"))
    for stem in stems:
        for path in (args.root / "JPEGImages" / f"{stem}.jpg", args.annotations / f"{stem}.mat"):
            if not path.is_file():
                raise InputError(f"{args.list} lists {stem}, but there is no {path}")
    for count in [count for count in args.classes if folder_of(args.root, count).exists()]:
        print(f"{folder_of(args.root, count)} is there already: remove it to make it anew")
        args.classes.remove(count)
    if not args.classes:
        return 0
    tables = {count: table(count, numbers) for count in args.classes}
    with ExitStack() as stack:
        settings = {"list": args.list.name, "images": len(stems), "names": digest(stems)}
        parts = {n: stack.enter_context(whole_folder(folder_of(args.root, n), settings)) for n in tables}

        def make(stem: str) -> None:
            labels = read_mat(args.annotations / f"{stem}.mat")
            for count, part in parts.items():
                save_map(tables[count][labels], part / f"{stem}.png")

        def done(stem: str) -> bool:
            return all((part / f"{stem}.png").is_file() for part in parts.values())

        before = make_all(stems, make, done, "label maps")
        shares = {n: mapped_share([part / f"{stem}.png" for stem in stems], n, IGNORE[n]) for n, part in parts.items()}
    for count, (share, occur) in shares.items():
        made = f"{len(stems) - before:,} label maps made" + (f", {before:,} were there" if before else "")
        mapped = f"{share:.1%} of the pixels have one of the {count} classes, of which {occur} occur"
        print(f"{folder_of(args.root, count)}: {made}; {mapped}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="the folder VOC2010, in which JPEGImages lies")
    parser.add_argument("--annotations", type=Path, help="the folder of the .mat files; default: ROOT/trainval")
    parser.add_argument("--labels", type=Path, help="the release's labels.txt; default: in ROOT or in the annotations")
    parser.add_argument("--list", type=Path, help="a file that lists one image a line; default: see above")
    parser.add_argument("--classes", type=int, nargs="+", choices=list(IGNORE), default=list(IGNORE), help="default: both")
    args = parser.parse_args(arguments)
    if not (args.root / "JPEGImages").is_dir():
        raise InputError(f"there is no folder {args.root / 'JPEGImages'}: give the folder VOC2010 of VOCtrainval_03-May-2010.tar")
    args.annotations = args.annotations or args.root / "trainval"
    if not args.annotations.is_dir():
        raise InputError(f"there is no folder {args.annotations}: unpack Pascal Context's trainval.tar.gz in {args.root}")
    labels, lists = (args.root / "labels.txt", args.annotations / "labels.txt"), [args.root / name for name in LISTS]
    args.labels = args.labels or next(filter(Path.is_file, labels), labels[0])
    args.list = args.list or next(filter(Path.is_file, lists), lists[-1])
    args.classes = list(dict.fromkeys(args.classes))
    return args


def read_numbers(path: Path) -> dict[str, int]:
    """The number 1..459 of each name, spelt in one way: small letters and digits only."""
    numbers: dict[str, int] = {}
    for place, line in enumerate(read_text(path).splitlines(), start=1):
        head, colon, name = line.partition(":")
        if not line.strip() or head.strip() == "0":  # some have a line for what nobody labelled
            continue
        word = "".join(letter for letter in name.casefold() if letter.isalnum())
        if not colon or not head.strip().isdecimal() or not word or word in numbers:
            raise InputError(f"{path}, line {place}: got {line.strip()!r}, want 'number: name', each name once")
        numbers[word] = int(head)
    if sorted(numbers.values()) != list(range(1, NUMBER + 1)):
        raise InputError(f"{path} has {len(numbers)} names, want the numbers 1..{NUMBER}: take the labels.txt of trainval.tar.gz")
    missing = [name for name in NAMES_59 if name not in numbers]
    if missing:
        raise InputError(f"{path} has no {', '.join(missing)}: take the labels.txt of trainval.tar.gz")
    return numbers


def folder_of(root: Path, count: int) -> Path:
    return root / f"context_{count}_val"


def table(count: int, numbers: dict[str, int]) -> np.ndarray:
    """The class of each number 0..459."""
    ignored = IGNORE[count]
    classes = np.full(NUMBER + 1, ignored, dtype=np.uint16 if ignored > 255 else np.uint8)
    chosen = [numbers[name] for name in NAMES_59] if count == 59 else range(1, NUMBER + 1)
    classes[list(chosen)] = np.arange(count)
    return classes


def read_mat(path: Path) -> np.ndarray:
    """(H, W) int64, 0..459."""
    from scipy.io import loadmat  # after --help
    from scipy.io.matlab import MatReadError

    broken = (OSError, ValueError, TypeError, NotImplementedError, EOFError, zlib.error, MatReadError)
    try:
        labels = np.asarray(loadmat(path, variable_names=["LabelMap"])["LabelMap"])
    except KeyError:
        raise InputError(f"{path} has no LabelMap: it is no annotation of Pascal Context") from None
    except broken as error:
        raise InputError(f"{path}: cannot be read as a .mat file ({str(error) or type(error).__name__})") from None
    numeric = np.issubdtype(labels.dtype, np.integer) or np.issubdtype(labels.dtype, np.floating)  # MATLAB's numbers are doubles
    is_map = labels.ndim == 2 and labels.size and numeric and bool((labels == np.floor(labels)).all())
    if not is_map or labels.min() < 0 or labels.max() > NUMBER:
        raise InputError(f"{path}: LabelMap is {labels.dtype} {labels.shape}, want (H, W) of whole numbers 0..{NUMBER}")
    return labels.astype(np.int64)


def read_stems(path: Path) -> list[str]:
    stems = [Path(line.split()[0]).stem for line in read_text(path).splitlines() if line.strip()]
    if not stems:
        raise InputError(f"{path} lists no image")
    return list(dict.fromkeys(stems))


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


if __name__ == "__main__":
    cli.run(main)
