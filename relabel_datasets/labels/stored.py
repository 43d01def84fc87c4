"""Stored label maps of a batch, which are decoded when their tensors are needed.

The C extension `_pooling` pools upright views from the stored bytes. Decoding would write four to eight times as many bytes, most of
them for locations outside the crops.
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, Mapping
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .pooling_checks import check_temperature
from .view import View

if TYPE_CHECKING:
    from .encodings.base import Temperature


@cache
def pooling_extension() -> ModuleType | None:
    """Return the extension, or None if it was not built."""
    try:
        from . import _pooling
    except ImportError:
        return None
    module: ModuleType = _pooling
    return module


class Form(NamedTuple):
    """Layout of the stored tensors of a `heatmaps` or `topk` map, as the extension reads it.

    Attributes:
        is_topk: Whether the encoding is `topk`.
        bits: Bits of a stored logit.
        num_classes: Number C of classes.
        k: Number K of logits at each location.
        height: Number H of rows of locations.
        width: Number W of columns of locations.
        logits: Offset of the logits in the bytes of a map.
        classes: Offset of the class indices.
        class_size: Number of bytes of a class index.
        base: Offset of the base, or -1 if none is stored.
        ranges: Offset of the ranges, or -1 if none are stored.
        end: Number of bytes of a map.
    """

    is_topk: bool
    bits: int
    num_classes: int
    k: int
    height: int
    width: int
    logits: int
    classes: int
    class_size: int
    base: int
    ranges: int
    end: int


class StoredTensors(Mapping[str, Tensor]):
    """Tensors of a batch of label maps by name, decoded when one of them is needed.

    Args:
        blobs: Bytes of each map.
        form: Layout of the bytes.
        decode: Function that returns the decoded tensors.
    """

    def __init__(self, blobs: tuple[bytes, ...], form: Form, decode: Callable[[], dict[str, Tensor]]) -> None:
        self._blobs, self._form, self._decode = blobs, form, decode
        self._decoded: dict[str, Tensor] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the decoded tensors."""
        if self._decoded is None:
            self._decoded = self._decode()
        return self._decoded

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors())

    def __len__(self) -> int:
        return len(self.tensors())

    def items(self) -> ItemsView[str, Tensor]:
        return self.tensors().items()  # the view of a Mapping looks up each name

    def pool(self, views: tuple[View, ...], divisor: Temperature) -> Tensor | None:
        """Pool the views of all maps without decoding them.

        Args:
            views: View of each map.
            divisor: Divisor of the mean logits before the softmax, see `MapEncoding.pool`.

        Returns:
            Soft labels `[B, C]`, or None if a view is no upright box, or the numbers of views or divisors are wrong.

        Raises:
            ValueError: The divisor is not positive and finite.
            TypeError: The divisor is not a number.
        """
        extension, batch = pooling_extension(), len(self._blobs)
        if isinstance(divisor, np.ndarray):
            divisors = divisor
        else:
            check_temperature(divisor)
            divisors = np.full(batch, divisor, np.float64)
        if extension is None or len(views) != batch or divisors.size != batch:
            return None
        soft = extension.pool(self._blobs, self._form, views, divisors.tobytes())
        if soft is None:
            return None
        return torch.frombuffer(soft, dtype=torch.float32).view(batch, self._form.num_classes)


def are_valid(blobs: tuple[bytes, ...], form: Form) -> bool:
    """Return whether all values of maps are in range, so that decoding them raises no error. False without the extension."""
    extension = pooling_extension()
    return extension is not None and extension.check(blobs, form)
