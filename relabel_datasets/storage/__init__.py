"""Read and write local files, URLs and Hub repositories, with one cache.

Names are imported on first use.

Example:
    >>> from relabel_datasets.storage import open_folder
    >>> folder = open_folder("https://example.org/dataset", cache_limit="10GB")
    >>> folder.configs()  # names of the configs
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._lazy import import_lazily

if TYPE_CHECKING:
    from .folders import Folder
    from .resolve import open_folder

_MODULES = {
    "Folder": "folders",
    "open_folder": "resolve",
}
__all__ = [
    "Folder",
    "open_folder",
]


def __getattr__(name: str) -> Any:
    return import_lazily(__name__, _MODULES, name)


def __dir__() -> list[str]:
    return __all__
