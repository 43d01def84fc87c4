"""Draw pictures of a dataset: contact sheets of notable images, and figures of single images."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..analysis.label_maps import measure_images, spread_rows
from ..analysis.suspects import find_suspects
from ..data.datasets import RelabelDataset
from ..labels.crop_labels import CropLabels
from ..labels.transforms import LabelPooling
from ..words import counted, printable
from .names import legible_names
from .overlay import (
    check_untransformed,
    draw_best_crops,
    draw_class_regions,
    draw_figures,
    save_png,
    spread,
    strongest_classes,
)
from .tiles import CLASS_COLORS, OTHER_COLOR, Line, panel, side_by_side, stack_rows, title_row

_PAIRS_PER_ROW = 3
_CLASSES_PER_TILE = 4
_LEGEND = (
    "Below an image: its label, and the first class of its label map, pooled over the whole image. The label map shows the best "
    "class at each location, more opaque for higher probability. Below it: the highest probabilities at any location."
)
_CROP_LEGEND = (
    "Below an image: its label, and the first class of the mean label of its stored crops. Crops: the boxes of those that are most certain "
    "of a class. Below them: these classes, with their probabilities."
)
_SEVERAL, _SUSPECTS = "Images that show the most classes", "Suspect labels"
_SUSPECT_TEXT = "The {labels} ranks another class first. The most suspect labels are first."


def draw_pictures(
    dataset: RelabelDataset,
    folder: Path,
    *,
    keys: Sequence[str] = (),
    classes: Sequence[str] = (),
    count: int = 12,
    num_samples: int | None = None,
    progress: bool = True,
) -> list[Path]:
    """Write pictures of a dataset as PNG files.

    With `keys`, the files are figures of these samples, `<key>.png`. Without `keys`, they are:

    - `several_classes.png`: images that show the most classes
    - `suspects.png`: images whose label may be wrong, if there are any
    - `<key>.png`: figures of samples spread evenly over the dataset

    Figures of stored crops show the first crops with their labels.

    Args:
        dataset: Dataset without transforms, so that its samples are whole images.
        folder: Folder for the files. It is created if it does not exist.
        keys: Keys of the samples to draw. Default: none.
        classes: Names of the classes whose heatmaps are drawn: those of the dataset or legible names, see `legible_names`.
            Default: the three strongest classes of each image.
        count: Maximum number of images per sheet, and of figures. Default: 12.
        num_samples: Number of samples to choose the images of the sheets from, spread evenly. Default: all.
        progress: Whether to show a progress bar on stderr. Default: True.

    Returns:
        The paths of the files.

    Raises:
        ValueError: A key or class is unknown, a number is not positive, or the dataset has transforms.
    """
    for name, value in (("count", count), ("num_samples", num_samples)):
        if value is not None and value < 1:
            raise ValueError(f"{name}= must be at least 1, got {value}")
    check_untransformed(dataset)
    manifest = dataset.label_maps.manifest
    if classes:
        manifest.check_maps("a heatmap")
    heatmaps_of = [_find_class(name, dataset.classes) for name in classes] or None
    indices = _find_indices(dataset, keys) if keys else spread(dataset, count)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [] if keys else _save_sheets(dataset, folder, count, num_samples, progress)
    for key, picture in draw_figures(dataset, indices, heatmaps_of):
        paths.append(save_png(picture, folder / f"{key.replace('/', '_')}.png"))
    return paths


def _save_sheets(
    dataset: RelabelDataset, folder: Path, count: int, num_samples: int | None, progress: bool
) -> list[Path]:
    label_maps = dataset.label_maps
    images = measure_images(label_maps, spread_rows(range(len(label_maps)), num_samples), progress=progress)
    several = np.lexsort((-images["entropy"], -images["num_shown"]))
    paths = []
    has_maps = label_maps.manifest.has_maps
    legend = _LEGEND if has_maps else _CROP_LEGEND
    suspects = f"{_SUSPECT_TEXT.format(labels='map' if has_maps else 'mean label')} {legend}"
    for name, words, order in (
        ("several_classes", (_SEVERAL, legend), several),
        ("suspects", (_SUSPECTS, suspects), find_suspects(images)),
    ):
        if chosen := _present(dataset, images["key"][order].tolist(), count):
            paths.append(save_png(draw_sheet(dataset, chosen, *words), folder / f"{name}.png"))
    return paths


def draw_sheet(dataset: RelabelDataset, indices: Sequence[int], title: str, text: str) -> Image.Image:
    """Draw a contact sheet of samples below a title and a text: each image next to its label map, with its label and classes."""
    names = legible_names(dataset.classes)
    panels = [picture for index in indices for picture in _pair(dataset, index, names)]
    rows = [side_by_side(panels[i : i + 2 * _PAIRS_PER_ROW]) for i in range(0, len(panels), 2 * _PAIRS_PER_ROW)]
    return stack_rows([title_row(title, text, rows[0].width), *rows])


def _pair(dataset: RelabelDataset, index: int, names: Sequence[str]) -> list[Image.Image]:
    image, labels = dataset[index]
    is_crops = isinstance(labels, CropLabels)
    ranked = strongest_classes(labels, _CLASSES_PER_TILE if is_crops else len(CLASS_COLORS))
    colors = dict(zip((class_index for class_index, _ in ranked), CLASS_COLORS, strict=False))
    label = int(dataset.targets[index])
    probability, best = (labels.mean_label() if is_crops else LabelPooling()(labels)).max(0)
    caption = [
        Line(f"label: {names[label]}", colors.get(label, OTHER_COLOR)),
        Line(
            f"{'mean' if is_crops else 'map'}: {probability:.0%} {names[int(best)]}", colors.get(int(best), OTHER_COLOR)
        ),
    ]
    lines = [Line(f"{highest:.0%} {names[i]}", colors[i]) for i, highest in ranked[:_CLASSES_PER_TILE]]
    drawn = draw_best_crops(image, labels, colors) if is_crops else draw_class_regions(image, labels, colors)
    return [
        panel(image, printable(dataset.keys[index]), caption),
        panel(drawn, "Crops" if is_crops else "Label map", lines),
    ]


def _present(dataset: RelabelDataset, keys: Sequence[str], count: int) -> list[int]:
    """Return the dataset indices of the first `count` keys that have images in the dataset."""
    rank = {key: i for i, key in enumerate(keys)}
    present = sorted((rank[key], index) for index, key in enumerate(dataset.keys) if key in rank)
    return [index for _, index in present[:count]]


def _find_indices(dataset: RelabelDataset, keys: Sequence[str]) -> list[int]:
    wanted = set(keys)
    indices = {key: index for index, key in enumerate(dataset.keys) if key in wanted}
    for key in keys:
        if key not in indices:
            raise ValueError(
                f"no sample {key!r} in split {dataset.label_maps.split.name!r}: expected one of its "
                f"{counted(len(dataset), 'key')}, such as {next(iter(dataset.keys), None)!r}"
            )
    return [indices[key] for key in keys]


def _find_class(name: str, classes: Sequence[str]) -> int:
    names = legible_names(classes)
    for candidates in (classes, names):
        if name in candidates:
            return candidates.index(name)
    close = difflib.get_close_matches(name, [*classes, *names], n=3)
    hint = (
        f"did you mean {close}?"
        if close
        else f"expected one of the {counted(len(classes), 'class', 'classes')} of the dataset"
    )
    raise ValueError(f"no class {name!r}: {hint}")
