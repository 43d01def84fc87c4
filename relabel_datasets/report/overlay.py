"""Pictures of label maps: a class's heatmap over its image, and a figure of an image, its heatmaps and its crops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..data.datasets import RelabelDataset
from ..labels.label_map import LabelMap
from ..labels.transforms import LabelPooling

# Seven steps of viridis, which reads the same for the colour-blind and in grey (van der Walt and Smith, 2015; CC0).
_VIRIDIS = ((68, 1, 84), (72, 40, 120), (62, 74, 137), (38, 130, 142), (53, 183, 121), (144, 215, 67), (253, 231, 37))
# Colours of crops, told apart by the colour-blind (Okabe and Ito, "Color Universal Design", 2008).
_CROP_COLORS = ((213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167))
_INK, _PAPER, _FAINT = (20, 20, 20), (255, 255, 255), (225, 225, 225)
_TILE, _GAP, _LINE = 220, 12, 19  # pixels: a tile's longer side, between tiles, a line of text


def overlay(image: Image.Image, label_map: LabelMap, class_index: int, strength: float = 0.65) -> Image.Image:
    """Return the image under the heatmap of a class: its probability at each location, from dark to bright.

    Args:
        image: RGB, the whole image that the map belongs to.
        label_map: its map; the view is not looked at.
        class_index: which class.
        strength: share of the heatmap's colour, 0..1.
    """
    probability = label_map.dense().softmax(0)[class_index].numpy()
    colored = Image.fromarray(_to_colors(probability)).resize(image.size, Image.Resampling.BILINEAR)
    return Image.blend(image, colored, strength)


def _to_colors(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Return `[..., 3]` colours of values in 0..1."""
    steps = np.linspace(0, 1, len(_VIRIDIS))
    channels = [np.interp(values, steps, channel) for channel in zip(*_VIRIDIS, strict=True)]
    return np.stack(channels, -1).round().astype(np.uint8)


def figure(
    image: Image.Image,
    label_map: LabelMap,
    classes: Sequence[str],
    *,
    num_heatmaps: int = 3,
    num_crops: int = 3,
    seed: int = 0,
) -> Image.Image:
    """Return a picture of an image with its crops, the heatmaps of its strongest classes, and the crops' pooled labels.

    Args:
        image: RGB.
        label_map: its map, of the whole image.
        classes: names of the classes.
        num_heatmaps: how many classes, strongest anywhere in the image first.
        num_crops: how many random crops (8 % to 60 % of the area), at most 4.
        seed: draws the crops.

    Reference: the layout is that of figure 1 of Yun et al., "Re-labeling ImageNet", 2021.
    """
    crops = _random_crops(image, num_crops, seed)
    framed = image.copy()
    for color, (top, left, height, width) in zip(_CROP_COLORS, crops, strict=False):
        box = (left, top, left + width - 1, top + height - 1)
        ImageDraw.Draw(framed).rectangle(box, outline=color, width=max(2, max(image.size) // 90))
    truth = "" if label_map.label is None else f"label: {classes[label_map.label]}"
    tiles = [_tile(framed, [truth])]
    strongest = label_map.dense().softmax(0).amax((1, 2)).topk(min(num_heatmaps, len(classes))).indices
    tiles += [_tile(overlay(image, label_map, index), [classes[index]]) for index in strongest.tolist()]
    pool = LabelPooling()
    for color, crop in zip(_CROP_COLORS, crops, strict=False):
        soft_label = pool(F.crop(label_map, *crop))
        tiles.append(_tile(F.crop(image, *crop), _best(soft_label, classes), color))
    return _with_legend(_side_by_side(tiles))


def _random_crops(image: Image.Image, count: int, seed: int) -> list[tuple[int, int, int, int]]:
    """Return crops as (top, left, height, width) in pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sized = torch.empty(1, 1, 1).expand(1, image.height, image.width)
        crops = [v2.RandomResizedCrop.get_params(sized, [0.08, 0.6], [3 / 4, 4 / 3]) for _ in range(count)]
    return [(int(top), int(left), int(height), int(width)) for top, left, height, width in crops]


def _best(soft_label: torch.Tensor, classes: Sequence[str], count: int = 3) -> list[str]:
    values, indices = soft_label.topk(min(count, len(classes)))
    return [f"{value:4.0%}  {classes[index]}" for value, index in zip(values.tolist(), indices.tolist(), strict=True)]


def _tile(picture: Image.Image, lines: Sequence[str], frame: tuple[int, int, int] | None = None) -> Image.Image:
    """Return the picture, enlarged or shrunk to a tile, over lines of text."""
    scale = _TILE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    tile = Image.new("RGB", (_TILE, _TILE + 4 + _LINE * len(lines)), _PAPER)
    corner = ((_TILE - size[0]) // 2, _TILE - size[1])
    tile.paste(picture.resize(size, Image.Resampling.BICUBIC), corner)
    draw = ImageDraw.Draw(tile)
    if frame is not None:
        draw.rectangle((*corner, corner[0] + size[0] - 1, _TILE - 1), outline=frame, width=4)
    for i, line in enumerate(lines):
        draw.text((2, _TILE + 3 + i * _LINE), _shortened(draw, line), fill=_INK, font=_font())
    return tile


def _shortened(draw: ImageDraw.ImageDraw, text: str) -> str:
    while draw.textlength(text, font=_font()) > _TILE - 4:
        text = text.removesuffix("...")[:-1] + "..."
    return text


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(15)


def _side_by_side(tiles: Sequence[Image.Image]) -> Image.Image:
    height = max(tile.height for tile in tiles)
    sheet = Image.new("RGB", (len(tiles) * (_TILE + _GAP) + _GAP, height + 2 * _GAP), _PAPER)
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (_GAP + i * (_TILE + _GAP), _GAP))
    return sheet


def _with_legend(sheet: Image.Image) -> Image.Image:
    """Return the sheet over a bar of the heatmaps' colours from probability 0 to 1."""
    legend = Image.new("RGB", (sheet.width, sheet.height + _LINE + _GAP // 2), _PAPER)
    legend.paste(sheet)
    bar = Image.fromarray(_to_colors(np.linspace(0, 1, _TILE, dtype=np.float32)[None].repeat(10, 0)))
    left, top = 2 * _GAP + _TILE, sheet.height
    draw = ImageDraw.Draw(legend)
    draw.line((_GAP, top - 4, sheet.width - _GAP, top - 4), fill=_FAINT)
    draw.text((left, top), "probability of the class: 0", fill=_INK, font=_font())
    left += round(draw.textlength("probability of the class: 0 ", font=_font())) + 4
    legend.paste(bar, (left, top + 5))
    draw.text((left + _TILE + 6, top), "1", fill=_INK, font=_font())
    return legend


def contact_sheet(dataset: RelabelDataset, count: int = 4) -> Image.Image:
    """Return the figures of samples spread over the dataset, one below the other.

    Args:
        dataset: without transforms, so that its samples are whole images.
        count: how many.

    Raises:
        ValueError: the dataset transforms its samples.
    """
    figures = [picture for _, picture in _figures(dataset, count)]
    sheet = Image.new("RGB", (max(each.width for each in figures), sum(each.height for each in figures)), _PAPER)
    top = 0
    for each in figures:
        sheet.paste(each, (0, top))
        top += each.height
    return sheet


def save_overlays(dataset: RelabelDataset, folder: Path, count: int = 10) -> list[Path]:
    """Write figures of samples spread over the dataset as `<key>.png`; return their paths.

    Args:
        dataset: without transforms, so that its samples are whole images.
        folder: made if need be.
        count: how many.

    Raises:
        ValueError: the dataset transforms its samples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for key, picture in _figures(dataset, count):
        paths.append(folder / f"{key.replace('/', '_')}.png")
        picture.save(paths[-1])
    return paths


def _figures(dataset: RelabelDataset, count: int) -> Iterator[tuple[str, Image.Image]]:
    """Yield keys and figures of samples spread over the dataset."""
    if dataset.transforms is not None:
        raise ValueError("figures need whole images: load the dataset without transforms")
    for index in np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int).tolist():
        image, label_map = dataset[index]
        yield dataset.keys[index], figure(image, label_map, dataset.classes, seed=index)
