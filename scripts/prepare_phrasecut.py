"""Fetch PhraseCut's annotations, and check annotations and images: what is there, what is missing, what is wrong.

    python scripts/prepare_phrasecut.py data/phrasecut                  # on a machine with network: fetches what is missing
    python scripts/prepare_phrasecut.py data/phrasecut --check-only     # offline

Counts are those of the README of github.com/ChenyunWu/PhraseCutDataset, the links those of its downloader since March 2026. Where
they have moved again, give others: --url refer_val.json=https://... (issue 6 of that repository has one zip of them all: unpack
it into the folder). Images are Visual Genome's, and are not fetched: this says where they are from.

Images whose size is not the annotated one are written to wrong_size.json, which ``PhraseCut`` reads and leaves out. The exit
status is 0 where everything asked for is there and as expected, else 1.
"""

import argparse
import shutil
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from json import dumps
from pathlib import Path

from tqdm import tqdm

from pmpseg import cli
from pmpseg.data.image_store import ImageStore
from pmpseg.data.phrasecut import SPLITS
from pmpseg.data.phrasecut_files import WRONG_SIZE, WRONG_SIZE_FILE, find_images, read_list, read_sizes
from pmpseg.errors import InputError

PHRASES = {"train": 310_816, "val": 20_316, "test": 14_354, "miniv": 821}
IMAGES = {"train": 71_746, "val": 2_971, "test": 2_545, "miniv": 100}
DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id="
URLS = {
    "image_data_split.json": f"{DRIVE}1xB9eExJo35K3DQu8PnBWZ1q_OMoMl8-i",
    "refer_train.json": f"{DRIVE}1qx-0q6r9r0YUGpoyT0B8HJKmUFWQDSu7",
    "refer_val.json": f"{DRIVE}1UyojArOFPlsSeNbA9fHWjCjOOU-OCohG",
    "refer_test.json": f"{DRIVE}1jrzXm1gcq6f5hNDeamZd0UmyyHUv61IZ",
    "refer_miniv.json": f"{DRIVE}1oLcTQ1blTIQyu5ZMelQN2HSniuQaxM4E",
}
IMAGE_HELP = (
    "images: Visual Genome 1.2, https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip (9.2 GB) and images2.zip beside it "
    "(5.5 GB); put both into the folder as they are, they need not be unpacked (image_data_split.json has each image's own link)"
)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if not args.check_only:
        args.folder.mkdir(parents=True, exist_ok=True)
        for name, url in args.urls.items():
            if not (args.folder / name).is_file():
                print(f"fetching {name}")
                fetch(url, args.folder / name)
    problems = check(args.folder, args.images or args.folder, args.splits)
    for problem in problems:
        print(f"MISSING OR WRONG: {problem}")
    print("all is as expected" if not problems else f"{len(problems)} to mend")
    return int(bool(problems))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the annotations are, or are to be")
    parser.add_argument("--images", type=Path, help="where the images are, a folder or a zip; default: the folder")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS), help="default: all four")
    parser.add_argument("--check-only", action="store_true", help="fetch nothing")
    parser.add_argument("--url", action="append", default=[], metavar="FILE=URL", help="another link for one of the files")
    args = parser.parse_args(arguments)
    wanted = ["image_data_split.json", *(f"refer_{split}.json" for split in args.splits)]
    args.urls = {name: URLS[name] for name in wanted}
    for text in args.url:
        name, equals, url = text.partition("=")
        if not equals or name not in URLS:
            raise InputError(f"--url: got {text!r}, want FILE=URL with a FILE of {', '.join(URLS)}{cli.did_you_mean(name, URLS)}")
        if name in args.urls:
            args.urls[name] = url
    return args


def fetch(url: str, path: Path) -> None:
    """A file, whole or not at all."""
    hint = "give another link with --url, or put the file there by hand"
    with cli.whole_file(path) as temporary:
        try:
            with urllib.request.urlopen(url, timeout=60) as answer, temporary.open("wb") as file:
                shutil.copyfileobj(answer, file)
                size, wanted = file.tell(), answer.headers.get("Content-Length")
        except (OSError, HTTPException, ValueError) as error:
            if getattr(error, "errno", None) in cli.USERS:  # no space, no permission: another link would not help
                raise
            raise InputError(f"{path.name}: cannot be fetched from {url} ({cli.one_line(str(error))}): {hint}") from None
        if wanted is not None and size != int(wanted):  # a server that closes early is no error to urllib
            raise InputError(f"{path.name}: {url} gave {size:,} of {int(wanted):,} bytes: try again, or {hint}")
        with temporary.open("rb") as file:
            first = file.read(64).lstrip()[:1]
            file.seek(max(0, size - 64))
            last = file.read().rstrip()[-1:]
        if first != b"[":  # a page that asks for something, or says that the link is dead
            raise InputError(f"{path.name}: {url} gives something else than the file: {hint}")
        if last != b"]":  # nor does it always say how many bytes there are
            raise InputError(f"{path.name}: {url} gave {size:,} bytes and then stopped: try again, or {hint}")


def check(folder: Path, images: Path, splits: Sequence[str]) -> list[str]:
    """What is missing or wrong, a line each; what was found is printed on the way."""
    wanted = ["image_data_split.json", *(f"refer_{split}.json" for split in splits)]
    problems = [f"{folder / name} is missing" for name in wanted if not (folder / name).is_file()]
    if not (folder / "image_data_split.json").is_file():
        return [*problems, IMAGE_HELP]
    sizes = read_sizes(folder)
    try:
        store = find_images(images)
    except InputError as error:
        store = ImageStore([])
        problems.append(str(error))
    split_of = {entry["image_id"]: entry.get("split") for entry in read_list(folder / "image_data_split.json")}
    used: set[int] = set()
    for split in splits:
        path = folder / f"refer_{split}.json"
        if path.is_file():
            tasks = read_list(path)
            try:
                problems += [f"{path.name}: {text}" for text in task_problems(tasks, split, sizes, split_of)]
            except (KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{path} is not PhraseCut's: a task of it lacks {error}") from None
            here = {task["image_id"] for task in tasks}
            print(f"{path.name}: {len(tasks):,} phrases on {len(here):,} images")
            used |= here
    problems += image_problems(used, sizes, store, folder)
    return problems


def task_problems(tasks: list[dict], split: str, sizes: dict, split_of: dict) -> list[str]:
    images = {task["image_id"] for task in tasks}
    problems = []
    for what, found, expected in (("phrases", len(tasks), PHRASES[split]), ("images", len(images), IMAGES[split])):
        if found != expected:
            problems.append(f"{found:,} {what}, not {expected:,}")
    kinds = {
        "without a word in the phrase": [task for task in tasks if not task["phrase"].strip()],
        "without a polygon of 3 points": [
            task for task in tasks if not any(len(polygon) > 2 for instance in task["Polygons"] for polygon in instance)
        ],
        "on an image that image_data_split.json lacks": [task for task in tasks if task["image_id"] not in sizes],
        "on an image of another split": [task for task in tasks if split_of.get(task["image_id"], split) != split],
    }
    problems += [f"{len(some):,} tasks {what}, as {some[0]['task_id']}" for what, some in kinds.items() if some]
    return problems


def image_problems(used: set[int], sizes: dict, store: ImageStore, folder: Path) -> list[str]:
    """Missing and broken images; those of another size are no problem once they are written down."""
    names = {identity: f"{identity}.jpg" for identity in sorted(used)}
    missing = [name for name in names.values() if name not in store]
    problems = [f"{len(missing):,} of {len(names):,} images, as {missing[0]}; {IMAGE_HELP}"] if missing else []
    other_size, broken = [], []
    for identity, name in tqdm(names.items(), desc="sizes", disable=None):
        if name in store and identity in sizes:
            try:
                if store.size(name) != sizes[identity]:
                    other_size.append(identity)
            except InputError as error:
                broken.append(str(error))
    if broken:
        problems.append(f"{len(broken):,} images cannot be read, as {broken[0]}")
    known = [identity for identity in other_size if identity in WRONG_SIZE]
    print(f"images: {len(names) - len(missing):,} of {len(names):,}, {len(other_size)} of them of another size than annotated")
    if len(known) < len(other_size):
        with cli.whole_file(folder / WRONG_SIZE_FILE) as temporary:
            temporary.write_text(dumps(other_size) + "\n")
        print(f"wrote them to {folder / WRONG_SIZE_FILE}: PhraseCut leaves them out")
    return problems


if __name__ == "__main__":
    cli.run(main)
