"""Area-preserving resampling of maps between grids of any sizes, which preserves the mean over a map."""

from __future__ import annotations

import torch
from torch import Tensor


def resample_area(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample maps to another grid that covers the same area.

    A new cell is the mean of the old cells, weighted by their overlap with it, as if the old map were constant within its
    cells. The mean over the map therefore changes only by rounding.

    Args:
        maps: Floating-point maps, `[..., H, W]`.
        grid: (height, width) of the new maps, finer or coarser.

    Returns:
        Resampled maps, `[..., height, width]`.

    Example:
        >>> resample_area(torch.tensor([[0.0, 3.0, 6.0]]), (1, 2))
        tensor([[1., 5.]])
    """
    height, width = maps.shape[-2:]
    if height != grid[0]:
        maps = _overlaps(height, grid[0], maps) @ maps
    if width != grid[1]:
        maps = maps @ _overlaps(width, grid[1], maps).T
    return maps


def _overlaps(old: int, new: int, like: Tensor) -> Tensor:
    """Return the share of each new cell that lies in each old cell, `[new, old]`. Rows sum to 1, columns to new / old."""
    old_edges = torch.arange(old + 1, dtype=torch.float64) / old
    new_edges = torch.arange(new + 1, dtype=torch.float64) / new
    right = torch.minimum(new_edges[1:, None], old_edges[None, 1:])
    left = torch.maximum(new_edges[:-1, None], old_edges[None, :-1])
    return ((right - left).clamp(min=0) * new).to(like.dtype).to(like.device)  # MPS has no float64
