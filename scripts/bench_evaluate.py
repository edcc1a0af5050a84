"""Memory and speed of ``evaluate`` with 847 classes: python scripts/bench_evaluate.py [--side 1024]

Each way runs in a process of its own, on the same made images (A-847's layout), with networks of the usual size that nobody
trained: a PMP (ResNet-50, 100 queries, width 256) and a CLIPSeg (ViT-B/16, 352 px). Peaks are the process's, with what it holds
before the first image taken off; times are ratios to the first way. All class maps that must be equal are compared.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

from pmpseg import Segmenter
from pmpseg.data import Benchmark
from pmpseg.evaluate import evaluate
from pmpseg.hub import shipped_or
from pmpseg.models import PMP, CLIPSeg, Prompts, TextEncoder
from pmpseg.usage import peak_gib
from pmpseg.views import Views

WAYS: dict[str, dict] = {
    "64 classes at a time": {},
    "8 at a time": {"chunk": 8},
    "all 847 at once": {"chunk": 847},
    "windows of 512, mirrored": {"views": Views(512, flip=True)},
    "CLIPSeg, 64 at a time": {"clipseg": True},
    "CLIPSeg, all at once": {"clipseg": True, "chunk": 847},
}
EQUAL = [("64 classes at a time", "8 at a time"), ("64 classes at a time", "all 847 at once")]
EQUAL += [("CLIPSeg, 64 at a time", "CLIPSeg, all at once")]


class Words(torch.nn.Module):
    """A text side of any width: a random embedding for each class, the same for the same list."""

    normalize, templates = False, ("{}",)

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def encode(self, words: list) -> Prompts:
        pooled = torch.randn(1, len(words), self.dim, generator=torch.Generator().manual_seed(0))
        valid = torch.ones(1, len(words), dtype=torch.bool)
        return Prompts(pooled[:, :, None], valid[..., None], pooled, valid)


def make_images(root: Path, count: int, side: int) -> None:
    rng = np.random.default_rng(0)
    base = root / "ADE20K_2021_17_01" / "benchmark_847" / "validation"
    for kind in ("images", "annotations"):
        (base / kind).mkdir(parents=True)
    for n in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
        coarse.save(base / "images" / f"{n}.jpg", quality=90)
        blocks = np.ones((side // 8, side // 8), np.uint16)
        Image.fromarray(np.kron(rng.integers(0, 847, (8, 8)).astype(np.uint16), blocks)).save(base / "annotations" / f"{n}.png")


def segmenter(clipseg: bool, side: int) -> Segmenter:
    torch.manual_seed(0)
    if clipseg:
        config = CLIPSegConfig(vision_config={"patch_size": 16})  # ViT-B/16, D = 64
        network = CLIPSeg.from_transformers(CLIPSegForImageSegmentation(config).eval())
        return Segmenter(network, Words(config.projection_dim), None, 352, square=True)
    text = TextEncoder(shipped_or("tiny_clip"))
    return Segmenter(PMP(text_dim=text.dim, backbone="resnet50", pixel_decoder="fpn"), text, None, side)


def one_way(name: str, root: Path, side: int) -> None:
    """One of ``WAYS``; prints what it needs as JSON."""
    way = dict(WAYS[name])
    model = segmenter(way.pop("clipseg", False), side)
    data = Benchmark("ade20k_847", str(root), model.image_size, square=model.square, num_workers=0)
    model.text.encode([list(words) for words in data.vocabulary.synonyms])  # once for all images; not what is measured
    before = peak_gib()
    usage = evaluate(model, data, save_labels=root / name.replace(" ", "_"), **way)["usage"]
    print(json.dumps({"peak": usage["peak_memory_gib"], "before": before, "seconds": 1 / usage["images_per_second"]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=1024, help="of the images, a multiple of 8; default: 1024")
    parser.add_argument("--images", type=int, default=3, help="default: 3, of which the first is not timed")
    parser.add_argument("--only", default="", help="ways that hold this text")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side < 64 or options.side % 8 or options.images < 2:
        raise SystemExit("--side: want a multiple of 8 from 64; --images: want 2 or more")
    if options.way:
        one_way(options.way, options.root, options.side)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), options.images, options.side)
        scores = 847 * options.side**2 * 4 / 2**30
        print(f"847 classes, {options.side}x{options.side}: one map of all scores would be {scores:.2f} GiB\n")
        print(f"{'':28}{'peak GiB':>10}{'above start':>13}{'s an image':>12}{'ratio':>8}")
        first = None
        for name in (name for name in WAYS if options.only in name):
            command = [sys.executable, __file__, "--way", name, "--root", folder, "--side", str(options.side)]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found = json.loads(said.splitlines()[-1])
            first = first or found["seconds"]
            more = found["peak"] - found["before"]
            ratio = found["seconds"] / first
            print(f"{name:28}{found['peak']:10.2f}{more:13.2f}{found['seconds']:12.2f}{ratio:8.2f}", flush=True)
        print()
        for pair in (pair for pair in EQUAL if all(options.only in name for name in pair)):
            one, other = (sorted((Path(folder) / name.replace(" ", "_")).iterdir()) for name in pair)
            same = all(a.read_bytes() == b.read_bytes() for a, b in zip(one, other, strict=True))
            print(f"{pair[0]} and {pair[1]}: {'the same labels' if same else 'DIFFERENT LABELS'}")


if __name__ == "__main__":
    main()
