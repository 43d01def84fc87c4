"""Precision of label arithmetic: float32 or wider, whatever autocast and the default dtype are."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def pooling_dtype(logits: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float64 for float64 logits, else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which autocast does not lower the precision of operations on `device`."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Return a context in which a forward pass on `device` runs in `dtype`; float32 works on devices without autocast."""
    return full_precision(device) if dtype == torch.float32 else torch.autocast(device.type, dtype)
