"""A tiny COCO-Stuff in the official layout, in folders and as the official zips: what scripts/make_coco_stuff.py writes."""

import runpy
from pathlib import Path

MAKE = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "make_coco_stuff.py"))
SIDE = 128


def make(root: Path, count: int = 12, val_count: int = 4, folders: bool = True, zips: bool = False) -> Path:
    MAKE["make"](root, count, val_count, folders, zips, SIDE)
    return root
