"""Area-preserving resampling of maps: between grids of any sizes, the mean over a map stays what it is."""

from __future__ import annotations

import torch
from torch import Tensor


def resample_area(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return maps `[..., H, W]` on another grid, as `[..., *grid]`.

    Both grids cover the same area. A new cell is the mean of the old ones, weighted by how much of it each covers, as if
    the old map were constant within its cells. So the mean over the map does not change but for rounding.

    Args:
        maps: floating-point maps.
        grid: (height, width) of the new maps, finer or coarser.

    Example:
        >>> resample_area(torch.tensor([[0.0, 3.0, 6.0]]), (1, 2))
        tensor([[1., 5.]])
    """
    height, width = maps.shape[-2:]
    if height != grid[0]:
        maps = _overlaps(height, grid[0]).to(maps) @ maps
    if width != grid[1]:
        maps = maps @ _overlaps(width, grid[1]).to(maps).T
    return maps


def _overlaps(old: int, new: int) -> Tensor:
    """Return `[new, old]`: the share of each new cell that lies in each old one. Rows sum to 1, columns to new / old."""
    old_edges = torch.arange(old + 1, dtype=torch.float64) / old
    new_edges = torch.arange(new + 1, dtype=torch.float64) / new
    right = torch.minimum(new_edges[1:, None], old_edges[None, 1:])
    left = torch.maximum(new_edges[:-1, None], old_edges[None, :-1])
    return (right - left).clamp(min=0) * new
