"""The format on disk: manifest, index, tar files, images, checks, and dataset cards.

Names are imported on first use.

Example:
    >>> from relabel_datasets.shards import verify
    >>> report = verify("path/to/dataset")
    >>> report.ok  # no problem was found
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._lazy import import_lazily

if TYPE_CHECKING:
    from .card import write_card
    from .images import decode_image
    from .manifest import Manifest, Split
    from .verification import Problem, SplitCounts, VerifyReport, verify

_MODULES = {
    "Manifest": "manifest",
    "Problem": "verification",
    "Split": "manifest",
    "SplitCounts": "verification",
    "VerifyReport": "verification",
    "decode_image": "images",
    "verify": "verification",
    "write_card": "card",
}
__all__ = [
    "Manifest",
    "Problem",
    "Split",
    "SplitCounts",
    "VerifyReport",
    "decode_image",
    "verify",
    "write_card",
]


def __getattr__(name: str) -> Any:
    return import_lazily(__name__, _MODULES, name)


def __dir__() -> list[str]:
    return __all__
