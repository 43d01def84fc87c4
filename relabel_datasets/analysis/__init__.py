"""Measure overlap of crops and objects, label map statistics, and the quality of classifiers.

Names are imported on first use.

Example:
    >>> from relabel_datasets.analysis import analyze
    >>> analysis = analyze("path/to/dataset", split="train", boxes="path/to/boxes")
    >>> print(analysis)  # shares, entropies and counts by topic
    >>> print(analysis.tables["overlap"].to_csv())
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._lazy import import_lazily

if TYPE_CHECKING:
    from .analysis import Analysis, Table, analyze
    from .boxes import read_boxes
    from .label_maps import MapMeasures, measure_images, measure_maps
    from .metrics import Metrics, mean_average_precision, real_labels
    from .object_measures import ObjectMeasures
    from .objects import Objects, find_objects
    from .overlap import Overlaps, overlaps
    from .suspects import find_suspects, label_margins

_MODULES = {
    "Analysis": "analysis",
    "MapMeasures": "label_maps",
    "Metrics": "metrics",
    "ObjectMeasures": "object_measures",
    "Objects": "objects",
    "Overlaps": "overlap",
    "Table": "analysis",
    "analyze": "analysis",
    "find_objects": "objects",
    "find_suspects": "suspects",
    "label_margins": "suspects",
    "mean_average_precision": "metrics",
    "measure_images": "label_maps",
    "measure_maps": "label_maps",
    "overlaps": "overlap",
    "read_boxes": "boxes",
    "real_labels": "metrics",
}
__all__ = [
    "Analysis",
    "MapMeasures",
    "Metrics",
    "ObjectMeasures",
    "Objects",
    "Overlaps",
    "Table",
    "analyze",
    "find_objects",
    "find_suspects",
    "label_margins",
    "mean_average_precision",
    "measure_images",
    "measure_maps",
    "overlaps",
    "read_boxes",
    "real_labels",
]


def __getattr__(name: str) -> Any:
    return import_lazily(__name__, _MODULES, name)


def __dir__() -> list[str]:
    return __all__
