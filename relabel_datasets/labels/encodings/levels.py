"""Quantization of logits to levels of 4 or 8 bits, and the packing of two 4-bit levels per byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BITS = {"uint4": 4, "uint8": 8, "float16": 16}  # bits of a stored logit by storage dtype
_SHARES = (7, 3, 5, 1)  # sixteenths of an error, for the neighbors on the right, below left, below and below right


def quantize_heatmaps(heatmaps: Array, low: Array, high: Array, levels: int) -> Array:
    """Quantize heatmaps linearly, with error diffusion.

    The rounding error of a location is passed to its neighbors on the right and below, so that errors cancel in the mean
    over any crop. Pooled labels of 4 bits are then nearly as exact as those of 8 bits (tests/benchmarks/fidelity.py).

    Args:
        heatmaps: Heatmaps `[B, K, H, W]`.
        low: Value of level 0 for each heatmap, `[B, K]`.
        high: Value of the highest level for each heatmap, `[B, K]`.
        levels: Number of levels, 16 or 256.

    Returns:
        Levels 0 to `levels` - 1, `[B, K, H, W]` uint8.

    Reference: Floyd and Steinberg, "An adaptive algorithm for spatial greyscale", 1976. Locations on one skewed diagonal
    (x + 2 y = const) do not depend on each other and are computed together.
    """
    batch, num_heatmaps, height, width = heatmaps.shape
    target = (heatmaps - low[..., None, None]) / _step(low, high, levels)[..., None, None]
    stride = width + 2  # of the rows below, with a column of zeros on both sides
    # All heatmaps are contiguous at each location, and diagonals are slices of the flattened locations.
    wanted = np.zeros(((height + 1) * stride, batch * num_heatmaps), heatmaps.dtype)
    errors = np.zeros_like(wanted)
    inside = wanted.reshape(height + 1, stride, -1)[1:, 1:-1]
    inside[...] = target.transpose(2, 3, 0, 1).reshape(height, width, -1)
    right, below_left, below, below_right = _SHARES
    for t in range(width + 2 * (height - 1)):
        first, last = max(0, -(-(t - width + 1) // 2)), min(height - 1, t // 2)  # rows of the diagonal
        start = stride + 1 + t + first * width
        stop = start + (last - first) * width + 1

        def at(shift: int, start: int = start, stop: int = stop) -> Array:
            return errors[start - shift : stop - shift : width]

        carried = right * at(1)
        carried += below_left * at(stride - 1)
        carried += below * at(stride)
        carried += below_right * at(stride + 1)
        carried /= 16
        diagonal = wanted[start:stop:width]
        diagonal += carried
        level = np.rint(diagonal)
        np.minimum(np.maximum(level, 0, out=level), levels - 1, out=level)
        np.subtract(diagonal, level, out=at(0))
        diagonal[...] = level
    return np.ascontiguousarray(inside.astype(np.uint8).transpose(2, 0, 1)).reshape(heatmaps.shape)


def round_to_levels(values: Array, low: Array, high: Array, levels: int) -> Array:
    """Return the level nearest to each value, uint8, given the values of the lowest and of the highest level."""
    rounded = np.rint((values - low) / _step(low, high, levels))
    return np.minimum(np.maximum(rounded, 0), levels - 1).astype(np.uint8)


def _step(low: Array, high: Array, levels: int) -> Array:
    """Return the difference between neighboring levels, above 0."""
    step: Array = np.maximum((high - low) / (levels - 1), np.finfo(low.dtype).tiny)
    return step


def float16_range(values: Array) -> tuple[Array, Array]:
    """Return minimum and maximum over the last dimension as float32, rounded outwards to float16 values."""
    bounds = []
    for exact, outwards in ((values.min(-1), -np.inf), (values.max(-1), np.inf)):
        half = exact.astype(np.float16)
        too_narrow = half > exact if outwards < 0 else half < exact
        half = np.where(too_narrow, np.nextafter(half, np.float16(outwards)), half)
        bounds.append(half.astype(np.float32))
    return bounds[0], bounds[1]


def pack_levels(levels: Array, storage_dtype: str) -> Array:
    """Return levels `[B, N, ...]` as bytes. For uint4, a byte holds two levels: `[B, ceil(N/2), ...]`."""
    if storage_dtype == "uint8":
        return levels
    half = -(-levels.shape[1] // 2)
    packed = levels[:, :half].copy()
    packed[:, : levels.shape[1] - half] |= levels[:, half:] << 4
    return packed


def unpack_levels(stored: Array, count: int, bits: int) -> Array:
    """Undo `pack_levels`.

    Args:
        stored: Packed levels `[B, ceil(N/2), ...]` for 4 bits, `[B, N, ...]` for 8 bits.
        count: Number N of levels.
        bits: Bits per level, 4 or 8.

    Returns:
        Levels `[B, N, ...]` uint8.
    """
    if bits == 8:
        return stored
    batch, half, *rest = stored.shape
    levels = np.empty((batch, 2 * half, *rest), np.uint8)
    np.bitwise_and(stored, 15, out=levels[:, :half])
    np.right_shift(stored, 4, out=levels[:, half:])
    return levels[:, :count]
