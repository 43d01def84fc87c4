"""Batches of stored labels that can be measured: `MapBatch` for label maps, `CropBatch` for stored crops.

Shapes: B images, M crops, C classes, H x W locations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..labels.batch import LabelMapBatch
from ..labels.crop_labels import CropLabels
from ..labels.crops import random_resized_crops
from ..labels.label_map import LabelMap
from ..labels.view import rows_of_boxes
from ..labels.windows import WindowMeasures, measure_stored_crops, measure_windows
from .overlap import Floats, overlaps
from .suspects import label_margins

Column = npt.NDArray[Any]
SHARE = 0.1  # lowest probability at which a class counts as present in a crop
BATCH_CROPS = 4096
_THRESHOLDS = np.linspace(0, 1, 21)[1:]  # of heatmaps that are scaled to 0..1


class Columns:
    """Columns that are collected batch by batch."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Column]] = {}

    def add(self, **columns: Column) -> None:
        """Add rows."""
        for name, values in columns.items():
            self._parts.setdefault(name, []).append(values)

    def joined(self) -> dict[str, Column]:
        """Return all rows."""
        return {name: np.concatenate(parts) for name, parts in self._parts.items()}


class CropMeasures(NamedTuple):
    """Measures of M crops.

    Attributes:
        columns: Columns of `MapMeasures.crops` except `image`.
        boxes_xyxy: Boxes of the crops `[M, 4]` in units of the whole image.
        owners: Index of the image of each crop in the batch, `[M]`.
    """

    columns: dict[str, Column]
    boxes_xyxy: Floats
    owners: npt.NDArray[np.int_]

    def of_images(self, images: npt.NDArray[np.int_]) -> CropMeasures:
        """Return the measures of the crops of some images, by index in the batch."""
        chosen = np.isin(self.owners, images)
        columns = {name: values[chosen] for name, values in self.columns.items()}
        return CropMeasures(columns, self.boxes_xyxy[chosen], self.owners[chosen])


class MapBatch:
    """Label maps of B images.

    Args:
        maps: The label maps.
        labels: Original class indices `[B]`.

    Attributes:
        sizes: Size (height, width) in pixels of each image.
    """

    def __init__(self, maps: Sequence[LabelMap], labels: Tensor) -> None:
        encoded = LabelMapBatch.of(maps).encoded
        self._encoded, self._labels = encoded.encoding.unpacked(encoded), labels
        self.sizes = [label_map.canvas_size for label_map in maps]

    def measure_images(self) -> dict[str, Column]:
        """Pool the labels of whole images and of windows. Returns columns of `MapMeasures.images`."""
        return _image_columns(measure_windows(self._encoded, self._labels), self._labels)

    def measure_crops(
        self, images: npt.NDArray[np.int_], num_crops: int, generator: np.random.Generator
    ) -> CropMeasures:
        """Pool the labels of `num_crops` random crops of some images, by index in the batch."""
        owners, columns = np.repeat(images, num_crops), Columns()
        boxes = random_resized_crops(np.array(self.sizes)[owners], generator)
        for start in range(0, len(boxes), BATCH_CROPS):
            chosen = torch.from_numpy(owners[start : start + BATCH_CROPS])
            rows = rows_of_boxes(boxes[start : start + BATCH_CROPS])
            soft = self._encoded.encoding.pool(self._encoded.select(chosen), rows)
            columns.add(**_crop_columns(soft, self._labels[chosen]))
        return CropMeasures(columns.joined(), boxes, owners)

    def localize(self, images: npt.NDArray[np.int_], object_boxes: Sequence[Floats]) -> dict[str, Column]:
        """Find objects by the heatmaps of the original classes of some images.

        Args:
            images: Indices of the images in the batch.
            object_boxes: Boxes of the objects of each of these images, arrays `[N, 4]`.

        Returns:
            Columns of `ObjectMeasures.localization`.
        """
        heatmaps, varies = self._heatmaps(torch.from_numpy(images))
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

    def _heatmaps(self, images: Tensor) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Return heatmaps `[n, H, W]` of the original classes of n images, scaled to 0..1, and whether each is not constant."""
        chosen = self._encoded.select(images)
        heatmaps = chosen.encoding.class_logits(chosen, self._labels[images]).double().numpy()
        low = heatmaps.min((1, 2), keepdims=True)
        spread = heatmaps.max((1, 2), keepdims=True) - low
        varies = spread.ravel() > 0
        return (heatmaps - low) / np.where(spread > 0, spread, 1), varies


class CropBatch:
    """Stored crops of B images. Their labels are decompressed once, and kept.

    Args:
        crops: The labels of the crops.
        labels: Original class indices `[B]`.

    Attributes:
        sizes: Size (height, width) in pixels of each image.
    """

    def __init__(self, crops: Sequence[CropLabels], labels: Tensor) -> None:
        self._crops, self._labels = crops, labels
        self._soft = [one.soft_labels() for one in crops]
        self.sizes = [one.canvas_size for one in crops]

    def measure_images(self) -> dict[str, Column]:
        """Measure all stored crops of each image and their mean. Returns columns of `MapMeasures.images`."""
        columns = Columns()
        for soft, label in zip(self._soft, self._labels[:, None], strict=True):
            columns.add(**_image_columns(measure_stored_crops(soft[None], label), label))
        return columns.joined()

    def measure_crops(
        self, images: npt.NDArray[np.int_], num_crops: int, generator: np.random.Generator
    ) -> CropMeasures:
        """Measure the first `num_crops` stored crops of some images, or all if there are fewer. They are random already."""
        columns, boxes, counts = Columns(), [], []
        for i in images.tolist():
            soft = self._soft[i][:num_crops]
            columns.add(**_crop_columns(soft, self._labels[i].expand(len(soft))))
            boxes.append(self._crops[i].boxes_xyxy[:num_crops].numpy())
            counts.append(len(soft))
        return CropMeasures(columns.joined(), np.concatenate(boxes), np.repeat(images, counts))


def _image_columns(windows: WindowMeasures, labels: Tensor) -> dict[str, Column]:
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


def _crop_columns(soft: Tensor, labels: Tensor) -> dict[str, Column]:
    """Return measures of crops with the soft labels `[M, C]`, whose images have the original classes `[M]`."""
    confidence, best = soft.max(1)
    return {
        "best": best.numpy(),
        "confidence": confidence.numpy(),
        "agrees": (best == labels).numpy(),
        "entropy": _entropy(soft),
        "num_classes": (soft >= SHARE).sum(1).numpy(),
    }


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
