"""How much random crops and objects have in common, for many crops at a time.

Shapes: M crops, one for each of M lists of boxes; boxes xyxy in units of the whole image, 0..1. Intersection over union is
the same in these units as in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_NEAR, _FAR = slice(0, 2), slice(2, 4)
_CELLS = 20_000_000  # booleans at a time, when areas of unions are measured


class Overlaps(NamedTuple):
    """Intersection over union of M crops with the objects of their images, each `[M]`, 0..1.

    Attributes:
        largest: with the largest box.
        best: with the box that gives most.
        union: with the region that all boxes cover together.
        enclosing: with the box around all of them.
    """

    largest: Floats
    best: Floats
    union: Floats
    enclosing: Floats


def overlaps(crops: Floats, boxes: Sequence[Floats]) -> Overlaps:
    """Return how much crops overlap the objects of their images.

    Args:
        crops: `[M, 4]`.
        boxes: M arrays `[N, 4]` with N at least 1.

    Raises:
        ValueError: an image without boxes, or as many lists as crops.
    """
    counts = np.array([len(each) for each in boxes], int)
    if len(crops) != len(boxes) or (counts == 0).any():
        raise ValueError(
            f"expected boxes for each of {len(crops)} crops, got {len(boxes)}, {(counts == 0).sum()} empty"
        )
    if not len(crops):
        return Overlaps(*(np.zeros(0) for _ in Overlaps._fields))
    flat, starts = np.concatenate(boxes), np.concatenate([[0], counts.cumsum()[:-1]])
    clipped = _clip(flat, np.repeat(crops, counts, 0))
    shared, areas, crop_areas = _area(clipped), _area(flat), _area(crops)
    iou = shared / (np.repeat(crop_areas, counts) + areas - shared)
    # A box is the largest of its image if it comes first in an order by image, then by falling area.
    largest = np.lexsort((-areas, np.repeat(np.arange(len(crops)), counts)))[starts]
    near, far = (ufunc.reduceat(flat[:, side], starts) for ufunc, side in ((np.minimum, _NEAR), (np.maximum, _FAR)))
    around = np.concatenate([near, far], 1)
    shared_with_one = _area(_clip(around, crops))
    covered, shared_with_all = union_areas(flat, counts), union_areas(clipped, counts)
    return Overlaps(
        largest=iou[largest],
        best=np.maximum.reduceat(iou, starts),
        union=shared_with_all / (crop_areas + covered - shared_with_all),
        enclosing=shared_with_one / (crop_areas + _area(around) - shared_with_one),
    )


def union_areas(boxes: Floats, counts: npt.NDArray[np.int_]) -> Floats:
    """Return `[M]`: the area that the boxes of each image cover together, exactly.

    Args:
        boxes: `[sum(counts), 4]`, image after image; empty ones count nothing.
        counts: `[M]` boxes of each image, at least 1.

    The edges of an image's boxes cut it into cells; the area is that of the cells in any of them.
    """
    result = np.zeros(len(counts))
    starts = np.concatenate([[0], counts.cumsum()[:-1]])
    for count in np.unique(counts).tolist():
        images = np.flatnonzero(counts == count)
        step = max(1, _CELLS // (4 * count**3))
        for first in range(0, len(images), step):
            part = images[first : first + step]
            some = boxes[starts[part][:, None] + np.arange(count)]  # [images, count, 4]
            if count == 1:
                result[part] = _area(some[:, 0])
                continue
            xs, ys = (np.sort(some[..., axis::2].reshape(len(part), -1), 1) for axis in (0, 1))
            x1, y1, x2, y2 = np.moveaxis(some, -1, 0)[..., None]
            across = (x1 <= xs[:, None, :-1]) & (xs[:, None, 1:] <= x2)  # [images, count, columns]
            down = (y1 <= ys[:, None, :-1]) & (ys[:, None, 1:] <= y2)
            cells = (down[..., :, None] & across[..., None, :]).any(1)
            result[part] = np.einsum("iy,ix,iyx->i", np.diff(ys), np.diff(xs), cells)
    return result


def share_above(values: Floats, threshold: float = 0.5) -> float:
    """Return the share of values above a threshold; NaN of none."""
    return float((values > threshold).mean()) if len(values) else float("nan")


def _clip(boxes: Floats, windows: Floats) -> Floats:
    """Return the part of each box in its window, of no width or height where there is none."""
    low, high = np.tile(windows[:, _NEAR], 2), np.tile(windows[:, _FAR], 2)
    return np.clip(boxes, low, high)


def _area(boxes: Floats) -> Floats:
    area: Floats = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return area
