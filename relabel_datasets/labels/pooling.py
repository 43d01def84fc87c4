"""LabelPooling in numbers: the mean of sparse logits over a part of the image, then softmax.

Shapes: B images, C classes, K stored logits, H x W locations, h x w output cells. Coordinates: boxes and views are in
units of the whole image; inside this module, positions are in locations, 0 being the centre of the first.

With RoIAlign the mean over a box is a weighted mean over locations, and the weights are the product of those of its
rows and columns. So the stored logits alone are pooled, and no `[B, C, H, W]` tensor is ever made.

Reference: He et al., "Mask R-CNN", 2017, section 3 (RoIAlign); the sampling is that of torchvision.ops.roi_align with
aligned=True and its default sampling ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .label_map import LabelMap, View

_SLACK = 1e-4  # locations; a box that sticks out, or a side that is longer, by less than this was rounded


class _BoxWeights(NamedTuple):
    """The weights of locations in output cells, that sum to 1, or to 0 in cells outside of what is visible."""

    rows: Tensor  # [B, h, H]
    columns: Tensor  # [B, w, W]
    any_outside: bool  # whether there is a cell outside

    def to(self, device: torch.device) -> _BoxWeights:
        rows, columns = (part.to(device, non_blocking=True) for part in self[:2])
        return _BoxWeights(rows, columns, self.any_outside)

    def product(self) -> Tensor:
        """Return the weight of each location in each cell, `[B, h * w, H * W]`."""
        return (self.rows[:, :, None, :, None] * self.columns[:, None, :, None, :]).flatten(3).flatten(1, 2)


def pool_labels(
    logits: Tensor,
    classes: Tensor,
    boxes_xyxy: Tensor,
    *,
    num_classes: int,
    base: Tensor | None = None,
    output_size: int | Sequence[int] = 1,
    temperature: float = 1.0,
) -> Tensor:
    """Return the soft labels of one box in each of B images, on the device of the logits.

    For a box inside the image it equals `softmax(roi_align(dense, box, output_size, aligned=True))`. Of a box that
    leaves the image, each output cell is the mean over its part inside, and the base where none is. A box of no width
    or height is the point, or the line, that it has shrunk to.

    Args:
        logits: `[B, K, H, W]` stored logits.
        classes: `[B, K, H, W]` or `[B, K, 1, 1]` class indices of the logits, different from each other at a location.
        boxes_xyxy: `[B, 4]` boxes (x1, y1, x2, y2) in units of the whole image, 0..1; x1 > x2 or y1 > y2 mirrors the
            grid of output cells.
        num_classes: C.
        base: `[B, C]` logits of the classes that are not stored; None means 0.
        output_size: 1 for one label `[B, C]`; (h, w), or n for (n, n), for one label in each cell of a grid over the
            box.
        temperature: divides the pooled logits before the softmax; above 1 softens.

    Returns:
        `[B, C]`, or `[B, C, h, w]`, that sums to 1 over C: float64 for float64 logits, else float32.

    Raises:
        ValueError: shapes do not fit together, or the temperature is not positive.
    """
    batch, _, height, width = _check(logits, classes, num_classes, base, temperature)
    if boxes_xyxy.shape != (batch, 4):
        raise ValueError(f"boxes_xyxy must have shape {(batch, 4)}, one box an image, got {tuple(boxes_xyxy.shape)}")
    boxes = boxes_xyxy.to(_compute_dtype(logits)).cpu()
    weights = _box_weights(boxes, _grid(output_size), (height, width)).to(logits.device)
    return _pool(logits, classes, base, num_classes, weights, temperature, output_size)


def pool_views(
    logits: Tensor,
    classes: Tensor,
    views: Sequence[View],
    *,
    num_classes: int,
    base: Tensor | None = None,
    output_size: int | Sequence[int] = 1,
    temperature: float = 1.0,
) -> Tensor:
    """Return the soft labels of one view of each of B images, rotated and sheared ones included.

    Upright views are pooled as boxes, the others by sampling points, as far apart as RoIAlign's, which is the same for
    views inside the image. Points outside of what is visible are left out of the mean.

    All arguments but `views`, what is returned and the errors are those of `pool_labels`.
    """
    batch, _, height, width = _check(logits, classes, num_classes, base, temperature)
    if len(views) != batch:
        raise ValueError(f"expected {batch} views, one an image, got {len(views)}")
    upright = [view.is_box for view in views]
    if any(upright) and not all(upright):
        parts = [torch.tensor([i for i in range(batch) if upright[i] is group]) for group in (True, False)]
        pooled = [
            pool_views(
                logits[part], classes[part], [views[i] for i in part], num_classes=num_classes,
                base=None if base is None else base[part], output_size=output_size, temperature=temperature,
            )
            for part in parts
        ]  # fmt: skip
        return torch.cat(pooled)[torch.cat(parts).argsort()]
    # On the CPU, so that nobody waits for another device; NumPy reads many numbers of Python in half of torch's time.
    numbers, dtype = np.array([(*view[:6], *view.visible_xyxy) for view in views], np.float64), _compute_dtype(logits)
    affine, visible = torch.from_numpy(numbers.reshape(batch, 10)).tensor_split([6], 1)
    grid, size, visible = _grid(output_size), (height, width), visible.to(dtype)
    weights: Tensor | _BoxWeights
    if all(upright):
        corner = affine[:, [2, 5]]
        boxes = torch.cat([corner, corner + affine[:, [0, 4]]], 1).to(dtype)
        weights = _box_weights(boxes, grid, size, visible).to(logits.device)
    else:
        affine = affine.to(dtype).reshape(batch, 2, 3)
        weights = _view_weights(affine, grid, size, visible).to(logits.device, non_blocking=True)
    return _pool(logits, classes, base, num_classes, weights, temperature, output_size)


def pool_label_map(
    label_map: LabelMap, view: View, output_size: int | Sequence[int] = 1, temperature: float = 1.0
) -> Tensor:
    """Return the soft label `[C]`, or `[C, h, w]`, of one view of one label map.

    The same numbers as `pool_views`; a label of one cell in a box on the CPU takes a short cut through plain Python,
    since at this size calling torch costs more than computing.
    """
    logits, classes = label_map.logits, label_map.classes
    if output_size == 1 and view.is_box and logits.device.type == "cpu" and logits.dtype == torch.float32:
        return _pool_one(
            logits.numpy(), classes.numpy(), label_map.base_array(), label_map.num_classes, view, temperature
        )
    base = label_map.base
    return pool_views(
        logits[None],
        classes[None],
        [view],
        num_classes=label_map.num_classes,
        base=None if base is None else base[None],
        output_size=output_size,
        temperature=temperature,
    )[0]


def _check(
    logits: Tensor, classes: Tensor, num_classes: int, base: Tensor | None, temperature: float
) -> tuple[int, int, int, int]:
    if logits.ndim != 4 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating point [B, K, H, W], got {logits.dtype} {tuple(logits.shape)}")
    batch, num_logits, height, width = logits.shape
    if classes.shape not in ((batch, num_logits, height, width), (batch, num_logits, 1, 1)):
        raise ValueError(
            f"classes must have shape {(batch, num_logits, height, width)} or {(batch, num_logits, 1, 1)}, "
            f"got {tuple(classes.shape)}"
        )
    if base is not None and base.shape != (batch, num_classes):
        raise ValueError(f"base must have shape {(batch, num_classes)}, got {tuple(base.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return batch, num_logits, height, width


def _grid(output_size: int | Sequence[int]) -> tuple[int, int]:
    rows, columns = (output_size, output_size) if isinstance(output_size, int) else output_size
    if rows < 1 or columns < 1:
        raise ValueError(f"output_size must be at least 1, got {output_size}")
    return rows, columns


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _box_weights(
    boxes_xyxy: Tensor, grid: tuple[int, int], size: tuple[int, int], visible_xyxy: Tensor | None = None
) -> _BoxWeights:
    """Return the weights in cells of boxes on the CPU, of which what is visible, by default the image, counts.

    Computed in NumPy, whose calls cost less than torch's at this size; both axes, x first, at once: `[2, B, n]`, n
    cells.
    """
    boxes = boxes_xyxy.numpy()
    lengths, location = _axes(size, boxes.dtype)
    start, end = _ends(boxes, lengths)
    low, high = (-0.5, lengths - 0.5) if visible_xyxy is None else _ends(visible_xyxy.numpy(), lengths)
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

    # RoIAlign takes equally spaced points, one a location, and gives each to its two neighbours by bilinear weights. Of
    # a point, the part of min(max(point - location, 0), 1) lies beyond a location; the sum of these over all points
    # has a closed form, and its differences from one location to the next are the weights. Locations come first,
    # `[L, 2, B, n]`, so that each step runs over contiguous memory.
    num_points = np.maximum(np.ceil(extent), 1)
    step = np.maximum(extent / num_points, boxes.dtype.type(1e-9))
    above = far - location  # how far the end is
    count = above / step
    np.rint(count, out=count)  # of points above each location: the last lies half a step before the end
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
    return _BoxWeights(rows[:, : grid[0], : size[0]], columns[:, : grid[1], : size[1]], outside is not None)


@lru_cache(maxsize=16)
def _axes(size: tuple[int, int], dtype: np.dtype[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the lengths of both axes, `[2, 1, 1]`, x first, and the locations on them, `[L + 1, 2, 1, 1]`."""
    lengths = np.array(size[::-1], dtype)[:, None, None]
    return lengths, np.minimum(np.arange(max(size) + 1, dtype=dtype)[:, None, None, None], lengths - 1)


def _ends(boxes_xyxy: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return where boxes `[B, 4]` start and end, in locations, `[2, 2, B, 1]`: start or end, then x or y."""
    ends: npt.NDArray[Any] = np.ascontiguousarray(boxes_xyxy.T).reshape(2, 2, -1, 1) * lengths
    ends -= boxes_xyxy.dtype.type(0.5)
    return ends


def _hat(position: Tensor, length: int) -> Tensor:
    """Return `[..., L]`: the weights of L locations in bilinear interpolation at each position of `[...]`."""
    location = torch.arange(length, device=position.device, dtype=position.dtype)
    return (1 - (position.clamp(0, length - 1)[..., None] - location).abs()).clamp_min(0)


def _view_weights(affine: Tensor, grid: tuple[int, int], size: tuple[int, int], visible_xyxy: Tensor) -> Tensor:
    """Return `[B, h * w, H * W]`: the weight of each location in each output cell of affine views `[B, 2, 3]`."""
    height, width = size
    x1, y1, x2, y2 = visible_xyxy[:, :, None, None, None, None].unbind(1)
    affine = affine * affine.new_tensor([width, height])[:, None]  # now to locations
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
    weights = torch.einsum("bijpy,bijpx->bijyx", _hat(y, height) * share[..., None], _hat(x, width))
    return weights.flatten(3).flatten(1, 2)


def _points(extent: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    """Return where RoIAlign samples along a side of `[B]` locations, `[B, n, S]` in 0..1, and which count, `[B, S]`."""
    num_points = (extent / num_cells - _SLACK).ceil().clamp_min(1)[:, None]  # a rotated side of 3 may be rounded up
    point = torch.arange(int(num_points.max()), device=extent.device, dtype=extent.dtype)
    cell = torch.arange(num_cells, device=extent.device, dtype=extent.dtype)[:, None]
    return (cell + ((point + 0.5) / num_points)[:, None]) / num_cells, point < num_points


def _pool(
    logits: Tensor,
    classes: Tensor,
    base: Tensor | None,
    num_classes: int,
    weights: Tensor | _BoxWeights,
    temperature: float,
    output_size: int | Sequence[int],
) -> Tensor:
    """Return the soft labels of n = h * w cells under weights `[B, n, H * W]`, or those of boxes."""
    dtype = _compute_dtype(logits)
    logits, classes = logits.to(dtype), classes.long()
    base = None if base is None else base.to(dtype)
    height, width = _grid(output_size)
    # Without a dimension for the cell where there is one alone: each that a kernel has to go over costs time.
    shape = (len(logits), *([height * width] if height * width > 1 else []), num_classes)
    pooled = logits.new_zeros(shape) if base is None else _each_cell(base, shape).expand(shape).clone()
    put = _add_locations if classes.shape == logits.shape else _set_heatmaps
    put(pooled, logits, classes, base, weights)
    if temperature != 1:
        pooled /= temperature
    # In place where the kernel is known to allow it: memory that is new to the process costs more than the arithmetic.
    in_place = pooled.device.type == "cpu" and not pooled.requires_grad
    soft = torch.softmax(pooled, -1, out=pooled) if in_place else pooled.softmax(-1)
    return soft if output_size == 1 else soft.reshape(len(logits), height, width, num_classes).movedim(-1, 1)


def _each_cell(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Return values of a batch, `[B, ...]`, as they go with pooled logits `[B, C]` or `[B, n, C]`."""
    return values if len(shape) == 2 else values[:, None]


def _set_heatmaps(
    pooled: Tensor, logits: Tensor, classes: Tensor, base: Tensor | None, weights: Tensor | _BoxWeights
) -> None:
    """Set the classes `[B, P, 1, 1]` of `pooled`, `[B, C]` or `[B, n, C]`, to their heatmaps' means, in cells inside."""
    any_outside = isinstance(weights, Tensor) or weights.any_outside
    if not isinstance(weights, Tensor) and pooled.ndim == 2:
        weights = weights.product()
    if isinstance(weights, Tensor):
        means = weights @ logits.flatten(2).mT
        total = weights.sum(-1) if any_outside else None
    else:
        rows, columns, _ = weights
        # Each product is one bmm over all heatmaps: broadcasting over them would make it many small ones.
        means_of_rows = (logits.flatten(1, 2) @ columns.mT).reshape(*logits.shape[:3], columns.shape[1])
        means = torch.einsum("biy,bpyj->bijp", rows, means_of_rows).flatten(1, 2)
        total = (rows.sum(-1)[:, :, None] * columns.sum(-1)[:, None]).flatten(1) if any_outside else None
    if pooled.ndim == 2:
        means = means[:, 0]
    index = _each_cell(classes.flatten(1), pooled.shape).expand_as(means)
    if total is not None:
        is_inside = total.reshape(*pooled.shape[:-1], 1) > 0.5
        means = torch.where(is_inside, means, pooled.gather(-1, index))
    pooled.scatter_(-1, index, means)


def _add_locations(
    pooled: Tensor, logits: Tensor, classes: Tensor, base: Tensor | None, weights: Tensor | _BoxWeights
) -> None:
    """Add to `pooled`, `[B, C]` or `[B, n, C]`, how far each logit rises above the base of its class, `[B, K, H, W]`."""
    if not isinstance(weights, Tensor):
        weights = weights.product()
    if pooled.ndim == 2:
        weights = weights[:, 0]
    index = classes.flatten(1)
    above_base = logits if base is None else logits - base.gather(1, index).reshape(logits.shape)
    # Locations in one dimension, which multiplies in half the time of two.
    change = (_each_cell(above_base.flatten(2), pooled.shape) * weights[..., None, :]).flatten(-2)
    pooled.scatter_add_(-1, _each_cell(index, pooled.shape).expand_as(change), change)


def _pool_one(
    values: npt.NDArray[Any],
    index: npt.NDArray[Any],
    base: npt.NDArray[Any] | None,
    num_classes: int,
    view: View,
    temperature: float,
) -> Tensor:
    """Return `[C]`, as `pool_labels` does for one box and one cell, in NumPy: its calls cost a fraction of torch's.

    Args:
        values: logits `[K, H, W]`.
        index: their classes.
        base: `[C]`; it is written to.
        num_classes: C.
        view: upright.
        temperature: see `pool_labels`.
    """
    height, width = values.shape[1:]
    x1, y1, x2, y2 = view.box_xyxy
    left, top, right, bottom = view.visible_xyxy
    rows, columns = _line_weights(y1, y2, top, bottom, height), _line_weights(x1, x2, left, right, width)
    pooled = np.zeros(num_classes, np.float32) if base is None else base
    if rows is not None and columns is not None:
        if index.shape[1:] == (1, 1):
            pooled[index[:, 0, 0]] = (values @ columns) @ rows
        else:
            if base is not None:
                values = values - pooled[index]
            change = (values * (rows[:, None] * columns)).ravel()
            pooled += np.bincount(index.ravel(), change, num_classes).astype(np.float32)
    soft = torch.from_numpy(pooled)
    return (soft if temperature == 1 else soft / temperature).softmax(0)


def _line_weights(start: float, end: float, low: float, high: float, length: int) -> npt.NDArray[np.float32] | None:
    """Return the `[L]` weights of `_box_weights` for one cell from `start` to `end`, None where it is outside.

    What is visible reaches from `low` to `high`; all are in 0..1. The ends are rounded as `_box_weights` rounds them,
    since the number of points jumps at whole extents.
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
