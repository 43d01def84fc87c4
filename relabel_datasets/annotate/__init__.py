"""Annotators, `build`, its engines, and the import of published label maps.

Names are imported on first use.

Example:
    >>> from relabel_datasets.annotate import TimmAnnotator, build
    >>> from relabel_datasets.data import ImageFolderSource
    >>> annotator = TimmAnnotator("resnet50.a1_in1k", pretrained=True)
    >>> build(ImageFolderSource("path/to/images"), "path/to/dataset", annotator, split="train")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._lazy import import_lazily

if TYPE_CHECKING:
    from .annotator import Annotator, ClassSubset, ModuleAnnotator
    from .builder import build
    from .catalogue import AnnotatorEntry, describe_annotators
    from .classes import match_classes
    from .combine import Ensemble, FlipAveraged
    from .custom import load_annotator
    from .engines import Description, Engine, LocalEngine, MakeAnnotator, Workers
    from .hf_annotator import HFAnnotator
    from .importers import import_label_maps
    from .orientation import OrderCheck, detect_order
    from .published import PublishedMaps
    from .ray_engine import RayEngine
    from .shard import BuildConfig
    from .timm_annotator import TimmAnnotator

_MODULES = {
    "Annotator": "annotator",
    "AnnotatorEntry": "catalogue",
    "BuildConfig": "shard",
    "ClassSubset": "annotator",
    "Description": "engines",
    "Engine": "engines",
    "Ensemble": "combine",
    "FlipAveraged": "combine",
    "HFAnnotator": "hf_annotator",
    "LocalEngine": "engines",
    "MakeAnnotator": "engines",
    "ModuleAnnotator": "annotator",
    "OrderCheck": "orientation",
    "PublishedMaps": "published",
    "RayEngine": "ray_engine",
    "TimmAnnotator": "timm_annotator",
    "Workers": "engines",
    "build": "builder",
    "describe_annotators": "catalogue",
    "detect_order": "orientation",
    "import_label_maps": "importers",
    "load_annotator": "custom",
    "match_classes": "classes",
}
__all__ = [
    "Annotator",
    "AnnotatorEntry",
    "BuildConfig",
    "ClassSubset",
    "Description",
    "Engine",
    "Ensemble",
    "FlipAveraged",
    "HFAnnotator",
    "LocalEngine",
    "MakeAnnotator",
    "ModuleAnnotator",
    "OrderCheck",
    "PublishedMaps",
    "RayEngine",
    "TimmAnnotator",
    "Workers",
    "build",
    "describe_annotators",
    "detect_order",
    "import_label_maps",
    "load_annotator",
    "match_classes",
]


def __getattr__(name: str) -> Any:
    return import_lazily(__name__, _MODULES, name)


def __dir__() -> list[str]:
    return __all__
