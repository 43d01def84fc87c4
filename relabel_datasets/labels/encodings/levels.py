"""Quantization of logits to levels of 4 or 8 bits, and the packing of two 4-bit levels per byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as nnf
from torch import Tensor

Array = npt.NDArray[Any]

BITS = {"uint4": 4, "uint8": 8, "float16": 16}  # bits of a stored logit by storage dtype


def quantize_heatmaps(heatmaps: Tensor, low: Tensor, high: Tensor, levels: int) -> Tensor:
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
    height, width = heatmaps.shape[2:]
    device = heatmaps.device
    step = ((high - low) / (levels - 1)).clamp_min(torch.finfo(heatmaps.dtype).tiny)
    target = (heatmaps - low[..., None, None]) / step[..., None, None]
    num_steps = width + 2 * (height - 1)
    y = torch.arange(height, device=device)
    x = torch.arange(num_steps, device=device)[:, None] - 2 * y  # [T, H]
    inside = (x >= 0) & (x < width)
    skewed = target[:, :, y, x.clamp(0, width - 1)]  # [B, K, T, H]
    levels_of_steps = []
    last = [torch.zeros_like(skewed[:, :, 0])] * 3  # errors of the last three diagonals, [B, K, H]
    for t in range(num_steps):
        above = [nnf.pad(error[:, :, :-1], (1, 0)) for error in last]  # errors of the row above
        wanted = skewed[:, :, t] + (7 * last[0] + 3 * above[0] + 5 * above[1] + above[2]) / 16
        level = wanted.round().clamp_(0, levels - 1)
        last = [(wanted - level) * inside[t], *last[:2]]
        levels_of_steps.append(level.to(torch.uint8))
    rows = y[:, None]
    step_of_location = torch.arange(width, device=device) + 2 * rows  # [H, W]
    return torch.stack(levels_of_steps, 2)[:, :, step_of_location, rows]


def round_to_levels(values: Tensor, low: Tensor, high: Tensor, levels: int) -> Tensor:
    step = ((high - low) / (levels - 1)).clamp_min(torch.finfo(torch.float32).tiny)
    return ((values - low) / step).round().clamp(0, levels - 1).to(torch.uint8)


def float16_range(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return minimum and maximum over the last dimension as float32, rounded outwards to float16 values."""
    bounds = []
    for bound, outwards in ((values.amin(-1), -np.inf), (values.amax(-1), np.inf)):
        exact = bound.cpu().numpy()
        half = exact.astype(np.float16)
        too_narrow = half > exact if outwards < 0 else half < exact
        half = np.where(too_narrow, np.nextafter(half, np.float16(outwards)), half)
        bounds.append(torch.from_numpy(half.astype(np.float32)).to(values.device))
    return bounds[0], bounds[1]


def pack_levels(levels: Tensor, storage_dtype: str) -> Array:
    """Return levels `[B, N, ...]` as bytes. For uint4, a byte holds two levels: `[B, ceil(N/2), ...]`."""
    values = levels.cpu().numpy()
    if storage_dtype == "uint8":
        return values
    half = -(-values.shape[1] // 2)
    packed = values[:, :half].copy()
    packed[:, : values.shape[1] - half] |= values[:, half:] << 4
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
