"""Building blocks of pictures: tiles with captions, colors, a legend, and their layout in rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]

# Seven steps of viridis, legible in grayscale and for the colorblind (van der Walt and Smith, 2015; CC0).
_VIRIDIS = ((68, 1, 84), (72, 40, 120), (62, 74, 137), (38, 130, 142), (53, 183, 121), (144, 215, 67), (253, 231, 37))
# Distinct for the colorblind (Okabe and Ito, "Color Universal Design", 2008); gray is for all other classes.
CLASS_COLORS = (
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (213, 94, 0), (86, 180, 233), (240, 228, 66),
)  # fmt: skip
OTHER_COLOR = (128, 128, 128)
INK, PAPER, FAINT = (20, 20, 20), (255, 255, 255), (225, 225, 225)
TILE, GAP = 220, 12  # longer side of a picture in a tile, and space between tiles, in pixels
_LINE, _SQUARE = 19, 11  # height of a text line, and side of the color square before it, in pixels


class Line(NamedTuple):
    """Line of a caption, with an optional square of a color before the text."""

    text: str
    color: Color | None = None


def to_colors(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Return the colors `[..., 3]` of values in 0..1, from dark to bright."""
    steps = np.linspace(0, 1, len(_VIRIDIS))
    channels = [np.interp(values, steps, channel) for channel in zip(*_VIRIDIS, strict=True)]
    return np.stack(channels, -1).round().astype(np.uint8)


def fit_to_tile(picture: Image.Image) -> Image.Image:
    """Resize a picture so that its longer side is `TILE` pixels."""
    scale = TILE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC)


def tile(picture: Image.Image, lines: Sequence[Line] = (), tag: str = "") -> Image.Image:
    """Return a picture, resized to the size of a tile, above lines of text.

    Args:
        picture: Picture, RGB.
        lines: Lines of text. Long lines are truncated.
        tag: Short text in the upper left corner of the picture. Default: none.

    Returns:
        The tile, `TILE` pixels wide.
    """
    picture = fit_to_tile(picture)
    result = Image.new("RGB", (TILE, TILE + 4 + _LINE * len(lines)), PAPER)
    corner = ((TILE - picture.width) // 2, TILE - picture.height)
    result.paste(picture, corner)
    draw = ImageDraw.Draw(result)
    if tag:
        draw_tag(draw, corner, tag)
    for i, line in enumerate(lines):
        _draw_line(draw, (2, TILE + 3 + i * _LINE), line)
    return result


def draw_tag(draw: ImageDraw.ImageDraw, corner: tuple[int, int], tag: str) -> None:
    """Write a short text on a dark box whose upper left corner is `corner`."""
    width, height = round(draw.textlength(tag, font=_font())) + 6, 17
    draw.rectangle((*corner, corner[0] + width, corner[1] + height), fill=INK)
    draw.text((corner[0] + width / 2, corner[1] + height / 2), tag, fill=PAPER, font=_font(), anchor="mm")


def _draw_line(draw: ImageDraw.ImageDraw, corner: tuple[int, int], line: Line) -> None:
    left, top = corner
    if line.color is not None:
        draw.rectangle((left, top + 3, left + _SQUARE, top + 3 + _SQUARE), fill=line.color, outline=INK)
        left += _SQUARE + 6
    draw.text((left, top), _truncated(draw, line.text, TILE - left), fill=INK, font=_font())


def _truncated(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    while draw.textlength(text, font=_font()) > width:
        text = text.removesuffix("…")[:-1] + "…"
    return text


@cache
def _font() -> ImageFont.FreeTypeFont:
    """Return the font of this package; the one of Pillow has only English letters."""
    return ImageFont.truetype(str(Path(__file__).parent / "fonts" / "DejaVuSans.ttf"), 13)


def side_by_side(tiles: Sequence[Image.Image]) -> Image.Image:
    """Return tiles in a row."""
    height = max(picture.height for picture in tiles)
    row = Image.new("RGB", (len(tiles) * (TILE + GAP) + GAP, height + 2 * GAP), PAPER)
    for i, picture in enumerate(tiles):
        row.paste(picture, (GAP + i * (TILE + GAP), GAP))
    return row


def stack_rows(rows: Sequence[Image.Image]) -> Image.Image:
    """Return rows of any width in one picture, one below the other."""
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), PAPER)
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def heading(text: str, width: int) -> Image.Image:
    """Return a text, wrapped to the width, as a row."""
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if measure.textlength(longer, font=_font()) <= width - 2 * GAP:
            lines[-1] = longer
        else:
            lines.append(word)
    row = Image.new("RGB", (width, _LINE * len(lines) + GAP), PAPER)
    ImageDraw.Draw(row).text((GAP, GAP), "\n".join(lines), fill=INK, font=_font())
    return row


def heatmap_legend(width: int) -> Image.Image:
    """Return a color bar of heatmaps, from probability 0 to 1, as a row."""
    row = Image.new("RGB", (width, _LINE + GAP // 2 + 5), PAPER)
    bar = Image.fromarray(to_colors(np.linspace(0, 1, TILE, dtype=np.float32)[None].repeat(10, 0)))
    draw = ImageDraw.Draw(row)
    draw.line((GAP, 1, width - GAP, 1), fill=FAINT)
    caption, top = "heatmaps: probability of the class, 0 ", 5
    draw.text((GAP, top), caption, fill=INK, font=_font())
    left = GAP + round(draw.textlength(caption, font=_font())) + 2
    row.paste(bar, (left, top + 4))
    draw.text((left + TILE + 6, top), "1", fill=INK, font=_font())
    return row
