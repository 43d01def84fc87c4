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
    from .annotator import Annotator, ModuleAnnotator
    from .builder import build
    from .catalogue import AnnotatorEntry, describe_annotators
    from .combine import Ensemble, FlipAveraged
    from .custom import load_annotator
    from .engines import Engine, LocalEngine
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
    "Engine": "engines",
    "Ensemble": "combine",
    "FlipAveraged": "combine",
    "HFAnnotator": "hf_annotator",
    "LocalEngine": "engines",
    "ModuleAnnotator": "annotator",
    "OrderCheck": "orientation",
    "PublishedMaps": "published",
    "RayEngine": "ray_engine",
    "TimmAnnotator": "timm_annotator",
    "build": "builder",
    "describe_annotators": "catalogue",
    "detect_order": "orientation",
    "import_label_maps": "importers",
    "load_annotator": "custom",
}
__all__ = [
    "Annotator",
    "AnnotatorEntry",
    "BuildConfig",
    "Engine",
    "Ensemble",
    "FlipAveraged",
    "HFAnnotator",
    "LocalEngine",
    "ModuleAnnotator",
    "OrderCheck",
    "PublishedMaps",
    "RayEngine",
    "TimmAnnotator",
    "build",
    "describe_annotators",
    "detect_order",
    "import_label_maps",
    "load_annotator",
]


def __getattr__(name: str) -> Any:
    return import_lazily(__name__, _MODULES, name)


def __dir__() -> list[str]:
    return __all__
