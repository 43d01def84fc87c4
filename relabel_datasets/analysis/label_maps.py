"""Measure the labels of whole images and of random crops, and how well heatmaps localize objects.

Shapes: B images, M crops, C classes, K stored logits, H x W locations.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from ..data.store import LabelMaps
from ..labels.batch import LabelMapBatch
from ..labels.crops import random_resized_crops
from ..labels.encodings import Encoded
from ..labels.view import rows_of_boxes
from ..labels.windows import measure_windows
from .objects import Objects, find_objects
from .overlap import Floats, overlaps
from .suspects import label_margins

logger = logging.getLogger(__name__)

Column = npt.NDArray[Any]
SHARE = 0.1  # lowest probability at which a class counts as present in a crop
IOU_LEVELS = (0.3, 0.5, 0.7)
_THRESHOLDS = np.linspace(0, 1, 21)[1:]  # of heatmaps that are scaled to 0..1
_BATCH_CROPS = 4096
_BATCH_IMAGES = 256
_BATCH_MAPS = 1024


@dataclass(frozen=True)
class MapMeasures:
    """Measures of label maps, in columns. All columns of one attribute have the same length.

    Attributes:
        images: One row per image. `key`: sample key. `label`: original class. `best`: class with the highest probability in the
            pooled label of the whole image. `p_label`, `p_best`: probabilities of these classes. `entropy`: entropy of the
            pooled label in nats. `margin`: log odds of the original class in the image and its parts, see `label_margins`.
            `num_shown`: number of classes that the image shows, see `labels.windows.DEFINITION`.
        crops: One row per random crop. `image`: row in `images`. `best`: class with the highest probability. `confidence`:
            probability of `best`. `agrees`: whether `best` is the original class. `entropy`: entropy in nats. `num_classes`:
            number of classes with a probability of at least 0.1. `best_iou`, only if objects are given: highest
            intersection over union with an object of the original class.
        localization: One row per image, empty unless objects are given. `image`: row in `images`. `pointed`: whether the
            maximum of the original class's heatmap lies inside an object of this class. `iou`, `[n, 20]`: for each of 20
            thresholds, highest intersection over union of an object with the box around all locations above the threshold.
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

    Crops are those of `RandomResizedCrop`, 8 % to 100 % of the area. Localization follows two metrics:

    - The pointing game (Zhang et al., "Top-down neural attention by excitation backprop", 2016), without its tolerance of 15
      pixels, because a location is larger than that.
    - MaxBoxAccV2 (Choe et al., "Evaluating weakly supervised object localization methods right", 2020), but with the box
      around all locations above a threshold instead of the largest connected component.

    Args:
        label_maps: Label maps of a split.
        objects: Objects by file name of the image without extension, see `find_objects`. Images without objects are left out.
            Default: None, measure all images and no localization.
        num_crops: Number of crops over all images, rounded up to a multiple of the number of images. Default: 100,000.
        num_samples: Number of images to measure, spread evenly over the split. Default: all.
        seed: Seed of the random crops. Default: 0.
        progress: Whether to show a progress bar on stderr. Default: True.

    Returns:
        The measures in columns.

    Raises:
        ValueError: None of the images has objects, two images with objects have the same name, or the split is empty.
    """
    label_maps.manifest.check_maps("measure_maps")
    if not len(label_maps):
        raise ValueError(f"split {label_maps.split.name!r} has no samples to measure: choose another split")
    by_row = {} if objects is None else _objects_by_row(label_maps, objects)
    rows = spread_rows(range(len(label_maps)) if objects is None else list(by_row), num_samples)
    per_image = math.ceil(num_crops / len(rows))
    size = max(1, min(_BATCH_IMAGES, _BATCH_CROPS // per_image))
    generator = np.random.default_rng(seed)
    images, crops, localization = _Columns(), _Columns(), _Columns()
    with tqdm(total=len(rows), desc="pool", unit="img", disable=not progress) as bar:
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            encoded, keys, labels, sizes = _stack(label_maps, batch)
            images.add(key=np.array(keys), **_measure_images(encoded, labels))
            boxes = random_resized_crops(np.repeat(sizes, per_image, 0), generator)
            owners = np.repeat(np.arange(len(batch)), per_image)
            crop_columns = dict(image=start + owners, **_measure_crops(encoded, labels, boxes, owners))
            if objects is not None:
                names = [label_maps.manifest.classes[label] for label in labels.tolist()]
                object_boxes = [by_row[row].of_class(name) for row, name in zip(batch, names, strict=True)]
                crop_columns["best_iou"] = overlaps(boxes, [object_boxes[i] for i in owners]).best
                localization.add(
                    image=start + np.arange(len(batch)), **_measure_localization(encoded, labels, object_boxes)
                )
            crops.add(**crop_columns)
            bar.update(len(batch))
    return MapMeasures(images.joined(), crops.joined(), localization.joined())


def measure_images(label_maps: LabelMaps, rows: Sequence[int], *, progress: bool = True) -> dict[str, Column]:
    """Pool the labels of whole images and measure them.

    Args:
        label_maps: Label maps of a split.
        rows: Rows of the images in the split, at least one.
        progress: Whether to show a progress bar on stderr. Default: True.

    Returns:
        The columns of `MapMeasures.images`.
    """
    label_maps.manifest.check_maps("measure_images")
    images = _Columns()
    for start in tqdm(range(0, len(rows), _BATCH_IMAGES), desc="pool", unit="batch", disable=not progress):
        encoded, keys, labels, _ = _stack(label_maps, list(rows[start : start + _BATCH_IMAGES]))
        images.add(key=np.array(keys), **_measure_images(encoded, labels))
    return images.joined()


def spread_rows(rows: Sequence[int], num_samples: int | None) -> list[int]:
    """Return `num_samples` of the rows, evenly spaced; all if it is None or too large."""
    if num_samples is None or num_samples >= len(rows):
        return list(rows)
    return [rows[i] for i in np.linspace(0, len(rows) - 1, num_samples).round().astype(int)]


class _Columns:
    """Columns that are collected batch by batch."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Column]] = {}

    def add(self, **columns: Column) -> None:
        for name, values in columns.items():
            self._parts.setdefault(name, []).append(values)

    def joined(self) -> dict[str, Column]:
        return {name: np.concatenate(parts) for name, parts in self._parts.items()}


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


def _stack(label_maps: LabelMaps, rows: list[int]) -> tuple[Encoded, list[str], Tensor, list[tuple[int, int]]]:
    """Return maps as one batch, with their keys, labels `[B]`, and image sizes (height, width)."""
    maps = label_maps.at_rows(rows)
    encoded = LabelMapBatch.of(maps).encoded
    encoded = encoded.encoding.unpacked(encoded)
    labels = torch.tensor(label_maps.index.labels[rows].astype(np.int64))
    return encoded, [label_maps.index.key(row) for row in rows], labels, [label_map.canvas_size for label_map in maps]


def _measure_images(encoded: Encoded, labels: Tensor) -> dict[str, Column]:
    windows = measure_windows(encoded, labels)
    p_best, best = windows.whole.max(1)
    return {
        "label": labels.numpy(),
        "best": best.numpy(),
        "p_label": windows.p_label[0][:, 0].numpy(),
        "p_best": p_best.numpy(),
        "entropy": _entropy(windows.whole),
        "margin": label_margins(windows.p_label).numpy(),
        "num_shown": windows.shown.sum(1).numpy(),
    }


def _measure_crops(encoded: Encoded, labels: Tensor, boxes: Floats, owners: npt.NDArray[np.int_]) -> dict[str, Column]:
    """Return measures of crops with boxes `[M, 4]`; `owners` `[M]` are the indices of their images in the batch."""
    columns = _Columns()
    for start in range(0, len(boxes), _BATCH_CROPS):
        images = torch.from_numpy(owners[start : start + _BATCH_CROPS])
        soft = encoded.encoding.pool(encoded.select(images), rows_of_boxes(boxes[start : start + _BATCH_CROPS]))
        confidence, best = soft.max(1)
        columns.add(
            best=best.numpy(),
            confidence=confidence.numpy(),
            agrees=(best == labels[images]).numpy(),
            entropy=_entropy(soft),
            num_classes=(soft >= SHARE).sum(1).numpy(),
        )
    return columns.joined()


def _measure_localization(encoded: Encoded, labels: Tensor, object_boxes: list[Floats]) -> dict[str, Column]:
    heatmaps, varies = _heatmaps(encoded, labels)
    height, width = heatmaps.shape[1:]
    y, x = np.divmod(heatmaps.reshape(len(heatmaps), -1).argmax(1), width)
    points = np.stack([(x + 0.5) / width, (y + 0.5) / height], 1)
    pointed = [
        is_known and bool(((boxes[:, :2] <= point) & (point <= boxes[:, 2:])).all(1).any())
        for is_known, point, boxes in zip(varies, points, object_boxes, strict=True)
    ]
    estimates = _boxes_above(heatmaps)
    estimates[~varies] = 0
    count = len(_THRESHOLDS)
    iou = overlaps(estimates.reshape(-1, 4), [boxes for boxes in object_boxes for _ in range(count)]).best
    return {"pointed": np.array(pointed), "iou": np.where(varies[:, None], iou.reshape(-1, count), 0)}


def _heatmaps(encoded: Encoded, labels: Tensor) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Return heatmaps `[B, H, W]` of the original classes, scaled to 0..1, and `[B]`: whether each is not constant."""
    heatmaps = encoded.encoding.class_logits(encoded, labels).double().numpy()
    low = heatmaps.min((1, 2), keepdims=True)
    spread = heatmaps.max((1, 2), keepdims=True) - low
    varies = spread.ravel() > 0
    return (heatmaps - low) / np.where(spread > 0, spread, 1), varies


def _boxes_above(heatmaps: Floats) -> Floats:
    """Return boxes `[B, 20, 4]` in 0..1, each around all locations at or above a threshold."""
    above = heatmaps[:, None] >= _THRESHOLDS[:, None, None] - 1e-9
    sides = []
    for axis, length in ((2, heatmaps.shape[2]), (3, heatmaps.shape[1])):  # columns, then rows
        line = np.asarray(above.any(axis))
        sides += [line.argmax(-1) / length, 1 - line[..., ::-1].argmax(-1) / length]
    return np.stack([sides[0], sides[2], sides[1], sides[3]], -1)


def _entropy(soft: Tensor) -> Column:
    """Return `[B]` entropies in nats."""
    entropy: Column = torch.special.entr(soft).sum(1).numpy()
    return entropy
