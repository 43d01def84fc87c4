"""Building blocks of pictures: panels with headings and captions, colors, a legend, and their layout in rows."""

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
INK, PAPER = (20, 20, 20), (255, 255, 255)
TILE, GAP = 210, 12  # longer side of a picture in a panel, and space between panels, in pixels
_LINE, _SQUARE = 20, 11  # height of a text line, and side of the color square before it, in pixels
_FONT_SIZE = 14  # legible where a README reduces a figure to three quarters
_BOLD = 0.3  # width of the stroke around bold letters: the package has no second font
_BAR = 120  # length of the color bar of heatmaps


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


def panel(picture: Image.Image, heading: str, lines: Sequence[Line] = (), *, color: Color | None = None) -> Image.Image:
    """Return a heading above a picture, resized so that its longer side is `TILE` pixels, above lines of text.

    Args:
        picture: Picture, RGB.
        heading: Heading, in bold letters.
        lines: Lines of text below the picture. The heading and long lines are truncated.
        color: Color of a frame around the picture. Default: no frame.

    Returns:
        The panel, `TILE` pixels wide.
    """
    picture = fit_to_tile(picture)
    result = Image.new("RGB", (TILE, _LINE + picture.height + 4 + _LINE * len(lines)), PAPER)
    draw = ImageDraw.Draw(result)
    draw.text((0, 0), _truncated(heading, TILE - 1), fill=INK, font=_font(), stroke_width=_BOLD)
    result.paste(picture, (0, _LINE))
    if color is not None:
        draw_box(draw, (0, _LINE, picture.width - 1, _LINE + picture.height - 1), color)
    for i, line in enumerate(lines):
        _draw_line(draw, (0, _LINE + picture.height + 3 + i * _LINE), line, TILE)
    return result


def draw_box(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], color: Color) -> None:
    """Draw a box (left, top, right, bottom) in a color, with dark edges that separate it from the picture."""
    left, top, right, bottom = box
    draw.rectangle(box, outline=INK, width=4)
    if right - left > 2 and bottom - top > 2:
        draw.rectangle((left + 1, top + 1, right - 1, bottom - 1), outline=color, width=2)


def tag_size(tag: str) -> tuple[int, int]:
    """Return the width and height of a tag."""
    return round(_font().getlength(tag)) + 8, 18


def draw_tag(draw: ImageDraw.ImageDraw, corner: tuple[int, int], tag: str, color: Color) -> None:
    """Write a short text on a colored field whose upper left corner is `corner`."""
    (left, top), (width, height) = corner, tag_size(tag)
    draw.rectangle((left, top, left + width, top + height), fill=color, outline=INK)
    luminance = float(np.dot(color, (0.299, 0.587, 0.114)))
    draw.text(
        (left + width / 2, top + height / 2), tag, fill=INK if luminance > 110 else PAPER, font=_font(), anchor="mm"
    )


def _draw_line(draw: ImageDraw.ImageDraw, corner: tuple[int, int], line: Line, width: int) -> None:
    """Draw a line of at most `width` pixels."""
    left, top = corner
    if line.color is not None:
        draw.rectangle((left, top + 3, left + _SQUARE, top + 3 + _SQUARE), fill=line.color, outline=INK)
        width, left = width - _SQUARE - 6, left + _SQUARE + 6
    draw.text((left, top), _truncated(line.text, width), fill=INK, font=_font())


def _line_width(line: Line) -> int:
    return round(_font().getlength(line.text) + 0.5) + (0 if line.color is None else _SQUARE + 6)


def _truncated(text: str, width: int) -> str:
    while _font().getlength(text) > width:
        text = text.removesuffix("…")[:-1] + "…"
    return text


@cache
def _font() -> ImageFont.FreeTypeFont:
    """Return the font of this package; the one of Pillow has only English letters."""
    return ImageFont.truetype(str(Path(__file__).parent / "fonts" / "DejaVuSans.ttf"), _FONT_SIZE)


def row_width(num_panels: int) -> int:
    """Return the width of a row of panels."""
    return num_panels * (TILE + GAP) + GAP


def side_by_side(panels: Sequence[Image.Image]) -> Image.Image:
    """Return panels of any width in a row, aligned at the top."""
    width = sum(picture.width + GAP for picture in panels) + GAP
    row = Image.new("RGB", (width, max(picture.height for picture in panels) + 2 * GAP), PAPER)
    left = GAP
    for picture in panels:
        row.paste(picture, (left, GAP))
        left += picture.width + GAP
    return row


def stack_rows(rows: Sequence[Image.Image]) -> Image.Image:
    """Return rows of any width in one picture, one below the other."""
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), PAPER)
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def title_row(title: str, text: str, width: int) -> Image.Image:
    """Return a title in bold letters above a text, which is wrapped to the width, as a row."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if _font().getlength(longer) <= width - 2 * GAP:
            lines[-1] = longer
        else:
            lines.append(word)
    lines = lines if text else []
    row = Image.new("RGB", (width, _LINE * (1 + len(lines)) + GAP), PAPER)
    draw = ImageDraw.Draw(row)
    draw.text((GAP, GAP), _truncated(title, width - 2 * GAP), fill=INK, font=_font(), stroke_width=_BOLD)
    for i, line in enumerate(lines, 1):
        draw.text((GAP, GAP + i * _LINE), line, fill=INK, font=_font())
    return row


def legend(names: Sequence[Line], width: int) -> Image.Image:
    """Return a panel with the colors of classes, the color bar of heatmaps, and the meaning of boxes.

    Args:
        names: Names and colors of classes. They flow in as many lines as necessary.
        width: Width of the panel in pixels.

    Returns:
        The panel.
    """
    places, left, top = [], 0, _LINE
    for name in names:
        if left and left + _line_width(name) > width:
            left, top = 0, top + _LINE
        places.append((left, top))
        left += _line_width(name) + 2 * GAP
    result = Image.new("RGB", (width, top + 3 * _LINE + 2), PAPER)
    draw = ImageDraw.Draw(result)
    draw.text((0, 0), "Legend", fill=INK, font=_font(), stroke_width=_BOLD)
    for name, place in zip(names, places, strict=True):
        _draw_line(draw, place, name, width)
    top += _LINE
    caption = "heatmap: probability of the class, 0 "
    draw.text((0, top), caption, fill=INK, font=_font())
    bar = Image.fromarray(to_colors(np.linspace(0, 1, _BAR, dtype=np.float32)[None].repeat(_SQUARE, 0)))
    left = round(_font().getlength(caption)) + 2
    result.paste(bar, (left, top + 4))
    draw.text((left + _BAR + 6, top), "1", fill=INK, font=_font())
    _draw_line(draw, (0, top + _LINE), Line("box of a crop: color of its most probable class"), width)
    return result
