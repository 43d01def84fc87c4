"""Annotators, `build`, its engines, and the import of published soft labels.

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
    from .annotator import Annotator, ModuleAnnotator
    from .builder import build
    from .catalogue import AnnotatorEntry, describe_annotators
    from .class_subset import ClassSubset
    from .classes import match_classes
    from .combine import Ensemble, FlipAveraged
    from .crop_files import CropFile
    from .crop_importers import import_crops
    from .custom import load_annotator
    from .engines import Description, Engine, LocalEngine, MakeAnnotator, Workers
    from .hf_annotator import HFAnnotator
    from .importers import import_label_maps
    from .orientation import OrderCheck, detect_order
    from .published import PublishedMaps
    from .published_crops import PublishedCrops
    from .ray_engine import RayEngine
    from .release_formats import find_format
    from .shard import BuildConfig
    from .timm_annotator import TimmAnnotator

_MODULES = {
    "Annotator": "annotator",
    "AnnotatorEntry": "catalogue",
    "BuildConfig": "shard",
    "ClassSubset": "class_subset",
    "CropFile": "crop_files",
    "Description": "engines",
    "Engine": "engines",
    "Ensemble": "combine",
    "FlipAveraged": "combine",
    "HFAnnotator": "hf_annotator",
    "LocalEngine": "engines",
    "MakeAnnotator": "engines",
    "ModuleAnnotator": "annotator",
    "OrderCheck": "orientation",
    "PublishedCrops": "published_crops",
    "PublishedMaps": "published",
    "RayEngine": "ray_engine",
    "TimmAnnotator": "timm_annotator",
    "Workers": "engines",
    "build": "builder",
    "describe_annotators": "catalogue",
    "detect_order": "orientation",
    "find_format": "release_formats",
    "import_crops": "crop_importers",
    "import_label_maps": "importers",
    "load_annotator": "custom",
    "match_classes": "classes",
}
__all__ = [
    "Annotator",
    "AnnotatorEntry",
    "BuildConfig",
    "ClassSubset",
    "CropFile",
    "Description",
    "Engine",
    "Ensemble",
    "FlipAveraged",
    "HFAnnotator",
    "LocalEngine",
    "MakeAnnotator",
    "ModuleAnnotator",
    "OrderCheck",
    "PublishedCrops",
    "PublishedMaps",
    "RayEngine",
    "TimmAnnotator",
    "Workers",
    "build",
    "describe_annotators",
    "detect_order",
    "find_format",
    "import_crops",
    "import_label_maps",
    "load_annotator",
    "match_classes",
]


def __getattr__(name: str) -> Any:
    return import_lazily(__name__, _MODULES, name)


def __dir__() -> list[str]:
    return __all__
