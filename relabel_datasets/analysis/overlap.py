"""Intersection over union of random crops and objects, for many crops at once.

Shapes: M crops, each with N objects (N differs between crops). Boxes are xyxy in units of the whole image, 0..1; intersection
over union is the same in these units as in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_NEAR, _FAR = slice(0, 2), slice(2, 4)
_MAX_CELLS = 20_000_000  # booleans per step of `union_areas`


class Overlaps(NamedTuple):
    """Intersection over union of M crops with the objects of their images, each `[M]`, 0..1.

    Attributes:
        largest: Overlap with the largest box.
        best: Overlap with the box that overlaps most.
        union: Overlap with the union of all boxes.
        enclosing: Overlap with the smallest box that encloses all boxes.
    """

    largest: Floats
    best: Floats
    union: Floats
    enclosing: Floats


def overlaps(crops: Floats, boxes: Sequence[Floats]) -> Overlaps:
    """Compute the intersection over union of each crop with the objects of its image.

    Args:
        crops: Crops `[M, 4]`, xyxy in units of the whole image.
        boxes: Boxes of each crop's image: M arrays `[N, 4]` with N at least 1.

    Returns:
        The overlaps with different choices of the object region, `[M]` each.

    Raises:
        ValueError: A crop has no boxes, or the numbers of crops and of arrays differ.
    """
    counts = np.array([len(image_boxes) for image_boxes in boxes], int)
    if len(crops) != len(boxes) or (counts == 0).any():
        raise ValueError(
            f"expected at least one box for each of {len(crops)} crops, got {len(boxes)} arrays, {(counts == 0).sum()} empty"
        )
    if not len(crops):
        return Overlaps(*(np.zeros(0) for _ in Overlaps._fields))
    flat, starts = np.concatenate(boxes), np.concatenate([[0], counts.cumsum()[:-1]])
    clipped = _clip(flat, np.repeat(crops, counts, 0))
    shared, areas, crop_areas = _area(clipped), _area(flat), _area(crops)
    iou = shared / (np.repeat(crop_areas, counts) + areas - shared)
    # The largest box of an image is the first in an order by image, then by decreasing area.
    largest = np.lexsort((-areas, np.repeat(np.arange(len(crops)), counts)))[starts]
    near, far = (ufunc.reduceat(flat[:, side], starts) for ufunc, side in ((np.minimum, _NEAR), (np.maximum, _FAR)))
    enclosing = np.concatenate([near, far], 1)
    shared_enclosing = _area(_clip(enclosing, crops))
    covered, shared_union = union_areas(flat, counts), union_areas(clipped, counts)
    return Overlaps(
        largest=iou[largest],
        best=np.maximum.reduceat(iou, starts),
        union=shared_union / (crop_areas + covered - shared_union),
        enclosing=shared_enclosing / (crop_areas + _area(enclosing) - shared_enclosing),
    )


def union_areas(boxes: Floats, counts: npt.NDArray[np.int_]) -> Floats:
    """Compute the exact area of the union of each image's boxes.

    The edges of the boxes divide an image into cells; the area is that of the cells inside any box.

    Args:
        boxes: Boxes of all images, one image after the other, `[sum(counts), 4]`. Empty boxes are allowed.
        counts: Number of boxes of each image `[M]`, at least 1.

    Returns:
        The areas `[M]` in units of the whole image.
    """
    result = np.zeros(len(counts))
    starts = np.concatenate([[0], counts.cumsum()[:-1]])
    for count in np.unique(counts).tolist():
        images = np.flatnonzero(counts == count)
        step = max(1, _MAX_CELLS // (4 * count**3))
        for first in range(0, len(images), step):
            chunk = images[first : first + step]
            chunk_boxes = boxes[starts[chunk][:, None] + np.arange(count)]  # [images, count, 4]
            if count == 1:
                result[chunk] = _area(chunk_boxes[:, 0])
                continue
            xs, ys = (np.sort(chunk_boxes[..., axis::2].reshape(len(chunk), -1), 1) for axis in (0, 1))
            x1, y1, x2, y2 = np.moveaxis(chunk_boxes, -1, 0)[..., None]
            across = (x1 <= xs[:, None, :-1]) & (xs[:, None, 1:] <= x2)  # [images, count, columns]
            down = (y1 <= ys[:, None, :-1]) & (ys[:, None, 1:] <= y2)
            cells = (down[..., :, None] & across[..., None, :]).any(1)
            result[chunk] = np.einsum("iy,ix,iyx->i", np.diff(ys), np.diff(xs), cells)
    return result


def share_above(values: Floats, threshold: float = 0.5) -> float:
    """Return the share of values above a threshold, in 0..1; NaN if there are no values."""
    return float((values > threshold).mean()) if len(values) else float("nan")


def _clip(boxes: Floats, windows: Floats) -> Floats:
    """Clip each box to its window. A box outside its window becomes empty."""
    low, high = np.tile(windows[:, _NEAR], 2), np.tile(windows[:, _FAR], 2)
    return np.clip(boxes, low, high)


def _area(boxes: Floats) -> Floats:
    area: Floats = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return area
