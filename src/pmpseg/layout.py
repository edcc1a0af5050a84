"""The typesetting of ``pmpseg.drawing``: text and legends as pictures, stacking them, and a page's HTML."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
INK, FAINT, PAPER, CARD = (25, 28, 33), (105, 112, 122), (255, 255, 255), (240, 241, 243)


def legend(entries: Sequence[tuple[str, Colour, bool]], width: int) -> Image.Image:
    """Coloured boxes with names, as many a line as fit; a hollow box for what was not found."""
    size = min(max(round(width / 28), 13), 18)
    face, pad = font(size), size // 2
    room = width - 2 * pad - round(1.4 * size)
    places: list[tuple[int, int, list[str], Colour, bool, int]] = []
    left = top = pad
    for name, colour, found in entries:
        lines = wrap(name, face, room)
        wide = round(1.4 * size + max(face.getlength(line) for line in lines))
        if left > pad and left + wide > width - pad:
            left, top = pad, max(bottom for *_, bottom in places)
        places.append((left, top, lines, colour, found, top + round(1.35 * size) * len(lines)))
        left += wide + size
    sheet = Image.new("RGB", (width, max((bottom for *_, bottom in places), default=0) + pad), PAPER)
    draw = ImageDraw.Draw(sheet)
    for left, top, lines, colour, found, _ in places:
        box = (left, top + 1, left + size - 1, top + size)
        draw.rectangle(box, fill=tuple(colour) if found else PAPER, outline=tuple(colour), width=2)
        for number, line in enumerate(lines):
            place = (left + round(1.4 * size), top + 1 + size // 2 + number * round(1.35 * size))
            draw.text(place, line, fill=INK if found else FAINT, font=face, anchor="lm")
    return sheet


def text_block(text: str, size: int, colour: Colour, width: int) -> Image.Image:
    lines = wrap(text, font(size), width) if text else []
    step = round(1.3 * size)
    sheet = Image.new("RGB", (width, step * len(lines)), PAPER)
    for number, line in enumerate(lines):
        ImageDraw.Draw(sheet).text(
            (0, number * step + step // 2), line, fill=colour, font=font(size), anchor="lm"
        )
    return sheet


def wrap(text: str, face: Font, width: int) -> list[str]:
    """Lines no wider than ``width``; a word that is wider by itself is cut."""
    lines = []
    for paragraph in text.splitlines() or [""]:
        lines.append("")
        for word in paragraph.split():
            if lines[-1] and face.getlength(f"{lines[-1]} {word}") > width:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
            while face.getlength(lines[-1]) > width and len(lines[-1]) > 1:
                fits = max(1, _length_that_fits(lines[-1], face, width))
                lines[-1:] = [lines[-1][:fits], lines[-1][fits:]]
    return lines


def _length_that_fits(text: str, face: Font, width: int) -> int:
    return bisect_right(range(len(text)), float(width), key=lambda n: face.getlength(text[:n])) - 1


def stack(sheets: Sequence[Image.Image], gap: int = 0, margin: int = 0) -> Image.Image:
    """Pictures below each other; empty ones take no room."""
    sheets = [sheet for sheet in sheets if sheet.height]
    height = sum(sheet.height for sheet in sheets) + gap * max(len(sheets) - 1, 0)
    pile = Image.new("RGB", (max(sheet.width for sheet in sheets) + 2 * margin, height + 2 * margin), PAPER)
    top = margin
    for sheet in sheets:
        pile.paste(sheet, (margin, top))
        top += sheet.height + gap
    return pile


@lru_cache
def font(size: int) -> Font:
    return ImageFont.load_default(size)


# title, intro, classes (legend), articles (rows)
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #191c21; --faint: #5f6670; --paper: #fff; --card: #f4f5f7 }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e8eaed; --faint: #a2a9b3; --paper: #15171a; --card: #202329 }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1300px; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.6rem; margin: 0 }} h2 {{ font-size: 1.1rem; margin: 0; overflow-wrap: anywhere }}
p, figcaption {{ color: var(--faint); margin: .2rem 0 }}
p {{ white-space: pre-line; overflow-wrap: anywhere }}
main {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 600px), 1fr));
  margin-top: 1rem }}
article {{ background: var(--card); border-radius: 8px; padding: .8rem 1rem }}
article div {{ display: flex; gap: .6rem; margin-top: .5rem }}
figure {{ margin: 0; flex: 1 1 0; min-width: 0 }} figcaption {{ font-size: .85rem; text-align: center }}
img {{ display: block; width: 100%; height: auto; border-radius: 4px }}
ul {{ display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; list-style: none }}
i {{ display: inline-block; width: .9em; height: .9em; border-radius: 3px; margin-right: .4em;
  vertical-align: -.1em }}
</style></head>
<body><h1>{title}</h1><p>{intro}</p><ul>{classes}</ul>
<main>
{articles}
</main></body></html>
"""
