"""Base classes of encodings, and encoded logits.

Shapes: B images, C classes, S maps per image, K logits kept at each location, H x W locations, n output cells.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...devices import copy_to_cpu
from ..view import Rows, View, to_rows
from .registry import EncodingEntry, get_encoding, get_map_encoding

_FINITE = "is_finite"
Array = npt.NDArray[Any]
Temperature = float | npt.NDArray[np.float64]  # of all cells, or of each cell and map of an image, `[B, n, S]`
Parts = dict[str, Any]  # tensors of one map except the logits, by name; an encoding may keep some of them packed


class Encoded(NamedTuple):
    """Encoded logits of a batch of images.

    Attributes:
        encoding: Encoding of the logits.
        tensors: Tensors of the encoding by name, each with a batch dimension. `"logits"` is always one of them.
        num_classes: Number of classes C.
    """

    encoding: MapEncoding
    tensors: Mapping[str, Tensor]
    num_classes: int

    @property
    def logits(self) -> Tensor:
        """Stored logits, with a batch dimension."""
        return self.tensors["logits"]

    def select(self, rows: slice | Tensor) -> Encoded:
        """Return the encoded logits of some images of the batch."""
        return self.changed(lambda tensor: tensor[rows])

    def changed(self, change: Callable[[Tensor], Tensor]) -> Encoded:
        """Return a copy whose tensors are `change(tensor)`."""
        return self._replace(tensors={name: change(tensor) for name, tensor in self.tensors.items()})


class StoredTensor(NamedTuple):
    """Shape and dtype of a tensor in the header of a stored map."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Encoding(ABC):
    """How the labels of images are stored and read.

    There are two kinds: a `MapEncoding` stores label maps, and `crops.Crops` stores labels of fixed crops.

    Attributes:
        entry: Entry of the registry.
        stored_tensors: Names of the tensors that are stored for an image.
        optional_tensors: Names of those that are not stored for every image.
        stored_types: Types of stored tensors, as safetensors spells them.
    """

    stored_tensors: ClassVar[tuple[str, ...]]
    optional_tensors: ClassVar[tuple[str, ...]] = ()
    stored_types: ClassVar[tuple[str, ...]] = ("U8", "U16", "U32", "F16")

    def __init__(self, entry: EncodingEntry) -> None:
        self.entry = entry

    @property
    def name(self) -> str:
        """Name of the encoding."""
        return self.entry.name

    def __reduce__(self) -> tuple[Any, ...]:  # copies and other processes use the registered object
        return get_encoding, (self.name,)

    def __repr__(self) -> str:
        return f"<encoding {self.name}>"

    @abstractmethod
    def check_header(self, tensors: Mapping[str, StoredTensor], num_classes: int) -> str:
        """Return the storage dtype of the labels of an image after checking the shapes and dtypes of their tensors.

        Raises:
            LabelMapError: Shapes or dtypes do not fit together.
        """

    @abstractmethod
    def decode(
        self, arrays: Mapping[str, Array], num_classes: int, storage_dtype: str
    ) -> dict[str, Tensor] | list[Parts]:
        """Decode the labels of images with the same header.

        Args:
            arrays: Stored tensors with a batch dimension, as views of the bytes.
            num_classes: Number of classes C.
            storage_dtype: Storage dtype found by `check_header`.

        Returns:
            The tensors of a batch of label maps, as in `Encoded`, or the tensors of each image for stored crops.

        Raises:
            LabelMapError: Values are out of range.
        """


class MapEncoding(Encoding):
    """How the logits of label maps are chosen, stored and pooled.

    A label map has the tensor `logits` and, by name, the other tensors of its encoding (its *parts*). Methods get one map
    without a batch dimension, or a batch as `Encoded`.
    """

    @abstractmethod
    def decode(self, arrays: Mapping[str, Array], num_classes: int, storage_dtype: str) -> dict[str, Tensor]:
        """See `Encoding.decode`."""

    # Encode and store.

    @abstractmethod
    def encode(self, dense: Tensor, k: int) -> dict[str, Tensor]:
        """Encode finite float32 logits `[B, C, H, W]`, keeping `k` <= C classes. Call `encode_logits`, which checks them."""

    def encode_scales(self, dense: Sequence[Tensor], k: int) -> dict[str, Tensor]:
        """Encode the logits of S maps of each image, see `encode`.

        Raises:
            ValueError: The encoding stores one map per image, and there are several.
        """
        if len(dense) != 1:
            raise ValueError(
                f"{self.name} maps are made of the logits of one input size, got those of {len(dense)}: use "
                "encoding='multiscale', or average them"
            )
        return self.encode(dense[0], k)

    @abstractmethod
    def check_storable(self, encoded: Encoded) -> None:
        """Raise ValueError unless the maps of a batch can be read back after they are stored."""

    @abstractmethod
    def store(self, encoded: Encoded, storage_dtype: str) -> dict[str, Array]:
        """Return the tensors to store, with a batch dimension."""

    @abstractmethod
    def num_bytes(self, num_classes: int, k: int, map_size: tuple[int, int], storage_dtype: str) -> int:
        """Return the size of the tensors of a stored map in bytes. The header takes about 350 bytes more."""

    # One label map.

    @abstractmethod
    def check(self, logits: Tensor, arguments: Mapping[str, Any], num_classes: int) -> Parts:
        """Return the parts of a map that is made of the arguments of a caller, on the device of the logits.

        Raises:
            ValueError: Names, shapes, dtypes or class indices do not fit together.
        """

    def plain(self, parts: Parts) -> dict[str, Tensor]:
        """Return the parts of a map as tensors, none of them packed."""
        return parts

    def like(self, parts: Parts, logits: Tensor) -> Parts:
        """Return the parts of a map on the device of `logits`, and floating-point parts in its dtype."""
        converted = {name: _converted(part, logits) for name, part in parts.items()}
        is_same = all(converted[name] is part for name, part in parts.items())
        return parts if is_same else converted

    def map_sizes(self, logits: Tensor, parts: Parts) -> list[list[int]]:
        """Return the sizes (H, W) of the S maps of an image. S is 1 unless the encoding has several."""
        return [list(logits.shape[-2:])]

    def pool_one(
        self,
        logits: Tensor,
        parts: Parts,
        num_classes: int,
        view: View,
        output_size: int | Sequence[int] = 1,
        temperature: Temperature = 1.0,
    ) -> Tensor:
        """Return the soft label `[C]`, or `[C, h, w]` for a grid, of one view of one map. Equals `pool` of a batch of one."""
        encoded = Encoded(self, self.stack([logits], [parts]), num_classes)
        return self.pool(encoded, to_rows([view]), output_size, temperature)[0]

    # Batches.

    def separate(self, tensors: Mapping[str, Tensor], row: int, num_classes: int) -> Parts:
        """Return the logits and the parts of one map of a batch on the CPU.

        Each refers to its own part of the batch's memory, since pickle copies all memory that a tensor refers to.
        """
        return {name: torch.from_numpy(values.numpy()[row]) for name, values in tensors.items()}

    def batch_key(self, logits: Tensor, parts: Parts) -> tuple[Any, ...]:
        """Return what maps of one encoding and number of classes must share to be stacked."""
        return logits.shape, *(part.shape for part in parts.values())

    def stack(self, logits: Sequence[Tensor], parts: Sequence[Parts]) -> dict[str, Tensor]:
        """Return the tensors of a batch of maps that have the same `batch_key`."""
        stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        return {"logits": torch.stack(list(logits)), **stacked}

    @abstractmethod
    def pool(
        self, encoded: Encoded, views: Rows, output_size: int | Sequence[int] = 1, temperature: Temperature = 1.0
    ) -> Tensor:
        """Pool the logits under one view of each image of a batch.

        Args:
            encoded: Encoded logits of B images.
            views: View of each image, `[B, 10]`, see `view.to_rows`.
            output_size: Grid of output cells, see `pool_labels`.
            temperature: Divisor of the pooled logits before the softmax: one number, or one for each cell and map of an image,
                `[B, n, S]`. For one number, the logits of several maps are averaged; otherwise their quotients are added.

        Returns:
            Soft labels `[B, C]`, or `[B, C, h, w]` for a grid.

        Raises:
            ValueError: A view is not finite, or an argument is out of range.
        """

    @abstractmethod
    def dense(self, encoded: Encoded) -> Tensor:
        """Return the logits `[B, C, H, W]` of the whole images."""

    # Analysis and checks of whole datasets.

    def unpacked(self, encoded: Encoded) -> Encoded:
        """Return the same logits with no tensor packed, which saves time if a batch is pooled many times."""
        return encoded

    def class_logits(self, encoded: Encoded, classes: Tensor) -> Tensor:
        """Return the logits `[B, H, W]` of one class of each image, given as indices `[B]`, at all locations."""
        return self.dense(encoded)[torch.arange(len(classes)), classes]

    def find_damage(self, logits: Tensor, parts: Parts) -> str | None:
        """Describe damage of a map that readers do not look for, since it takes long, or return None."""
        return None


def encode_logits(dense: Tensor | Sequence[Tensor], encoding: str = "heatmaps", k: int | None = None) -> Encoded:
    """Encode dense logits, in batches on the device of the logits.

    Args:
        dense: Class logits at every location, `[B, C, H, W]`. For `"multiscale"`, those of each input size.
        encoding: Name of the encoding. Default: `"heatmaps"`.
        k: Number of classes to keep, at most C. Default: that of the encoding.

    Returns:
        The encoded logits, in float32.

    Raises:
        ValueError: The encoding is unknown or not one of label maps, `k` is below 1, the logits are not finite
            `[B, C, H, W]`, or their number does not fit the encoding.
    """
    encoded, is_finite = _encode(dense, encoding, k)
    _check_finite(is_finite)
    return encoded


def encode_to_cpu(dense: Tensor | Sequence[Tensor], encoding: str = "heatmaps", k: int | None = None) -> Encoded:
    """Encode dense logits on their device, and copy the result to the CPU, where maps are stored.

    Nothing waits for the device except the copy: `encode_logits` would wait once more, to check the logits.

    Args:
        dense: Class logits at every location, `[B, C, H, W]`. For `"multiscale"`, those of each input size.
        encoding: Name of the encoding. Default: `"heatmaps"`.
        k: Number of classes to keep, at most C. Default: that of the encoding.

    Returns:
        The encoded logits on the CPU, in float32.

    Raises:
        ValueError: See `encode_logits`.
    """
    encoded, is_finite = _encode(dense, encoding, k)
    copies = copy_to_cpu({**encoded.tensors, _FINITE: is_finite})
    _check_finite(copies.pop(_FINITE))
    return encoded._replace(tensors=copies)


def _encode(dense: Tensor | Sequence[Tensor], encoding: str, k: int | None) -> tuple[Encoded, Tensor]:
    """Return encoded logits, and whether the dense logits are finite as a tensor, both on the device of the logits."""
    chosen = get_map_encoding(encoding)
    num_kept = chosen.entry.resolve_k(k)
    maps = [dense] if isinstance(dense, Tensor) else list(dense)
    for one in maps:
        if one.ndim != 4 or 0 in one.shape[1:] or one.shape[:2] != maps[0].shape[:2]:
            shapes = " and ".join(str(tuple(other.shape)) for other in maps)
            raise ValueError(
                f"dense logits must be [B, C, H, W] with no empty side, and equal B and C in all maps, got {shapes}"
            )
    maps = [one.float() for one in maps]
    num_classes = maps[0].shape[1] if maps else 0
    tensors = chosen.encode_scales(maps, min(num_kept, num_classes))
    return Encoded(chosen, tensors, num_classes), torch.stack([torch.isfinite(one).all() for one in maps]).all()


def _check_finite(is_finite: Tensor) -> None:
    if not is_finite:
        raise ValueError("dense logits must be finite, got nan or inf: try the annotator in a wider dtype")


def _converted(part: Tensor, logits: Tensor) -> Tensor:
    if part.is_floating_point() and logits.is_floating_point():
        return part.to(logits.device, logits.dtype)
    return part.to(logits.device)
