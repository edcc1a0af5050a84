"""CLIPSeg beside transformers' with the same weights: sections `clipseg` and `clipseg_parity` of bench.py.

ViT-B/16 at 352 px, D = 64, blocks (3, 6, 9). Weights are random: speed does not depend on them. transformers wants a copy of the
image for every prompt; both get the prompts' embeddings. Past `MOST_COPIES` of them it is asked in parts, for memory's sake.
"""

import copy
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from bench_common import in_turns, show
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from train_tiny_clip import build_tokenizer
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

from pmpseg import ImagePrompt, Segmenter
from pmpseg.models import CLIPSeg
from pmpseg.models.hf import quiet
from pmpseg.supports import Showing
from pmpseg.usage import forget_peak, peak_gib

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MOST_COPIES, MOST_COPIES_GPU = 16, 128  # of an image, that transformers gets at once
COLOURS, THINGS = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle", "star")
PHRASES = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]


@dataclass(frozen=True)
class Shape:
    """Of the network and of what it is asked."""

    side: int = 352
    patch: int = 16
    width: int = 768
    depth: int = 12
    text_depth: int = 12
    blocks: tuple[int, ...] = (3, 6, 9)
    dim: int = 64
    counts: tuple[int, ...] = (1, 4, 16, 64)
    wanted: tuple[float | None, ...] = (1.1, None, 12.0, 18.0)  # times as fast as transformers, by count


BASE = Shape()
TINY = Shape(side=64, width=128, depth=3, text_depth=1, blocks=(0, 2), dim=16, counts=(1, 20), wanted=(None, None))


def clipseg(repeat: int, shape: Shape = BASE) -> None:
    threads = f"float32, {torch.get_num_threads()} threads"
    print(f"\nCLIPSeg, patch {shape.patch}, {shape.side}x{shape.side}, D = {shape.dim}, blocks {shape.blocks}, {threads}")
    theirs = transformers_clipseg(shape)
    ours = CLIPSeg.from_transformers(theirs).eval()
    speed(repeat, shape, theirs, ours)
    parts(repeat, shape, ours)
    folder(repeat, shape)
    if shape is BASE:
        memory(shape)


def transformers_clipseg(shape: Shape, refined: bool = False, ids: dict[str, int] | None = None) -> CLIPSegForImageSegmentation:
    """With noise where fresh weights are all alike, so that none can be mixed up unseen."""
    torch.manual_seed(0)
    vision = {"hidden_size": shape.width, "intermediate_size": 4 * shape.width, "num_hidden_layers": shape.depth}
    vision |= {"num_attention_heads": shape.width // 64, "image_size": 224, "patch_size": shape.patch}
    text = {"num_hidden_layers": shape.text_depth} | (ids or {})
    model = CLIPSegForImageSegmentation(
        CLIPSegConfig(
            vision_config=vision, text_config=text, extract_layers=list(shape.blocks), reduce_dim=shape.dim,
            use_complex_transposed_convolution=refined,
        )
    )  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p += 0.1 * torch.randn_like(p)
        for reduce in model.decoder.reduces:
            reduce.weight *= 0.03  # or random tokens, which are large, drown the prompt
    return model.eval()


def their_logits(model: CLIPSegForImageSegmentation, normal: Tensor, embeddings: Tensor, at_once: int = MOST_COPIES) -> Tensor:
    """``normal`` (1, 3, S, S) normalised, ``embeddings`` (P, E) -> (P, S, S)."""
    copies = normal.expand(at_once, -1, -1, -1)
    parts = embeddings.split(at_once)
    return torch.cat([model(pixel_values=copies[: len(some)], conditional_embeddings=some).logits for some in parts])


def off_by(got: Tensor, want: Tensor) -> float:
    """The largest difference, of the largest logit."""
    return float((got - want).abs().max() / want.abs().max())


def asked(shape: Shape, network: CLIPSeg) -> tuple[Tensor, Tensor, Tensor]:
    """An image in [0, 1], the same normalised, and embeddings for the largest count."""
    torch.manual_seed(1)
    image = torch.rand(1, 3, shape.side, shape.side)
    mean, std = network.backbone.mean.cpu().float(), network.backbone.std.cpu().float()
    return image, (image - mean) / std, torch.randn(max(shape.counts), network.text_dim)


@torch.inference_mode()
def speed(repeat: int, shape: Shape, theirs: CLIPSegForImageSegmentation, ours: CLIPSeg) -> None:
    image, normal, embeddings = asked(shape, ours)
    for count, wanted in zip(shape.counts, shape.wanted, strict=True):
        some, answer = embeddings[:count], {}
        sides = {
            "transformers": lambda some=some, answer=answer: answer.update(theirs=their_logits(theirs, normal, some)),
            "CLIPSeg": lambda some=some, answer=answer: answer.update(ours=ours(image, some)[0]),
        }
        once = count > MOST_COPIES  # it takes a minute
        if once:
            seconds = in_turns({"transformers": sides.pop("transformers")}, 1, warm_up=False) | in_turns(sides, repeat)
        else:
            seconds = in_turns(sides, repeat)
        difference = off_by(answer["ours"], answer["theirs"])
        title = f"One image, prompts: {count}; largest difference {difference:.1e} of the largest logit"
        title += f"; transformers once, {MOST_COPIES} copies at a time" if once else ""
        show(title + ("" if wanted is None else f"; wanted {wanted:g}x"), seconds)


@torch.inference_mode()
def parts(repeat: int, shape: Shape, ours: CLIPSeg) -> None:
    image, _, embeddings = asked(shape, ours)
    features = ours.encode(image)
    example = ImagePrompt(np.zeros((480, 640, 3), np.uint8), np.arange(480 * 640).reshape(480, 640) % 640 < 200)
    showing = Showing(shape.side)
    sides = {"encode": partial(ours.encode, image)}
    sides |= {f"decode, prompts: {count}": partial(ours.decode, features, embeddings[:count]) for count in shape.counts}
    sides["embed an image as a prompt"] = partial(ours.embed, image)
    sides["an example of 480x640: shown and embedded"] = lambda: ours.embed(showing(*example.tensors()))
    show("Its parts", in_turns(sides, repeat))


def write_folder(folder: Path, shape: Shape, refined: bool = False) -> CLIPSegForImageSegmentation:
    """A folder as transformers writes one, its tokenizer a BPE that knows some 100 words; returns its model."""
    tokenizer = build_tokenizer(folder)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = transformers_clipseg(shape, refined, ids | {"vocab_size": len(tokenizer)})
    with quiet():
        model.save_pretrained(folder)
    settings = {"image_mean": MEAN, "image_std": STD, "size": {"height": shape.side, "width": shape.side}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


@torch.inference_mode()
def folder(repeat: int, shape: Shape, images: int = 6) -> None:
    """A folder of files with one list of prompts, through ``Segmenter.segment``; hooks count what is encoded."""
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        write_folder(root, shape)
        segmenter = Segmenter.load(root)
        paths = [root / f"{number}.jpg" for number in range(images)]
        for number, path in enumerate(paths):
            noise = np.random.default_rng(number).integers(0, 256, (480, 640, 3), dtype=np.uint8)
            Image.fromarray(noise).save(path)
        encoded = {"texts": 0, "images": 0}
        segmenter.text.model.register_forward_hook(
            lambda _, __, kwargs, ___: encoded.update(texts=encoded["texts"] + len(kwargs["input_ids"])), with_kwargs=True
        )
        segmenter.network.backbone.register_forward_hook(
            lambda _, given, __: encoded.update(images=encoded["images"] + len(given[0]))
        )

        def every(anew: bool) -> None:
            segmenter.text.forget()
            for path in paths:
                if anew:
                    segmenter.text.forget()
                segmenter.segment(path, PHRASES)

        sides = {"texts encoded for every image": partial(every, True), "texts encoded once": partial(every, False)}
        counted = {}
        for name, run in sides.items():
            encoded.update(texts=0, images=0)
            run()
            counted[f"{name} ({encoded['texts']} texts, {encoded['images']} images)"] = run
        seconds = in_turns(counted, repeat, warm_up=False)
        title = f"A folder of {images} photographs of 480x640 with {len(PHRASES)} prompts (texts by a CLIP's tower, a small BPE)"
        show(title + ", seconds an image", {name: spent / images for name, spent in seconds.items()})
        text = in_turns({"": lambda: (segmenter.text.forget(), segmenter.text.encode(PHRASES))}, repeat)[""]
        print(f"  encoding {len(PHRASES)} texts takes {text:.3f} s")


def memory(shape: Shape) -> None:
    """Each case in a process of its own."""
    print("\nPeak resident memory of a forward, GiB (before it, the network alone; transformers' holds CLIP's text tower, too)")
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    for count in shape.counts:
        found = []
        for side in ("transformers", "CLIPSeg"):
            command = [sys.executable, __file__, side, str(count), str(torch.get_num_threads())]
            ran = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
            found.append(f"{side} {ran.stdout.strip()}")
        note = f"; transformers {MOST_COPIES} copies at a time" if count > MOST_COPIES else ""
        print(f"  prompts: {count:3}   " + ", ".join(found) + note, flush=True)


@torch.inference_mode()
def peak(side: str, count: int, shape: Shape = BASE) -> str:
    model = transformers_clipseg(shape)
    image, embeddings = torch.rand(1, 3, shape.side, shape.side), torch.randn(count, 512)
    if side == "transformers":
        run = partial(their_logits, model, image, embeddings)
    else:
        run = partial(CLIPSeg.from_transformers(model).eval(), image, embeddings)
    del model
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system (glibc)
    before = forget_peak()
    run()
    return f"{peak_gib():.2f} ({before:.2f})"


@torch.inference_mode()
def clipseg_parity(_: int, shape: Shape = BASE, sizes: Sequence[int] = (64, 160, 224, 352)) -> None:
    """From words, or examples, to logits: ours by folder, text encoder and all."""
    print("\nLargest difference of logits to transformers', of the largest logit: asked with texts / with images (their spread)")
    for refined in (False, True):
        for patch in (16, 32):
            with tempfile.TemporaryDirectory() as made:
                theirs = write_folder(Path(made), Shape(**(shape.__dict__ | {"patch": patch})), refined)
                segmenter = Segmenter.load(made)
            row = [parity_at(side, theirs, segmenter) for side in sizes]
            print(f"  {'refined' if refined else 'plain':8} patch {patch}:  " + "   ".join(row), flush=True)


def parity_at(side: int, theirs: CLIPSegForImageSegmentation, segmenter: Segmenter, count: int = 2) -> str:
    ours, words = segmenter.network, PHRASES[:count]
    assert isinstance(ours, CLIPSeg)
    torch.manual_seed(side)
    image, examples = torch.rand(1, 3, side, side), torch.rand(count, 3, side, side)
    normal, seen = ((x - ours.backbone.mean) / ours.backbone.std for x in (image, examples))
    tokens = segmenter.text.tokenizer(words, padding=True, return_tensors="pt")
    found = []
    for given, prompts in (
        ({"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}, segmenter.text.encode(words).pooled),
        ({"conditional_pixel_values": seen}, ours.embed(examples)),
    ):
        want = theirs(pixel_values=normal.expand(count, -1, -1, -1), **given).logits[None]
        if want.shape[-1] != side:  # their refined head at patch 32 gives twice the size
            want = F.interpolate(want, (side, side), mode="bilinear")
        spread = (want.std((2, 3)).min() / want.abs().max()).item()
        found.append((off_by(ours(image, prompts), want), spread))
    (text, text_spread), (shown, image_spread) = found
    return f"{side} px {text:.0e} / {shown:.0e} ({min(text_spread, image_spread):.2f})"


@torch.inference_mode()
def clipseg_gpu(repeat: int, shape: Shape = BASE, device: str = "cuda", batches: Sequence[int] = (1, 8)) -> None:
    """Images a second and peak memory, float32 and bf16 weights, compiled or not. On a CPU only to see that it runs."""
    reference = transformers_clipseg(shape)
    image, normal, embeddings = (x.to(device) for x in asked(shape, CLIPSeg.from_transformers(reference)))
    print(
        f"\nCLIPSeg, {shape.side}x{shape.side}, patch {shape.patch}, {device}; at most {MOST_COPIES_GPU} copies for transformers"
    )
    for dtype in (torch.float32, torch.bfloat16):
        theirs = copy.deepcopy(reference).to(device, dtype)
        ours, compiled = (CLIPSeg.from_transformers(reference).eval().to(device, dtype) for _ in range(2))
        compiled.compile()
        seen, asked_with = normal.to(dtype), embeddings.to(dtype)
        difference = off_by(ours(image, asked_with).float()[0], their_logits(theirs, seen, asked_with).float())
        print(f"{dtype}: largest difference {difference:.1e} of the largest logit")
        for batch, count in product(batches, (count for count in shape.counts if count != 4)):
            images, prompts = image.repeat(batch, 1, 1, 1), asked_with[:count]
            sides = {
                "transformers": partial(their_logits, theirs, seen, prompts.repeat(batch, 1), MOST_COPIES_GPU),
                "CLIPSeg": partial(ours, images, prompts),
                "CLIPSeg compiled": partial(compiled, images, prompts),
            }
            for name, run in sides.items():
                run()  # compiles, and fills caches that last
                reset_peak(device)
                rate = batch / in_turns({name: run}, repeat, device)[name]
                title = f"  images {batch}, prompts {count:2}: {name:17}"
                print(f"{title}{rate:9.1f} images a second, peak {peak_of(device):.2f} GiB", flush=True)


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()


def peak_of(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else peak_gib()


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(peak(sys.argv[1], int(sys.argv[2])))
