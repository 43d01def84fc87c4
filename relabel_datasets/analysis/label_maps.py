"""Measure the labels of whole images and of random crops, and how well heatmaps localize objects."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from ..data.store import LabelMaps
from ..labels.crop_labels import CropLabels
from ..labels.label_map import LabelMap
from .batches import BATCH_CROPS, Column, Columns, CropBatch, MapBatch
from .objects import Objects, find_objects
from .overlap import overlaps

logger = logging.getLogger(__name__)

IOU_LEVELS = (0.3, 0.5, 0.7)
_BATCH_IMAGES = 256
_BATCH_MAPS = 1024


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
            number of classes with a probability of at least 0.1. `best_iou`, only if objects are given: highest
            intersection over union with an object of the original class.
        localization: One row per image, empty for stored crops, which have no heatmaps, and unless objects are given. `image`: row
            in `images`. `pointed`: whether the maximum of the original class's heatmap lies inside an object of this class.
            `iou`, `[n, 20]`: for each of 20 thresholds, highest intersection over union of an object with the box around all
            locations above the threshold.
    """

    images: Mapping[str, Column]
    crops: Mapping[str, Column]
    localization: Mapping[str, Column]


def measure_maps(
    label_maps: LabelMaps,
    *,
    objects: Mapping[str, Objects] | None = None,
    num_crops: int = 100_000,
    num_samples: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> MapMeasures:
    """Pool the labels of whole images and random crops, and measure them.

    Crops are those of `RandomResizedCrop`, 8 % to 100 % of the area, or the stored crops. The localization of label maps follows two
    metrics:

    - The pointing game (Zhang et al., "Top-down neural attention by excitation backprop", 2016), without its tolerance of 15
      pixels, because a location is larger than that.
    - MaxBoxAccV2 (Choe et al., "Evaluating weakly supervised object localization methods right", 2020), but with the box
      around all locations above a threshold instead of the largest connected component.

    Args:
        label_maps: Label maps or stored crops of a split.
        objects: Objects by file name of the image without extension, see `find_objects`. Images without objects are left out.
            Default: None, measure all images and no localization.
        num_crops: Number of crops over all images, rounded up to a multiple of the number of images. Of stored crops, the first
            ones of each image are measured, at most all. Default: 100,000.
        num_samples: Number of images to measure, spread evenly over the split. Default: all.
        seed: Seed of the random crops. Default: 0.
        progress: Whether to show a progress bar on stderr. Default: True.

    Returns:
        The measures in columns.

    Raises:
        ValueError: None of the images has objects, two images with objects have the same name, or the split is empty.
    """
    if not len(label_maps):
        raise ValueError(f"split {label_maps.split.name!r} has no samples to measure: choose another split")
    by_row = {} if objects is None else _objects_by_row(label_maps, objects)
    rows = spread_rows(range(len(label_maps)) if objects is None else list(by_row), num_samples)
    per_image = math.ceil(num_crops / len(rows))
    size = max(1, min(_BATCH_IMAGES, BATCH_CROPS // per_image))
    generator = np.random.default_rng(seed)
    images, crops, localization = Columns(), Columns(), Columns()
    with tqdm(total=len(rows), desc="pool", unit="img", disable=not progress) as bar:
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            labels = _read(label_maps, batch)
            images.add(key=_keys(label_maps, batch), **labels.measure_images())
            measured = labels.measure_crops(per_image, generator)
            crops.add(image=start + measured.owners, **measured.columns)
            if objects is not None:
                names = [label_maps.manifest.classes[label] for label in label_maps.index.labels[batch]]
                object_boxes = [by_row[row].of_class(name) for row, name in zip(batch, names, strict=True)]
                iou = overlaps(measured.boxes_xyxy, [object_boxes[i] for i in measured.owners]).best
                crops.add(best_iou=iou)
                if isinstance(labels, MapBatch):
                    localization.add(image=start + np.arange(len(batch)), **labels.localize(object_boxes))
            bar.update(len(batch))
    return MapMeasures(images.joined(), crops.joined(), localization.joined())


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
    for start in tqdm(range(0, len(rows), _BATCH_IMAGES), desc="pool", unit="batch", disable=not progress):
        batch = list(rows[start : start + _BATCH_IMAGES])
        images.add(key=_keys(label_maps, batch), **_read(label_maps, batch).measure_images())
    return images.joined()


def spread_rows(rows: Sequence[int], num_samples: int | None) -> list[int]:
    """Return `num_samples` of the rows, evenly spaced; all if it is None or too large."""
    if num_samples is None or num_samples >= len(rows):
        return list(rows)
    return [rows[i] for i in np.linspace(0, len(rows) - 1, num_samples).round().astype(int)]


def _objects_by_row(label_maps: LabelMaps, objects: Mapping[str, Objects]) -> dict[int, Objects]:
    """Return the objects of each sample that has any, by row, except boxes that were measured before EXIF rotated the image."""
    keys = list(label_maps)
    by_key = find_objects(keys, objects)
    by_row = {row: by_key[key] for row, key in enumerate(keys) if key in by_key}
    rows = list(by_row)
    rotated = []
    for start in range(0, len(rows), _BATCH_MAPS):
        batch = rows[start : start + _BATCH_MAPS]
        for row, label_map in zip(batch, label_maps.at_rows(batch), strict=True):
            size = by_row[row].size
            if label_map.canvas_size != size and label_map.canvas_size == size[::-1]:
                rotated.append(row)
    if rotated:
        logger.warning(
            "left out %d of %d images with boxes, such as %r: EXIF rotates the image, and its boxes were measured before the "
            "rotation",
            len(rotated), len(rows), keys[rotated[0]],
        )  # fmt: skip
        by_row = {row: image_objects for row, image_objects in by_row.items() if row not in set(rotated)}
    if not by_row:
        raise ValueError(
            f"EXIF rotates all {len(rows)} images with boxes, and their boxes were measured before the rotation: give boxes of the "
            "rotated images"
        )
    return by_row


def _read(label_maps: LabelMaps, rows: Sequence[int]) -> MapBatch | CropBatch:
    """Return the stored labels of some rows as one batch."""
    stored, labels = label_maps.at_rows(rows), torch.tensor(label_maps.index.labels[rows].astype(np.int64))
    crops = [one for one in stored if isinstance(one, CropLabels)]
    return CropBatch(crops, labels) if crops else MapBatch([one for one in stored if isinstance(one, LabelMap)], labels)


def _keys(label_maps: LabelMaps, rows: Sequence[int]) -> Column:
    return np.array([label_maps.index.key(row) for row in rows])
