"""Multi-label, localised soft labels for image datasets: ReLabel label maps and LabelPooling.

Importing this package loads torch and torchvision, but not timm or what else only the making of label maps needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .data.datasets import RelabelDataset
from .data.images import ImageError, decode_image
from .data.loading import load_dataset
from .data.manifest import DatasetError
from .data.sampling import RelabelSampler
from .data.storage import open_folder
from .data.store import LabelMaps
from .data.stream import RelabelLoader, RelabelStream
from .labels.codec import LabelMapError
from .labels.label_map import LabelMap, View
from .labels.pooling import pool_labels
from .labels.transforms import LabelPooling

if TYPE_CHECKING:
    from .annotate.annotator import Annotator, ModuleAnnotator
    from .annotate.build import build
    from .annotate.shard import Settings
    from .annotate.sources import HFSource, ImageFolderSource, WebDatasetSource, open_source
    from .annotate.timm_annotator import TimmAnnotator

# The producer is imported when first asked for: timm alone takes seconds, which a training script need not wait.
_PRODUCER = {
    "Annotator": "annotator",
    "HFSource": "sources",
    "ImageFolderSource": "sources",
    "ModuleAnnotator": "annotator",
    "Settings": "shard",
    "TimmAnnotator": "timm_annotator",
    "WebDatasetSource": "sources",
    "build": "build",
    "open_source": "sources",
}

__all__ = [
    "Annotator",
    "DatasetError",
    "HFSource",
    "ImageError",
    "ImageFolderSource",
    "LabelMap",
    "LabelMapError",
    "LabelMaps",
    "LabelPooling",
    "ModuleAnnotator",
    "RelabelDataset",
    "RelabelLoader",
    "RelabelSampler",
    "RelabelStream",
    "Settings",
    "TimmAnnotator",
    "View",
    "WebDatasetSource",
    "build",
    "decode_image",
    "load_dataset",
    "open_folder",
    "open_source",
    "pool_labels",
]


def __getattr__(name: str) -> Any:
    if name not in _PRODUCER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".annotate.{_PRODUCER[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
