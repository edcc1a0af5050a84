"""A picture grid of what the network sees in training, for any config: image, labels or prompt masks, segments, prompts.

    python scripts/show_batch.py -c conf/pmp_coco_stuff.yaml --data.root data/coco --images 8 --out batch.png

What follows --data. is an argument of the config's data module and replaces its value. Prompts that show nothing in the image
are listed below it; what is ignored stays grey.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from pmpseg import cli
from pmpseg.drawing import colour_map, overlay
from pmpseg.errors import InputError
from pmpseg.evaluate import build_data, read_data
from pmpseg.layout import FAINT, INK, PAPER, legend, stack, text_block

GAP, MOST_PROMPTS = 8, 10


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", required=True, help="of which only the data counts")
    parser.add_argument("--images", type=cli.positive, default=8, help="default: 8, from all of the training set")
    parser.add_argument("--epoch", type=int, default=0, help="whose augmentations are seen; default: 0")
    parser.add_argument("--across", type=cli.positive, default=2, help="images next to each other")
    parser.add_argument("--side", type=cli.positive, default=300, help="of each picture")
    parser.add_argument("--out", type=Path, default=Path("batch.png"), help="default: batch.png")
    args, rest = parser.parse_known_args(arguments)
    if args.epoch < 0:
        raise InputError(f"--epoch: got {args.epoch}, want 0 or more")
    if not args.out.parent.is_dir():
        raise InputError(f"--out: there is no folder {args.out.parent}")
    data = build_data(with_arguments(read_data(args.config), rest))
    dataset = data.dataset("train")
    chosen = np.linspace(0, len(dataset) - 1, min(args.images, len(dataset))).astype(int).tolist()
    sheet = grid([dataset[args.epoch, index] for index in chosen], args.side, args.across)
    with cli.whole_file(args.out) as temporary:
        sheet.save(temporary, "PNG")
    print(f"saved: {args.out} ({sheet.width}x{sheet.height})")


def with_arguments(spec: dict[str, Any], rest: Sequence[str]) -> dict[str, Any]:
    """``--data.root x`` or ``--data.root=x`` put into a spec."""
    given = dict(spec.get("init_args") or {}) | {"num_workers": 0}
    words = list(rest)
    while words:
        key, equals, value = words.pop(0).partition("=")
        if not key.startswith("--data.") or not (equals or words):
            raise InputError(f"unexpected argument {key!r}: want --data.NAME VALUE")
        value = value if equals else words.pop(0)
        try:
            given[key.removeprefix("--data.").removeprefix("init_args.")] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"{key}: got {value!r}, which is no YAML value") from None
    return {**spec, "init_args": given}


def grid(items: Sequence[dict[str, Any]], side: int = 300, across: int = 2) -> Image.Image:
    """One picture of all items."""
    blocks = [block(item, side) for item in items]
    width = max(one.width for one in blocks)
    rows = []
    for start in range(0, len(blocks), across):
        line = blocks[start : start + across]
        row = Image.new("RGB", (across * (width + 4 * GAP) - 4 * GAP, max(one.height for one in line)), PAPER)
        for column, one in enumerate(line):
            row.paste(one, (column * (width + 4 * GAP), 0))
        rows.append(row)
    return stack(rows, gap=3 * GAP, margin=20)


def block(item: dict[str, Any], side: int) -> Image.Image:
    """One item: its pictures beside each other, and its prompts below."""
    image = item["image"].permute(1, 2, 0).numpy()
    labels = item["labels"].numpy()
    prompts, classes = item["prompts"], np.asarray(item["prompt_class"])
    masks = item["prompt_masks"].numpy() if "prompt_masks" in item else labels == classes[:, None, None]
    asked = [k for k, prompt in enumerate(prompts) if prompt]
    shown = [k for k in asked if masks[k].any()]
    palette = colour_map(len(shown))
    pictures = [("image", overlay(image, [], side=side))]
    pictures.append(("prompts", overlay(image, masks[shown], colours=palette, side=side, opacity=0.6)))
    if "segments" in item:
        segments = item["segments"].numpy()
        count = len(item["segment_prompt"])
        colours = colour_map(count + 7)[7:]  # other hues than the prompts': a segment's colour means nothing
        name = f"{count} segments, {int((item['segment_prompt'] < 0).sum())} not asked"
        own = [segments == number for number in range(count)]
        pictures.append((name, overlay(image, own, colours=colours, side=side, opacity=0.6)))
    width = len(pictures) * (side + GAP) - GAP
    strip = Image.new("RGB", (width, max(picture.height for _, picture in pictures) + 24), PAPER)
    for column, (name, picture) in enumerate(pictures):
        strip.paste(picture, (column * (side + GAP), 0))
        strip.paste(text_block(name, 14, FAINT, side), (column * (side + GAP), picture.height + 4))
    entries = [(prompts[k], tuple(palette[n].tolist()), True) for n, k in enumerate(shown)]
    absent = [prompts[k] for k in asked if k not in shown]
    more = f" and {len(absent) - MOST_PROMPTS} more" if len(absent) > MOST_PROMPTS else ""
    ignored = f"{100 * float((labels == 255).mean()):.0f} % ignored"
    heading = text_block(f"{item['name']}  {image.shape[1]}x{image.shape[0]}, {ignored}", 16, INK, width)
    rest = text_block(f"absent: {', '.join(absent[:MOST_PROMPTS])}{more}" if absent else "", 14, FAINT, width)
    said = text_block(" / ".join(item.get("captions", [])[:1]), 14, FAINT, width)
    return stack([heading, strip, said, *([legend(entries, width)] if entries else []), rest], gap=4)


if __name__ == "__main__":
    cli.run(main)
