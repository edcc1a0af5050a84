"""Pictures: what is tinted, how large, and that nothing is cut or runs into something else."""

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pmpseg import drawing
from pmpseg.drawing import Row, colour_map, overlay, panel, write_page
from pmpseg.errors import InputError
from pmpseg.layout import PAPER, font, legend, text_block, wrap

GREY = np.full((40, 60, 3), 128, dtype=np.uint8)
LONG = "the small striped red circle left of the brick " * 6 + "w" * 300


def square(top: int = 10, left: int = 20, side: int = 16) -> np.ndarray:
    mask = np.zeros((40, 60), dtype=bool)
    mask[top : top + side, left : left + side] = True
    return mask


def rows(n: int = 3, truth: bool = True, **other: str) -> list[Row]:
    return [Row(GREY, "a square", square() if truth else None, square(12), **other) for _ in range(n)]


def test_colour_map() -> None:
    colours = colour_map(200)
    assert colours.shape == (200, 3) and colours.dtype == np.uint8
    assert np.array_equal(colour_map(9), colours[:9]) and colour_map(0).shape == (0, 3)
    assert len(np.unique(colours, axis=0)) == 200
    apart = np.abs(colours[:, None].astype(int) - colours[None]).sum(-1) + 999 * np.eye(200, dtype=int)
    assert apart.min() > 5 and apart[:60, :60].min() > 25
    assert colours.max(axis=1).min() > 120  # none is lost on black, which stands for "ignore"


def test_overlay_tints_only_the_mask() -> None:
    picture = np.asarray(overlay(GREY, [square()], colours=[(255, 0, 0)], opacity=0.5, dim=0.5))
    assert picture.shape == (240, 360, 3)  # six times as large: 384 / 60
    assert picture[18 * 6, 28 * 6].tolist() == [192, 64, 64]  # within
    assert picture[10 * 6, 28 * 6].tolist() == [255, 0, 0]  # its edge
    assert picture[10 * 6 - 1, 28 * 6].max() < 30  # the dark line around it
    assert picture[5, 5].tolist() == [64, 64, 64]  # the rest


def test_overlay_shows_small_masks_on_large_ones() -> None:
    small, large = square(16, 26, 4), square()
    for masks, colours in (
        ([small, large], [(255, 0, 0), (0, 0, 255)]),
        ([large, small], [(0, 0, 255), (255, 0, 0)]),
    ):
        picture = np.asarray(overlay(GREY, masks, colours=colours, opacity=1))
        assert picture[18 * 6, 28 * 6].tolist() == [255, 0, 0] and picture[13 * 6, 28 * 6].tolist() == [
            0,
            0,
            255,
        ]


def test_overlay_at_the_border_and_without_masks() -> None:
    whole = np.asarray(overlay(GREY, [np.ones((40, 60), bool)], colours=[(255, 0, 0)], opacity=0))
    assert (whole == 128).all()  # the border of the image is no edge
    assert (np.asarray(overlay(GREY, [])) == 128).all()


@pytest.mark.parametrize(
    ("side", "size"), [(None, (360, 240)), (60, (60, 40)), (100, (120, 80)), (30, (30, 20))]
)
def test_sizes(side: int | None, size: tuple[int, int]) -> None:
    assert overlay(GREY, [square()], side=side).size == size


def test_large_images_keep_their_size_and_thin_masks_stay_visible() -> None:
    mask = np.zeros((500, 900), bool)
    mask[:, 450] = True
    picture = overlay(Image.new("L", (900, 500)), mask[None])
    assert picture.size == (900, 500) and np.asarray(picture)[250, 450].any()


def test_overlay_legend() -> None:
    plain = overlay(GREY, [square(), square() & False])
    named = overlay(GREY, [square(), square() & False], ["found 0.93", "nothing"])
    assert named.width == plain.width and named.height > plain.height
    assert named.crop((0, 0, *plain.size)).tobytes() == plain.tobytes()
    many = overlay(GREY, np.stack([square()] + [square() & False] * 99), [f"name {i}" for i in range(100)])
    assert many.height < plain.height + 50  # only what was found


def test_bad_input() -> None:
    with pytest.raises(InputError, match=r"shape \(4, 4\), but its image \(40, 60\)"):
        overlay(GREY, [np.ones((4, 4), bool)])
    with pytest.raises(InputError, match="1 masks and 2 names"):
        overlay(GREY, [square()], ["a", "b"])
    with pytest.raises(InputError, match=r"uint8 .* got float64 \(40, 60, 3\)"):
        overlay(GREY / 255, [])
    with pytest.raises(InputError, match=r"got uint8 \(3, 40, 60\)"):
        overlay(GREY.transpose(2, 0, 1), [])
    with pytest.raises(InputError, match="at least one row"):
        panel([])


@pytest.mark.parametrize("width", [40, 300])
def test_text_stays_inside(width: int) -> None:
    lines = wrap(LONG, font(15), width)
    assert max(font(15).getlength(line) for line in lines) <= width
    assert "".join(lines).replace(" ", "") == LONG.replace(" ", "")  # nothing is lost
    assert wrap("", font(15), width) == [""] and wrap("a\nb", font(15), width) == ["a", "b"]
    for sheet in (
        text_block(LONG, 15, (0, 0, 0), width),
        legend([(LONG, (9, 9, 9), True), ("b", (9, 9, 9), False)], width),
    ):
        assert (np.asarray(sheet)[-1] == PAPER).all()  # the last line is not cut


def test_panel() -> None:
    picture = panel(rows(2, caption="IoU 0.93"))
    assert picture.width == 3 * 300 + 2 * 8 + 2 * 20  # three pictures, five times as large
    assert panel(rows(2, truth=False)).width == 2 * 300 + 8 + 2 * 20
    assert panel(rows(2), across=2).width > 2 * 900 and panel(rows(8)).width > 2 * 900
    assert panel(rows(2, caption=LONG)).height > picture.height
    assert panel([*rows(1), *rows(1, truth=False)]).size == panel(rows(2)).size


def test_panel_of_labels() -> None:
    labels = np.where(square(), 2, 255)
    labels[0] = -1
    row = Row(GREY, "street.png", labels, np.where(square(), 2, 0), "mIoU 0.5")
    assert panel([row], ["sky", "road", "car"]).height > panel([row]).height
    shown = {what: np.asarray(picture) for what, picture in drawing._pictures(row, 288)}
    assert not np.array_equal(shown["ground truth"], shown["prediction"])


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[dict] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list) -> None:
        if tag == "img":
            self.images.append(dict(attributes))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_write_page(tmp_path: Path) -> None:
    page = [*rows(2), Row(GREY, '<script> & "quotes"', None, square(), "none given")]
    for _ in range(2):  # a second time replaces the first
        index, sheet = write_page(tmp_path / "page", page, "Title <1>", "What it is.\nAnd how.")
    assert (index.name, sheet.name) == ("index.html", "page.png")
    links = Links()
    links.feed(index.read_text())
    assert "<script>" not in index.read_text()
    assert "Title <1>" in links.text and '<script> & "quotes"' in links.text and "And how." in links.text
    assert len(links.images) == 3 + 3 + 2
    for image in links.images:
        with Image.open(index.parent / image["src"]) as picture:
            assert (str(picture.width), str(picture.height)) == (image["width"], image["height"])
        assert image["alt"]
    assert Image.open(sheet).width > 900
    left = {path.name for path in index.parent.iterdir()} | {
        path.suffix for path in (index.parent / "pictures").iterdir()
    }
    assert left == {"index.html", "page.png", "pictures", ".png"}
