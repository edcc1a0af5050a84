"""``python -m pmpseg.predict MODEL IMAGE_OR_FOLDER --prompts "red circle; stripes" --out DIR``.

A model that takes examples may also be asked with ``--prompt-image A.jpg --prompt-mask A.png``.

Writes, for each image NAME, ``NAME_overlay.png`` and a mask (0 or 255) for each prompt,
``NAME_mask_00_red-circle.png``, and for all together ``predictions.json`` in COCO's format, masks as run
lengths. Sub-folders are kept. Never imports lightning, and torch only after the arguments are known to be
good.
"""

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from pmpseg.cli import run, whole_file
from pmpseg.errors import InputError
from pmpseg.hub import model_folder
from pmpseg.images import read_image
from pmpseg.vocabulary import Vocabulary, parse_prompts

if TYPE_CHECKING:
    from pmpseg.segmenter import Segmentation

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 1 where files of a folder could not be read, else 0. Raises ``InputError``."""
    args = parse_arguments(arguments)
    classes = Vocabulary.read(args.names_from) if args.names_from else None
    prompts = classes.names if classes else parse_prompts(args.prompts) if args.prompts else []
    check_examples(args, prompts)
    images = list_images(args.images, args.out)
    model = model_folder(args.model)

    from tqdm import tqdm

    from pmpseg.segmenter import Segmenter

    segmenter = Segmenter.load(model, device=choose_device(args.device))
    segmenter.vocabulary = segmenter.vocabulary or classes  # a class stands for its synonyms
    asked, prompts = with_examples(prompts, args)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.region:
        from pmpseg.region_stage import RegionStage

        segmenter.region = RegionStage.load(args.region).to(segmenter.device)
    if 0 < len(missing := segmenter.not_on_list(prompts)) < len(prompts):
        names = ", ".join(missing[:5]) + ", ..." * (len(missing) > 5)
        print(f"{len(missing)} of {len(prompts)} prompts are no class of this model: {names}", file=sys.stderr)
    found: dict[str, Any] = {
        "info": {
            "model": args.model,
            "together": args.together,
            "threshold": args.threshold if args.together or args.threshold is not None else segmenter.threshold,
        },
        "images": [],
        "categories": [{"id": number, "name": prompt} for number, prompt in enumerate(prompts)],
        "annotations": [],
    }
    started = time.perf_counter()
    for path, name in tqdm(images.items(), unit="image", disable=len(images) == 1):
        try:
            image = read_image(path)
        except InputError as error:
            if path == args.images:  # it was asked for by name
                raise
            tqdm.write(f"pmpseg: skipped: {error}", file=sys.stderr)
            continue
        answer = segmenter.segment(image, asked, threshold=args.threshold, together=args.together)
        write_pictures(answer, prompts, args.out / name)
        number = len(found["images"])
        file_name = path.name if path == args.images else path.relative_to(args.images).as_posix()
        found["images"].append(
            {"id": number, "file_name": file_name, "width": image.width, "height": image.height}
        )
        for annotation in answer.to_coco():
            place = len(found["annotations"]) % len(prompts)  # there is one for each prompt
            ids = {"id": len(found["annotations"]), "image_id": number, "category_id": place}
            found["annotations"].append({**ids, **annotation, "prompt": prompts[place], "iscrowd": 0})
    seconds = time.perf_counter() - started
    with whole_file(args.out / "predictions.json") as temporary:
        temporary.write_text(json.dumps(found), encoding="utf-8")
    done, skipped = len(found["images"]), len(images) - len(found["images"])
    skips = f", {skipped} skipped" if skipped else ""
    speed = f"{done / seconds:.2f} images/s"
    print(f"{done} images{skips}, {speed}: pictures and predictions.json are in {args.out}")
    return 1 if skipped else 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pmpseg.predict",
        description="Outline what the prompts name, in an image or a folder of images.",
    )
    parser.add_argument("model", metavar="MODEL", help="the model/ folder of a run, or a hub id")
    parser.add_argument("images", metavar="IMAGE_OR_FOLDER", type=Path, help="sub-folders are searched too")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--prompts", metavar='"A; B"', help="words or phrases, separated by semicolons")
    asked.add_argument(
        "--names-from", metavar="FILE", type=Path, help="a class list (conf/vocab/*.txt): a prompt a class"
    )
    parser.add_argument(
        "--prompt-image",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="an example of what is wanted, for a model that takes examples (CLIPSeg); several are taken together",
    )
    parser.add_argument(
        "--prompt-mask",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="a PNG of the example's size, black outside the object; one for each example, or none: the whole images",
    )
    parser.add_argument(
        "--text-weight",
        metavar="W",
        type=float,
        help="ask one prompt and the examples as one thing, with this share of the words, 0 to 1; otherwise by themselves",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="where the pictures and the JSON go"
    )
    parser.add_argument(
        "--together",
        action=argparse.BooleanOptionalAction,
        help="ask all prompts as one list and give every pixel to the best of them: the default with "
        "--names-from, and right for a model of a class list (CamVid), which has only seen whole lists; "
        "otherwise each prompt is asked alone, and masks may overlap",
    )
    parser.add_argument(
        "--threshold",
        metavar="T",
        type=float,
        help="of the masks of prompts asked alone, from 0 to below 1 (default: the model's own)",
    )
    parser.add_argument("--region", metavar="MODEL", help="second stage: a region model, or a CLIP folder or hub id")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: cuda if there is one"
    )
    args = parser.parse_args(arguments)
    check_threshold(args.threshold)
    if args.together is None:
        args.together = args.names_from is not None
    if args.together and args.threshold is not None:
        raise InputError("--threshold is for prompts asked alone: add --no-together, or leave it out")
    return args


def check_examples(args: argparse.Namespace, prompts: Sequence[str]) -> None:
    images, masks = args.prompt_image, args.prompt_mask
    if not prompts and not images:
        raise InputError('nothing is asked: give --prompts "A; B", --names-from FILE, or --prompt-image FILE')
    if masks and len(masks) != len(images):
        raise InputError(f"got {len(images)} --prompt-image and {len(masks)} --prompt-mask: give a mask for each, or none")
    if missing := [path for path in (*images, *masks) if not path.is_file()]:
        raise InputError(f"{missing[0]}: no such file")
    if args.text_weight is None:
        return
    if not 0 <= args.text_weight <= 1:
        raise InputError(f"--text-weight: got {args.text_weight:g}, want 0 (examples only) to 1 (words only)")
    if len(prompts) != 1 or not images:
        raise InputError(f"--text-weight mixes one prompt with examples: got {len(prompts)} prompts and {len(images)} examples")


def with_examples(prompts: list[str], args: argparse.Namespace) -> tuple[list[Any], list[str]]:
    """What is asked, the examples included, and the names of it, each only once."""
    if not args.prompt_image:
        return list(prompts), prompts
    from pmpseg.image_prompts import ImagePrompt, MixedPrompt

    masks: list[Path | None] = args.prompt_mask or [None] * len(args.prompt_image)
    examples = [ImagePrompt(image, mask) for image, mask in zip(args.prompt_image, masks, strict=True)]
    for example in examples:
        example.tensors()  # what is wrong with the files is said now
    if args.text_weight is not None:
        return [MixedPrompt(prompts[0], examples, args.text_weight)], [f"{prompts[0]} + example"]
    return [*prompts, MixedPrompt(None, examples)], [*prompts, f"example {args.prompt_image[0].stem}"]


def check_threshold(value: float | None) -> None:
    if value is not None and not 0 <= value < 1:
        raise InputError(f"--threshold must lie in 0 to 1 (and below 1), got {value:g}")


def list_images(source: Path, out: Path) -> dict[Path, Path]:
    """Each image with the name that its pictures get, relative to ``out``: its own path without the
    extension.

    Where two would get the same name (a.jpg, a.png), all of them keep the extension, as a_jpg.
    """
    if source.is_file():
        return {source: Path(source.stem)}
    if not source.is_dir():
        raise InputError(f"no image or folder at {source}")
    if source.resolve() == out.resolve():
        raise InputError(
            f"--out must not be the folder of the images ({source}): its pictures would be read next time"
        )
    files = [path for path in sorted(source.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file()]
    files = [path for path in files if not path.resolve().is_relative_to(out.resolve())]  # of an earlier run
    if not files:
        raise InputError(f"no images in {source}: want files that end in {', '.join(sorted(SUFFIXES))}")
    stems = {path: path.relative_to(source).with_suffix("") for path in files}
    # some file systems know no case: A.png and a.png must differ in more than that
    often = Counter(str(stem).lower() for stem in stems.values())
    names: dict[Path, Path] = {}
    taken: set[str] = set()
    for path, stem in stems.items():
        base = stem.name if often[str(stem).lower()] == 1 else f"{stem.name}_{path.suffix[1:]}"
        tries = (stem.with_name(base if n == 1 else f"{base}_{n}") for n in count(1))
        names[path] = next(name for name in tries if str(name).lower() not in taken)
        taken.add(str(names[path]).lower())
    return names


def choose_device(wanted: str) -> str:
    import torch

    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise InputError("--device cuda: torch sees no CUDA device here; use --device cpu")
    return ("cuda" if available else "cpu") if wanted == "auto" else wanted


def write_pictures(answer: "Segmentation", prompts: Sequence[str], base: Path) -> None:
    """``BASE_overlay.png`` and ``BASE_mask_00_red-circle.png``, ..."""
    base.parent.mkdir(parents=True, exist_ok=True)
    pictures = {"overlay": answer.overlay()}
    for number, prompt in enumerate(prompts):
        safe = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40]
        pictures[f"mask_{number:02d}_{safe}"] = Image.fromarray(answer.mask(number)).convert("L")
    for what, picture in pictures.items():
        with whole_file(base.with_name(f"{base.name}_{what}.png")) as temporary:
            picture.save(temporary, "PNG")


if __name__ == "__main__":
    run(main)
