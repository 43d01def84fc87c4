"""What `heatmaps` and `topk` share: logits of K classes on a grid of locations, and the class indices of these logits.

Shapes: B images, C classes, K logits stored at each of H x W locations.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd import forward_ad

from ...errors import LabelMapError
from ..limits import MAX_DENSE
from ..pooling_checks import check_finite
from ..view import Rows, View, to_rows
from ..weights import BoxWeights, line_weights
from .base import Array, Encoded, MapEncoding, Parts, StoredTensor, Temperature
from .grid_pooling import divisors_of, pool_scales
from .levels import BITS, unpack_levels

Floats = npt.NDArray[np.float32]
_CLASS_DTYPES = tuple(np.dtype(name) for name in ("uint8", "uint16", "uint32"))
_FLOAT16_MAX = float(np.finfo(np.float16).max)


class SparseEncoding(MapEncoding):
    """Encoding with logits `[K, H, W]` and the indices `classes` of the classes that they belong to.

    Attributes:
        parts: Names of the parts of a label map.
    """

    parts: ClassVar[tuple[str, ...]]

    # What the encodings differ in.

    @abstractmethod
    def classes_shape(self, logits_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the class indices of logits `[K, H, W]`."""

    @abstractmethod
    def layout(
        self, num_classes: int, k: int, map_size: tuple[int, int], storage_dtype: str
    ) -> dict[str, StoredTensor]:
        """Return the tensors of a stored map."""

    @abstractmethod
    def find_storage_dtype(self, tensors: Mapping[str, StoredTensor], num_classes: int) -> str:
        """Return the storage dtype of a stored map by its tensors."""

    @abstractmethod
    def mean_logits(self, encoded: Encoded, weights: Tensor | BoxWeights, shape: tuple[int, ...]) -> Tensor:
        """Compute the mean logits of cells, see `MeanLogits`."""

    @abstractmethod
    def mean_logits_of_box(
        self, logits: Floats, parts: Parts, num_classes: int, lines: tuple[Floats, Floats] | None
    ) -> Floats:
        """Compute the mean logits `[C]` of one box, as a new array.

        Args:
            logits: Logits `[K, H, W]`.
            parts: Parts of the map.
            num_classes: Number of classes C.
            lines: Weights of rows `[H]` and columns `[W]`, or None for a box outside the image.
        """

    @abstractmethod
    def dense_base(self, encoded: Encoded) -> Tensor:
        """Return the logits `[B, C]` of classes at locations where they are not stored."""

    # Stored maps.

    def num_bytes(self, num_classes: int, k: int, map_size: tuple[int, int], storage_dtype: str) -> int:
        tensors = self.layout(num_classes, k, map_size, storage_dtype).values()
        return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors)

    def check_header(self, tensors: Mapping[str, StoredTensor], num_classes: int) -> str:
        logits_shape, classes_shape = tensors["logits"].shape, tensors["classes"].shape
        if len(logits_shape) != 3 or not classes_shape:
            raise LabelMapError(f"logits must be [K, H, W] and classes have K, got {logits_shape} and {classes_shape}")
        k, map_size = classes_shape[0], (logits_shape[1], logits_shape[2])
        if num_classes * math.prod(map_size) > MAX_DENSE:
            raise LabelMapError(
                f"a map of {num_classes} classes at {map_size} locations exceeds {MAX_DENSE} classes x locations"
            )
        if k > num_classes:
            raise LabelMapError(f"a map of {num_classes} classes cannot store {k} of them at each location")
        storage_dtype = self.find_storage_dtype(tensors, num_classes)
        for name, expected in self.layout(num_classes, k, map_size, storage_dtype).items():
            if tensors[name] != expected:
                shape, dtype = tensors[name]
                raise LabelMapError(f"{name} must be {expected.dtype} {expected.shape}, got {dtype} {shape}")
        return storage_dtype

    def check_storable(self, encoded: Encoded) -> None:
        tensors, num_classes = encoded.tensors, encoded.num_classes
        logits, classes = encoded.logits, tensors["classes"]
        if 0 in logits.shape[1:] or classes.shape[1:] != self.classes_shape(tuple(logits.shape[1:])):
            raise ValueError(
                f"stored {self.name} maps have logits [K, H, W] and classes {self.classes_shape(tuple(logits.shape[1:]))}, "
                f"got {tuple(logits.shape[1:])} and {tuple(classes.shape[1:])}"
            )
        if num_classes * math.prod(logits.shape[2:]) > MAX_DENSE:
            raise ValueError(
                f"a label map has at most {MAX_DENSE} classes x locations, got {num_classes} x {tuple(logits.shape[2:])}: "
                "choose a smaller input size"
            )
        if bool(((classes < 0) | (classes >= num_classes)).any()):
            raise ValueError(f"class indices must be in 0 .. {num_classes - 1}")
        if _has_repeated(classes, 1):
            raise ValueError("the classes of one location must differ from each other")
        for name, values in tensors.items():
            if values.is_floating_point() and not bool((values.abs() <= _FLOAT16_MAX).all()):  # false for nan, too
                raise ValueError(f"{name} must be finite and within float16's +-{_FLOAT16_MAX:.0f}")

    # One label map.

    def check(self, logits: Tensor, arguments: Mapping[str, Any], num_classes: int) -> Parts:
        if logits.ndim != 3 or not logits.is_floating_point():
            raise ValueError(f"logits must be floating point [K, H, W], got {logits.dtype} {tuple(logits.shape)}")
        if arguments.keys() != set(self.parts):
            expected, given = (" and ".join(["logits", *names]) for names in (self.parts, arguments))
            raise ValueError(f"{self.name} maps are made of {expected}, got {given}")
        classes = torch.as_tensor(arguments["classes"], device=logits.device)
        shape = self.classes_shape(tuple(logits.shape))
        if classes.is_floating_point() or classes.shape != shape:
            raise ValueError(f"classes must be integers of shape {shape}, got {classes.dtype} {tuple(classes.shape)}")
        if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
            raise ValueError(f"class indices must be in 0 .. {num_classes - 1}, got {classes.min()} .. {classes.max()}")
        return {"classes": classes.long()}

    def find_damage(self, logits: Tensor, parts: Parts) -> str | None:
        return "a class is stored more than once at a location" if _has_repeated(parts["classes"], 0) else None

    def pool_one(
        self,
        logits: Tensor,
        parts: Parts,
        num_classes: int,
        view: View,
        output_size: int | Sequence[int] = 1,
        temperature: Temperature = 1.0,
    ) -> Tensor:
        pooled = None if output_size != 1 else self.mean_of_box(logits, parts, num_classes, view)
        if pooled is None:
            return super().pool_one(logits, parts, num_classes, view, output_size, temperature)
        (divisor,) = divisors_of(temperature, 1)
        soft, number = torch.from_numpy(pooled), np.asarray(divisor).item()
        return (soft if number == 1 else soft / number).softmax(0)

    def mean_of_box(self, logits: Tensor, parts: Parts, num_classes: int, view: View) -> Floats | None:
        """Return the mean logits `[C]` of one view as a new array, or None for views and maps that need torch.

        An upright view on the CPU is computed in NumPy, whose calls cost a fraction of torch's.
        """
        if not (view.is_box and _is_constant_on_cpu(logits, parts)):
            return None
        height, width = logits.shape[1:]
        x1, y1, x2, y2 = view.box_xyxy
        left, top, right, bottom = view.visible_xyxy
        if not math.isfinite(x1 + y1 + x2 + y2 + left + top + right + bottom):
            check_finite("views", to_rows([view]))
        rows, columns = line_weights(y1, y2, top, bottom, height), line_weights(x1, x2, left, right, width)
        lines = None if rows is None or columns is None else (rows, columns)
        return self.mean_logits_of_box(logits.numpy(), parts, num_classes, lines)

    # Batches.

    def batch_key(self, logits: Tensor, parts: Parts) -> tuple[Any, ...]:
        return tuple(logits.shape)  # determines the shapes of all parts

    def pool(
        self, encoded: Encoded, views: Rows, output_size: int | Sequence[int] = 1, temperature: Temperature = 1.0
    ) -> Tensor:
        return pool_scales([encoded], views, self.mean_logits, output_size, temperature)

    def dense(self, encoded: Encoded) -> Tensor:
        logits = encoded.logits
        dense = self.dense_base(encoded)[:, :, None, None].expand(-1, -1, *logits.shape[2:]).clone()
        return dense.scatter_(1, encoded.tensors["classes"].expand(logits.shape), logits)

    def class_logits(self, encoded: Encoded, classes: Tensor) -> Tensor:
        base = self.dense_base(encoded).gather(1, classes[:, None])[:, :, None, None]
        is_class = encoded.tensors["classes"] == classes[:, None, None, None]
        return (base + ((encoded.logits - base) * is_class).sum(1, keepdim=True))[:, 0]


def _is_constant_on_cpu(logits: Tensor, parts: Parts) -> bool:
    """Return whether a map is on the CPU in float32 and takes part in no differentiation, which NumPy would not see."""
    return (
        logits.device.type == "cpu"
        and logits.dtype == torch.float32
        and forward_ad._current_level < 0
        and not (logits.requires_grad or any(getattr(part, "requires_grad", False) for part in parts.values()))
    )


def _has_repeated(classes: Tensor, dim: int) -> bool:
    return bool((classes.sort(dim).values.diff(dim=dim) == 0).any())


def class_dtype(num_classes: int) -> np.dtype[Any]:
    """Return the narrowest dtype that holds the class indices."""
    return next(dtype for dtype in _CLASS_DTYPES if num_classes <= 1 << 8 * dtype.itemsize)


def check_highest(index: int, num_classes: int) -> None:
    """Raise LabelMapError if the highest stored class index is out of range."""
    if index >= num_classes:
        raise LabelMapError(f"class index {index} is not below num_classes={num_classes}")


def to_floats(logits: Tensor) -> Floats:
    """Return logits on the CPU in float32, for the arithmetic of stored maps, which is NumPy's on all devices."""
    values: Floats = logits.detach().float().cpu().numpy()
    return values


def to_finite(stored: Array, name: str) -> Floats:
    """Return stored float16 values in float32.

    Raises:
        LabelMapError: A value is not finite.
    """
    values: Floats = stored.astype(np.float32)
    if np.count_nonzero(np.isfinite(values)) != values.size:  # half the time of np.all
        raise LabelMapError(f"{name} must be finite, got nan or inf")
    return values


def decode_ranges(stored: Array, storage_dtype: str) -> tuple[Floats, Floats]:
    """Return the value of level 0 and the difference between levels, `[B, N]` each, of stored ranges `[B, N, 2]`."""
    ranges = to_finite(stored, "ranges")
    low = ranges[:, :, 0]
    return low, (ranges[:, :, 1] - low) * np.float32(1 / (2 ** BITS[storage_dtype] - 1))


def decode_levels(stored: Array, low: Floats, step: Floats, storage_dtype: str) -> Floats:
    """Return the logits `[B, K, H, W]` of stored levels, given `low` and `step` `[B, K]`."""
    logits: Floats = unpack_levels(stored, low.shape[1], BITS[storage_dtype]) * step[:, :, None, None]
    logits += low[:, :, None, None]
    return logits
