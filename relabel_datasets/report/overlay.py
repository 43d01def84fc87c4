"""Draw label maps: a heatmap over its image, and figures of images with heatmaps and crops."""

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
from ..labels.crop_labels import CropLabels
from ..labels.label_map import LabelMap
from ..labels.transforms import LabelPooling
from ..storage.local import write_atomically
from ..words import printable
from .names import legible_names
from .tiles import (
    CLASS_COLORS,
    GAP,
    OTHER_COLOR,
    TILE,
    Color,
    Line,
    draw_box,
    draw_tag,
    fit_to_tile,
    legend,
    panel,
    row_width,
    side_by_side,
    stack_rows,
    tag_size,
    title_row,
    to_colors,
)

_STRENGTH = 0.65  # opacity of a heatmap
_MIN_PROBABILITY = 0.01  # of classes that are listed below a crop
_LEGEND_COLUMNS = 2  # panels whose place a legend needs


def draw_heatmap(image: Image.Image, label_map: LabelMap, class_index: int, strength: float = _STRENGTH) -> Image.Image:
    """Draw the heatmap of a class over an image: its probability at each location, from dark to bright.

    Args:
        image: Whole image of the label map, RGB.
        label_map: Label map of the image. Its view is ignored.
        class_index: Index of the class.
        strength: Opacity of the heatmap, in 0..1. Default: 0.65.

    Returns:
        The blended picture, of the same size.

    Raises:
        TypeError: The labels are stored crops, which have no heatmaps.
    """
    _check_heatmaps(label_map)
    probability = label_map.dense().softmax(0)[class_index].numpy()
    colored = Image.fromarray(to_colors(probability)).resize(image.size, Image.Resampling.BILINEAR)
    return Image.blend(image, colored, strength)


def _check_heatmaps(labels: LabelMap | CropLabels) -> None:
    if isinstance(labels, CropLabels):
        raise TypeError(
            "a heatmap needs a LabelMap, got CropLabels: stored crops have no heatmaps, draw_figure draws the crops"
        )


def draw_class_regions(
    image: Image.Image, label_map: LabelMap, colors: Mapping[int, Color], strength: float = _STRENGTH
) -> Image.Image:
    """Draw the best class at each location over a gray version of the image. Opacity is proportional to the probability.

    Args:
        image: Whole image of the label map, RGB.
        label_map: Label map of the image. Its view is ignored.
        colors: Colors by class index. Other classes are gray.
        strength: Opacity at probability 1, in 0..1. Default: 0.65.

    Returns:
        The blended picture, of the same size.
    """
    dense = label_map.dense()
    # Interpolate only these of thousands of classes; between two locations, another class is hardly ever best.
    kept = torch.tensor(_best_anywhere(dense))
    best, probability = kept[_resized(dense[kept], image).argmax(0)], _resized(dense.softmax(0)[kept], image)
    palette = torch.tensor(OTHER_COLOR, dtype=torch.float32).repeat(label_map.num_classes, 1)
    for index, color in colors.items():
        palette[index] = torch.tensor(color, dtype=torch.float32)
    share = (strength * probability.amax(0))[..., None].numpy()
    gray = np.asarray(image.convert("L"), np.float32)[..., None]  # image colors could be mistaken for class colors
    pixels = gray * (1 - share) + palette[best].numpy() * share
    return Image.fromarray(pixels.round().astype(np.uint8))


def _best_anywhere(dense: torch.Tensor) -> list[int]:
    """Return the classes that are best at any location."""
    indices: list[int] = np.unique(dense.argmax(0).numpy()).tolist()
    return indices


def _resized(maps: torch.Tensor, image: Image.Image) -> torch.Tensor:
    """Return maps `[N, H, W]`, resized to the size of an image."""
    size = image.height, image.width
    resized: torch.Tensor = torch.nn.functional.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
    return resized


def strongest_classes(labels: LabelMap | CropLabels, count: int) -> list[tuple[int, float]]:
    """Return the `count` classes with the highest probability at any location or in any stored crop, and this probability, best first."""
    is_crops = isinstance(labels, CropLabels)
    highest = labels.soft_labels().amax(0) if is_crops else labels.dense().softmax(0).amax((1, 2))
    values, indices = highest.topk(min(count, len(highest)))
    return list(zip(indices.tolist(), values.tolist(), strict=True))


def draw_figure(
    image: Image.Image,
    label_map: LabelMap | CropLabels,
    classes: Sequence[str],
    *,
    heatmaps_of: Sequence[int] | None = None,
    num_heatmaps: int = 3,
    num_crops: int = 3,
    seed: int = 0,
) -> Image.Image:
    """Draw a figure of an image: its random crops, label map, heatmaps, and the pooled labels of the crops.

    The box of a crop has the color of the most probable class of the crop. Of stored crops, the first ones are drawn as the annotator
    saw them, and no label map and heatmaps.

    Args:
        image: Whole image, RGB.
        label_map: Label map or stored crops of the whole image.
        classes: Names of the classes.
        heatmaps_of: Indices of the classes whose heatmaps are drawn. Default: the `num_heatmaps` strongest classes.
        num_heatmaps: Number of heatmaps if `heatmaps_of` is None. Default: 3.
        num_crops: Number of random crops, 8 % to 60 % of the area, or maximum number of stored crops. Default: 3.
        seed: Seed of the random crops. Default: 0.

    Returns:
        The figure.

    Raises:
        TypeError: `heatmaps_of` is given for stored crops.

    Reference: The layout is that of figure 1 of Yun et al., "Re-labeling ImageNet", 2021.
    """
    if isinstance(label_map, CropLabels):
        if heatmaps_of is not None:
            _check_heatmaps(label_map)
        return _draw_crops(image, label_map, classes, num_crops)
    crops = _random_crops(image, num_crops, seed)
    pool = LabelPooling()
    soft_labels = [pool(F.crop(label_map, *crop)) for crop in crops]
    ranked = [index for index, _ in strongest_classes(label_map, len(CLASS_COLORS))]
    colors = dict(zip(ranked, CLASS_COLORS, strict=False))
    boxes = [colors.get(int(soft_label.argmax()), OTHER_COLOR) for soft_label in soft_labels]
    truth = [] if label_map.label is None else [_line(f"label: {classes[label_map.label]}", label_map.label, colors)]
    panels = [panel(_framed(image, crops, boxes), "Image and crops" if crops else "Image", truth)]
    panels.append(
        panel(draw_class_regions(image, label_map, colors), "Label map", [Line("best class at each location")])
    )
    panels += [
        panel(draw_heatmap(image, label_map, index), "Heatmap", [_line(classes[index], index, colors)])
        for index in (ranked[:num_heatmaps] if heatmaps_of is None else heatmaps_of)
    ]
    crop_panels = [
        panel(F.crop(image, *crop), f"Crop {number}", _best_lines(soft_label, classes, colors), color=color)
        for number, (crop, soft_label, color) in enumerate(zip(crops, soft_labels, boxes, strict=True), 1)
    ]
    return _arranged(panels, crop_panels, _class_names(label_map, ranked, classes, colors))


def _class_names(
    label_map: LabelMap, ranked: Sequence[int], classes: Sequence[str], colors: Mapping[int, Color]
) -> list[Line]:
    """Return the names and colors of the classes that are best at any location."""
    best = set(_best_anywhere(label_map.dense()))
    names = [_line(classes[index], index, colors) for index in ranked if index in best]
    return names + ([Line("other classes", OTHER_COLOR)] if best - set(ranked) else [])


def _arranged(panels: Sequence[Image.Image], crops: Sequence[Image.Image], names: Sequence[Line]) -> Image.Image:
    """Return panels above crops. The legend is right of the crops if it fits there, else below them."""
    columns = max(len(panels), len(crops))
    free = row_width(columns - len(crops)) - 2 * GAP
    if free >= _LEGEND_COLUMNS * TILE:
        return stack_rows([side_by_side(panels), side_by_side([*crops, legend(names, free)])])
    rows = [side_by_side(row) for row in (panels, crops) if row]
    return stack_rows(
        [*rows, side_by_side([legend(names, max(row_width(columns), row_width(_LEGEND_COLUMNS)) - 2 * GAP)])]
    )


def _random_crops(image: Image.Image, count: int, seed: int) -> list[tuple[int, int, int, int]]:
    """Return crops as (top, left, height, width) in pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sized = torch.empty(1, 1, 1).expand(1, image.height, image.width)
        crops = [v2.RandomResizedCrop.get_params(sized, [0.08, 0.6], [3 / 4, 4 / 3]) for _ in range(count)]
    return [(int(top), int(left), int(height), int(width)) for top, left, height, width in crops]


def _framed(image: Image.Image, crops: Sequence[tuple[int, int, int, int]], colors: Sequence[Color]) -> Image.Image:
    """Return the image, fitted to a panel, with numbered boxes of crops in their colors."""
    framed, scale = fit_to_tile(image), TILE / max(image.size)
    draw = ImageDraw.Draw(framed)
    boxes = []
    for (top, left, height, width), color in zip(crops, colors, strict=True):
        x1, y1 = round(scale * left), round(scale * top)
        boxes.append(
            (x1, y1, max(x1 + 2, round(scale * (left + width)) - 1), max(y1 + 2, round(scale * (top + height)) - 1))
        )
        draw_box(draw, boxes[-1], color)
    taken: list[tuple[int, int]] = []
    for number, (box, color) in enumerate(
        zip(boxes, colors, strict=True), 1
    ):  # after all boxes, which could hide numbers
        taken.append(_free_corner(box, str(number), taken))
        draw_tag(draw, taken[-1], str(number), color)
    return framed


def _free_corner(box: tuple[int, int, int, int], tag: str, taken: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the place of a tag in the first corner of a box where it covers no other tag."""
    (left, top, right, bottom), (width, height) = box, tag_size(tag)
    corners = [(x, y) for y in (top, bottom - height) for x in (left, right - width)]
    is_free = (all(abs(x - a) > width or abs(y - b) > height for a, b in taken) for x, y in corners)
    return next((corner for corner, free in zip(corners, is_free, strict=True) if free), corners[0])


def _line(text: str, index: int, colors: Mapping[int, Color]) -> Line:
    return Line(text, colors.get(index, OTHER_COLOR))


def _best_lines(
    soft_label: torch.Tensor, classes: Sequence[str], colors: Mapping[int, Color], count: int = 3
) -> list[Line]:
    values, indices = soft_label.topk(min(count, len(classes)))
    return [
        _line(f"{value:.0%} {classes[index]}", index, colors)
        for value, index in zip(values.tolist(), indices.tolist(), strict=True)
        if value >= _MIN_PROBABILITY
    ]


def contact_sheet(dataset: RelabelDataset, count: int = 4) -> Image.Image:
    """Draw figures of samples spread evenly over a dataset, one below the other.

    Args:
        dataset: Dataset without transforms, so that its samples are whole images.
        count: Maximum number of samples. Default: 4.

    Returns:
        The contact sheet.

    Raises:
        ValueError: The dataset has transforms.
    """
    figures = draw_figures(dataset, spread(dataset, count))
    return stack_rows([row for key, figure in figures for row in (title_row(printable(key), "", figure.width), figure)])


def save_overlays(dataset: RelabelDataset, folder: Path, count: int = 10) -> list[Path]:
    """Write figures of samples spread evenly over a dataset as `<key>.png`, with `_` for `/` and after a name that is used already.

    Args:
        dataset: Dataset without transforms, so that its samples are whole images.
        folder: Folder for the files. It is created if it does not exist.
        count: Maximum number of figures. Default: 10.

    Returns:
        The paths of the files.

    Raises:
        ValueError: The dataset has transforms.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    used: set[str] = set()  # in lower case: macOS and Windows usually have one file for `A.png` and `a.png`
    for key, picture in draw_figures(dataset, spread(dataset, count)):
        name = key.replace("/", "_")
        while name.lower() in used:
            name += "_"
        used.add(name.lower())
        paths.append(save_png(picture, folder / f"{name}.png"))
    return paths


def save_png(picture: Image.Image, path: Path) -> Path:
    """Write a picture as PNG, atomically, and return its path."""
    data = io.BytesIO()
    picture.save(data, "PNG")
    write_atomically(path, data.getvalue())
    return path


def spread(dataset: RelabelDataset, count: int) -> list[int]:
    """Return the indices of at most `count` samples, spread evenly over the dataset."""
    indices: list[int] = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int).tolist()
    return indices


def _draw_crops(image: Image.Image, labels: CropLabels, classes: Sequence[str], num_crops: int) -> Image.Image:
    """Draw the first stored crops of an image as the annotator saw them, with their labels."""
    crops = range(min(num_crops, labels.num_crops))
    soft = labels.soft_labels(crops)
    ranked = soft.amax(0).topk(min(len(CLASS_COLORS), len(classes))).indices.tolist()
    colors = dict(zip(ranked, CLASS_COLORS, strict=False))
    boxes = [labels.pixel_box(crop) for crop in crops]
    frames = [(top, left, bottom - top, right - left) for left, top, right, bottom in boxes]
    best = [colors.get(int(label.argmax()), OTHER_COLOR) for label in soft]
    truth = [] if labels.label is None else [_line(f"label: {classes[labels.label]}", labels.label, colors)]
    panels = [panel(_framed(image, frames, best), "Image and crops", truth)]
    for crop, box in zip(crops, boxes, strict=True):
        part = image.crop(box)
        shown = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if labels.flips[crop] else part
        panels.append(panel(shown, f"Crop {crop + 1}", _best_lines(soft[crop], classes, colors), color=best[crop]))
    return side_by_side(panels)


def draw_best_crops(image: Image.Image, labels: CropLabels, colors: Mapping[int, Color]) -> Image.Image:
    """Draw the box of the stored crop that is most certain of a class, for each class with a color.

    Args:
        image: Whole image, RGB.
        labels: Its stored crops.
        colors: Colors by class index.

    Returns:
        The image, fitted to a panel, with numbered boxes in the colors and order of the classes.
    """
    boxes = map(labels.pixel_box, labels.soft_labels()[:, list(colors)].argmax(0).tolist())
    return _framed(
        image, [(top, left, bottom - top, right - left) for left, top, right, bottom in boxes], [*colors.values()]
    )


def check_untransformed(dataset: RelabelDataset) -> None:
    """Raise ValueError if a dataset has transforms: figures need whole images."""
    if dataset.transforms is not None:
        raise ValueError(
            "the dataset has transforms, but figures need whole images: load the dataset without transforms"
        )


def draw_figures(
    dataset: RelabelDataset, indices: Sequence[int], heatmaps_of: Sequence[int] | None = None
) -> Iterator[tuple[str, Image.Image]]:
    """Draw figures of samples.

    Args:
        dataset: Dataset without transforms, so that its samples are whole images.
        indices: Indices of the samples.
        heatmaps_of: Indices of the classes whose heatmaps are drawn. Default: the strongest classes of each sample.

    Yields:
        The key and the figure of each sample.

    Raises:
        ValueError: The dataset has transforms.
    """
    check_untransformed(dataset)
    names = legible_names(dataset.classes)
    for index in indices:
        image, labels = dataset[index]
        yield dataset.keys[index], draw_figure(image, labels, names, heatmaps_of=heatmaps_of, seed=index)
