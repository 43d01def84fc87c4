"""The base of label maps as it is stored, in a few bits a class: it stays so from the shard to where it is pooled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]


class PackedBase(NamedTuple):
    """The base of one map as it is stored: an eighth of what its float32 values take.

    Attributes:
        levels: uint8 `[C]`, or `[ceil(C/2)]` of 4 bits.
        low: value of level 0.
        step: between levels.
        means: `[K]`, the base of the classes that have a heatmap.
        num_classes: C.
    """

    levels: Array
    low: np.float32
    step: np.float32
    means: Array
    num_classes: int

    def dense(self, classes: Array) -> Array:
        """Return the base `[C]` in float32; `classes` `[K]` have the heatmaps."""
        bits = 8 if len(self.levels) == self.num_classes else 4
        base: Array = unpack_levels(self.levels[None], self.num_classes, bits)[0] * self.step
        base += self.low
        base[classes] = self.means
        return base


class PackedBases(NamedTuple):
    """The bases of a batch of maps, in the same way, with B in front; all are tensors, on any device."""

    levels: Tensor
    low: Tensor
    step: Tensor
    means: Tensor
    num_classes: int

    @classmethod
    def of(cls, bases: Sequence[PackedBase]) -> PackedBases:
        """Return those of maps that are stored alike."""
        levels, low, step, means = (
            torch.from_numpy(np.array(part)) for part in zip(*(each[:4] for each in bases), strict=True)
        )
        return cls(levels, low, step, means, bases[0].num_classes)

    def changed(self, change: Callable[[Tensor], Tensor]) -> PackedBases:
        """Return the bases elsewhere."""
        levels, low, step, means = map(change, self[:4])
        return PackedBases(levels, low, step, means, self.num_classes)

    def dense(self, classes: Tensor) -> Tensor:
        """Return the bases `[B, C]` in float32; `classes` `[B, K]` have the heatmaps."""
        levels = self.levels
        if levels.shape[1] != self.num_classes:
            levels = torch.cat([levels & 15, levels >> 4], 1)[:, : self.num_classes]
        base = levels * self.step[:, None] + self.low[:, None]
        return base.scatter_(1, classes, self.means)


def unpack_levels(stored: Array, count: int, bits: int) -> Array:
    """Return levels `[B, N, ...]`, N `count`, as they were before the codec packed them."""
    if bits == 8:
        return stored
    batch, half, *rest = stored.shape
    levels = np.empty((batch, 2 * half, *rest), np.uint8)
    np.bitwise_and(stored, 15, out=levels[:, :half])
    np.right_shift(stored, 4, out=levels[:, half:])
    return levels[:, :count]
