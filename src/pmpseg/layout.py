"""Text and legends as pictures, and stacking them: the typesetting of ``pmpseg.drawing``, in PIL."""

from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
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
        ImageDraw.Draw(sheet).text((0, number * step + step // 2), line, fill=colour, font=font(size), anchor="lm")
    return sheet


def wrap(text: str, face: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no wider than ``width``; a word that is wider by itself is cut."""
    lines = []
    for paragraph in text.splitlines() or [""]:
        lines.append("")
        for word in paragraph.split():
            if lines[-1] and face.getlength(f"{lines[-1]} {word}") > width:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
            while face.getlength(lines[-1]) > width and len(lines[-1]) > 1:
                keep = len(lines[-1]) - 1
                while keep > 1 and face.getlength(lines[-1][:keep]) > width:
                    keep -= 1
                lines[-1:] = [lines[-1][:keep], lines[-1][keep:]]
    return lines


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
def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
