"""Label maps: their encodings, stored bytes, pooling under crops, and transforms.

Names are imported on first use.

Example:
    >>> from torchvision.transforms import v2
    >>> from relabel_datasets.labels import LabelPooling
    >>> transforms = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), LabelPooling()])
    >>> image, soft_label = transforms(image, label_map)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._lazy import import_lazily

if TYPE_CHECKING:
    from .batch import LabelMapBatch, collate, collate_crops
    from .calibration import Calibration
    from .crop_labels import CropLabels
    from .crop_transforms import RandomStoredCrop
    from .label_map import LabelMap
    from .pooling import pool_labels
    from .transforms import LabelPooling
    from .view import View

_MODULES = {
    "Calibration": "calibration",
    "CropLabels": "crop_labels",
    "LabelMap": "label_map",
    "LabelMapBatch": "batch",
    "LabelPooling": "transforms",
    "RandomStoredCrop": "crop_transforms",
    "View": "view",
    "collate": "batch",
    "collate_crops": "batch",
    "pool_labels": "pooling",
}
__all__ = [
    "Calibration",
    "CropLabels",
    "LabelMap",
    "LabelMapBatch",
    "LabelPooling",
    "RandomStoredCrop",
    "View",
    "collate",
    "collate_crops",
    "pool_labels",
]


def __getattr__(name: str) -> Any:
    return import_lazily(__name__, _MODULES, name)


def __dir__() -> list[str]:
    return __all__
