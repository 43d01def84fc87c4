"""Localized multi-label soft labels for image datasets: ReLabel label maps and LabelPooling.

Names are imported on first use, so that `import relabel_datasets` takes no time and the producer's libraries are loaded only
where label maps are made.

Example:
    >>> import relabel_datasets as rd
    >>> dataset = rd.load_dataset("scenes-relabel", split="train", transforms=transforms)  # ending in rd.LabelPooling()
    >>> image, soft_label = dataset[0]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._lazy import import_lazily

if TYPE_CHECKING:
    from .analysis.analysis import analyze
    from .annotate.annotator import Annotator, ModuleAnnotator
    from .annotate.build import build
    from .annotate.catalogue import AnnotatorEntry, describe_annotators
    from .annotate.combine import Ensemble, FlipAveraged
    from .annotate.hf_annotator import HFAnnotator
    from .annotate.importers import import_label_maps
    from .annotate.orientation import detect_order
    from .annotate.published import PublishedMaps
    from .annotate.ray_engine import RayEngine
    from .annotate.shard import BuildConfig
    from .annotate.timm_annotator import TimmAnnotator
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
    from .hub import PublishResult, publish
    from .labels.batch import LabelMapBatch, collate
    from .labels.label_map import LabelMap, View
    from .labels.pooling import pool_labels
    from .labels.transforms import LabelPooling
    from .report.html_report import write_report
    from .shards.images import decode_image
    from .shards.verify import VerifyReport, verify
    from .storage.resolve import open_folder
    from .train.classifier import Classifier, load_classifier
    from .train.comparison import ComparisonEntry, compare
    from .train.evaluation import evaluate
    from .train.loop import train_student
    from .train.recipe import PRESETS, Recipe, RuntimeConfig
    from .train.timm_augmentation import timm_transforms
    from .train.tokens import MixToken, TokenLabelPooling, TokenStudent, token_label_loss

_MODULES = {
    "Annotator": "annotate.annotator",
    "AnnotatorEntry": "annotate.catalogue",
    "Classifier": "train.classifier",
    "DatasetError": "errors",
    "Ensemble": "annotate.combine",
    "FlipAveraged": "annotate.combine",
    "HFAnnotator": "annotate.hf_annotator",
    "HFSource": "data.hf_source",
    "ImageError": "errors",
    "ImageFolderSource": "data.sources",
    "LabelMap": "labels.label_map",
    "LabelMapBatch": "labels.batch",
    "LabelMapError": "errors",
    "LabelMaps": "data.store",
    "LabelPooling": "labels.transforms",
    "RuntimeConfig": "train.recipe",
    "MixToken": "train.tokens",
    "ModuleAnnotator": "annotate.annotator",
    "PRESETS": "train.recipe",
    "PublishResult": "hub",
    "PublishedMaps": "annotate.published",
    "RayEngine": "annotate.ray_engine",
    "Recipe": "train.recipe",
    "RelabelDataset": "data.datasets",
    "RelabelLoader": "data.stream",
    "RelabelSampler": "data.sampling",
    "RelabelStream": "data.stream",
    "BuildConfig": "annotate.shard",
    "ComparisonEntry": "train.comparison",
    "TimmAnnotator": "annotate.timm_annotator",
    "TokenLabelPooling": "train.tokens",
    "TokenStudent": "train.tokens",
    "VerifyReport": "shards.verify",
    "View": "labels.label_map",
    "WebDatasetSource": "data.tar_source",
    "analyze": "analysis.analysis",
    "build": "annotate.build",
    "collate": "labels.batch",
    "compare": "train.comparison",
    "decode_image": "shards.images",
    "decode_sample": "data.samples",
    "describe_annotators": "annotate.catalogue",
    "detect_order": "annotate.orientation",
    "evaluate": "train.evaluation",
    "import_label_maps": "annotate.importers",
    "join": "data.stream_joins",
    "load_classifier": "train.classifier",
    "load_dataset": "data.loading",
    "open_folder": "storage.resolve",
    "open_source": "data.sources",
    "pool_labels": "labels.pooling",
    "publish": "hub",
    "timm_transforms": "train.timm_augmentation",
    "token_label_loss": "train.tokens",
    "train_student": "train.loop",
    "verify": "shards.verify",
    "write_report": "report.html_report",
}
__all__ = [
    "PRESETS",
    "Annotator",
    "AnnotatorEntry",
    "BuildConfig",
    "Classifier",
    "ComparisonEntry",
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
    "MixToken",
    "ModuleAnnotator",
    "PublishResult",
    "PublishedMaps",
    "RayEngine",
    "Recipe",
    "RelabelDataset",
    "RelabelLoader",
    "RelabelSampler",
    "RelabelStream",
    "RuntimeConfig",
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
    return import_lazily(__name__, _MODULES, name)


def __dir__() -> list[str]:
    return __all__
