"""Pictures of answers: tinted masks with outlines, training panels, and a page of rows to look at in a browser.

Only numpy and PIL. An *answer* is a mask (H, W) bool, drawn in one colour, or labels (H, W) of integers with 255 for
"ignore", drawn in the colours of their classes. Images are PIL images or uint8 arrays (H, W, 3) or (H, W). Small
images are drawn several times as large, by a whole factor, so that a person sees something.

The first seven colours are those of Okabe and Ito (2008), which colour-blind people can tell apart.
"""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pmpseg.cli import whole_file
from pmpseg.errors import InputError
from pmpseg.layout import CARD, FAINT, INK, PAPER, Colour, legend, stack, text_block

IGNORE = 255
OKABE_ITO = "E69F00 56B4E9 009E73 F0E442 0072B2 D55E00 CC79A7"
TRUTH, PREDICTION = (0x56, 0xB4, 0xE9), (0xE6, 0x9F, 0x00)
GAP = 8  # between pictures
LEGEND_LIMIT = 12  # with more names than this, those with nothing found are left out of the legend

Picture = Image.Image | np.ndarray


@dataclass
class Row:
    """One row of a panel or page: ``truth`` (None where not known) and ``prediction`` are answers as defined above."""

    image: Picture
    prompt: str
    truth: np.ndarray | None
    prediction: np.ndarray
    caption: str = ""


def colour_map(n: int) -> np.ndarray:
    """(n, 3) uint8, always the same: seven colours for colour-blind readers, then hues a golden angle apart."""
    first = np.frombuffer(bytes.fromhex(OKABE_ITO), dtype=np.uint8).reshape(-1, 3)
    index = np.arange(max(n - len(first), 0))
    hue = (index * 0.618034 + 0.05) % 1
    light = np.array([0.95, 0.6, 0.8])[index % 3]
    # HSV to RGB at saturation 0.65: a channel is at its lightest within 1/6 of its own hue
    distance = np.abs((hue[:, None] - np.array([0, 1 / 3, 2 / 3]) + 0.5) % 1 - 0.5) * 6
    rest = 255 * light[:, None] * (1 - 0.65 * np.clip(distance - 1, 0, 1))
    return np.concatenate([first, rest.round().astype(np.uint8)])[:n]


def labels_to_rgb(labels: np.ndarray, colours: np.ndarray | None = None) -> np.ndarray:
    """Labels (H, W) -> (H, W, 3) uint8 in ``colours`` (C, 3), by default ``colour_map``'s; 255 becomes black.

    Raises ``InputError`` where a label has no colour.
    """
    labels = np.asarray(labels)
    known = labels != IGNORE
    highest = int(labels[known].max(initial=0))
    colours = colour_map(highest + 1) if colours is None else np.asarray(colours, dtype=np.uint8)
    if highest >= len(colours) or labels.min(initial=0) < 0:
        raise InputError(f"labels must lie in 0..{len(colours) - 1} or be {IGNORE}, got {labels.min()}..{highest}")
    return np.where(known[..., None], colours[np.where(known, labels, 0)], 0).astype(np.uint8)


def overlay(
    image: Picture,
    masks: Sequence[np.ndarray] | np.ndarray,
    names: Sequence[str] = (),
    *,
    colours: Sequence[Colour] | np.ndarray | None = None,
    side: int | None = None,
    opacity: float = 0.45,
    dim: float = 0.3,
) -> Image.Image:
    """The image with masks (P, H, W) bool tinted and outlined, small ones on top of large ones, the rest darkened.

    With ``names`` (P) a legend stands below the picture; a name whose mask is empty gets a hollow box. ``side`` is the
    length of the longer side in pixels; by default the image's own, or a multiple of it that is about 384.
    Raises ``InputError`` where a mask's size is not the image's, or names and masks differ in number.
    """
    picture = _to_pil(image)
    if names and len(names) != len(masks):
        raise InputError(f"overlay got {len(masks)} masks and {len(names)} names: give a name to each mask, or none")
    size = _fit(picture.size, side or max(max(picture.size), 384))
    line = max(2, round(max(size) / 250))
    pixels = np.asarray(picture.resize(size, _filter(picture.size, size)), dtype=np.float32)
    palette = colour_map(len(masks)) if colours is None else np.asarray(colours)
    canvas = pixels * (1 - dim if len(masks) else 1)
    for index in sorted(range(len(masks)), key=lambda i: -np.count_nonzero(masks[i])):
        mask = _resize_mask(masks[index], picture.size, size)
        canvas[mask] = (1 - opacity) * pixels[mask] + opacity * palette[index]
        canvas[_grow(mask, 1) & ~mask] *= 0.3  # a thin dark line outside, so that the edge shows on any ground
        canvas[mask & _grow(~mask, line)] = palette[index]
    drawn = Image.fromarray(canvas.round().astype(np.uint8))
    if not names:
        return drawn
    entries = [(name, tuple(colour), bool(np.any(mask))) for name, colour, mask in zip(names, palette, masks, strict=True)]
    if len(entries) > LEGEND_LIMIT:
        entries = [entry for entry in entries if entry[2]]
    return stack([drawn, legend(entries, drawn.width)])


def panel(rows: Sequence[Row], names: Sequence[str] = (), *, side: int = 288, across: int | None = None) -> Image.Image:
    """One picture of rows [image | ground truth | prediction], with prompt and caption above each.

    ``names`` (C) are the classes of labels and make a legend. ``side`` is the longer side of each picture,
    ``across`` the rows next to each other (by default 2 where there are more than 6). The ground truth's column is
    left out where no row has one.
    """
    if not rows:
        raise InputError("a panel needs at least one row, got none")
    across = across or (2 if len(rows) > 6 else 1)
    drawn = [dict(_pictures(row, side)) for row in rows]
    cells = ["image", "ground truth", "prediction"]
    cells = [what for what in cells if any(what in pictures for pictures in drawn)]
    widest = max(picture.width for pictures in drawn for picture in pictures.values())
    blocks = [_block(row, pictures, cells, widest) for row, pictures in zip(rows, drawn, strict=True)]
    step = blocks[0].width + 4 * GAP
    sheets = []
    for start in range(0, len(blocks), across):
        line = blocks[start : start + across]
        sheet = Image.new("RGB", (across * step - 4 * GAP, max(block.height for block in line)), PAPER)
        for column, block in enumerate(line):
            sheet.paste(block, (column * step, sheet.height - block.height))  # the pictures of a line are level
        sheets.append(sheet)
    if names:
        sheets.append(legend([(names[c], colour, True) for c, colour in _present(rows, len(names))], sheets[0].width))
    return stack(sheets, gap=2 * GAP, margin=20)


def write_page(
    folder: str | Path, rows: Sequence[Row], title: str, intro: str = "", names: Sequence[str] = ()
) -> tuple[Path, Path]:
    """Write ``index.html``, with its PNGs in ``pictures/`` beside it, and the same rows as one ``page.png``.

    Returns the paths of both. Files of the same names are replaced.
    """
    body = panel(rows, names)
    folder = Path(folder)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    articles = []
    for number, row in enumerate(rows):
        figures = []
        for what, picture in _pictures(row, 384):
            path = f"pictures/{number:03d}_{what.replace(' ', '_')}.png"
            with whole_file(folder / path) as temporary:
                picture.save(temporary, "PNG")
            alt = html.escape(f"{what}: {row.prompt}", quote=True)
            size = f'width="{picture.width}" height="{picture.height}"'
            figures.append(f'<figure><img src="{path}" alt="{alt}" {size}><figcaption>{what}</figcaption></figure>')
        heading = f"<h2>{html.escape(row.prompt)}</h2><p>{html.escape(row.caption)}</p>"
        articles.append(f"<article>{heading}<div>{''.join(figures)}</div></article>")
    classes = "".join(
        f'<li><i style="background:rgb{colour}"></i>{html.escape(names[c])}</li>'
        for c, colour in (_present(rows, len(names)) if names else [])
    )
    text = PAGE.format(
        title=html.escape(title), intro=html.escape(intro), classes=classes, articles="\n".join(articles)
    )
    index, sheet = folder / "index.html", folder / "page.png"
    with whole_file(index) as temporary:
        temporary.write_text(text, encoding="utf-8")
    with whole_file(sheet) as temporary:
        head = [text_block(title, 30, INK, body.width - 40), text_block(intro, 17, FAINT, body.width - 40)]
        stack([stack(head, gap=8, margin=20), body], gap=-GAP).save(temporary, "PNG")
    return index, sheet


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #191c21; --faint: #5f6670; --paper: #fff; --card: #f4f5f7 }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e8eaed; --faint: #a2a9b3; --paper: #15171a; --card: #202329 }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1300px; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.6rem; margin: 0 }} h2 {{ font-size: 1.1rem; margin: 0; overflow-wrap: anywhere }}
p, figcaption {{ color: var(--faint); margin: .2rem 0 }} p {{ white-space: pre-line; overflow-wrap: anywhere }}
main {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 600px), 1fr));
  margin-top: 1rem }}
article {{ background: var(--card); border-radius: 8px; padding: .8rem 1rem }}
article div {{ display: flex; gap: .6rem; margin-top: .5rem }}
figure {{ margin: 0; flex: 1 1 0; min-width: 0 }} figcaption {{ font-size: .85rem; text-align: center }}
img {{ display: block; width: 100%; height: auto; border-radius: 4px }}
ul {{ display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; list-style: none }}
i {{ display: inline-block; width: .9em; height: .9em; border-radius: 3px; margin-right: .4em; vertical-align: -.1em }}
</style></head>
<body><h1>{title}</h1><p>{intro}</p><ul>{classes}</ul>
<main>
{articles}
</main></body></html>
"""


def _pictures(row: Row, side: int) -> Iterator[tuple[str, Image.Image]]:
    """The row's two or three pictures with their names."""
    yield "image", overlay(row.image, [], side=side)
    for what, answer, colour in (("ground truth", row.truth, TRUTH), ("prediction", row.prediction, PREDICTION)):
        if answer is None:
            continue
        answer = np.asarray(answer)
        if answer.dtype == bool:
            yield what, overlay(row.image, [answer], colours=[colour], side=side, opacity=0.15, dim=0.6)
        else:
            present = [c for c in np.unique(answer) if c != IGNORE]
            colours = colour_map(max(present, default=0) + 1)[present]
            yield what, overlay(row.image, [answer == c for c in present], colours=colours, side=side, opacity=0.6)


def _block(row: Row, pictures: dict[str, Image.Image], cells: Sequence[str], side: int) -> Image.Image:
    """Prompt, caption and the pictures side by side, each in a cell of width ``side`` with its name below."""
    width = len(cells) * side + (len(cells) - 1) * GAP
    height = max(picture.height for picture in pictures.values())
    strip = Image.new("RGB", (width, height + 24), PAPER)
    for column, what in enumerate(cells):
        picture = pictures.get(what, Image.new("RGB", pictures["image"].size, CARD))
        left = column * (side + GAP)
        strip.paste(picture, (left, 0))
        strip.paste(text_block(what if what in pictures else f"no {what}", 14, FAINT, side), (left, height + 4))
    return stack([text_block(row.prompt, 20, INK, width), text_block(row.caption, 15, FAINT, width), strip], gap=4)


def _present(rows: Sequence[Row], n: int) -> list[tuple[int, Colour]]:
    """The classes below n that occur in the labels of any row, with their colours."""
    answers = [np.unique(a) for row in rows for a in (row.truth, row.prediction) if a is not None and a.dtype != bool]
    classes = np.unique(np.concatenate(answers)) if answers else []
    colours = colour_map(n)
    return [(int(c), tuple(colours[c].tolist())) for c in classes if c < n]


def _fit(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The size to draw at: shrunk until the longer side is ``side``, or enlarged by a whole factor."""
    longer = max(size)
    factor = max(1, round(side / longer)) if longer <= side else side / longer
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _filter(old: tuple[int, int], new: tuple[int, int]) -> Image.Resampling:
    return Image.Resampling.BICUBIC if new[0] >= old[0] else Image.Resampling.LANCZOS


def _resize_mask(mask: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    mask = np.asarray(mask)
    if mask.shape != old[::-1]:
        raise InputError(f"a mask has shape {mask.shape}, but its image is {old[1]} x {old[0]} (height x width)")
    grey = Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0)))
    return np.asarray(grey.resize(new, Image.Resampling.BILINEAR)) >= 128


def _grow(mask: np.ndarray, steps: int) -> np.ndarray:
    """The mask with the pixels that are up to ``steps`` away, in the four directions."""
    for _ in range(steps):
        p = np.pad(mask, 1)
        mask = p[1:-1, 1:-1] | p[:-2, 1:-1] | p[2:, 1:-1] | p[1:-1, :-2] | p[1:-1, 2:]
    return mask


def _to_pil(image: Picture) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise InputError(f"an image to draw must be uint8 (H, W, 3) or (H, W), got {image.dtype} {image.shape}")
    return Image.fromarray(image).convert("RGB")
