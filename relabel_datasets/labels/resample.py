"""Area-preserving resampling of maps between grids of any sizes, which preserves the mean over a map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .eager import eagerly


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
        maps = _overlaps(height, grid[0], maps.device, maps.dtype) @ maps
    if width != grid[1]:
        maps = maps @ _overlaps(width, grid[1], maps.device, maps.dtype).T
    return maps


def mean_of_maps(maps: Sequence[Tensor]) -> Tensor:
    """Return the mean of maps `[..., H, W]`, at the locations of the map with the most."""
    grid = max(((one.shape[-2], one.shape[-1]) for one in maps), key=math.prod)
    total = resample_area(maps[0], grid)
    for one in maps[1:]:
        total = total + resample_area(one, grid)
    return total / len(maps)


@eagerly  # torch.compile would compute them in every call
def _overlaps(old: int, new: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return _cached_overlaps(old, new, device, dtype)


@lru_cache(maxsize=256)  # a CUDA graph cannot contain the copy to the device
@torch.inference_mode(mode=False)  # a tensor that derivatives may use as well
def _cached_overlaps(old: int, new: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the share of each new cell that lies in each old cell, `[new, old]`. Rows sum to 1, columns to new / old."""
    old_edges = torch.arange(old + 1, dtype=torch.float64, device="cpu") / old
    new_edges = torch.arange(new + 1, dtype=torch.float64, device="cpu") / new
    right = torch.minimum(new_edges[1:, None], old_edges[None, 1:])
    left = torch.maximum(new_edges[:-1, None], old_edges[None, :-1])
    return ((right - left).clamp(min=0) * new).to(dtype).to(device)  # MPS has no float64
