"""Pool logits on a grid of locations over boxes and views, and turn the means into soft labels.

The mean over a part of an image is a weighted mean over locations, see `weights`. An encoding computes it from the logits that
it stores, so no dense `[B, C, H, W]` tensor is ever created.

Shapes: B images, C classes, H x W locations, h x w output cells, n = h * w. Boxes and views are in units of the whole image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from ...words import counted
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
def pool_scales(
    scales: Sequence[Encoded],
    views: Rows,
    mean_logits: MeanLogits,
    output_size: int | Sequence[int] = 1,
    temperature: Temperature = 1.0,
) -> Tensor:
    """Pool the logits `[B, K, H, W]` of one or several maps of each of B images under one view, rotated and sheared views included.

    The mean logits of several maps are added, or averaged for a `temperature` that is one number. Upright views are pooled as boxes.
    The others are pooled over sampling points with RoIAlign's spacing, which is equivalent for views inside the image. Points
    outside the visible box are left out of the mean.

    Args:
        scales: Encoded logits of the same images, one for each map of an image.
        views: One view per image, `[B, 10]`, see `view.to_rows`.
        mean_logits: Function that computes the mean logits of cells.
        output_size: Grid of output cells, see `pool_labels`.
        temperature: Divisor of the mean logits before the softmax, see `MapEncoding.pool`.

    Returns:
        Soft labels, see `pool_labels`.

    Raises:
        ValueError: The number of views is not that of the images, a view is not finite, or an argument is out of range.
    """
    logits, batch, grid = scales[0].logits, len(views), resolve_grid(output_size)
    divisors = divisors_of(temperature, len(scales))
    if batch != len(logits):
        raise ValueError(f"expected {len(logits)} views, one per image, got {batch}")
    check_finite("views", views)
    shape = _shape(scales[0], grid)
    with full_precision(logits.device), in_one_thread(math.prod(shape)):
        pooled = _divided(_mean_of_views(scales[0], views, mean_logits, grid), divisors[0])
        for encoded, divisor in zip(scales[1:], divisors[1:], strict=True):
            pooled += _divided(_mean_of_views(encoded, views, mean_logits, grid), divisor)
        return _softmax(pooled, output_size, grid)


def divisors_of(temperature: Temperature, num_scales: int) -> list[Temperature]:
    """Return the divisor of the mean logits of each map of an image: one number, or one per cell, `[B, n]`.

    Raises:
        ValueError: A temperature is out of range, or those of gains are not as many as the maps.
        TypeError: A temperature is not a number.
    """
    if not isinstance(temperature, np.ndarray):
        check_temperature(temperature)
        return [temperature if num_scales == 1 else temperature * num_scales] * num_scales
    if temperature.shape[2] != num_scales:
        raise ValueError(
            f"the calibration has gains of {counted(temperature.shape[2], 'map')} per image, but there "
            f"{'is' if num_scales == 1 else 'are'} {num_scales}: it belongs to another dataset"
        )
    return [temperature[:, :, scale] for scale in range(num_scales)]


def _mean_of_views(encoded: Encoded, views: Rows, mean_logits: MeanLogits, grid: tuple[int, int]) -> Tensor:
    """Return the mean logits `[B, C]` of views, or `[B, n, C]` for a grid."""
    logits, batch = encoded.logits, len(views)
    upright = are_boxes(views)
    if upright.any() and not upright.all():
        groups = [np.flatnonzero(upright), np.flatnonzero(~upright)]
        means = [
            _mean_of_views(encoded.select(torch.from_numpy(group)), views[group], mean_logits, grid) for group in groups
        ]
        return torch.cat(means)[torch.from_numpy(np.concatenate(groups).argsort())]
    # On the CPU, to avoid a synchronisation with another device.
    affine, visible = torch.from_numpy(views).tensor_split([6], 1)
    dtype = pooling_dtype(logits)
    visible = visible.to(dtype)
    size = logits.shape[2], logits.shape[3]
    weights: Tensor | BoxWeights
    if upright.all():
        corner = affine[:, [2, 5]]
        boxes = torch.cat([corner, corner + affine[:, [0, 4]]], 1).to(dtype)
        weights = box_weights(boxes.numpy(), grid, size, visible.numpy()).to(logits.device)
    else:
        affine = affine.to(dtype).reshape(batch, 2, 3)
        weights = view_weights(affine, grid, size, visible).to(logits.device, non_blocking=True)
    return mean_logits(encoded, weights, _shape(encoded, grid))


def pool_weighted(
    encoded: Encoded,
    weights: Tensor | BoxWeights,
    mean_logits: MeanLogits,
    output_size: int | Sequence[int],
    temperature: float,
) -> Tensor:
    """Return the soft labels of n cells from weights `[B, n, H * W]` or from those of boxes."""
    grid = resolve_grid(output_size)
    shape = _shape(encoded, grid)
    with full_precision(encoded.logits.device), in_one_thread(math.prod(shape)):
        return _softmax(_divided(mean_logits(encoded, weights, shape), temperature), output_size, grid)


def _shape(encoded: Encoded, grid: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of mean logits: `[B, C]`, or `[B, n, C]` for a grid."""
    # No cell dimension for a single cell: every dimension that a kernel iterates over costs time.
    cells = (grid[0] * grid[1],) if grid != (1, 1) else ()
    return (len(encoded.logits), *cells, encoded.num_classes)


def _divided(pooled: Tensor, divisor: Temperature) -> Tensor:
    """Divide mean logits in-place by a number, or by one per cell, `[B, n]`."""
    if isinstance(divisor, np.ndarray):
        pooled /= torch.from_numpy(divisor).reshape(*pooled.shape[:-1], 1).to(pooled.device, pooled.dtype)
    elif divisor != 1:
        pooled /= divisor
    return pooled


def _softmax(pooled: Tensor, output_size: int | Sequence[int], grid: tuple[int, int]) -> Tensor:
    """Return the soft labels of mean logits, `[B, C]`, or `[B, C, h, w]` for a grid."""
    # In place where the kernel is known to allow it: memory that is new to the process costs more than the arithmetic.
    soft = torch.softmax(pooled, -1, out=pooled) if _may_overwrite(pooled) else pooled.softmax(-1)
    return soft if output_size == 1 else soft.reshape(len(soft), *grid, soft.shape[-1]).movedim(-1, 1)


def _may_overwrite(pooled: Tensor) -> bool:
    """Return whether `softmax(out=)` is supported: on the CPU, outside reverse and forward differentiation."""
    return pooled.device.type == "cpu" and not pooled.requires_grad and forward_ad._current_level < 0


def each_cell(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Return values `[B, ...]` of a batch in a shape that broadcasts with mean logits `[B, C]` or `[B, n, C]`."""
    return values if len(shape) == 2 else values[:, None]
