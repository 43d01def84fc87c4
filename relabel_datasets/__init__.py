"""Multi-label, localised soft labels for image datasets: ReLabel label maps and LabelPooling.

Importing this package loads torch and torchvision, but not timm or what else only the making of label maps needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .data.datasets import RelabelDataset
from .data.images import ImageError, decode_image
from .data.joins import join
from .data.loading import load_dataset
from .data.manifest import DatasetError
from .data.names import open_folder
from .data.samples import decode_sample
from .data.sampling import RelabelSampler
from .data.sources import HFSource, ImageFolderSource, WebDatasetSource, open_source
from .data.store import LabelMaps
from .data.stream import RelabelLoader, RelabelStream
from .data.verify import VerifyReport, verify
from .labels.codec import LabelMapError
from .labels.label_map import LabelMap, View
from .labels.pooling import pool_labels
from .labels.transforms import LabelPooling

if TYPE_CHECKING:
    from .analysis.analyze import analyze
    from .annotate.annotator import Annotator, ModuleAnnotator
    from .annotate.build import build
    from .annotate.catalogue import AnnotatorEntry, describe_annotators
    from .annotate.combine import Ensemble, FlipAveraged
    from .annotate.hf_annotator import HFAnnotator
    from .annotate.importers import import_label_maps
    from .annotate.orientation import detect_order
    from .annotate.published import PublishedMaps
    from .annotate.ray_engine import RayEngine
    from .annotate.shard import Settings
    from .annotate.timm_annotator import TimmAnnotator
    from .hub import Published, publish
    from .report.html_report import write_report
    from .train.timm_transforms import timm_transforms

# What a training script need not wait for is imported when first asked for: timm alone takes seconds.
_LAZY = {
    "Annotator": "annotate.annotator",
    "AnnotatorEntry": "annotate.catalogue",
    "Ensemble": "annotate.combine",
    "FlipAveraged": "annotate.combine",
    "HFAnnotator": "annotate.hf_annotator",
    "ModuleAnnotator": "annotate.annotator",
    "PublishedMaps": "annotate.published",
    "Published": "hub",
    "RayEngine": "annotate.ray_engine",
    "Settings": "annotate.shard",
    "TimmAnnotator": "annotate.timm_annotator",
    "analyze": "analysis.analyze",
    "build": "annotate.build",
    "describe_annotators": "annotate.catalogue",
    "detect_order": "annotate.orientation",
    "import_label_maps": "annotate.importers",
    "publish": "hub",
    "timm_transforms": "train.timm_transforms",
    "write_report": "report.html_report",
}

__all__ = [
    "Annotator",
    "AnnotatorEntry",
    "DatasetError",
    "Ensemble",
    "FlipAveraged",
    "HFAnnotator",
    "HFSource",
    "ImageError",
    "ImageFolderSource",
    "LabelMap",
    "LabelMapError",
    "LabelMaps",
    "LabelPooling",
    "ModuleAnnotator",
    "Published",
    "PublishedMaps",
    "RayEngine",
    "RelabelDataset",
    "RelabelLoader",
    "RelabelSampler",
    "RelabelStream",
    "Settings",
    "TimmAnnotator",
    "VerifyReport",
    "View",
    "WebDatasetSource",
    "analyze",
    "build",
    "decode_image",
    "decode_sample",
    "describe_annotators",
    "detect_order",
    "import_label_maps",
    "join",
    "load_dataset",
    "open_folder",
    "open_source",
    "pool_labels",
    "publish",
    "timm_transforms",
    "verify",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
