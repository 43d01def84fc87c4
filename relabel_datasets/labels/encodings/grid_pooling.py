"""Pool logits on a grid of locations over boxes and views, and turn the means into soft labels.

The mean over a part of an image is a weighted mean over locations, see `weights`. An encoding computes it from the logits that
it stores, so no dense `[B, C, H, W]` tensor is ever created.

Shapes: B images, C classes, H x W locations, h x w output cells, n = h * w. Boxes and views are in units of the whole image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..eager import eagerly
from ..pooling_checks import check_finite, check_temperature, resolve_grid
from ..precision import full_precision, pooling_dtype
from ..threads import in_one_thread
from ..view import Rows, are_boxes
from ..weights import BoxWeights, box_weights, view_weights
from .base import Encoded, Temperature

# Function of encoded logits, the weights of their locations in each cell, and the shape of the result. It returns the mean
# logits `[B, C]` of a single cell per image, or `[B, n, C]`, as a new tensor in the dtype of pooling.
MeanLogits = Callable[[Encoded, Tensor | BoxWeights, tuple[int, ...]], Tensor]


@eagerly
def pool_views(
    encoded: Encoded,
    views: Rows,
    mean_logits: MeanLogits,
    output_size: int | Sequence[int] = 1,
    temperature: Temperature = 1.0,
) -> Tensor:
    """Pool logits `[B, K, H, W]` under one view of each of B images, rotated and sheared views included.

    Upright views are pooled as boxes. The others are pooled over sampling points with RoIAlign's spacing, which is
    equivalent for views inside the image. Points outside the visible box are left out of the mean.

    Args:
        encoded: Encoded logits.
        views: One view per image, `[B, 10]`, see `view.to_rows`.
        mean_logits: Function that computes the mean logits of cells.
        output_size: Grid of output cells, see `pool_labels`.
        temperature: Divisor of the mean logits before the softmax: one number, or one per cell, `[B, n]`.

    Returns:
        Soft labels, see `pool_labels`.

    Raises:
        ValueError: The number of views is not that of the images, a view is not finite, or an argument is out of range.
    """
    logits, batch = encoded.logits, len(views)
    if not isinstance(temperature, np.ndarray):
        check_temperature(temperature)
    if batch != len(logits):
        raise ValueError(f"expected {len(logits)} views, one per image, got {batch}")
    check_finite("views", views)
    upright = are_boxes(views)
    if upright.any() and not upright.all():
        return _pool_groups(encoded, views, upright, mean_logits, output_size, temperature)
    # On the CPU, to avoid a synchronisation with another device.
    affine, visible = torch.from_numpy(views).tensor_split([6], 1)
    dtype = pooling_dtype(logits)
    grid, visible = resolve_grid(output_size), visible.to(dtype)
    size = logits.shape[2], logits.shape[3]
    weights: Tensor | BoxWeights
    if upright.all():
        corner = affine[:, [2, 5]]
        boxes = torch.cat([corner, corner + affine[:, [0, 4]]], 1).to(dtype)
        weights = box_weights(boxes.numpy(), grid, size, visible.numpy()).to(logits.device)
    else:
        affine = affine.to(dtype).reshape(batch, 2, 3)
        weights = view_weights(affine, grid, size, visible).to(logits.device, non_blocking=True)
    return pool_weighted(encoded, weights, mean_logits, output_size, temperature)


def _pool_groups(
    encoded: Encoded,
    views: Rows,
    upright: npt.NDArray[np.bool_],
    mean_logits: MeanLogits,
    output_size: int | Sequence[int],
    temperature: Temperature,
) -> Tensor:
    """Pool upright and other views separately."""
    groups = [np.flatnonzero(upright), np.flatnonzero(~upright)]
    pooled = []
    for group in groups:
        divisor = temperature[group] if isinstance(temperature, np.ndarray) else temperature
        chosen = encoded.select(torch.from_numpy(group))
        pooled.append(pool_views(chosen, views[group], mean_logits, output_size, divisor))
    return torch.cat(pooled)[torch.from_numpy(np.concatenate(groups).argsort())]


def pool_weighted(
    encoded: Encoded,
    weights: Tensor | BoxWeights,
    mean_logits: MeanLogits,
    output_size: int | Sequence[int],
    temperature: Temperature,
) -> Tensor:
    """Return the soft labels of n cells from weights `[B, n, H * W]` or from those of boxes."""
    logits = encoded.logits
    height, width = resolve_grid(output_size)
    # No cell dimension for a single cell: every dimension that a kernel iterates over costs time.
    cells = (height * width,) if height * width > 1 else ()
    shape = (len(logits), *cells, encoded.num_classes)
    with full_precision(logits.device), in_one_thread(math.prod(shape)):
        pooled = mean_logits(encoded, weights, shape)
        if isinstance(temperature, np.ndarray):
            pooled /= torch.from_numpy(temperature).reshape(len(logits), *cells, 1).to(pooled.device, pooled.dtype)
        elif temperature != 1:
            pooled /= temperature
        # In place where the kernel is known to allow it: memory that is new to the process costs more than the arithmetic.
        soft = torch.softmax(pooled, -1, out=pooled) if _may_overwrite(pooled) else pooled.softmax(-1)
    return soft if output_size == 1 else soft.reshape(len(logits), height, width, encoded.num_classes).movedim(-1, 1)


def _may_overwrite(pooled: Tensor) -> bool:
    """Return whether `softmax(out=)` is supported: on the CPU, outside reverse and forward differentiation."""
    return pooled.device.type == "cpu" and not pooled.requires_grad and forward_ad._current_level < 0


def each_cell(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Return values `[B, ...]` of a batch in a shape that broadcasts with mean logits `[B, C]` or `[B, n, C]`."""
    return values if len(shape) == 2 else values[:, None]
