"""Make A-847's validation images and label maps from the full ADE20K release of January 2021.

    python scripts/prepare_ade20k_full.py ../data/ADE20K_2021_17_01

reads ROOT/images/ADE/validation/**/NAME.jpg, NAME_seg.png and NAME.json and writes ROOT/benchmark_847/validation/images/NAME.jpg
and annotations/NAME.png: 16 bits, classes 0..846, 65535 = ignore. A run that was stopped goes on where it was; the folder takes
its name when it is whole.

The red and green of a _seg.png give a number of the release's index of names (red // 10 * 256 + green, 0 = nothing). The index
itself, index_ade20k.pkl, is a pickle, that is, a program: we do not run it. The JSON files say the same, since each object has
its number (name_ndx) beside its name, and they are data. A class is a whole name of the list of 847 that MaskFormer chose, and by
which OVSeg, SAN and others are scored.

The published scores are of images and maps made smaller, to a short side of 512 where it is more (MaskFormer's preparation): the
default here, too; --short-side 0 keeps the release's sizes. Ours are not the same to the bit: labels come from the pixel under
the centre, images are smoothed when they shrink, and saved as JPEG of quality 95.
"""

import argparse
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image
from prepare_common import digest, make_all, mapped_share, read_pixels, save_map, whole_folder
from tqdm import tqdm

import pmpseg
from pmpseg import cli
from pmpseg.data.transforms import nearest, resize
from pmpseg.errors import InputError

NAMES = Path(pmpseg.__file__).parent / "assets" / "benchmarks" / "ade20k_847.txt"
MOST_ODD = 0.01  # files, of all, that may give a number another name
IGNORE = 65535
IMAGES = {"validation": 2000, "training": 25_574}


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    found = find_images(args.root, args.split)
    if len(found) != IMAGES[args.split]:
        print(f"{len(found):,} images, the release has {IMAGES[args.split]:,} for {args.split}: going on with these")
    class_of = {name: number for number, name in enumerate(read_names(NAMES))}
    name_of, unlisted = read_index(list(found.values()), class_of)
    table = np.full(26 * 256, IGNORE, dtype=np.uint16)  # of red // 10 * 256 + green
    for number, name in name_of.items():
        table[number] = class_of.get(name, IGNORE)
    target = args.root / "benchmark_847" / args.split
    unnamed: set[int] = set()
    settings = {"short_side": args.short_side, "jpeg_quality": 95, "images": len(found), "names": digest(list(found))}
    with whole_folder(target, settings) as part:
        images, maps = part / "images", part / "annotations"
        for folder in (images, maps):
            folder.mkdir(exist_ok=True)

        def make(stem: str) -> None:
            labels = read_numbers(found[stem])
            unnamed.update(int(number) for number in np.unique(labels) if number and int(number) not in name_of)
            shape = small_shape(labels.shape, args.short_side)
            write_image(found[stem], images / f"{stem}.jpg", labels.shape, shape)
            save_map(nearest(table[labels], shape), maps / f"{stem}.png")  # last: with it an image is done

        before = make_all(list(found), make, lambda stem: (maps / f"{stem}.png").is_file(), "label maps")
        share, classes = mapped_share([maps / f"{stem}.png" for stem in found], len(class_of), IGNORE)
    made = f"{len(found) - before:,} images made" + (f", {before:,} were there" if before else "")
    print(f"{target}: {made}; {share:.1%} of the pixels have one of the 847 classes, of which {classes} occur")
    if unlisted:
        most = ", ".join(f"{name.split(',')[0]} ({count})" for name, count in unlisted.most_common(8))
        print(f"{len(unlisted):,} names of objects are not in the list and are ignored, most often (images): {most}")
    if unnamed:
        print(f"{len(unnamed):,} numbers in the maps have no name in any JSON file and are ignored, as {min(unnamed)}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="the folder ADE20K_2021_17_01, in which images/ADE lies")
    parser.add_argument("--split", choices=list(IMAGES), default="validation", help="default: validation, the benchmark")
    parser.add_argument("--short-side", type=int, default=512, help="of larger images; 0: as they are; default: 512")
    args = parser.parse_args(arguments)
    if args.short_side < 0:
        raise InputError(f"--short-side: got {args.short_side}, want 1 or more, or 0 for the release's sizes")
    return args


def find_images(root: Path, split: str) -> dict[str, Path]:
    """The split's images by name, each with its map and its JSON beside it."""
    folder = root / "images" / "ADE" / split
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}: give the folder ADE20K_2021_17_01 of the full release, unpacked")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.jpg")):
        if path.stem in found:
            raise InputError(f"{path} and {found[path.stem]} have one name: take one away")
        for other in (seg_path(path), path.with_suffix(".json")):
            if not other.is_file():
                raise InputError(f"{path} has no {other.name} beside it: unpack the release again")
        found[path.stem] = path
    if not found:
        raise InputError(f"{folder} has no .jpg in it: unpack the release again")
    return found


def read_names(path: Path) -> list[str]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [normal(line) for line in lines if line and not line.startswith("#")]


def normal(name: str) -> str:
    """The synonyms of a name with one comma and space between, whatever was there."""
    return ", ".join(" ".join(word.split()) for word in name.split(",") if word.strip())


def read_index(images: Sequence[Path], class_of: dict[str, int]) -> tuple[dict[int, str], Counter[str]]:
    """The name of each number, and the names that are no class with the number of images in which they occur.

    A number goes by the name that most files give it. A few that give it another are told of; more are an error.
    """
    names_of: dict[int, Counter[str]] = defaultdict(Counter)
    unlisted: Counter[str] = Counter()
    for path in tqdm(images, desc="names", disable=None):
        here = read_objects(path.with_suffix(".json"))
        for number, name in here.items():
            names_of[number][name] += 1
        unlisted.update({name for name in here.values() if name not in class_of})
    odd = {number: names for number, names in names_of.items() if len(names) > 1}
    if odd:
        number, names = next(iter(odd.items()))
        (most, _), (other, _) = names.most_common(2)
        said = f"number {number} is {most!r} in most JSON files, and {other!r} in others"
        if sum(names.total() - names.most_common(1)[0][1] for names in odd.values()) > MOST_ODD * len(images):
            raise InputError(f"{said}: is all of it the full release? Unpack it again")
        print(f"{len(odd)} numbers have more than one name, and go by the most frequent: {said}")
    return {number: names.most_common(1)[0][0] for number, names in names_of.items()}, unlisted


def read_objects(path: Path) -> dict[int, str]:
    """The numbers and names of an image's objects, not of their parts, which are not in the _seg.png."""
    data = path.read_bytes()
    try:
        try:
            content = json.loads(data.decode("utf-8"))
        except UnicodeDecodeError:
            content = json.loads(data.decode("latin-1"))  # some of the annotators' names are
        objects = content["annotation"]["object"]
        objects = objects if isinstance(objects, list) else [objects]  # one object alone may come without its list
        whole = [thing for thing in objects if not thing["parts"]["part_level"]]
        numbers = {int(thing["name_ndx"]): normal(thing["name"]) for thing in whole}
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not a JSON file: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is not of ADE20K's full release: {error} in its objects") from None
    numbers.pop(0, None)  # nothing, in the maps
    wrong = [number for number in numbers if not 0 < number < 26 * 256]
    if wrong:
        raise InputError(f"{path} gives an object the number {wrong[0]}: a _seg.png can hold 1..{26 * 256 - 1}")
    return numbers


def read_numbers(image: Path) -> np.ndarray:
    """(H, W) the number of each pixel's name, 0 where there is none."""
    path = seg_path(image)
    pixels = read_pixels(path)
    if pixels.ndim != 3 or pixels.shape[2] < 3:
        raise InputError(f"{path} has no red and green: it is no _seg.png of the full release")
    return pixels[..., 0].astype(np.int64) // 10 * 256 + pixels[..., 1]


def write_image(source: Path, path: Path, shape: tuple[int, ...], small: tuple[int, int]) -> None:
    """The image, of its map's ``shape``, at the size ``small``; the file itself where that is its size and no EXIF turns it."""
    pixels = read_pixels(source, "RGB")
    if pixels.shape[:2] != shape:
        sizes = f"{pixels.shape[1]}x{pixels.shape[0]}, its map {shape[1]}x{shape[0]}"
        raise InputError(f"{source} is {sizes}: they must have one size; unpack the release again")
    with cli.whole_file(path) as temporary:
        if small == shape and not turned(source):
            shutil.copyfile(source, temporary)
        else:
            Image.fromarray(resize(pixels, small)).save(temporary, "JPEG", quality=95)


def turned(path: Path) -> bool:
    with Image.open(path) as image:
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1


def small_shape(shape: tuple[int, ...], short_side: int) -> tuple[int, int]:
    height, width = shape
    factor = min(1.0, short_side / min(height, width)) if short_side else 1.0
    return round(height * factor), round(width * factor)


def seg_path(image: Path) -> Path:
    return image.with_name(f"{image.stem}_seg.png")


if __name__ == "__main__":
    cli.run(main)
