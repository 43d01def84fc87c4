"""Count what is computed on a device, without one.

Tensors on the device `meta` have no values: whatever waits for the values of a GPU (`item`, `tolist`, `nonzero`, `if tensor`,
`numpy`) is an error there.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class DeviceWork(TorchDispatchMode):
    """Counter of the operations on tensors of a device, views excluded."""

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.device = device
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if not func.is_view and any(leaf.device.type == self.device for leaf in leaves):
            self.operations[str(func)] += 1
        return result
