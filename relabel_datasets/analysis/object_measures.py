"""Measure labels against the objects of the images, batch by batch."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..data.store import LabelMaps
from .batches import Column, Columns, CropBatch, CropMeasures, MapBatch
from .objects import Objects
from .overlap import overlaps

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ObjectMeasures:
    """Measures of images with objects, in columns. All columns of one attribute have the same length.

    Attributes:
        keys: Sample keys of the images.
        crops: One row per random crop, with the columns of `MapMeasures.crops`. `image`: index in `keys`. `best_iou`: highest
            intersection over union with an object of the original class.
        localization: One row per image, empty for stored crops, which have no heatmaps. `pointed`: whether the maximum of the
            original class's heatmap lies inside an object of this class. `iou`, `[n, 20]`: for each of 20 thresholds, highest
            intersection over union of an object with the box around all locations above the threshold.
    """

    keys: Sequence[str]
    crops: Mapping[str, Column]
    localization: Mapping[str, Column]


class ObjectCollector:
    """Collects the measures of the images that have objects, except those whose boxes were measured before EXIF rotated them.

    Args:
        label_maps: Label maps or stored crops of the split.
        objects: Objects of at least one image, by row of the image in the split.
        num_crops: Number of crops over all images, rounded up to a multiple of the number of images.
        seed: Seed of the random crops.

    Attributes:
        rows: Rows of the images with objects.
    """

    def __init__(self, label_maps: LabelMaps, objects: Mapping[int, Objects], num_crops: int, seed: int) -> None:
        self._label_maps, self._objects = label_maps, objects
        self.rows = list(objects)
        self._crops_per_image = math.ceil(num_crops / len(objects))
        self._generator = np.random.default_rng(seed)
        self._keys: list[str] = []
        self._rotated: list[str] = []
        self._crops, self._localization = Columns(), Columns()

    def add(self, rows: Sequence[int], labels: MapBatch | CropBatch, measured: CropMeasures | None = None) -> None:
        """Measure the images of a batch that have objects.

        Args:
            rows: Rows of the images of the batch in the split.
            labels: Labels of the batch.
            measured: Measures of crops of all images of the batch. They are used if they are as many as wanted. Default: none.
        """
        index, names = self._label_maps.index, self._label_maps.manifest.classes
        chosen = np.array([i for i, row in enumerate(rows) if row in self._objects], int)
        is_rotated = np.array([_is_rotated(self._objects[rows[i]].size, labels.sizes[i]) for i in chosen], bool)
        self._rotated += [index.key(rows[i]) for i in chosen[is_rotated]]
        chosen = chosen[~is_rotated]
        if not len(chosen):
            return
        boxes = [self._objects[row].of_class(names[index.labels[row]]) for row in (rows[i] for i in chosen)]
        if measured is None or len(measured.owners) != self._crops_per_image * len(rows):
            measured = labels.measure_crops(chosen, self._crops_per_image, self._generator)
        else:
            measured = measured.of_images(chosen)
        owners = np.searchsorted(chosen, measured.owners)
        iou = overlaps(measured.boxes_xyxy, [boxes[i] for i in owners]).best
        self._crops.add(image=len(self._keys) + owners, best_iou=iou, **measured.columns)
        if isinstance(labels, MapBatch):
            self._localization.add(**labels.localize(chosen, boxes))
        self._keys += [index.key(rows[i]) for i in chosen]

    def finish(self) -> ObjectMeasures:
        """Return the measures, and warn about images that were left out.

        Raises:
            ValueError: All images were left out.
        """
        if not self._keys:
            raise ValueError(
                f"EXIF rotates every image with boxes, such as {self._rotated[0]!r}, and the boxes were measured before the rotation: "
                "give boxes of the rotated images"
            )
        if self._rotated:
            logger.warning(
                "left out %d of %d images with boxes, such as %r: EXIF rotates the image, and its boxes were measured before the "
                "rotation",
                len(self._rotated), len(self._objects), self._rotated[0],
            )  # fmt: skip
        return ObjectMeasures(self._keys, self._crops.joined(), self._localization.joined())


def _is_rotated(size: tuple[int, int], canvas_size: tuple[int, int]) -> bool:
    """Return whether boxes in an image of a size belong to the image before EXIF rotated it to its canvas size."""
    return size != canvas_size and size == canvas_size[::-1]
