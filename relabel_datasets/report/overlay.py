"""Pictures of label maps: a class's heatmap over its image, and a figure of an image, its heatmaps and its crops."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..data.datasets import RelabelDataset
from ..labels.label_map import LabelMap
from ..labels.transforms import LabelPooling
from ..storage.local import write_atomically
from .names import legible_names
from .tiles import (
    CLASS_COLORS,
    INK,
    OTHER_COLOR,
    PAPER,
    TILE,
    Color,
    Line,
    draw_tag,
    fitted,
    heatmap_legend,
    one_below_the_other,
    side_by_side,
    tile,
    to_colors,
)

_STRENGTH = 0.65  # share of a heatmap's colour
_WORTH_A_LINE = 0.01  # probability from which on a crop's class is named


def overlay(image: Image.Image, label_map: LabelMap, class_index: int, strength: float = _STRENGTH) -> Image.Image:
    """Return the image under the heatmap of a class: its probability at each location, from dark to bright.

    Args:
        image: RGB, the whole image that the map belongs to.
        label_map: its map; the view is not looked at.
        class_index: which class.
        strength: share of the heatmap's colour, 0..1.
    """
    probability = label_map.dense().softmax(0)[class_index].numpy()
    colored = Image.fromarray(to_colors(probability)).resize(image.size, Image.Resampling.BILINEAR)
    return Image.blend(image, colored, strength)


def regions(
    image: Image.Image, label_map: LabelMap, colors: Mapping[int, Color], strength: float = _STRENGTH
) -> Image.Image:
    """Return the image in grey under its label map: where a class is best its colour, the stronger the surer it is.

    Args:
        image: RGB, the whole image that the map belongs to.
        label_map: its map; the view is not looked at.
        colors: of classes by index; all others are grey.
        strength: share of the colour where the class is sure, 0..1.
    """
    dense = label_map.dense()
    kept = torch.tensor(
        _best_anywhere(dense)
    )  # of thousands of classes; between two locations, no other is likely to be best
    best, probability = kept[_resized(dense[kept], image).argmax(0)], _resized(dense.softmax(0)[kept], image)
    palette = torch.tensor(OTHER_COLOR, dtype=torch.float32).repeat(label_map.num_classes, 1)
    for index, color in colors.items():
        palette[index] = torch.tensor(color, dtype=torch.float32)
    share = (strength * probability.amax(0))[..., None].numpy()
    grey = np.asarray(image.convert("L"), np.float32)[..., None]  # or its colours would be taken for those of classes
    pixels = grey * (1 - share) + palette[best].numpy() * share
    return Image.fromarray(pixels.round().astype(np.uint8))


def _best_anywhere(dense: torch.Tensor) -> list[int]:
    """Return the classes that are best at some location."""
    indices: list[int] = np.unique(dense.argmax(0).numpy()).tolist()
    return indices


def _resized(maps: torch.Tensor, image: Image.Image) -> torch.Tensor:
    """Return maps `[N, H, W]` in the size of an image."""
    size = image.height, image.width
    resized: torch.Tensor = torch.nn.functional.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
    return resized


def strongest(label_map: LabelMap, count: int) -> list[tuple[int, float]]:
    """Return the classes that have the highest probability at some location, and this probability, best first."""
    highest = label_map.dense().softmax(0).amax((1, 2))
    values, indices = highest.topk(min(count, len(highest)))
    return list(zip(indices.tolist(), values.tolist(), strict=True))


def figure(
    image: Image.Image,
    label_map: LabelMap,
    classes: Sequence[str],
    *,
    heatmaps_of: Sequence[int] | None = None,
    num_heatmaps: int = 3,
    num_crops: int = 3,
    seed: int = 0,
) -> Image.Image:
    """Return a picture of an image with its crops, its label map, heatmaps of classes, and the crops' pooled labels.

    Args:
        image: RGB.
        label_map: its map, of the whole image.
        classes: names of the classes.
        heatmaps_of: indices of classes. Default: the strongest anywhere in the image.
        num_heatmaps: how many, where it is not said which.
        num_crops: how many random crops (8 % to 60 % of the area).
        seed: draws the crops.

    Reference: the layout is that of figure 1 of Yun et al., "Re-labeling ImageNet", 2021.
    """
    crops = _random_crops(image, num_crops, seed)
    ranked = [index for index, _ in strongest(label_map, len(CLASS_COLORS))]
    colors = dict(zip(ranked, CLASS_COLORS, strict=False))
    truth = [] if label_map.label is None else [_line(f"label: {classes[label_map.label]}", label_map.label, colors)]
    tiles = [tile(_framed(image, crops), truth)]
    best = set(_best_anywhere(label_map.dense()))
    names = [_line(classes[index], index, colors) for index in ranked if index in best]
    names += [Line("other classes", OTHER_COLOR)] if best - set(ranked) else []
    tiles.append(tile(regions(image, label_map, colors), names))
    tiles += [
        tile(overlay(image, label_map, index), [_line(classes[index], index, colors)])
        for index in (ranked[:num_heatmaps] if heatmaps_of is None else heatmaps_of)
    ]
    pool = LabelPooling()
    for number, crop in enumerate(crops, 1):
        lines = _best(pool(F.crop(label_map, *crop)), classes, colors)
        tiles.append(tile(F.crop(image, *crop), lines, str(number)))
    row = side_by_side(tiles)
    return one_below_the_other([row, heatmap_legend(row.width)])


def _random_crops(image: Image.Image, count: int, seed: int) -> list[tuple[int, int, int, int]]:
    """Return crops as (top, left, height, width) in pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sized = torch.empty(1, 1, 1).expand(1, image.height, image.width)
        crops = [v2.RandomResizedCrop.get_params(sized, [0.08, 0.6], [3 / 4, 4 / 3]) for _ in range(count)]
    return [(int(top), int(left), int(height), int(width)) for top, left, height, width in crops]


def _framed(image: Image.Image, crops: Sequence[tuple[int, int, int, int]]) -> Image.Image:
    """Return the image in a tile's size with numbered frames of crops, light in dark: colours stand for classes."""
    framed, scale = fitted(image), TILE / max(image.size)
    draw = ImageDraw.Draw(framed)
    for crop in crops:
        top, left, height, width = (round(scale * pixels) for pixels in crop)
        right, bottom = left + max(2, width - 1), top + max(2, height - 1)
        draw.rectangle((left, top, right, bottom), outline=INK, width=3)
        draw.rectangle((left + 1, top + 1, right - 1, bottom - 1), outline=PAPER)
    for number, (top, left, *_) in enumerate(crops, 1):  # after all frames, or one would hide another's number
        draw_tag(draw, (round(scale * left), round(scale * top)), str(number))
    return framed


def _line(text: str, index: int, colors: Mapping[int, Color]) -> Line:
    return Line(text, colors.get(index, OTHER_COLOR))


def _best(soft_label: torch.Tensor, classes: Sequence[str], colors: Mapping[int, Color], count: int = 3) -> list[Line]:
    values, indices = soft_label.topk(min(count, len(classes)))
    return [
        _line(f"{value:.0%} {classes[index]}", index, colors)
        for value, index in zip(values.tolist(), indices.tolist(), strict=True)
        if value >= _WORTH_A_LINE
    ]


def contact_sheet(dataset: RelabelDataset, count: int = 4) -> Image.Image:
    """Return the figures of samples spread over the dataset, one below the other.

    Args:
        dataset: without transforms, so that its samples are whole images.
        count: how many.

    Raises:
        ValueError: the dataset transforms its samples.
    """
    return one_below_the_other([picture for _, picture in figures(dataset, spread(dataset, count))])


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
    for key, picture in figures(dataset, spread(dataset, count)):
        paths.append(folder / f"{key.replace('/', '_')}.png")
        save_png(picture, paths[-1])
    return paths


def save_png(picture: Image.Image, path: Path) -> Path:
    """Write a picture as PNG, whole or not at all; return the path."""
    data = io.BytesIO()
    picture.save(data, "PNG")
    write_atomically(path, data.getvalue())
    return path


def spread(dataset: RelabelDataset, count: int) -> list[int]:
    """Return indices of so many samples, spread evenly over the dataset."""
    places: list[int] = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int).tolist()
    return places


def check_whole(dataset: RelabelDataset) -> None:
    """Raise ValueError if the samples of a dataset are not whole images."""
    if dataset.transforms is not None:
        raise ValueError("figures need whole images: load the dataset without transforms")


def figures(
    dataset: RelabelDataset, indices: Sequence[int], heatmaps_of: Sequence[int] | None = None
) -> Iterator[tuple[str, Image.Image]]:
    """Yield keys and figures of samples.

    Raises:
        ValueError: the dataset transforms its samples.
    """
    check_whole(dataset)
    names = legible_names(dataset.classes)
    for index in indices:
        image, label_map = dataset[index]
        yield dataset.keys[index], figure(image, label_map, names, heatmaps_of=heatmaps_of, seed=index)
