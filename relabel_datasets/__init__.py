"""Localized multi-label soft labels for image datasets: ReLabel label maps and LabelPooling.

The names below are for everyday use. All other public names are in the subpackages: `annotate` makes datasets, `data` reads them,
`labels` holds label maps and their transforms, `train` trains students, and `analysis` and `report` show results. Names and
subpackages are imported on first use, so `import relabel_datasets` is fast and loads no library that is not needed.

Example:
    >>> import relabel_datasets as rd
    >>> dataset = rd.load_dataset("scenes-relabel", split="train", transforms=transforms)  # ending in rd.LabelPooling()
    >>> image, soft_label = dataset[0]
    >>> source = rd.data.ImageFolderSource("path/to/images")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._lazy import import_lazily

if TYPE_CHECKING:
    from . import analysis as analysis
    from . import annotate as annotate
    from . import data as data
    from . import demo as demo
    from . import errors as errors
    from . import hub as hub
    from . import labels as labels
    from . import report as report
    from . import shards as shards
    from . import storage as storage
    from . import train as train
    from ._version import __version__
    from .annotate.annotator import Annotator, ModuleAnnotator
    from .annotate.builder import build
    from .annotate.combine import Ensemble
    from .annotate.hf_annotator import HFAnnotator
    from .annotate.timm_annotator import TimmAnnotator
    from .data.datasets import RelabelDataset
    from .data.loading import load_dataset
    from .data.samples import decode_sample
    from .data.sampling import RelabelSampler
    from .data.store import LabelMaps
    from .data.stream import RelabelLoader, RelabelStream
    from .errors import DatasetError
    from .hub import publish
    from .labels.batch import collate, collate_crops
    from .labels.crop_labels import CropLabels
    from .labels.crop_transforms import RandomStoredCrop
    from .labels.label_map import LabelMap
    from .labels.pooling import pool_labels
    from .labels.transforms import LabelPooling
    from .shards.images import decode_image
    from .shards.verification import verify
    from .train.timm_augmentation import timm_transforms

_MODULES = {
    "Annotator": "annotate.annotator",
    "CropLabels": "labels.crop_labels",
    "DatasetError": "errors",
    "Ensemble": "annotate.combine",
    "HFAnnotator": "annotate.hf_annotator",
    "LabelMap": "labels.label_map",
    "LabelMaps": "data.store",
    "LabelPooling": "labels.transforms",
    "ModuleAnnotator": "annotate.annotator",
    "RandomStoredCrop": "labels.crop_transforms",
    "RelabelDataset": "data.datasets",
    "RelabelLoader": "data.stream",
    "RelabelSampler": "data.sampling",
    "RelabelStream": "data.stream",
    "TimmAnnotator": "annotate.timm_annotator",
    "__version__": "_version",
    "build": "annotate.builder",
    "collate": "labels.batch",
    "collate_crops": "labels.batch",
    "decode_image": "shards.images",
    "decode_sample": "data.samples",
    "load_dataset": "data.loading",
    "pool_labels": "labels.pooling",
    "publish": "hub",
    "timm_transforms": "train.timm_augmentation",
    "verify": "shards.verification",
}
_SUBMODULES = (
    "analysis",
    "annotate",
    "data",
    "demo",
    "errors",
    "hub",
    "labels",
    "report",
    "shards",
    "storage",
    "train",
)
__all__ = [
    "Annotator",
    "CropLabels",
    "DatasetError",
    "Ensemble",
    "HFAnnotator",
    "LabelMap",
    "LabelMaps",
    "LabelPooling",
    "ModuleAnnotator",
    "RandomStoredCrop",
    "RelabelDataset",
    "RelabelLoader",
    "RelabelSampler",
    "RelabelStream",
    "TimmAnnotator",
    "__version__",
    "build",
    "collate",
    "collate_crops",
    "decode_image",
    "decode_sample",
    "load_dataset",
    "pool_labels",
    "publish",
    "timm_transforms",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f".{name}", __name__)
    if name not in _MODULES and not name.startswith("_"):
        homes = (f"{__name__}.{home}" for home in _SUBMODULES if name in import_module(f".{home}", __name__).__all__)
        if home := next(homes, None):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}: use {home}.{name}")
    return import_lazily(__name__, _MODULES, name)


def __dir__() -> list[str]:
    return [*__all__, *_SUBMODULES]
