"""Registry of encodings. It does not import torch, so that the command line can list them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, cast

from ..limits import MAX_CROPS

if TYPE_CHECKING:
    from .base import Encoding, MapEncoding


@dataclass(frozen=True)
class EncodingEntry:
    """Choices that users have with an encoding, and where its code is.

    Attributes:
        name: Name of the encoding, as stored in manifests.
        implementation: Module and class of the encoding, `".module:Class"`.
        summary: Phrase for help texts that says what is stored.
        default_k: Default of `k`.
        k_unit: Phrase that says what `k` counts, such as `"classes to keep per image"`.
        storage_dtypes: Storage dtypes of the logits, the default first.
        default_num_crops: Default number of crops per image for an encoding of stored crops, None for one of label maps.
        has_scales: Whether it stores a label map for each of several input sizes. Default: False.
    """

    name: str
    implementation: str
    summary: str
    default_k: int
    k_unit: str
    storage_dtypes: tuple[str, ...]
    default_num_crops: int | None = None
    has_scales: bool = False

    @property
    def is_map(self) -> bool:
        """Whether the encoding stores label maps, not crops."""
        return self.default_num_crops is None

    def resolve_k(self, k: int | None) -> int:
        """Return `k`, or its default if `k` is None.

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
            labels = f"{self.name} maps" if self.is_map else self.name
            raise ValueError(f"storage_dtype must be one of {known} for {labels}, got {storage_dtype!r}")
        return storage_dtype

    def resolve_num_crops(self, num_crops: int | None) -> int | None:
        """Return the number of crops per image after checking it, the default for None. It is None for label maps.

        Raises:
            ValueError: The number is out of range, or the encoding stores label maps.
        """
        if num_crops is None:
            return self.default_num_crops
        if self.is_map:
            raise ValueError(
                f"num_crops={num_crops} needs encoding='crops', got {self.name!r}, which stores one label map per image"
            )
        if not 1 <= num_crops <= MAX_CROPS:
            raise ValueError(f"num_crops must be 1 to {MAX_CROPS}, got {num_crops}")
        return num_crops


ENCODINGS: dict[str, EncodingEntry] = {
    entry.name: entry
    for entry in (
        EncodingEntry(
            "heatmaps", ".heatmaps:Heatmaps", "all locations of the most important classes", 10, "classes to keep per image",
            ("uint4", "uint8", "float16"),
        ),
        EncodingEntry(
            "topk", ".topk:TopK", "the best classes at each location, as in the paper", 5, "classes to keep per location",
            ("float16", "uint8"),
        ),
        EncodingEntry(
            "multiscale", ".multiscale:MultiScale", "heatmaps of each of the input sizes of --scales", 10,
            "classes to keep per image and input size", ("uint4", "uint8", "float16"), has_scales=True,
        ),
        EncodingEntry(
            "crops", ".crops:Crops", "labels of a fixed number of random crops", 16,
            "components that the labels of an image are made of", ("compact",), 100
        ),
    )
}  # fmt: skip
DEFAULT_ENCODING = "heatmaps"


def map_encodings() -> list[str]:
    """Return the names of the encodings of label maps."""
    return [entry.name for entry in ENCODINGS.values() if entry.is_map]


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


def get_map_encoding(name: str) -> MapEncoding:
    """Return the encoding of label maps of this name.

    Raises:
        ValueError: The name is not that of an encoding of label maps.
    """
    if name not in map_encodings():
        hint = ", which stores crops: use CropLabels" if name in ENCODINGS else ""
        raise ValueError(f"encoding must be one of {sorted(map_encodings())}, got {name!r}{hint}")
    return cast("MapEncoding", get_encoding(name))


@cache
def _make(entry: EncodingEntry) -> Encoding:
    module, _, class_name = entry.implementation.partition(":")
    encoding_class = getattr(import_module(module, __package__), class_name)
    return cast("Encoding", encoding_class(entry))
