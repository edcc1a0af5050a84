"""An ablation's table as pictures: a line a variant, a small dot a seed, a large one the mean. Only numpy and PIL."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from pmpseg.ablation.table import COSTS, Row, by_variant, shown
from pmpseg.layout import CARD, FAINT, INK, PAPER, Colour, font

LONG = {
    "iou_at_50": "IoU of phrases where 50 % of absent ones are answered with nothing",
    "iou_at_60": "IoU of phrases where 60 % of absent ones are answered with nothing",
    "recall": "IoU of the best proposal, chosen by the truth",
    "text_iou": "IoU of phrases asked by text, at the best threshold",
    "text_ap": "average precision of phrases asked by text",
    "text_iou_at_50": "IoU by text where 50 % of absent phrases are answered with nothing",
    "image_iou": "IoU of phrases asked by example, at the best threshold",
    "image_ap": "average precision of phrases asked by example",
    "image_iou_at_50": "IoU by example where 50 % of absent phrases are answered with nothing",
    "miou_seen": "mIoU of the class list, seen classes",
    "miou": "mIoU of the class list",
}
FINE = 3  # drawn so many times as large and shrunk: PIL's circles have no soft edges
BASE, OTHER = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)  # of Okabe and Ito
LINE, HEAD, MARGIN, WIDTH = 26, 36, 12, 760


def chart(rows: Sequence[Row], measure: str) -> Image.Image:
    """One measure; the first variant is the base, whose mean is the line through all others."""
    label, scale = (f"{LONG[measure]}, percent", 100) if measure in LONG else (COSTS[measure], 1)
    values = {name: [scale * v for v in seeds.values()] for name, seeds in by_variant(rows, measure).items()}
    factor = {row["variant"]: row["factor"] or "" for row in rows}
    groups: dict[str, list[str]] = {}
    for name in values:
        groups.setdefault(factor[name], []).append(name)
    base = next(iter(values))
    sheet = _Sheet(values, HEAD + LINE // 2 + sum(LINE * len(names) + LINE * bool(group) for group, names in groups.items()))
    top = HEAD
    sheet.grid(top, mean=float(np.mean(values[base])))
    sheet.text(MARGIN, HEAD / 2, label, 16, INK)
    for group, names in groups.items():
        if group:
            sheet.text(MARGIN, top + LINE / 2, group, 13, FAINT)
            top += LINE
        for name in names:
            sheet.line(top + LINE / 2, name, values[name], BASE if name == base else OTHER)
            top += LINE
    return sheet.picture()


def charts(rows: Sequence[Row]) -> list[Image.Image]:
    """One for each measure and cost that differs between variants."""
    costs = [name for name in COSTS if len({v for seeds in by_variant(rows, name).values() for v in seeds.values()}) > 1]
    return [chart(rows, name) for name in (*shown(rows), *costs)]


class _Sheet:
    """Coordinates in pixels of the finished picture; names on the left, means in figures on the right."""

    def __init__(self, values: dict[str, list[float]], height: int) -> None:
        self.height, self.foot = height, 24
        self.canvas = Image.new("RGB", (FINE * WIDTH, FINE * (height + self.foot)), PAPER)
        self.draw = ImageDraw.Draw(self.canvas)
        longest = max(font(14).getlength(name) for name in values)
        self.left, self.right = round(min(longest, 240)) + 4 * MARGIN, WIDTH - 120
        everything = [v for seeds in values.values() for v in seeds]
        low, high = min(everything), max(everything)
        room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        self.low, self.high = low - room, high + room
        self.digits = _digits((self.high - self.low) / 20)

    def x(self, value: float) -> float:
        return self.left + (value - self.low) / (self.high - self.low) * (self.right - self.left)

    def grid(self, top: float, mean: float) -> None:
        step = _nice((self.high - self.low) / 5)
        for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1):
            self._stroke(self.x(n * step), top, self.x(n * step), self.height, CARD, 1.5)
            self.text(self.x(n * step), self.height + self.foot / 2, f"{n * step:,.{_digits(step)}f}", 12, FAINT, "mm")
        self._stroke(self.x(mean), top, self.x(mean), self.height, BASE, 1)

    def line(self, y: float, name: str, values: Sequence[float], colour: Colour) -> None:
        mean = float(np.mean(values))
        self.text(2 * MARGIN, y, name, 14, INK)
        self._stroke(self.x(min(values)), y, self.x(max(values)), y, _pale(colour, 0.5), 2)
        for value in values:
            self._dot(self.x(value), y, 4, _pale(colour, 0.5))
        self._dot(self.x(mean), y, 6, colour)
        spread = f" ± {np.std(values, ddof=1):,.{self.digits}f}" if len(values) > 1 and np.ptp(values) else ""
        self.text(self.right + 14, y, f"{mean:,.{self.digits}f}{spread}", 13, INK)

    def text(self, x: float, y: float, text: str, size: int, colour: Colour, anchor: str = "lm") -> None:
        self.draw.text((FINE * x, FINE * y), text, fill=colour, font=font(FINE * size), anchor=anchor)

    def picture(self) -> Image.Image:
        return self.canvas.resize((WIDTH, self.height + self.foot), Image.Resampling.LANCZOS)

    def _dot(self, x: float, y: float, radius: float, colour: Colour) -> None:
        box = [FINE * v for v in (x - radius, y - radius, x + radius, y + radius)]
        self.draw.ellipse(box, fill=colour, outline=PAPER, width=FINE)

    def _stroke(self, x0: float, y0: float, x1: float, y1: float, colour: Colour, width: float) -> None:
        self.draw.line([FINE * v for v in (x0, y0, x1, y1)], fill=colour, width=round(FINE * width))


def _pale(colour: Colour, share: float) -> Colour:
    red, green, blue = (round(c + share * (255 - c)) for c in colour)
    return red, green, blue


def _nice(step: float) -> float:
    """The next of 1, 2 and 5 times a power of ten."""
    power = 10 ** math.floor(math.log10(step))
    return next(n * power for n in (1, 2, 5, 10) if n * power >= 0.999 * step)


def _digits(step: float) -> int:
    """Decimals that tell such a step."""
    return max(0, -math.floor(math.log10(step) + 1e-9))
