"""Pictures, plots and HTML reports of label maps.

Names are imported on first use.

Example:
    >>> from relabel_datasets.report import write_report
    >>> write_report("path/to/dataset", "report.html", split="train")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._lazy import import_lazily

if TYPE_CHECKING:
    from .html_report import write_report

_MODULES = {
    "write_report": "html_report",
}
__all__ = [
    "write_report",
]


def __getattr__(name: str) -> Any:
    return import_lazily(__name__, _MODULES, name)


def __dir__() -> list[str]:
    return __all__
