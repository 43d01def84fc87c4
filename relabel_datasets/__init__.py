"""Multi-label, localised soft labels for image datasets: ReLabel label maps and LabelPooling.

Importing this package loads torch and torchvision, but neither timm nor anything else that only makes label maps.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .labels.codec import LabelMapError
from .labels.label_map import LabelMap, View
from .labels.pooling import pool_labels
from .labels.transforms import LabelPooling

_LAZY: dict[str, str] = {}  # name -> module, for what needs timm or other libraries of the producer

__all__ = ["LabelMap", "LabelMapError", "LabelPooling", "View", "pool_labels"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
