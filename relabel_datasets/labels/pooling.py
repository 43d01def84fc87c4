"""LabelPooling: the mean of sparse logits over a part of the image, then softmax.

Shapes: B images, C classes, K stored logits, H x W locations, h x w output cells. Boxes and views are in units of the
whole image.

The mean over a part is a weighted mean over locations, see `weights`. Only the stored logits are pooled, so no dense
`[B, C, H, W]` tensor is ever created.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd import forward_ad

from .blending import blend_labels
from .label_map import LabelMap, View
from .pooling_checks import (
    check_class_range,
    check_finite,
    check_inputs,
    check_label_weight,
    check_labels,
    resolve_grid,
    to_array,
)
from .precision import full_precision, pooling_dtype
from .weights import BoxWeights, box_weights, line_weights, view_weights

P = ParamSpec("P")
R = TypeVar("R")


def _eagerly(function: Callable[P, R]) -> Callable[P, R]:
    """Exclude a function from `torch.compile`, which cannot trace the NumPy that computes the weights."""
    eager: Callable[P, R] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return eager


@_eagerly
def pool_labels(
    logits: Tensor,
    classes: Tensor,
    boxes_xyxy: Tensor,
    *,
    num_classes: int,
    base: Tensor | None = None,
    output_size: int | Sequence[int] = 1,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    label_weight: float = 0.0,
) -> Tensor:
    """Pool the logits under one box of each of B images into soft labels, on the device of the logits.

    For a box inside the image the result equals `softmax(roi_align(dense, box, output_size, aligned=True))`. If a box
    leaves the image, each output cell is the mean over its part inside the image, or the base if no part is inside. A
    box without width or height is pooled as the point or line that it has shrunk to.

    The arithmetic is float32, or float64 for float64 logits, under `torch.autocast` and with any default dtype. As with
    `torchvision.ops.roi_align`, gradients reach `logits` and `base` but not `boxes_xyxy`. Under `torch.compile` the call
    is a graph break and runs eagerly.

    Args:
        logits: Stored logits `[B, K, H, W]`, floating point, in any memory format. NaN and infinite logits are not
            rejected and give NaN labels.
        classes: Class indices of the logits, integers `[B, K, H, W]` or `[B, K, 1, 1]` in 0 .. C - 1. The K classes of
            a location must differ, which is not checked. The range is checked on the CPU only: on a GPU the check would
            wait for the device, and an index out of range ends in a device-side assertion.
        boxes_xyxy: Boxes (x1, y1, x2, y2) `[B, 4]`, finite, in units of the whole image (0..1), on any device. Boxes on
            the CPU avoid a synchronisation with a GPU. x1 > x2 or y1 > y2 mirrors the grid of output cells.
        num_classes: Number of classes C.
        base: Logits `[B, C]` of the classes that are not stored. Default: 0.
        output_size: 1 for one label `[B, C]` per box; (h, w), or n for (n, n), for one label per cell of a grid over
            the box.
        temperature: Positive divisor of the pooled logits before the softmax; values above 1 soften the labels.
        labels: Class index of each image, integers `[B]` in 0 .. C - 1, for `label_weight`. The range is checked on the CPU
            only; on a GPU, an index out of range has no one-hot label. Default: none.
        label_weight: Weight w of the one-hot label of each image, 0 to 1. The result is `(1 - w) * softmax(pooled /
            temperature) + w * one_hot(labels)`, in every cell of a grid. Default: 0.

    Returns:
        Soft labels `[B, C]` or `[B, C, h, w]` that sum to 1 over C: float64 for float64 logits, else float32.

    Raises:
        ValueError: The shapes, dtypes or devices do not fit together, a box is not finite, a class index is out of
            range (CPU), `num_classes`, `output_size` or `temperature` is not positive, `label_weight` is not in 0 .. 1, or it
            is above 0 without `labels`.
        TypeError: An argument is not a tensor or not a number, the call is inside a transform of `torch.func` such as
            `vmap`, or `boxes_xyxy` has no values that can be read, such as a meta tensor or a `FakeTensor`.
    """
    batch, _, height, width = check_inputs(logits, classes, num_classes, base, temperature)
    boxes = to_array("boxes_xyxy", boxes_xyxy, (batch, 4), pooling_dtype(logits))
    check_finite("boxes_xyxy", boxes)
    check_label_weight(label_weight)
    if label_weight:
        labels = check_labels(labels, batch, num_classes)
    weights = box_weights(boxes, resolve_grid(output_size), (height, width)).to(logits.device)
    soft = _pool(logits, classes, base, num_classes, weights, temperature, output_size)
    return blend_labels(soft, labels, label_weight) if label_weight and labels is not None else soft


@_eagerly
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
    """Pool the logits under one view of each of B images, rotated and sheared views included.

    Upright views are pooled as boxes. The others are pooled over sampling points with RoIAlign's spacing, which is
    equivalent for views inside the image. Points outside the visible box are left out of the mean.

    The other arguments, the result and the errors are those of `pool_labels`.
    """
    batch, _, height, width = check_inputs(logits, classes, num_classes, base, temperature)
    if len(views) != batch:
        raise ValueError(f"expected {batch} views, one an image, got {len(views)}")
    upright = [view.is_box for view in views]
    if any(upright) and not all(upright):
        places = [[i for i in range(batch) if upright[i] is group] for group in (True, False)]
        parts = [torch.tensor(place, device="cpu") for place in places]
        pooled = [
            pool_views(
                logits[part], classes[part], [views[i] for i in place], num_classes=num_classes,
                base=None if base is None else base[part], output_size=output_size, temperature=temperature,
            )
            for part, place in zip(parts, places, strict=True)
        ]  # fmt: skip
        return torch.cat(pooled)[torch.cat(parts).argsort()]
    # On the CPU, to avoid a synchronisation with another device; NumPy converts Python numbers in half of torch's time.
    numbers, dtype = np.array([(*view[:6], *view.visible_xyxy) for view in views], np.float64), pooling_dtype(logits)
    check_finite("views", numbers)
    affine, visible = torch.from_numpy(numbers.reshape(batch, 10)).tensor_split([6], 1)
    grid, size, visible = resolve_grid(output_size), (height, width), visible.to(dtype)
    weights: Tensor | BoxWeights
    if all(upright):
        corner = affine[:, [2, 5]]
        boxes = torch.cat([corner, corner + affine[:, [0, 4]]], 1).to(dtype)
        weights = box_weights(boxes.numpy(), grid, size, visible.numpy()).to(logits.device)
    else:
        affine = affine.to(dtype).reshape(batch, 2, 3)
        weights = view_weights(affine, grid, size, visible).to(logits.device, non_blocking=True)
    return _pool(logits, classes, base, num_classes, weights, temperature, output_size)


@_eagerly
def pool_label_map(
    label_map: LabelMap, view: View, output_size: int | Sequence[int] = 1, temperature: float = 1.0
) -> Tensor:
    """Return the soft label `[C]`, or `[C, h, w]`, of one view of one label map.

    Equals `pool_views` of a batch of one. A single cell of an upright view on the CPU is computed in plain Python,
    because at this size calling torch costs more than the arithmetic.
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


def _pool(
    logits: Tensor,
    classes: Tensor,
    base: Tensor | None,
    num_classes: int,
    weights: Tensor | BoxWeights,
    temperature: float,
    output_size: int | Sequence[int],
) -> Tensor:
    """Return the soft labels of n = h * w cells from weights `[B, n, H * W]` or from those of boxes."""
    dtype = pooling_dtype(logits)
    logits, classes = logits.to(dtype), classes.long()
    base = None if base is None else base.to(dtype)
    height, width = resolve_grid(output_size)
    # No cell dimension for a single cell: every dimension that a kernel iterates over costs time.
    shape = (len(logits), *([height * width] if height * width > 1 else []), num_classes)
    pooled = logits.new_zeros(shape) if base is None else _each_cell(base, shape).expand(shape).clone()
    put = _add_locations if classes.shape == logits.shape else _set_heatmaps
    try:
        with full_precision(logits.device):
            put(pooled, logits, classes, base, weights)
    except RuntimeError:
        check_class_range(classes, num_classes)  # here, as torch's own check on the CPU costs nothing extra
        raise
    if temperature != 1:
        pooled /= temperature
    # In place where the kernel is known to allow it: memory that is new to the process costs more than the arithmetic.
    soft = torch.softmax(pooled, -1, out=pooled) if _may_overwrite(pooled) else pooled.softmax(-1)
    return soft if output_size == 1 else soft.reshape(len(logits), height, width, num_classes).movedim(-1, 1)


def _may_overwrite(pooled: Tensor) -> bool:
    """Return whether `softmax(out=)` is supported: on the CPU, outside reverse and forward differentiation."""
    return pooled.device.type == "cpu" and not pooled.requires_grad and forward_ad._current_level < 0


def _each_cell(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Return values `[B, ...]` of a batch in a shape that broadcasts with pooled logits `[B, C]` or `[B, n, C]`."""
    return values if len(shape) == 2 else values[:, None]


def _set_heatmaps(
    pooled: Tensor, logits: Tensor, classes: Tensor, base: Tensor | None, weights: Tensor | BoxWeights
) -> None:
    """Set the classes `[B, P, 1, 1]` of `pooled`, `[B, C]` or `[B, n, C]`, to the means of their heatmaps in cells inside."""
    any_outside = isinstance(weights, Tensor) or weights.any_outside
    if not isinstance(weights, Tensor) and pooled.ndim == 2:
        weights = weights.product()
    if isinstance(weights, Tensor):
        means = weights @ logits.flatten(2).mT
        total = weights.sum(-1) if any_outside else None
    else:
        rows, columns, _ = weights
        # Each product is one bmm over all heatmaps. Broadcasting over them would cause many small ones.
        means_of_rows = (logits.flatten(1, 2) @ columns.mT).reshape(*logits.shape[:3], columns.shape[1])
        means = torch.einsum("biy,bpyj->bijp", rows, means_of_rows).flatten(1, 2)
        total = (rows.sum(-1)[:, :, None] * columns.sum(-1)[:, None]).flatten(1) if any_outside else None
    if pooled.ndim == 2:
        means = means[:, 0]
    index = _each_cell(classes.flatten(1), pooled.shape).expand_as(means)
    if total is not None:
        is_inside = total.reshape(*pooled.shape[:-1], 1) > 0.5
        # Read from the base, because gradients need `pooled` unchanged.
        outside = 0.0 if base is None else _each_cell(base.gather(1, classes.flatten(1)), pooled.shape)
        means = torch.where(is_inside, means, outside)
    pooled.scatter_(-1, index, means)


def _add_locations(
    pooled: Tensor, logits: Tensor, classes: Tensor, base: Tensor | None, weights: Tensor | BoxWeights
) -> None:
    """Add the excess of each logit `[B, K, H, W]` over the base of its class to `pooled`, `[B, C]` or `[B, n, C]`."""
    if not isinstance(weights, Tensor):
        weights = weights.product()
    if pooled.ndim == 2:
        weights = weights[:, 0]
    index = classes.flatten(1)
    above_base = logits if base is None else logits - base.gather(1, index).reshape(logits.shape)
    # Flattened locations multiply twice as fast as two dimensions.
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
    """Pool one box and one cell like `pool_labels`, in NumPy, whose calls cost a fraction of torch's.

    Args:
        values: Logits `[K, H, W]`.
        index: Class indices of the logits.
        base: Base `[C]`, which is overwritten, or None for 0.
        num_classes: Number of classes C.
        view: Upright view.
        temperature: Divisor of the pooled logits.

    Returns:
        The soft label `[C]`.
    """
    height, width = values.shape[1:]
    x1, y1, x2, y2 = view.box_xyxy
    left, top, right, bottom = view.visible_xyxy
    if not math.isfinite(x1 + y1 + x2 + y2 + left + top + right + bottom):
        check_finite("views", np.array([(*view[:6], *view.visible_xyxy)]))
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
