"""Images a second of a training loader, a worker's time by part, and folders against zips, side by side in one run.

    python scripts/bench_loading.py --root data/coco                      # CocoStuff; both forms where ROOT has both
    python scripts/bench_loading.py -c conf/pmp_coco_stuff.yaml --data.root data/coco --workers 2

scripts/make_coco_stuff.py --both writes a ROOT to try it on. The parts are CPU time of one process, which moves less on a busy
machine than wall time does; the loader's rates are wall time. Files come from the system's cache after the first turn: a slow
disk is not measured.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from show_batch import with_arguments

from pmpseg import cli
from pmpseg.errors import InputError
from pmpseg.evaluate import build_data, read_data

PARTS = ("read and decode", "things", "augment", "labels, prompts, tensors", "collate")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", help="by default CocoStuff as it is, in crops of 512")
    parser.add_argument("--root", help="the same as --data.root")
    parser.add_argument("--images", type=cli.positive, default=200, help="in each turn")
    parser.add_argument("--workers", type=cli.positive, default=2, help="of the loader, beside none; default: 2")
    parser.add_argument("--turns", type=cli.positive, default=3, help="of each measurement, the best of which counts; default: 3")
    args, rest = parser.parse_known_args(arguments)
    spec = read_data(args.config) if args.config else {"class_path": "pmpseg.data.CocoStuff"}
    spec = with_arguments(spec, [*rest, *(["--data.root", args.root] if args.root else [])])
    with sides(spec) as built:
        for name, data in built.items():
            parts = by_part(data, args.images, args.turns)
            total = sum(parts.values())
            print(f"\n{name}: {1 / total:.0f} images a second in one worker ({1000 * total:.1f} CPU-ms each)")
            for part, seconds in parts.items():
                print(f"  {part:28}{1000 * seconds:7.2f} ms {100 * seconds / total:5.0f} %")
        for workers in sorted({0, args.workers}):
            rates: dict[str, list[float]] = {name: [] for name in built}
            for _ in range(args.turns):
                for name, data in built.items():
                    rates[name].append(rate(data, workers, args.images))
            print(f"\nloader with {workers or 'no'} workers, images a second (wall), best of {args.turns}")
            first = max(next(iter(rates.values())))
            for name, found in rates.items():
                print(f"  {name:28}{max(found):7.0f}   {max(found) / first:5.2f}x")


@contextmanager
def sides(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The data of a spec; that of CocoStuff once for each form in which its root has it."""
    root = Path(spec["init_args"].get("root", "../data/coco"))
    forms = {"folders": ("train2017", "stuffthingmaps"), "zips": ("train2017.zip", "stuffthingmaps_trainval2017.zip")}
    forms = {form: names for form, names in forms.items() if all((root / name).exists() for name in names)}
    if not spec["class_path"].endswith("CocoStuff") or len(forms) < 2:
        yield {"as configured": build_data(spec)}
        return
    with tempfile.TemporaryDirectory() as temporary:
        built = {}
        for form in forms:
            own = Path(temporary) / form
            own.mkdir()
            for path in root.iterdir():
                if (path.suffix == ".zip") == (form == "zips"):
                    (own / path.name).symlink_to(path.resolve())
            built[form] = build_data({**spec, "init_args": spec["init_args"] | {"root": str(own)}})
        yield built


def by_part(data: Any, images: int, turns: int) -> dict[str, float]:
    """CPU seconds an image of each part; the fastest turn of each."""
    dataset = data.dataset("train")
    spent = dict.fromkeys(PARTS, 0.0)

    def timed(part: str, run: Callable) -> Callable:
        def wrapped(*args: Any, **options: Any) -> Any:
            start = time.process_time()
            result = run(*args, **options)
            spent[part] += time.process_time() - start
            return result

        return wrapped

    reader = getattr(dataset, "files", None) or getattr(dataset, "source", None)
    if reader is None or not hasattr(reader, "read"):
        raise InputError(f"{type(data).__name__} reads no files that can be timed: want CocoStuff or FolderData")
    reader.read = timed(PARTS[0], reader.read)
    things = getattr(dataset, "things", None)
    if things is not None:
        things.read = timed(PARTS[1], things.read)
    dataset.transform = timed(PARTS[2], dataset.transform)
    best: dict[str, float] = {}
    for turn in range(turns + 1):
        spent.update(dict.fromkeys(PARTS, 0.0))
        start, items, count = time.process_time(), [], 0
        while count < images:
            items.append(dataset[turn, count % len(dataset)])
            count += 1
            if len(items) == data.batch_size:
                timed(PARTS[4], data.collate)(items)
                items = []
        whole = time.process_time() - start
        spent[PARTS[3]] = whole - sum(spent.values())
        if turn:  # the first one imports and opens
            best = {part: min(seconds / images, best.get(part, 1e9)) for part, seconds in spent.items()}
    for owner in (reader, things):
        if owner is not None:
            del owner.read
    return {part: seconds for part, seconds in best.items() if seconds}


def rate(data: Any, workers: int, images: int) -> float:
    """Images a second of a loader that is already running."""
    data.num_workers = workers
    loader = data.train_dataloader()
    batches, seen, start = iter(loader), 0, 0.0
    warm = max(1, 2 * workers)
    for number in range(warm + max(1, images // data.batch_size)):
        try:
            batch = next(batches)
        except StopIteration:
            batches = iter(loader)
            batch = next(batches)
        if number == warm - 1:
            start = time.perf_counter()
        elif number >= warm:
            seen += len(batch["name"])
    return seen / (time.perf_counter() - start)


if __name__ == "__main__":
    cli.run(main)
