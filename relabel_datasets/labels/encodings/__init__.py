"""Encodings: how the logits of label maps are chosen, stored and pooled, and how the labels of stored crops are.

Each encoding is one subclass of `Encoding` in a module of its own, and one entry of `ENCODINGS`. Those of label maps derive from
`MapEncoding`. Everything else asks the encoding of a label map.

Names are imported on first use.

Example:
    >>> from relabel_datasets.labels.encodings import ENCODINGS, encode_logits
    >>> list(ENCODINGS)
    ['heatmaps', 'topk', 'multiscale', 'crops']
    >>> encoded = encode_logits(dense, "topk", k=5)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..._lazy import import_lazily
from .registry import (
    DEFAULT_ENCODING,
    ENCODINGS,
    EncodingEntry,
    find_entry,
    get_encoding,
    get_map_encoding,
    map_encodings,
)

if TYPE_CHECKING:
    from .base import Encoded, Encoding, MapEncoding, encode_logits, encode_to_cpu

_MODULES = dict.fromkeys(("Encoded", "Encoding", "MapEncoding", "encode_logits", "encode_to_cpu"), "base")
__all__ = [
    "DEFAULT_ENCODING",
    "ENCODINGS",
    "Encoded",
    "Encoding",
    "EncodingEntry",
    "MapEncoding",
    "encode_logits",
    "encode_to_cpu",
    "find_entry",
    "get_encoding",
    "get_map_encoding",
    "map_encodings",
]


def __getattr__(name: str) -> Any:
    return import_lazily(__name__, _MODULES, name)


def __dir__() -> list[str]:
    return __all__
