"""LabelPooling in numbers: the mean of sparse logits over a part of the image, then softmax.

Shapes: B images, C classes, K stored logits, H x W locations, h x w output cells. Boxes and views are in units of the
whole image.

The mean over a part is a weighted mean over locations, see `weights`. So the stored logits alone are pooled, and no
`[B, C, H, W]` tensor is ever made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .label_map import LabelMap, View
from .weights import BoxWeights, box_weights, line_weights, view_weights


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
    weights = box_weights(boxes, _grid(output_size), (height, width)).to(logits.device)
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
    weights: Tensor | BoxWeights
    if all(upright):
        corner = affine[:, [2, 5]]
        boxes = torch.cat([corner, corner + affine[:, [0, 4]]], 1).to(dtype)
        weights = box_weights(boxes, grid, size, visible).to(logits.device)
    else:
        affine = affine.to(dtype).reshape(batch, 2, 3)
        weights = view_weights(affine, grid, size, visible).to(logits.device, non_blocking=True)
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


def _pool(
    logits: Tensor,
    classes: Tensor,
    base: Tensor | None,
    num_classes: int,
    weights: Tensor | BoxWeights,
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
    pooled: Tensor, logits: Tensor, classes: Tensor, base: Tensor | None, weights: Tensor | BoxWeights
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
    pooled: Tensor, logits: Tensor, classes: Tensor, base: Tensor | None, weights: Tensor | BoxWeights
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
    rows, columns = line_weights(y1, y2, top, bottom, height), line_weights(x1, x2, left, right, width)
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
