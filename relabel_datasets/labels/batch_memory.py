"""Memory for the images of a batch, which is used again for a later batch.

Large blocks come from the system and go back to it. To touch the pages of a new block for the first time takes three times as long
as to convert and normalize the images in it.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_MIN_BYTES = 1 << 20  # the allocator keeps smaller blocks
_NUM_KEPT = 2  # one batch that the caller still uses, and the next

_last = threading.local()
_Bytes = npt.NDArray[np.uint8]


class BatchMemory(threading.local):
    """Memory of the last batches of each thread. It is used again only when no tensor refers to it any longer."""

    def __init__(self) -> None:
        # A tensor holds a reference to the view that it was made of.
        self._blocks: list[tuple[_Bytes, weakref.ref[_Bytes]]] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor on the CPU with undefined values.

        Args:
            shape: Shape of the tensor.
            dtype: Data type of the tensor.
        """
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes < _MIN_BYTES:
            return torch.empty(*shape, dtype=dtype, device="cpu")
        free = [block for block, used in self._blocks if used() is None]
        block = next((block for block in free if block.nbytes == num_bytes), None)
        kept = [entry for entry in self._blocks if entry[0] is not block]
        if block is None:
            block = np.empty(num_bytes, np.uint8)
        view = block[:]
        self._blocks = [*kept, (block, weakref.ref(view))][-_NUM_KEPT:]
        return torch.from_numpy(view).view(dtype).view(*shape)


def rows_of(whole: Tensor, kind: type[Tensor]) -> list[Tensor]:
    """Return the rows of a batch. Until the next call in this thread, `whole_of` recognizes them.

    Args:
        whole: Contiguous batch.
        kind: Type of the rows.
    """
    rows = [row.detach().as_subclass(kind) for row in whole]  # autograd forbids in-place changes of the rows themselves
    _last.rows = [weakref.ref(row) for row in rows]
    return rows


def whole_of(rows: Sequence[Tensor]) -> Tensor | None:
    """Return the batch, without a copy, if these are its rows in order, as `rows_of` has returned them, else None."""
    known, first = getattr(_last, "rows", ()), rows[0].as_subclass(Tensor)
    if len(known) != len(rows) or any(ref() is not row for ref, row in zip(known, rows, strict=True)):
        return None
    form, num_bytes = (first.shape, first.stride(), first.dtype), first.numel() * first.element_size()
    for place, row in enumerate(rows):  # in-place changes may have moved or reshaped it
        if row.data_ptr() != first.data_ptr() + place * num_bytes or (row.shape, row.stride(), row.dtype) != form:
            return None
    return first.as_strided((len(rows), *first.shape), (first.numel(), *first.stride())).detach()
