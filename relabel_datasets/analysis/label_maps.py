"""Measure the labels of whole images and of random crops, and how well heatmaps localize objects."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..data.store import LabelMaps
from ..labels.crop_labels import CropLabels
from ..labels.label_map import LabelMap
from .batches import BATCH_CROPS, Column, Columns, CropBatch, MapBatch
from .object_measures import ObjectCollector, ObjectMeasures
from .objects import Objects, find_objects

IOU_LEVELS = (0.3, 0.5, 0.7)
_BATCH_IMAGES = 256


@dataclass(frozen=True)
class MapMeasures:
    """Measures of label maps or of stored crops, in columns. All columns of one attribute have the same length.

    Attributes:
        images: One row per image. `key`: sample key. `label`: original class. `best`: class with the highest probability in the
            label of the whole image, which is pooled from the map, or the mean label of the stored crops. `p_label`, `p_best`:
            probabilities of these classes. `entropy`: entropy of the label of the whole image in nats. `margin`: log odds of the
            original class in the image and its parts, see `label_margins`. `num_shown`: number of classes that the image shows,
            see `labels.windows.DEFINITION` and `CROPS_DEFINITION`.
        crops: One row per random crop. `image`: row in `images`. `best`: class with the highest probability. `confidence`:
            probability of `best`. `agrees`: whether `best` is the original class. `entropy`: entropy in nats. `num_classes`:
            number of classes with a probability of at least 0.1.
        objects: Measures of the images with objects. None if no objects are given.
    """

    images: Mapping[str, Column]
    crops: Mapping[str, Column]
    objects: ObjectMeasures | None


def measure_maps(
    label_maps: LabelMaps,
    *,
    objects: Mapping[str, Objects] | None = None,
    num_crops: int = 100_000,
    num_samples: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> MapMeasures:
    """Pool the labels of whole images and random crops, and measure them. Each label map is read once.

    Crops are those of `RandomResizedCrop`, 8 % to 100 % of the area, or the stored crops. The localization of label maps follows two
    metrics:

    - The pointing game (Zhang et al., "Top-down neural attention by excitation backprop", 2016), without its tolerance of 15
      pixels, because a location is larger than that.
    - MaxBoxAccV2 (Choe et al., "Evaluating weakly supervised object localization methods right", 2020), but with the box
      around all locations above a threshold instead of the largest connected component.

    Args:
        label_maps: Label maps or stored crops of a split.
        objects: Objects by file name of the image without extension, see `find_objects`. The images that have any are also
            measured against them. Default: None, no objects.
        num_crops: Number of crops over all images, rounded up to a multiple of the number of images, and again over the images with
            objects. Of stored crops, the first ones of each image are measured, at most all. Default: 100,000.
        num_samples: Number of images to measure, spread evenly over the split, and of images with objects, spread evenly over
            these. Default: all.
        seed: Seed of the random crops. Default: 0.
        progress: Whether to show a progress bar on stderr. Default: True.

    Returns:
        The measures in columns.

    Raises:
        ValueError: None of the images has objects, two images with objects have the same name, or the split is empty.
    """
    if not len(label_maps):
        raise ValueError(f"split {label_maps.split.name!r} has no samples to measure: choose another split")
    rows = spread_rows(range(len(label_maps)), num_samples)
    collector = None if objects is None else _collector(label_maps, objects, num_crops, num_samples, seed)
    others = [] if collector is None else sorted(set(collector.rows).difference(rows))
    per_image = math.ceil(num_crops / len(rows))
    generator = np.random.default_rng(seed)
    images, crops = Columns(), Columns()
    with tqdm(total=len(rows) + len(others), desc="pool", unit="img", disable=not progress) as bar:
        start = 0
        for batch, labels in _batches(label_maps, rows, per_image, bar):
            images.add(key=_keys(label_maps, batch), **labels.measure_images())
            measured = labels.measure_crops(np.arange(len(batch)), per_image, generator)
            crops.add(image=start + measured.owners, **measured.columns)
            if collector is not None:
                collector.add(batch, labels, measured)
            start += len(batch)
        for batch, labels in _batches(label_maps, others, per_image, bar):
            assert collector is not None
            collector.add(batch, labels)
    return MapMeasures(images.joined(), crops.joined(), None if collector is None else collector.finish())


def measure_images(label_maps: LabelMaps, rows: Sequence[int], *, progress: bool = True) -> dict[str, Column]:
    """Pool the labels of whole images and measure them.

    Args:
        label_maps: Label maps or stored crops of a split.
        rows: Rows of the images in the split, at least one.
        progress: Whether to show a progress bar on stderr. Default: True.

    Returns:
        The columns of `MapMeasures.images`.
    """
    images = Columns()
    with tqdm(total=len(rows), desc="pool", unit="img", disable=not progress) as bar:
        for batch, labels in _batches(label_maps, rows, 1, bar):
            images.add(key=_keys(label_maps, batch), **labels.measure_images())
    return images.joined()


def spread_rows(rows: Sequence[int], num_samples: int | None) -> list[int]:
    """Return `num_samples` of the rows, evenly spaced; all if it is None or too large."""
    if num_samples is None or num_samples >= len(rows):
        return list(rows)
    return [rows[i] for i in np.linspace(0, len(rows) - 1, num_samples).round().astype(int)]


def _collector(
    label_maps: LabelMaps, objects: Mapping[str, Objects], num_crops: int, num_samples: int | None, seed: int
) -> ObjectCollector:
    keys = list(label_maps)
    by_key = find_objects(keys, objects)
    rows = spread_rows([row for row, key in enumerate(keys) if key in by_key], num_samples)
    return ObjectCollector(label_maps, {row: by_key[keys[row]] for row in rows}, num_crops, seed)


def _batches(
    label_maps: LabelMaps, rows: Sequence[int], crops_per_image: int, bar: tqdm[Any]
) -> Iterator[tuple[list[int], MapBatch | CropBatch]]:
    """Yield rows and their labels in batches of limited memory, and advance the bar after each."""
    if not label_maps.manifest.has_maps:
        crops_per_image = label_maps.manifest.encoding["num_crops"]  # all are decompressed
    size = max(1, min(_BATCH_IMAGES, BATCH_CROPS // crops_per_image))
    for start in range(0, len(rows), size):
        batch = list(rows[start : start + size])
        stored, labels = label_maps.at_rows(batch), torch.tensor(label_maps.index.labels[batch].astype(np.int64))
        crops = [one for one in stored if isinstance(one, CropLabels)]
        maps = [one for one in stored if isinstance(one, LabelMap)]
        yield batch, CropBatch(crops, labels) if crops else MapBatch(maps, labels)
        bar.update(len(batch))


def _keys(label_maps: LabelMaps, rows: Sequence[int]) -> Column:
    return np.array([label_maps.index.key(row) for row in rows])
