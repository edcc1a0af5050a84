"""Pictures of answers: tinted masks with outlines, training panels, and a page of rows for a browser.

Only numpy and PIL. An *answer* is a mask (H, W) bool, drawn in one colour, or labels (H, W) of integers,
drawn in the colours of their classes, with 255 for "ignore" and -1 for "nothing". Images are PIL images or
uint8 arrays (H, W, 3) or (H, W); small ones are drawn several times as large, by a whole factor.

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
from pmpseg.layout import CARD, FAINT, INK, PAGE, PAPER, Colour, legend, stack, text_block

IGNORE, NOTHING = 255, -1  # labels without a class: not annotated, and claimed by no prompt
OKABE_ITO = "E69F00 56B4E9 009E73 F0E442 0072B2 D55E00 CC79A7"
TRUTH, PREDICTION = (0x56, 0xB4, 0xE9), (0xE6, 0x9F, 0x00)
GAP = 8  # between pictures
LEGEND_LIMIT = 12  # with more names than this, those with nothing found are left out of the legend

Picture = Image.Image | np.ndarray


@dataclass
class Row:
    """A row of a panel or page; ``truth`` (None: not known) and ``prediction`` are answers (see above)."""

    image: Picture
    prompt: str
    truth: np.ndarray | None
    prediction: np.ndarray
    caption: str = ""


def colour_map(n: int) -> np.ndarray:
    """(n, 3) uint8, always the same: the seven of Okabe and Ito, then hues that are a golden angle apart."""
    first = np.frombuffer(bytes.fromhex(OKABE_ITO), dtype=np.uint8).reshape(-1, 3)
    index = np.arange(max(n - len(first), 0))
    hue = (index * 0.618034 + 0.05) % 1
    light = np.array([0.95, 0.55, 0.75, 0.65])[index % 4]
    strong = np.array([0.65, 0.4, 0.85, 0.5, 0.75])[index % 5]
    # HSV to RGB: a channel is at its lightest within 1/6 of its own hue
    distance = np.abs((hue[:, None] - np.array([0, 1 / 3, 2 / 3]) + 0.5) % 1 - 0.5) * 6
    rest = 255 * light[:, None] * (1 - strong[:, None] * np.clip(distance - 1, 0, 1))
    return np.concatenate([first, rest.round().astype(np.uint8)])[:n]


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
    """The image with masks (P, H, W) bool tinted and outlined, small ones on top; the rest is darkened.

    With ``names`` (P) a legend stands below the picture; a name whose mask is empty gets a hollow box.
    ``side`` is the length of the longer side in pixels; by default the image's own, or a multiple of it that
    is about 384. Raises ``InputError`` where a mask's size is not the image's, or a name is missing.
    """
    picture = _to_pil(image)
    if names and len(names) != len(masks):
        raise InputError(f"got {len(masks)} masks and {len(names)} names: give a name to each mask, or none")
    size = _fit(picture.size, side or max(max(picture.size), 384))
    line = max(2, round(max(size) / 250))
    pixels = np.asarray(picture.resize(size, _filter(picture.size, size)), dtype=np.float32)
    palette = colour_map(len(masks)) if colours is None else np.asarray(colours)
    canvas = pixels * (1 - dim if len(masks) else 1)
    areas = [np.count_nonzero(mask) for mask in masks]
    for index in sorted(np.flatnonzero(areas).tolist(), key=lambda i: -areas[i]):
        mask = _resize_mask(masks[index], picture.size, size)
        canvas[mask] = (1 - opacity) * pixels[mask] + opacity * palette[index]
        canvas[_grow(mask, 1) & ~mask] *= 0.3  # a thin dark line, so that the edge shows on any ground
        canvas[mask & _grow(~mask, line)] = palette[index]
    drawn = Image.fromarray(canvas.round().astype(np.uint8))
    if not names:
        return drawn
    entries = [(name, tuple(palette[i]), bool(areas[i])) for i, name in enumerate(names)]
    if len(entries) > LEGEND_LIMIT:
        entries = [entry for entry in entries if entry[2]]
    return stack([drawn, legend(entries, drawn.width)])


def panel(
    rows: Sequence[Row], names: Sequence[str] = (), *, side: int = 288, across: int | None = None
) -> Image.Image:
    """One picture of rows [image | ground truth | prediction], with prompt and caption above each.

    ``names`` (C) are the classes of labels and make a legend. ``side`` is the longer side of each picture,
    ``across`` the rows next to each other (by default 2 where there are more than 6). The ground truth's
    column is left out where no row has one.
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
            sheet.paste(block, (column * step, sheet.height - block.height))  # so that pictures are level
        sheets.append(sheet)
    if classes := _present(rows, names):
        sheets.append(legend([(name, colour, True) for name, colour in classes], sheets[0].width))
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
            img = f'<img src="{path}" alt="{alt}" {size}>'
            figures.append(f"<figure>{img}<figcaption>{what}</figcaption></figure>")
        heading = f"<h2>{html.escape(row.prompt)}</h2><p>{html.escape(row.caption)}</p>"
        articles.append(f"<article>{heading}<div>{''.join(figures)}</div></article>")
    classes = [
        f'<li><i style="background:rgb{colour}"></i>{html.escape(name)}</li>'
        for name, colour in _present(rows, names)
    ]
    fields = {"title": html.escape(title), "intro": html.escape(intro)}
    text = PAGE.format(**fields, classes="".join(classes), articles="\n".join(articles))
    index, sheet = folder / "index.html", folder / "page.png"
    with whole_file(index) as temporary:
        temporary.write_text(text, encoding="utf-8")
    with whole_file(sheet) as temporary:
        head = [text_block(title, 30, INK, body.width - 40), text_block(intro, 17, FAINT, body.width - 40)]
        stack([stack(head, gap=8, margin=20), body], gap=-GAP).save(temporary, "PNG")
    return index, sheet


def _pictures(row: Row, side: int) -> Iterator[tuple[str, Image.Image]]:
    """The row's two or three pictures with their names."""
    yield "image", overlay(row.image, [], side=side)
    if row.truth is not None:
        yield "ground truth", _draw(row.image, np.asarray(row.truth), TRUTH, side)
    yield "prediction", _draw(row.image, np.asarray(row.prediction), PREDICTION, side)


def _draw(image: Picture, answer: np.ndarray, colour: Colour, side: int) -> Image.Image:
    if answer.dtype == bool:
        return overlay(image, [answer], colours=[colour], side=side, opacity=0.15, dim=0.6)
    classes = _classes(answer)
    colours = colour_map(max(classes, default=0) + 1)[classes]
    return overlay(image, [answer == c for c in classes], colours=colours, side=side, opacity=0.6)


def _block(row: Row, pictures: dict[str, Image.Image], cells: Sequence[str], side: int) -> Image.Image:
    """Prompt, caption and the pictures side by side, each in a cell of width ``side`` with its name below."""
    width = len(cells) * side + (len(cells) - 1) * GAP
    height = max(picture.height for picture in pictures.values())
    strip = Image.new("RGB", (width, height + 24), PAPER)
    for column, what in enumerate(cells):
        picture = pictures.get(what, Image.new("RGB", pictures["image"].size, CARD))
        left = column * (side + GAP)
        strip.paste(picture, (left, 0))
        name = what if what in pictures else f"no {what}"
        strip.paste(text_block(name, 14, FAINT, side), (left, height + 4))
    head = [text_block(row.prompt, 20, INK, width), text_block(row.caption, 15, FAINT, width)]
    return stack([*head, strip], gap=4)


def _classes(answer: np.ndarray) -> list[int]:
    """The classes that occur in labels; none in a mask."""
    if answer.dtype == bool:
        return []
    return [int(c) for c in np.unique(answer) if c not in (IGNORE, NOTHING)]


def _present(rows: Sequence[Row], names: Sequence[str]) -> list[tuple[str, Colour]]:
    """The names of the classes that occur in the labels of any row, with their colours."""
    answers = [np.asarray(a) for row in rows for a in (row.truth, row.prediction) if a is not None]
    found = sorted({c for answer in answers for c in _classes(answer)})
    return [(names[c], tuple(colour_map(c + 1)[c].tolist())) for c in found if c < len(names)]


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
        raise InputError(f"a mask has shape {mask.shape}, but its image {old[::-1]} (height, width)")
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
        wanted = "a PIL image or uint8 (H, W, 3) or (H, W)"
        raise InputError(f"an image to draw must be {wanted}, got {image.dtype} {image.shape}")
    return Image.fromarray(image).convert("RGB")


def iou_caption(mask: np.ndarray, truth: np.ndarray) -> str:
    """"IoU 93", or what is right and wrong where there is nothing to find."""
    if not truth.any():
        return "nothing to find: " + ("found something" if mask.any() else "right, found nothing")
    return f"IoU {100 * (mask & truth).sum() / (mask | truth).sum():.0f}"
