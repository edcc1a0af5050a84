"""How should a CLIP be shown what a mask means? CLIPSeg's Table 2 on scenes, and a picture of what each preset makes.

    python scripts/visual_prompts.py                                    # the table; three minutes on one core
    python scripts/visual_prompts.py --picture docs/visual_prompts.jpg  # the picture instead, in seconds
    python scripts/visual_prompts.py --clip openai/clip-vit-base-patch16 --template "a photo of a {}"

P(object) is the softmax, at the CLIP's own scale, of the target's name among the names of all things in the scene ("a red
circle", ..., at least 3 of them), for the image as the preset shows it. Each scene has one target, drawn at random; a preset's
gain is over the same image unchanged, in points, mean +- standard error over scenes. Test scenes are of all three kinds: a CLIP's
captions hold back no word. "before" and "after" say where the image is changed: before the CLIP's normalisation, towards black,
or after it as the paper's code does, towards the mean. The rows of the paper with masked attention are not here.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPVisionModelWithProjection

from pmpseg import cli
from pmpseg.data.scene_drawing import KINDS, Scene, draw_scene
from pmpseg.data.scene_phrases import SMALLEST
from pmpseg.drawing import overlay
from pmpseg.errors import InputError
from pmpseg.hub import shipped_or
from pmpseg.layout import FAINT, INK, PAPER, stack, text_block
from pmpseg.models.backbone import OPENAI
from pmpseg.models.clip import TextEncoder, load_clip_vision
from pmpseg.visual_prompts import PRESETS, visual_prompt

SEED = 6_000_000  # beside those of the splits, and of what the tiny CLIP was trained on
PAPER_GAINS = {  # Table 2: ViT-B/16 on 1,600 pairs of LVIS
    "dye": 1.21, "outline": 2.29, "darken50": 3.08, "darken10": 13.85, "darken0": 23.40, "blur3": 13.15,
    "blur3_highlight01": 21.73, "crop_large": 6.27, "crop": 13.60, "crop_blur_highlight": 23.50,
}  # fmt: skip
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # CLIPSeg's
ACROSS, CELL, GAP = 6, 184, 12  # of the picture: cells in a row, their side and what parts them in pixels
TWICE = ("crop_blur_highlight", "blur3_highlight01", "blur3_highlight", "darken10", "darken0", "crop_darken10")


class Clip:
    """P(object) by one CLIP."""

    def __init__(self, name: str, template: str) -> None:
        self.vision, given = load_clip_vision(name, CLIPVisionModelWithProjection)
        self.vision.eval()
        self.mean, self.std = (list(given.get(key, OPENAI[key])) for key in ("mean", "std"))
        self.scale = CLIPModel.from_pretrained(name).logit_scale.float().exp().item()
        self.size = self.vision.config.image_size
        self.text = TextEncoder(name, [template])

    def probability(self, images: Tensor, names: list[str], target: int) -> np.ndarray:
        """Images (V, 3, S, S) in [0, 1], each shown in another way -> (V,) of the target among the names."""
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (self.mean, self.std))
        image = self.vision(pixel_values=(images - mean) / std).image_embeds  # (V, D)
        cosines = torch.nn.functional.normalize(image, dim=-1) @ self.text.encode(names).pooled[0].T  # (V, names)
        return (self.scale * cosines).softmax(-1)[:, target].numpy()


def cases(count: int) -> Iterator[tuple[Scene, list[str], int, np.ndarray]]:
    """Scenes with at least 3 names: all of them, the index of the target's, and the mask of the things that have it."""
    index = found = 0
    while found < count:
        scene = draw_scene(SEED, index, KINDS[index % 3])
        rng = np.random.default_rng([SEED, index])
        names = sorted({t.name for t in scene.things})
        target = int(rng.integers(len(names)))
        mask = np.isin(scene.owner, [i + 1 for i, t in enumerate(scene.things) if t.name == names[target]])
        index += 1
        if len(names) >= 3 and mask.sum() >= SMALLEST:
            found += 1
            yield scene, names, target, mask


def as_tensors(scene: Scene, mask: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(scene.image).permute(2, 0, 1)[None] / 255, torch.from_numpy(mask)[None]


@torch.inference_mode()
def measure(clip: Clip, count: int) -> np.ndarray:
    """(N, 2, presets): P(object) of each case, before and after normalisation."""
    rows = []
    for scene, names, target, mask in cases(count):
        image, inside = as_tensors(scene, mask)
        ways = [visual_prompt(image, inside, p, clip.size, mean) for mean in (None, clip.mean) for p in PRESETS]
        rows.append(clip.probability(torch.cat(ways), names, target).reshape(2, -1))
    return np.stack(rows)


def print_table(scores: np.ndarray, clip: Clip, name: str) -> None:
    count, names = len(scores), list(PRESETS)
    plain = 100 * scores[:, 0, names.index("none")]
    print(f"{name}: {count} scenes, scale {clip.scale:.1f}; P(object) of the plain image {_with_error(plain)}\n")
    print("| preset | before | after | paper, LVIS |\n|---|---|---|---|")
    for i, preset in enumerate(names):
        if preset != "none":
            before, after = (_with_error(100 * scores[:, way, i] - plain, "+") for way in (0, 1))
            print(f"| {preset} | {before} | {after} | {PAPER_GAINS.get(preset, '')} |")


def _with_error(values: np.ndarray, sign: str = "") -> str:
    return f"{values.mean():{sign}.1f} ± {values.std(ddof=1) / len(values) ** 0.5:.1f}"


def draw_picture(index: int) -> Image.Image:
    """Every preset on one scene, named; some that darken once more, as after normalisation."""
    scene = draw_scene(SEED, index, size=CELL)
    middle = min(range(len(scene.things)), key=lambda i: np.hypot(scene.things[i].x - CELL / 2, scene.things[i].y - CELL / 2))
    thing, mask = scene.things[middle], scene.owner == middle + 1
    image, inside = as_tensors(scene, mask)

    def cell(preset: str, mean: tuple[float, ...] | None = None) -> Image.Image:
        pixels = visual_prompt(image, inside, preset, CELL, mean)[0].permute(1, 2, 0)
        return _named(Image.fromarray((pixels.numpy() * 255).round().astype(np.uint8)), preset)

    tinted = overlay(scene.image, [mask], colours=[(0xE6, 0x9F, 0x00)], side=CELL, opacity=0.4)
    cells = [_named(tinted, f"the mask: {thing.name}"), *(cell(preset) for preset in PRESETS)]
    again = [cell(preset, IMAGENET_MEAN) for preset in TWICE]
    first, second = _grid(cells), _grid(again)
    heads = ("visual_prompt(image, mask, preset)", f"as the paper's code does it, after normalisation: mean={IMAGENET_MEAN}")
    titles = [text_block(head, 18, INK, first.width) for head in heads]
    return stack([titles[0], first, titles[1], second], gap=10, margin=14)


def _named(picture: Image.Image, name: str) -> Image.Image:
    return stack([picture, text_block(name, 15, FAINT, CELL)], gap=3)


def _grid(cells: list[Image.Image]) -> Image.Image:
    height = cells[0].height + 8
    sheet = Image.new("RGB", (ACROSS * (CELL + GAP) - GAP, -(-len(cells) // ACROSS) * height - 8), PAPER)
    for i, cell in enumerate(cells):
        sheet.paste(cell, (i % ACROSS * (CELL + GAP), i // ACROSS * height))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=400, help="scenes")
    parser.add_argument("--clip", default="tiny_clip", help="folder or hub id of a CLIP; default: the one that ships")
    parser.add_argument("--template", default="a {}", help="of the names; default: %(default)r")
    parser.add_argument("--picture", type=Path, help="JPEG to draw the presets into; nothing is measured then")
    parser.add_argument("--scene", type=int, default=69, help="the picture's; default: %(default)s")
    args = parser.parse_args()
    if args.picture:
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        with cli.whole_file(args.picture) as path:
            draw_picture(args.scene).save(path, "JPEG", quality=72, optimize=True)
        return
    if args.count < 2:
        raise InputError(f"--count: got {args.count}, want 2 scenes or more, for a standard error")
    name = shipped_or(args.clip)
    clip = Clip(name, args.template)
    print_table(measure(clip, args.count), clip, args.clip)


if __name__ == "__main__":
    cli.run(main)
