"""The base of label maps in its stored form, a few bits per class, kept packed until the maps are pooled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]


class PackedBase(NamedTuple):
    """The stored base of one map, up to eight times smaller than its float32 values.

    Attributes:
        levels: Quantization levels: uint8 `[C]`, or two 4-bit levels per byte, `[ceil(C/2)]`.
        low: Value of level 0.
        step: Difference between neighboring levels.
        means: Base of the classes that have a heatmap, `[K]`.
        num_classes: Number of classes C.
    """

    levels: Array
    low: np.float32
    step: np.float32
    means: Array
    num_classes: int

    def dense(self, classes: Array) -> Array:
        """Return the base `[C]` in float32.

        Args:
            classes: Indices `[K]` of the classes that have a heatmap.
        """
        bits = 8 if len(self.levels) == self.num_classes else 4
        base: Array = unpack_levels(self.levels[None], self.num_classes, bits)[0] * self.step
        base += self.low
        base[classes] = self.means
        return base


class PackedBaseBatch(NamedTuple):
    """The stored bases of B maps: the tensors of `PackedBase` with a batch dimension, on any device."""

    levels: Tensor
    low: Tensor
    step: Tensor
    means: Tensor
    num_classes: int

    @classmethod
    def of(cls, bases: Sequence[PackedBase]) -> PackedBaseBatch:
        """Stack the bases of maps that are stored with the same number of bits."""
        levels, low, step, means = (
            torch.from_numpy(np.array(part)) for part in zip(*(base[:4] for base in bases), strict=True)
        )
        return cls(levels, low, step, means, bases[0].num_classes)

    def changed(self, change: Callable[[Tensor], Tensor]) -> PackedBaseBatch:
        """Return a copy whose tensors are `change(tensor)`."""
        levels, low, step, means = map(change, self[:4])
        return PackedBaseBatch(levels, low, step, means, self.num_classes)

    def dense(self, classes: Tensor) -> Tensor:
        """Return the bases `[B, C]` in float32.

        Args:
            classes: Indices `[B, K]` of the classes that have a heatmap.
        """
        levels = self.levels
        if levels.shape[1] != self.num_classes:
            levels = torch.cat([levels & 15, levels >> 4], 1)[:, : self.num_classes]
        base = levels * self.step[:, None] + self.low[:, None]
        return base.scatter_(1, classes, self.means)


def unpack_levels(stored: Array, count: int, bits: int) -> Array:
    """Undo the codec's packing of two 4-bit levels per byte.

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
