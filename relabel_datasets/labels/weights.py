"""Weights of the locations of a label map in the mean over a box or a view: RoIAlign's sampling, in closed form for boxes.

RoIAlign's mean over a box is a weighted mean over locations. The weights are products of row and column weights. Shapes are
as in `pooling`. Boxes and views are in units of the whole image. Everything else is in locations; position 0 is the center of
the first location.

Reference: He et al., "Mask R-CNN", 2017, section 3 (RoIAlign); the sampling is that of torchvision.ops.roi_align with
aligned=True and its default sampling ratio.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .precision import full_precision

_SLACK = 1e-4  # locations; smaller excesses over the image or over a whole number are rounding errors


class BoxWeights(NamedTuple):
    """Weights of locations in output cells. They sum to 1 in each cell, or to 0 in cells outside the visible part."""

    rows: Tensor  # [B, h, H]
    columns: Tensor  # [B, w, W]
    any_outside: bool  # whether any cell is outside

    def to(self, device: torch.device) -> BoxWeights:
        rows, columns = (part.to(device, non_blocking=True) for part in self[:2])
        return BoxWeights(rows, columns, self.any_outside)

    def product(self) -> Tensor:
        """Return the weights `[B, h * w, H * W]` of each location in each cell."""
        return (self.rows[:, :, None, :, None] * self.columns[:, None, :, None, :]).flatten(3).flatten(1, 2)


def box_weights(
    boxes: npt.NDArray[Any],
    grid: tuple[int, int],
    size: tuple[int, int],
    visible_xyxy: npt.NDArray[Any] | None = None,
) -> BoxWeights:
    """Compute the weights of locations in each cell of boxes, counting only their visible part.

    Uses NumPy, whose calls cost less than torch's at this size, for both axes at once, x first: `[2, B, n]` for n cells.

    Args:
        boxes: Boxes `[B, 4]` xyxy.
        grid: Number of output cells (h, w).
        size: Number of locations (H, W).
        visible_xyxy: Visible part of the image for each box, `[B, 4]`. Default: the whole image.

    Returns:
        The weights of rows and columns.
    """
    lengths, location = _axes(size, boxes.dtype)
    start, end = _ends(boxes, lengths)
    low, high = (-0.5, lengths - 0.5) if visible_xyxy is None else _ends(visible_xyxy, lengths)
    extent = end - start
    if grid != (1, 1):
        extent /= np.array(grid[::-1], boxes.dtype)[:, None, None]
        start = start + extent * np.arange(max(grid), dtype=boxes.dtype)
        end = start + extent
    near, far, extent = np.minimum(start, end), np.maximum(start, end), np.abs(extent)
    leaves = (near < low - _SLACK) | (far > high + _SLACK)
    outside = None
    if leaves.any():
        near, far = np.where(leaves, np.maximum(near, low), near), np.where(leaves, np.minimum(far, high), far)
        extent = np.where(leaves, np.maximum(far - near, 0), extent)
        outside = leaves & (far <= near)

    # RoIAlign samples equally spaced points, about one per location, and splits each between its two neighbors by bilinear
    # weights. The share min(max(point - location, 0), 1) of a point lies beyond a location. The sum of these shares over all
    # points has a closed form, and its differences between neighboring locations are the weights. Locations are the first
    # dimension, `[L, 2, B, n]`, so that each step runs over contiguous memory.
    num_points = np.maximum(np.ceil(extent), 1)
    step = np.maximum(extent / num_points, boxes.dtype.type(1e-9))
    above = far - location  # distance to the end
    count = above / step
    np.rint(count, out=count)  # number of points above each location; the last one is half a step before the end
    np.minimum(np.maximum(count, 0, out=count), num_points, out=count)
    above -= count * (step / 2)
    above *= count
    beyond = above[:-1] - above[1:]
    beyond /= num_points
    weights = np.empty_like(beyond)
    np.subtract(1, beyond[0], out=weights[0])
    np.subtract(beyond[:-1], beyond[1:], out=weights[1:])
    if outside is not None:
        weights[:, outside] = 0
    columns, rows = torch.from_numpy(np.ascontiguousarray(np.moveaxis(weights, 0, -1)))
    return BoxWeights(rows[:, : grid[0], : size[0]], columns[:, : grid[1], : size[1]], outside is not None)


@lru_cache(maxsize=16)
def _axes(size: tuple[int, int], dtype: np.dtype[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the lengths `[2, 1, 1]` of both axes, x first, and their locations `[L + 1, 2, 1, 1]`."""
    lengths = np.array(size[::-1], dtype)[:, None, None]
    return lengths, np.minimum(np.arange(max(size) + 1, dtype=dtype)[:, None, None, None], lengths - 1)


def _ends(boxes_xyxy: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return start and end of boxes `[B, 4]` in locations, `[2, 2, B, 1]`: first start and end, then x and y."""
    ends: npt.NDArray[Any] = np.ascontiguousarray(boxes_xyxy.T).reshape(2, 2, -1, 1) * lengths
    ends -= boxes_xyxy.dtype.type(0.5)
    return ends


def _hat(position: Tensor, length: int) -> Tensor:
    """Return the bilinear weights `[..., L]` of L locations at each position `[...]`."""
    location = torch.arange(length, device=position.device, dtype=position.dtype)
    return (1 - (position.clamp(0, length - 1)[..., None] - location).abs()).clamp_min(0)


def view_weights(affine: Tensor, grid: tuple[int, int], size: tuple[int, int], visible_xyxy: Tensor) -> Tensor:
    """Return the weights `[B, h * w, H * W]` of each location in each output cell of affine views `[B, 2, 3]`."""
    height, width = size
    x1, y1, x2, y2 = visible_xyxy[:, :, None, None, None, None].unbind(1)
    affine = affine * affine.new_tensor([width, height])[:, None]  # maps to locations
    u, counted_u = _points(affine[:, :, 0].norm(dim=1), grid[1])
    v, counted_v = _points(affine[:, :, 1].norm(dim=1), grid[0])
    u, v = u[:, None, :, None, :], v[:, :, None, :, None]  # to [B, h, w, points along v, points along u]
    (xx, xy, x0), (yx, yy, y0) = affine[..., None, None, None, None].permute(1, 2, 0, 3, 4, 5, 6)
    x, y = xx * u + xy * v + x0, yx * u + yy * v + y0
    inside = (x >= x1 * width) & (x <= x2 * width) & (y >= y1 * height) & (y <= y2 * height)
    x, y = x - 0.5, y - 0.5
    counted = inside & counted_u[:, None, None, None, :] & counted_v[:, None, None, :, None]
    x, y, counted = (t.flatten(3) for t in (x, y, counted.to(x.dtype)))
    share = counted / counted.sum(-1, keepdim=True).clamp_min(1)
    with full_precision(affine.device):
        weights = torch.einsum("bijpy,bijpx->bijyx", _hat(y, height) * share[..., None], _hat(x, width))
    return weights.flatten(3).flatten(1, 2)


def _points(extent: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    """Return RoIAlign's sampling points `[B, n, S]`, 0 to 1, along sides of `[B]` locations, and which count, `[B, S]`."""
    num_points = (extent / num_cells - _SLACK).ceil().clamp_min(1)[:, None]  # the length of a rotated side is rounded
    point = torch.arange(int(num_points.max()), device=extent.device, dtype=extent.dtype)
    cell = torch.arange(num_cells, device=extent.device, dtype=extent.dtype)[:, None]
    return (cell + ((point + 0.5) / num_points)[:, None]) / num_cells, point < num_points


def line_weights(start: float, end: float, low: float, high: float, length: int) -> npt.NDArray[np.float32] | None:
    """Compute the weights `[L]` of `box_weights` for one cell along one axis.

    The ends are rounded as in `box_weights`, because the number of points jumps at whole extents.

    Args:
        start: Start of the cell, 0 to 1.
        end: End of the cell, 0 to 1. A smaller value than `start` mirrors the cell.
        low: Start of the visible part, 0 to 1.
        high: End of the visible part, 0 to 1.
        length: Number L of locations.

    Returns:
        The weights, or None if the cell is outside the visible part.
    """
    scale, half = np.float32(length), np.float32(0.5)
    first = np.float32(start) * scale - half
    extent = float(np.float32(end) * scale - half - first)
    position, least, most = float(first), float(np.float32(low) * scale - half), float(np.float32(high) * scale - half)
    near, far = min(position, position + extent), max(position, position + extent)
    if near < least - _SLACK or far > most + _SLACK:
        position, far = max(near, least), min(far, most)
        extent = far - position
        if extent <= 0:
            return None
    num_points = max(1, math.ceil(abs(extent)))
    step, last_location = extent / num_points, length - 1
    position += step / 2
    weights = [0.0] * length
    for _ in range(num_points):
        if position <= 0:
            weights[0] += 1
        elif position >= last_location:
            weights[-1] += 1
        else:
            location = int(position)
            fraction = position - location
            weights[location] += 1 - fraction
            weights[location + 1] += fraction
        position += step
    return np.array(weights, np.float32) / np.float32(num_points)
