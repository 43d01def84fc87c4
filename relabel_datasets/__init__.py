"""Multi-label, localised soft labels for image datasets: ReLabel label maps and LabelPooling.

Importing this package loads torch and torchvision, but not timm or what else only the making of label maps needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .data.datasets import RelabelDataset
from .data.hf_source import HFSource
from .data.loading import load_dataset
from .data.samples import decode_sample
from .data.sampling import RelabelSampler
from .data.sources import ImageFolderSource, open_source
from .data.store import LabelMaps
from .data.stream import RelabelLoader, RelabelStream
from .data.stream_joins import join
from .data.tar_source import WebDatasetSource
from .errors import DatasetError, ImageError, LabelMapError
from .labels.batch import LabelMapBatch, collate
from .labels.label_map import LabelMap, View
from .labels.pooling import pool_labels
from .labels.transforms import LabelPooling
from .shards.images import decode_image
from .shards.verify import VerifyReport, verify
from .storage.resolve import open_folder

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
    from .train.classifier import Classifier, load_classifier
    from .train.compare import Student, compare
    from .train.evaluate import evaluate
    from .train.loop import train_student
    from .train.recipe import PRESETS, Machine, Recipe
    from .train.timm_transforms import timm_transforms
    from .train.tokens import MixToken, TokenLabelPooling, TokenStudent, token_label_loss

# What a training script need not wait for is imported when first asked for: timm alone takes seconds.
_LAZY = {
    "Annotator": "annotate.annotator",
    "AnnotatorEntry": "annotate.catalogue",
    "Classifier": "train.classifier",
    "Ensemble": "annotate.combine",
    "FlipAveraged": "annotate.combine",
    "HFAnnotator": "annotate.hf_annotator",
    "Machine": "train.recipe",
    "MixToken": "train.tokens",
    "ModuleAnnotator": "annotate.annotator",
    "PRESETS": "train.recipe",
    "Published": "hub",
    "PublishedMaps": "annotate.published",
    "RayEngine": "annotate.ray_engine",
    "Recipe": "train.recipe",
    "Settings": "annotate.shard",
    "Student": "train.compare",
    "TimmAnnotator": "annotate.timm_annotator",
    "TokenLabelPooling": "train.tokens",
    "TokenStudent": "train.tokens",
    "analyze": "analysis.analyze",
    "build": "annotate.build",
    "compare": "train.compare",
    "describe_annotators": "annotate.catalogue",
    "detect_order": "annotate.orientation",
    "evaluate": "train.evaluate",
    "import_label_maps": "annotate.importers",
    "load_classifier": "train.classifier",
    "publish": "hub",
    "timm_transforms": "train.timm_transforms",
    "token_label_loss": "train.tokens",
    "train_student": "train.loop",
    "write_report": "report.html_report",
}

__all__ = [
    "PRESETS",
    "Annotator",
    "AnnotatorEntry",
    "Classifier",
    "DatasetError",
    "Ensemble",
    "FlipAveraged",
    "HFAnnotator",
    "HFSource",
    "ImageError",
    "ImageFolderSource",
    "LabelMap",
    "LabelMapBatch",
    "LabelMapError",
    "LabelMaps",
    "LabelPooling",
    "Machine",
    "MixToken",
    "ModuleAnnotator",
    "Published",
    "PublishedMaps",
    "RayEngine",
    "Recipe",
    "RelabelDataset",
    "RelabelLoader",
    "RelabelSampler",
    "RelabelStream",
    "Settings",
    "Student",
    "TimmAnnotator",
    "TokenLabelPooling",
    "TokenStudent",
    "VerifyReport",
    "View",
    "WebDatasetSource",
    "analyze",
    "build",
    "collate",
    "compare",
    "decode_image",
    "decode_sample",
    "describe_annotators",
    "detect_order",
    "evaluate",
    "import_label_maps",
    "join",
    "load_classifier",
    "load_dataset",
    "open_folder",
    "open_source",
    "pool_labels",
    "publish",
    "timm_transforms",
    "token_label_loss",
    "train_student",
    "verify",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
