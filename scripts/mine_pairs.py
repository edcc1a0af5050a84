"""Mine pairs of a mask and a noun from images with captions (OVSeg, arXiv 2210.04150, sec. 3.2), to tune a CLIP on.

    python scripts/mine_pairs.py --images coco/train2017 --captions coco/annotations/captions_train2017.json \
        --proposals runs/coco/model --clip openai/clip-vit-large-patch14 --out pairs.csv

The nouns of an image's captions, by --parser, are each paired with the mask proposal whose cut-out the CLIP scores highest.
Proposals come from a model folder of pmpseg, which is asked the nouns (--blind asks it the names it was trained on instead), or
from a Mask2Former's or MaskFormer's folder. --out is CSV, one row a pair (see ``pmpseg.data.pairs``); it is called
NAME.part.csv until all images are done. Stopped or killed, the same command goes on where it was, and ends with the same file.
"""

import argparse
import csv
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pmpseg import cli, rle
from pmpseg.data.pairs import COLUMNS, broken
from pmpseg.errors import InputError
from pmpseg.images import read_image
from pmpseg.inference import upsample
from pmpseg.nouns import PARSERS, noun_parser
from pmpseg.predict import choose_device
from pmpseg.region_stage import RegionStage
from pmpseg.segmenter import Segmenter, working_image

Propose = Callable[[Image.Image, Sequence[str]], Tensor]  # an image and nouns -> (Q, H, W) probabilities
SETTINGS = ("captions", "captions_per_image", "proposals", "blind", "image_size", "clip", "parser", "templates", "mask_threshold")


def main(arguments: Sequence[str] | None = None) -> Path:
    args = parse_arguments(arguments)
    part, settings = args.out.with_suffix(".part.csv"), {key: getattr(args, key) for key in SETTINGS}
    captions = read_captions(args.captions, args.captions_per_image)
    nouns = noun_parser(args.parser)
    if not args.images.is_dir():
        raise InputError(f"--images {args.images}: no such folder")
    done = resume(part, args.out, settings, list(captions))
    device = choose_device(args.device)
    stage = RegionStage.load(args.clip).to(device).eval()
    stage.text.templates = tuple(args.templates)
    stage.classifier.mask_threshold = args.mask_threshold
    propose = proposer(args.proposals, args.image_size, args.blind, device)
    missing = 0
    with part.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        for name in tqdm(list(captions)[done:], initial=done, total=len(captions), unit="image", desc="mine"):
            try:
                image = read_image(args.images / name)
            except InputError as error:
                missing += 1
                tqdm.write(f"pmpseg: skipped: {error}")
                continue
            found: dict[str, str] = {}  # nouns with their first captions
            for caption, noun in ((c, noun) for c in captions[name] for noun in nouns(c)):
                found.setdefault(noun, caption)
            writer.writerows(pairs_of(name, image, found, propose, stage, device))
            file.flush()
            os.fsync(file.fileno())
    if missing == len(captions):
        raise InputError(f"none of the {missing} images of {args.captions} is in {args.images}: give the folder that they are in")
    part.replace(args.out)
    with args.out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    print(f"{len(rows)} pairs, {len({r['noun'] for r in rows})} nouns, {len({r['image'] for r in rows})} images: {args.out}")
    return args.out


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="the folder of the images")
    parser.add_argument("--captions", required=True, help="COCO captions (JSON)")
    parser.add_argument("--captions-per-image", type=int, default=1, help="how many of them; OVSeg: 1 is as good as 5")
    parser.add_argument("--proposals", required=True, help="a model folder of pmpseg, or one of Mask2Former or MaskFormer")
    parser.add_argument("--blind", action="store_true", help="ask a model of pmpseg its own class list, and not the nouns")
    parser.add_argument("--image-size", type=int, default=640, help="short side, for Mask2Former and MaskFormer; default: 640")
    parser.add_argument("--clip", required=True, help="a CLIP's folder or hub id, a region model, or tiny_clip")
    parser.add_argument("--templates", nargs="+", default=["a photo of a {}."], help="default: 'a photo of a {}.'")
    parser.add_argument("--parser", default="textblob", choices=PARSERS, help="of nouns; default: textblob, which works offline")
    parser.add_argument("--mask-threshold", type=float, default=0.5, help="default: 0.5")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is one")
    parser.add_argument("--out", type=Path, required=True, help="the CSV file")
    args = parser.parse_args(arguments)
    if args.captions_per_image < 1 or args.image_size < 1 or not 0 < args.mask_threshold < 1:
        raise InputError("--captions-per-image and --image-size want 1 or more, --mask-threshold above 0 to below 1")
    if wrong := [template for template in args.templates if template.count("{}") != 1]:
        raise InputError(f"--templates: got {wrong[0]!r}, want texts with one '{{}}' each, where the noun goes")
    return args


def read_captions(path: str, per_image: int) -> dict[str, list[str]]:
    """Image names, in the order of their ids, with their first captions."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        names = {image["id"]: image["file_name"] for image in content["images"]}
        captions: dict[str, list[str]] = {}
        for row in sorted(content["annotations"], key=lambda row: (row["image_id"], row["id"])):
            captions.setdefault(names[row["image_id"]], []).append(row["caption"])
    except FileNotFoundError:
        raise InputError(f"--captions {path}: no such file") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"--captions {path}: not COCO captions, with 'images' and 'annotations' ({error!r})") from None
    if not captions:
        raise InputError(f"--captions {path}: holds no caption")
    return {name: some[:per_image] for name, some in captions.items()}


def resume(part: Path, out: Path, settings: dict[str, Any], names: list[str]) -> int:
    """How many images ``part`` has behind it; its last image, which may be half written, is taken out and mined again.

    Images are mined in order, so those before the last are done, with pairs or without.
    """
    kept = out.with_suffix(".json")
    if out.exists():
        raise InputError(f"--out {out} is done: give another name, or remove it to mine anew")
    if part.exists():
        before = json.loads(kept.read_text()) if kept.exists() else {}
        changed = [key for key in settings if before.get(key) != settings[key]]
        if changed:
            key = changed[0]
            was = f"{part} was begun with {key} {before.get(key)!r}, now it is {settings[key]!r}"
            raise InputError(f"{was}: ask for the same, or give another --out")
        with part.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if not broken(row)]
        known = set(names)
        if gone := [row["image"] for row in rows if row["image"] not in known]:
            was = f"{part} has pairs of {gone[0]}, which is not in the captions"
            raise InputError(f"{was}: they have changed, so restore them, give another --out, or remove the file to mine anew")
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        with cli.whole_file(kept) as temporary:
            temporary.write_text(json.dumps(settings, indent=1) + "\n")
        rows = []
    last = rows[-1]["image"] if rows else ""
    with cli.whole_file(part) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(row for row in rows if row["image"] != last)
    return names.index(last) if rows else 0


def proposer(folder: str, image_size: int, blind: bool, device: str) -> Propose:
    """Whatever proposes masks, as one function."""
    config = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise InputError(f"--proposals {folder}: no such folder; give a model folder of pmpseg, or one of Mask2Former")
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.is_file() else None
    except (ValueError, AttributeError):
        kind = None  # Segmenter.load says what is wrong
    if kind in ("mask2former", "maskformer"):
        from pmpseg.models.pmp import PMP

        network, ask = PMP.from_transformers(folder).to(device).eval(), lambda nouns: None
    else:
        segmenter = Segmenter.load(folder, device)
        network, image_size, names = segmenter.network, segmenter.image_size, segmenter.vocabulary.synonyms
        text = segmenter.text
        ask = lambda nouns: text.encode(names if blind else nouns)  # type: ignore[assignment]  # noqa: E731

    @torch.inference_mode()
    def propose(image: Image.Image, nouns: Sequence[str]) -> Tensor:
        tensor = working_image(image, image_size).to(device)
        masks = network.decode(network.encode(tensor), ask(nouns)).mask_logits.float().sigmoid()
        return upsample(masks, (tensor.shape[-2], tensor.shape[-1]), (image.height, image.width))[0]

    return propose


def pairs_of(
    name: str, image: Image.Image, nouns: dict[str, str], propose: Propose, stage: RegionStage, device: str
) -> list[dict[str, Any]]:
    """The rows of one image."""
    if not nouns:
        return []
    masks = propose(image, list(nouns))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(device).float() / 255
    scores, best = stage.best_regions(pixels, masks, list(nouns))
    rows = []
    for (noun, caption), score, index in zip(nouns.items(), scores.tolist(), best.tolist(), strict=True):
        if index < 0:
            continue
        mask = (masks[index] > stage.classifier.mask_threshold).cpu().numpy()
        ys, xs = np.nonzero(mask)
        place = {"x": xs.min(), "y": ys.min(), "width": np.ptp(xs) + 1, "height": np.ptp(ys) + 1, "area": len(xs)}
        size = {"image_width": image.width, "image_height": image.height}
        words = {"image": name, "noun": noun, "score": f"{score:.4f}", "caption": " ".join(caption.split())}
        rows.append(words | place | size | {"counts": rle.encode(mask)["counts"]})
    return rows


if __name__ == "__main__":
    cli.run(main)
