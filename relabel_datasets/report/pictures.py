"""Pictures of a dataset: contact sheets of the images that are worth a look, and figures of single ones."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..analysis.label_maps import find_suspects, measure_maps
from ..data.datasets import RelabelDataset
from ..labels.transforms import LabelPooling
from .names import legible_names
from .overlay import check_whole, figures, regions, save_png, spread, strongest
from .tiles import CLASS_COLORS, OTHER_COLOR, Line, heading, one_below_the_other, side_by_side, tile

_PAIRS_A_ROW = 3
_CLASSES_A_TILE = 4
_LEGEND = "Right: the best class at each place, the stronger the surer; with its highest probability anywhere."
_SEVERAL = f"Images of the most classes, each of them above 50 % somewhere. {_LEGEND}"
_SUSPECTS = f"Is the label right? The map ranks another class first; the surest are first. {_LEGEND}"


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
    """Write pictures of a dataset as PNG and return their paths.

    With keys, figures of these samples, `<key>.png`. Without, `several_classes.png`, the images whose maps show the most
    classes; `suspects.png`, those whose maps disagree with their labels, if there are any; and figures of samples spread over
    the dataset.

    Args:
        dataset: without transforms, so that its samples are whole images.
        folder: made if need be.
        keys: of samples.
        classes: whose heatmaps the figures show, by name, as the dataset has it or as `legible_names` does. Default: those
            of the strongest three.
        count: images on each sheet, and figures.
        num_samples: look for images for the sheets among this many only, spread evenly. Default: all.
        progress: whether to show a progress bar on stderr.

    Raises:
        ValueError: no such key or class, a number that is not positive, or the dataset transforms its samples.
    """
    if count < 1 or (num_samples is not None and num_samples < 1):
        raise ValueError(f"count and num_samples must be at least 1, got {count} and {num_samples}")
    check_whole(dataset)
    heatmaps_of = [_find_class(name, dataset.classes) for name in classes] or None
    indices = _find(dataset, keys) if keys else spread(dataset, count)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [] if keys else _save_sheets(dataset, folder, count, num_samples, progress)
    for key, picture in figures(dataset, indices, heatmaps_of):
        paths.append(save_png(picture, folder / f"{key.replace('/', '_')}.png"))
    return paths


def _save_sheets(
    dataset: RelabelDataset, folder: Path, count: int, num_samples: int | None, progress: bool
) -> list[Path]:
    images = measure_maps(dataset.label_maps, num_crops=1, num_samples=num_samples, progress=progress).images
    several = np.lexsort((-images["entropy"], -images["num_confident"]))
    paths = []
    for name, title, order in (("several_classes", _SEVERAL, several), ("suspects", _SUSPECTS, find_suspects(images))):
        if chosen := _present(dataset, images["key"][order].tolist(), count):
            paths.append(save_png(sheet(dataset, chosen, title), folder / f"{name}.png"))
    return paths


def sheet(dataset: RelabelDataset, indices: Sequence[int], title: str) -> Image.Image:
    """Return a picture of samples, each as its image beside its label map, with labels, key and strongest classes."""
    names = legible_names(dataset.classes)
    tiles = [each for index in indices for each in _pair(dataset, index, names)]
    rows = [side_by_side(tiles[i : i + 2 * _PAIRS_A_ROW]) for i in range(0, len(tiles), 2 * _PAIRS_A_ROW)]
    return one_below_the_other([heading(title, rows[0].width), *rows])


def _pair(dataset: RelabelDataset, index: int, names: Sequence[str]) -> list[Image.Image]:
    image, label_map = dataset[index]
    ranked = strongest(label_map, len(CLASS_COLORS))
    colors = dict(zip((each for each, _ in ranked), CLASS_COLORS, strict=False))
    label = int(dataset.targets[index])
    pooled, best = LabelPooling()(label_map).max(0)
    about = [
        Line(f"label: {names[label]}", colors.get(label, OTHER_COLOR)),
        Line(f"pooled: {pooled:.0%} {names[int(best)]}", colors.get(int(best), OTHER_COLOR)),
        Line(dataset.keys[index]),
    ]
    lines = [Line(f"{highest:.0%} {names[each]}", colors[each]) for each, highest in ranked[:_CLASSES_A_TILE]]
    return [tile(image, about), tile(regions(image, label_map, colors), lines)]


def _present(dataset: RelabelDataset, keys: Sequence[str], count: int) -> list[int]:
    """Return the indices of the first keys whose images are in the dataset; others have been left out."""
    wanted = {key: place for place, key in enumerate(keys)}
    found = sorted((wanted[key], index) for index, key in enumerate(dataset.keys) if key in wanted)
    return [index for _, index in found[:count]]


def _find(dataset: RelabelDataset, keys: Sequence[str]) -> list[int]:
    wanted = set(keys)
    places = {key: index for index, key in enumerate(dataset.keys) if key in wanted}
    for key in keys:
        if key not in places:
            raise ValueError(
                f"no sample {key!r} among the {len(dataset)} of split {dataset.label_maps.split.name!r}, such as "
                f"{next(iter(dataset.keys), None)!r}"
            )
    return [places[key] for key in keys]


def _find_class(name: str, classes: Sequence[str]) -> int:
    names = legible_names(classes)
    for candidates in (classes, names):
        if name in candidates:
            return candidates.index(name)
    close = difflib.get_close_matches(name, [*classes, *names], n=3)
    raise ValueError(f"no class {name!r} among the {len(classes)}" + (f", did you mean {close}?" if close else ""))
