"""Show label maps: as an HTML page, as pictures, as plots, and as text in a terminal.

Names are imported on first use.

Example:
    >>> from relabel_datasets.report import describe, write_report
    >>> print(describe("path/to/dataset"))  # configs, splits and the first samples with heatmaps
    >>> write_report("path/to/dataset", "report.html", split="validation")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._lazy import import_lazily

if TYPE_CHECKING:
    from .html_report import write_report
    from .overlay import contact_sheet, draw_figure, draw_heatmap, save_overlays
    from .pictures import draw_pictures
    from .plots import plot, save_plots
    from .terminal import describe

_MODULES = {
    "contact_sheet": "overlay",
    "describe": "terminal",
    "draw_figure": "overlay",
    "draw_heatmap": "overlay",
    "draw_pictures": "pictures",
    "plot": "plots",
    "save_overlays": "overlay",
    "save_plots": "plots",
    "write_report": "html_report",
}
__all__ = [
    "contact_sheet",
    "describe",
    "draw_figure",
    "draw_heatmap",
    "draw_pictures",
    "plot",
    "save_overlays",
    "save_plots",
    "write_report",
]


def __getattr__(name: str) -> Any:
    return import_lazily(__name__, _MODULES, name)


def __dir__() -> list[str]:
    return __all__
