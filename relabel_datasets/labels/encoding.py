"""Encode dense logits as the few logits that are worth storing.

Shapes: B images, C classes, K logits kept at each location, H x W locations. Everything runs in batches on the device of
the logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from .precision import full_precision

ENCODINGS = {"heatmaps": 10, "topk": 5}  # encoding -> default number of classes to keep


class Encoded(NamedTuple):
    """The stored part of a batch of dense logits: the fields of `LabelMap` with a batch dimension."""

    logits: Tensor  # [B, K, H, W]
    classes: Tensor  # [B, K, 1, 1] (heatmaps) or [B, K, H, W] (topk), int64
    base: Tensor | None  # [B, C] (heatmaps) or None, which means 0 (topk)
    num_classes: int

    def first(self, count: int) -> Encoded:
        """Return the first images of the batch."""
        base = None if self.base is None else self.base[:count]
        return Encoded(self.logits[:count], self.classes[:count], base, self.num_classes)


def encode_logits(dense: Tensor, encoding: str = "heatmaps", k: int | None = None) -> Encoded:
    """Encode dense logits.

    Args:
        dense: Class logits at every location, `[B, C, H, W]`.
        encoding: Name of the encoding, `"heatmaps"` or `"topk"`.
        k: Number of classes to keep per image (heatmaps, default 10) or per location (topk, default 5), at most C.

    Returns:
        The encoded logits, in float32.

    Raises:
        ValueError: The encoding is unknown, `k` is below 1, or the logits are not finite `[B, C, H, W]`.

    Reference: Yun et al., "Re-labeling ImageNet", 2021, section 3, store `topk` with k=5.
    """
    num_kept = resolve_k(encoding, k)
    if dense.ndim != 4 or 0 in dense.shape[1:]:
        raise ValueError(f"dense logits must be [B, C, H, W] with no empty side, got {tuple(dense.shape)}")
    dense = dense.float()
    if not torch.isfinite(dense).all():
        raise ValueError("dense logits must be finite, got nan or inf: try the annotator in a wider dtype")
    num_kept = min(num_kept, dense.shape[1])
    if encoding == "topk":
        logits, classes = dense.topk(num_kept, dim=1)
        return Encoded(logits, classes, None, dense.shape[1])
    return _encode_heatmaps(dense, num_kept)


def resolve_k(encoding: str, k: int | None) -> int:
    """Return the number of classes to keep: `k`, or the default of the encoding if `k` is None.

    Raises:
        ValueError: The encoding is unknown or `k` is below 1.
    """
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding must be one of {sorted(ENCODINGS)}, got {encoding!r}")
    if k is not None and k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return ENCODINGS[encoding] if k is None else k


def _encode_heatmaps(dense: Tensor, num_kept: int) -> Encoded:
    weight = crop_probabilities(dense)  # [B, C]
    classes = weight.topk(num_kept, dim=1).indices
    base = dense.mean((2, 3))
    heatmaps = dense.gather(1, classes[:, :, None, None].expand(-1, -1, *dense.shape[2:]))

    # The logits of the dropped classes vary together from location to location. Softmax ignores a constant subtracted from
    # all classes of a location, so their common part is subtracted from the heatmaps and the base fits better. The common
    # part has zero mean over locations, which keeps the mean of the map.
    rest = weight.scatter(1, classes, 0.0)
    rest = rest / rest.sum(1, keepdim=True).clamp_min(torch.finfo(rest.dtype).tiny)
    with full_precision(dense.device):
        common = torch.einsum("bc,bchw->bhw", rest, dense) - (rest * base).sum(1)[:, None, None]
    return Encoded(heatmaps - common[:, None], classes[:, :, None, None], base, dense.shape[1])


def crop_probabilities(dense: Tensor) -> Tensor:
    """Compute the mean probability of each class over crops of many sizes, which selects the heatmaps to keep.

    Training sees the pooled labels of crops, so a class matters as much as it appears in them. Ranking by the softmax of
    single locations would prefer classes that peak at one location and vanish in every crop.

    Args:
        dense: Class logits `[B, C, H, W]`.

    Returns:
        Mean probabilities `[B, C]`.
    """
    height, width = dense.shape[2:]
    total = torch.zeros_like(dense[:, :, 0, 0])
    for share in (0.2, 0.33, 0.53, 0.73):  # shares of the image sides: 4 % to 53 % of the area
        kernel = max(1, round(height * share)), max(1, round(width * share))
        stride = max(1, height // 7), max(1, width // 7)  # about 7 x 7 crops at most
        total += nnf.avg_pool2d(dense, kernel, stride).softmax(1).mean((2, 3))
    return total / 4


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
