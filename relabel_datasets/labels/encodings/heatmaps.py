"""`heatmaps`: all locations of the K classes that matter most in an image, and a base, the mean logits of all other classes.

    stored tensor    dtype                  shape
    logits           F16, or U8 (8 bits)    [K, H, W]
                     or U8 (4 bits)         [ceil(K/2), H, W]: heatmap i in the low half of plane i, i + ceil(K/2) in the high
    classes          U8, U16 or U32         [K]: the narrowest dtype that holds C - 1
    base             as logits              [C], or [ceil(C/2)] packed as above. The base of a class that has a heatmap is the
                                            heatmap's mean, whatever is stored.
    ranges           F16, only with U8      [K + 1, 2]: values of the lowest and of the highest level of each heatmap, and of the
                                            base in the last row

In memory, the base that was read from disk stays packed until it is pooled, a few bits per class: a soft label of ImageNet-21k
takes 87 KB, but its label map only 20 KB. In a batch, the packed base is the tensors `base_levels`, `base_low`, `base_step` and
`base_means`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from ...errors import LabelMapError
from ..precision import full_precision, pooling_dtype
from ..weights import BoxWeights
from .base import Array, Encoded, Parts, StoredTensor
from .grid_pooling import each_cell
from .levels import BITS, float16_range, pack_levels, quantize_heatmaps, round_to_levels, unpack_levels
from .sparse import (
    Floats,
    SparseEncoding,
    check_highest,
    class_dtype,
    decode_levels,
    decode_ranges,
    to_finite,
    to_floats,
)

_PACKED = ("base_levels", "base_low", "base_step", "base_means")  # tensors of a batch, in the order of `PackedBase`


class PackedBase(NamedTuple):
    """The stored base of one map, up to eight times smaller than its float32 values.

    Attributes:
        levels: Quantization levels: uint8 `[C]`, or two 4-bit levels per byte, `[ceil(C/2)]`.
        low: Value of level 0.
        step: Difference between neighboring levels.
        means: Base of the classes that have a heatmap, `[K]`.
        num_classes: Number of classes C.
    """

    levels: Array
    low: np.float32
    step: np.float32
    means: Array
    num_classes: int

    def dense(self, classes: Array) -> Floats:
        """Return the base `[C]` as a new array, given the indices `[K]` of the classes that have a heatmap."""
        bits = 8 if len(self.levels) == self.num_classes else 4
        base: Floats = unpack_levels(self.levels[None], self.num_classes, bits)[0] * self.step
        base += self.low
        base[classes] = self.means
        return base


class Heatmaps(SparseEncoding):
    """Heatmaps `[K, H, W]` of the classes `[K, 1, 1]`, and the logits `base` `[C]` of all other classes."""

    stored_tensors = ("logits", "classes", "base", "ranges")
    optional_tensors = ("ranges",)
    parts = ("classes", "base")

    def encode(self, dense: Tensor, k: int) -> dict[str, Tensor]:
        weight = crop_probabilities(dense)  # [B, C]
        classes = weight.topk(k, dim=1).indices
        base = dense.mean((2, 3))
        heatmaps = dense.gather(1, classes[:, :, None, None].expand(-1, -1, *dense.shape[2:]))

        # The logits of the dropped classes vary together from location to location. Softmax ignores a constant subtracted from
        # all classes of a location, so their common part is subtracted from the heatmaps and the base fits better. The common
        # part has zero mean over locations, which keeps the mean of the map.
        rest = weight.scatter(1, classes, 0.0)
        rest = rest / rest.sum(1, keepdim=True).clamp_min(torch.finfo(rest.dtype).tiny)
        with full_precision(dense.device):
            common = torch.einsum("bc,bchw->bhw", rest, dense) - (rest * base).sum(1)[:, None, None]
        return {"logits": heatmaps - common[:, None], "classes": classes[:, :, None, None], "base": base}

    # Stored maps.

    def layout(
        self, num_classes: int, k: int, map_size: tuple[int, int], storage_dtype: str
    ) -> dict[str, StoredTensor]:
        is_quantized, per_byte = storage_dtype != "float16", 2 if storage_dtype == "uint4" else 1
        dtype = np.dtype(np.uint8 if is_quantized else np.float16)
        tensors = {
            "logits": StoredTensor((-(-k // per_byte), *map_size), dtype),
            "classes": StoredTensor((k,), class_dtype(num_classes)),
            "base": StoredTensor((-(-num_classes // per_byte),), dtype),
        }
        if is_quantized:
            tensors["ranges"] = StoredTensor((k + 1, 2), np.dtype(np.float16))
        return tensors

    def find_storage_dtype(self, tensors: Mapping[str, StoredTensor], num_classes: int) -> str:
        if "ranges" not in tensors:
            return "float16"
        return "uint8" if tensors["base"].shape == (num_classes,) else "uint4"

    def check_storable(self, encoded: Encoded) -> None:
        super().check_storable(encoded)
        base = encoded.tensors["base"]
        if base.shape[1:] != (encoded.num_classes,):
            raise ValueError(f"base must have shape ({encoded.num_classes},), got {tuple(base.shape[1:])}")

    def store(self, encoded: Encoded, storage_dtype: str) -> dict[str, Array]:
        logits, base = to_floats(encoded.logits), to_floats(encoded.tensors["base"])
        classes = encoded.tensors["classes"][:, :, 0, 0].cpu().numpy()
        stored = {"classes": classes.astype(class_dtype(encoded.num_classes))}
        if storage_dtype == "float16":
            return {**stored, "logits": logits.astype(np.float16), "base": base.astype(np.float16)}
        num_levels = 2 ** BITS[storage_dtype]
        low, high = float16_range(logits.reshape(*logits.shape[:2], -1))
        levels = quantize_heatmaps(logits, low, high, num_levels)
        base = _base_of_the_rest(base, classes)
        base_low, base_high = float16_range(base[:, None])
        base_levels = round_to_levels(base, base_low, base_high, num_levels)
        ranges = np.stack([np.concatenate([low, base_low], 1), np.concatenate([high, base_high], 1)], 2)
        return {
            **stored,
            "base": pack_levels(base_levels, storage_dtype),
            "logits": pack_levels(levels, storage_dtype),
            "ranges": ranges.astype(np.float16),
        }

    def decode(self, arrays: Mapping[str, Array], num_classes: int, storage_dtype: str) -> dict[str, Tensor]:
        classes = arrays["classes"].astype(np.int64)
        check_highest(int(classes.max()), num_classes)
        ordered = np.sort(classes, 1)
        repeats = (ordered[:, 1:] == ordered[:, :-1]).any(1)
        if repeats.any():
            raise LabelMapError(f"each heatmap must be of another class, got {classes[repeats][0].tolist()}")
        if storage_dtype == "float16":
            logits = to_finite(arrays["logits"], "logits")
            base = to_finite(arrays["base"], "base")
            base[np.arange(len(classes))[:, None], classes] = _means(logits)
            bases = {"base": base}
        else:
            low, step = decode_ranges(arrays["ranges"], storage_dtype)
            logits = decode_levels(arrays["logits"], low[:, :-1], step[:, :-1], storage_dtype)
            packed = arrays["base"].copy(), low[:, -1].copy(), step[:, -1].copy(), _means(logits)
            bases = dict(zip(_PACKED, packed, strict=True))
        tensors = {"logits": logits, "classes": classes[:, :, None, None], **bases}
        return {name: torch.from_numpy(values) for name, values in tensors.items()}

    # One label map.

    def classes_shape(self, logits_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (logits_shape[0], 1, 1)

    def check(self, logits: Tensor, arguments: Mapping[str, Any], num_classes: int) -> Parts:
        parts = super().check(logits, arguments, num_classes)
        base = torch.as_tensor(arguments["base"], dtype=logits.dtype, device=logits.device)
        if base.shape != (num_classes,):
            raise ValueError(f"base must have shape ({num_classes},), one logit per class, got {tuple(base.shape)}")
        return {**parts, "base": base}

    def plain(self, parts: Parts) -> dict[str, Tensor]:
        if not isinstance(parts["base"], PackedBase):
            return parts
        return {**parts, "base": torch.from_numpy(_base_array(parts))}

    def like(self, parts: Parts, logits: Tensor) -> Parts:
        if isinstance(parts["base"], PackedBase):
            if logits.dtype == torch.float32 and logits.device.type == "cpu":
                return parts
            parts = self.plain(parts)
        return super().like(parts, logits)

    def mean_logits_of_box(
        self, logits: Floats, parts: Parts, num_classes: int, lines: tuple[Floats, Floats] | None
    ) -> Floats:
        pooled = _base_array(parts)
        if lines is not None:
            rows, columns = lines
            with np.errstate(invalid="ignore"):  # OpenBLAS may set the flag for finite numbers: numpy/numpy#24067
                pooled[parts["classes"].numpy()[:, 0, 0]] = (logits @ columns) @ rows
        return pooled

    # Batches.

    def stack(self, logits: Sequence[Tensor], parts: Sequence[Parts]) -> dict[str, Tensor]:
        bases = [part["base"] for part in parts]
        if not all(isinstance(base, PackedBase) for base in bases) or len({base.levels.shape for base in bases}) > 1:
            return super().stack(logits, [self.plain(part) for part in parts])
        packed = zip(*(base[:4] for base in bases), strict=True)
        levels, low, step, means = (torch.from_numpy(np.array(values)) for values in packed)
        stacked = super().stack(logits, [{"classes": part["classes"]} for part in parts])
        return {**stacked, **dict(zip(_PACKED, (levels, low, step, means), strict=True))}

    def separate(self, tensors: Mapping[str, Tensor], row: int, num_classes: int) -> Parts:
        parts: Parts = super().separate({k: v for k, v in tensors.items() if k not in _PACKED}, row, num_classes)
        if "base" not in tensors:
            levels, low, step, means = (tensors[name].numpy()[row] for name in _PACKED)
            parts["base"] = PackedBase(levels, low, step, means, num_classes)
        return parts

    def dense_base(self, encoded: Encoded) -> Tensor:
        tensors, num_classes = encoded.tensors, encoded.num_classes
        if "base" in tensors:
            return tensors["base"]
        levels = tensors["base_levels"]
        if levels.shape[1] != num_classes:
            levels = torch.cat([levels & 15, levels >> 4], 1)[:, :num_classes]
        base = levels * tensors["base_step"][:, None] + tensors["base_low"][:, None]
        return base.scatter_(1, tensors["classes"].flatten(1), tensors["base_means"])

    def unpacked(self, encoded: Encoded) -> Encoded:
        tensors = {name: encoded.tensors[name] for name in ("logits", "classes")}
        return encoded._replace(tensors={**tensors, "base": self.dense_base(encoded)})

    def mean_logits(self, encoded: Encoded, weights: Tensor | BoxWeights, shape: tuple[int, ...]) -> Tensor:
        dtype = pooling_dtype(encoded.logits)
        logits, classes = encoded.logits.to(dtype), encoded.tensors["classes"].long().flatten(1)
        base = self.dense_base(encoded).to(dtype)
        is_new = "base" not in encoded.tensors and len(shape) == 2  # memory that is new costs more than the arithmetic
        pooled = base if is_new else each_cell(base, shape).expand(shape).clone()
        means, is_inside = _means_of_cells(logits, weights, shape)
        if is_inside is not None:
            means = torch.where(is_inside, means, each_cell(base.gather(1, classes), shape))
        return pooled.scatter_(-1, each_cell(classes, shape).expand_as(means), means)


def crop_probabilities(dense: Tensor) -> Tensor:
    """Compute the mean probability of each class over crops of many sizes, which selects the heatmaps to keep.

    Training sees the pooled labels of crops, so a class matters as much as it appears in them. Ranking by the softmax of
    single locations would prefer classes that peak at one location and vanish in every crop.

    Args:
        dense: Class logits `[B, C, H, W]`.

    Returns:
        Mean probabilities `[B, C]`.
    """
    height, width = dense.shape[2:]
    total = torch.zeros_like(dense[:, :, 0, 0])
    for share in (0.2, 0.33, 0.53, 0.73):  # shares of the image sides: 4 % to 53 % of the area
        kernel = max(1, round(height * share)), max(1, round(width * share))
        stride = max(1, height // 7), max(1, width // 7)  # about 7 x 7 crops at most
        total += nnf.avg_pool2d(dense, kernel, stride).softmax(1).mean((2, 3))
    return total / 4


def _means_of_cells(
    logits: Tensor, weights: Tensor | BoxWeights, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor | None]:
    """Return the means of heatmaps in cells, `[B, K]` or `[B, n, K]`, and which cells are inside, None if all are."""
    any_outside = isinstance(weights, Tensor) or weights.any_outside
    if not isinstance(weights, Tensor) and len(shape) == 2:
        weights = weights.product()
    if isinstance(weights, Tensor):
        means = weights @ logits.flatten(2).mT
        total = weights.sum(-1) if any_outside else None
    else:
        rows, columns, _ = weights
        # Each product is one bmm over all heatmaps. Broadcasting over them would cause many small ones.
        means_of_rows = (logits.flatten(1, 2) @ columns.mT).reshape(*logits.shape[:3], columns.shape[1])
        means = torch.einsum("biy,bpyj->bijp", rows, means_of_rows).flatten(1, 2)
        total = (rows.sum(-1)[:, :, None] * columns.sum(-1)[:, None]).flatten(1) if any_outside else None
    if len(shape) == 2:
        means = means[:, 0]
    return means, None if total is None else total.reshape(*shape[:-1], 1) > 0.5


def _base_array(parts: Parts) -> Floats:
    """Return the base `[C]` of a map on the CPU as a new array."""
    base = parts["base"]
    array: Floats = (
        base.dense(parts["classes"].numpy().reshape(-1)) if type(base) is PackedBase else base.numpy().copy()
    )
    return array


def _base_of_the_rest(base: Floats, classes: Array) -> Floats:
    """Return the base `[B, C]` with the classes of heatmaps set to the lowest other value, which narrows the range."""
    kept = np.zeros(base.shape, bool)
    np.put_along_axis(kept, classes, True, 1)
    lowest = np.min(base, 1, keepdims=True, initial=np.inf, where=~kept)
    rest: Floats = np.where(kept, np.where(np.isinf(lowest), np.float32(0), lowest), base)
    return rest


def _means(logits: Floats) -> Floats:
    """Return the means `[B, K]` of heatmaps."""
    num_locations = logits.shape[2] * logits.shape[3]
    sums: Floats = np.add.reduce(logits.reshape(*logits.shape[:2], num_locations), 2)  # faster than np.mean
    sums /= np.float32(num_locations)
    return sums
