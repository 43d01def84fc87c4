"""Registry of encodings. It does not import torch, so that the command line can list them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from .base import Encoding


@dataclass(frozen=True)
class EncodingEntry:
    """Choices that users have with an encoding, and where its code is.

    Attributes:
        name: Name of the encoding, as stored in manifests.
        implementation: Module and class of the encoding, `".module:Class"`.
        summary: Phrase for help texts that says what is stored.
        default_k: Default number of classes to keep.
        k_unit: Unit to which `k` applies, such as `"per image"`.
        storage_dtypes: Storage dtypes of the logits, the default first.
    """

    name: str
    implementation: str
    summary: str
    default_k: int
    k_unit: str
    storage_dtypes: tuple[str, ...]

    def resolve_k(self, k: int | None) -> int:
        """Return the number of classes to keep: `k`, or the default if `k` is None.

        Raises:
            ValueError: `k` is below 1.
        """
        if k is not None and k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        return self.default_k if k is None else k

    def resolve_storage_dtype(self, storage_dtype: str | None) -> str:
        """Return a storage dtype after checking it, or the default for None.

        Raises:
            ValueError: The encoding does not have this storage dtype.
        """
        if storage_dtype is None:
            return self.storage_dtypes[0]
        if storage_dtype not in self.storage_dtypes:
            known = ", ".join(map(repr, self.storage_dtypes))
            raise ValueError(f"storage_dtype must be one of {known} for {self.name} maps, got {storage_dtype!r}")
        return storage_dtype


ENCODINGS: dict[str, EncodingEntry] = {
    entry.name: entry
    for entry in (
        EncodingEntry(
            "heatmaps", ".heatmaps:Heatmaps", "all locations of the most important classes", 10, "per image",
            ("uint4", "uint8", "float16"),
        ),
        EncodingEntry(
            "topk", ".topk:TopK", "the best classes at each location, as in the paper", 5, "per location",
            ("float16", "uint8"),
        ),
    )
}  # fmt: skip
DEFAULT_ENCODING = "heatmaps"


def find_entry(name: str) -> EncodingEntry:
    """Return the entry of an encoding.

    Raises:
        ValueError: The name is not that of an encoding.
    """
    if name not in ENCODINGS:
        raise ValueError(f"encoding must be one of {sorted(ENCODINGS)}, got {name!r}")
    return ENCODINGS[name]


def get_encoding(name: str) -> Encoding:
    """Return the encoding of this name. There is one object per encoding.

    Raises:
        ValueError: The name is not that of an encoding.
    """
    return _make(find_entry(name))


@cache
def _make(entry: EncodingEntry) -> Encoding:
    module, _, class_name = entry.implementation.partition(":")
    encoding_class = getattr(import_module(module, __package__), class_name)
    return cast("Encoding", encoding_class(entry))
