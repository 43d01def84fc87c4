"""Types of the keyword arguments of `RelabelLoader`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict

import torch


class LoaderOptions(TypedDict, total=False):
    """Keyword arguments that `RelabelLoader` passes on to torch's `DataLoader`, see there."""

    num_workers: int
    collate_fn: Callable[[list[Any]], Any] | None
    pin_memory: bool
    drop_last: bool
    timeout: float
    worker_init_fn: Callable[[int], None] | None
    multiprocessing_context: Any
    generator: torch.Generator | None
    prefetch_factor: int | None
    persistent_workers: bool
    pin_memory_device: str
    in_order: bool
    shuffle: bool | None
    batch_sampler: None
