"""`topk`: the K best classes at each location, as published with the paper. All other logits are 0.

    stored tensor    dtype                shape
    logits           F16, or U8           [K, H, W]
    classes          U8, U16 or U32       [K, H, W]: the narrowest dtype that holds C - 1
    ranges           F16, only with U8    [K, 2]: values of the lowest and the highest level of each logit plane

Reference: Yun et al., "Re-labeling ImageNet", 2021, section 3, with K = 5.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..precision import pooling_dtype
from ..weights import BoxWeights
from .base import Array, Encoded, Parts, StoredTensor
from .grid_pooling import each_cell
from .levels import BITS, float16_range, pack_levels, round_to_levels
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


class TopK(SparseEncoding):
    """Logits `[K, H, W]` of the classes `[K, H, W]`, which differ from location to location."""

    stored_tensors = ("logits", "classes", "ranges")
    optional_tensors = ("ranges",)
    parts = ("classes",)

    def encode(self, dense: Tensor, k: int) -> dict[str, Tensor]:
        logits, classes = dense.topk(k, dim=1)
        return {"logits": logits, "classes": classes}

    def classes_shape(self, logits_shape: tuple[int, ...]) -> tuple[int, ...]:
        return logits_shape

    def layout(
        self, num_classes: int, k: int, map_size: tuple[int, int], storage_dtype: str
    ) -> dict[str, StoredTensor]:
        is_quantized = storage_dtype == "uint8"
        tensors = {
            "logits": StoredTensor((k, *map_size), np.dtype(np.uint8 if is_quantized else np.float16)),
            "classes": StoredTensor((k, *map_size), class_dtype(num_classes)),
        }
        if is_quantized:
            tensors["ranges"] = StoredTensor((k, 2), np.dtype(np.float16))
        return tensors

    def find_storage_dtype(self, tensors: Mapping[str, StoredTensor], num_classes: int) -> str:
        return "uint8" if "ranges" in tensors else "float16"

    def store(self, encoded: Encoded, storage_dtype: str) -> dict[str, Array]:
        logits = to_floats(encoded.logits)
        stored = {"classes": encoded.tensors["classes"].cpu().numpy().astype(class_dtype(encoded.num_classes))}
        if storage_dtype == "float16":
            return {**stored, "logits": logits.astype(np.float16)}
        low, high = float16_range(logits.reshape(*logits.shape[:2], -1))
        levels = round_to_levels(logits, low[..., None, None], high[..., None, None], 2 ** BITS[storage_dtype])
        ranges = np.stack([low, high], 2).astype(np.float16)
        return {**stored, "logits": pack_levels(levels, storage_dtype), "ranges": ranges}

    def decode(self, arrays: Mapping[str, Array], num_classes: int, storage_dtype: str) -> dict[str, Tensor]:
        classes = arrays["classes"].astype(np.int64)
        check_highest(int(classes.max()), num_classes)
        if storage_dtype == "float16":
            logits = to_finite(arrays["logits"], "logits")
        else:
            logits = decode_levels(arrays["logits"], *decode_ranges(arrays["ranges"], storage_dtype), storage_dtype)
        return {"logits": torch.from_numpy(logits), "classes": torch.from_numpy(classes)}

    def mean_logits(self, encoded: Encoded, weights: Tensor | BoxWeights, shape: tuple[int, ...]) -> Tensor:
        dtype = pooling_dtype(encoded.logits)
        logits, index = encoded.logits.to(dtype), encoded.tensors["classes"].long().flatten(1)
        if not isinstance(weights, Tensor):
            weights = weights.product()
        if len(shape) == 2:
            weights = weights[:, 0]
        if "base" in encoded.tensors:  # only in calls of `pool_labels`
            base = encoded.tensors["base"].to(dtype)
            pooled = each_cell(base, shape).expand(shape).clone()
            logits = logits - base.gather(1, index).reshape(logits.shape)
        else:
            pooled = logits.new_zeros(shape)
        # Flattened locations multiply twice as fast as two dimensions.
        change = (each_cell(logits.flatten(2), shape) * weights[..., None, :]).flatten(-2)
        return pooled.scatter_add_(-1, each_cell(index, shape).expand_as(change), change)

    def mean_logits_of_box(
        self, logits: Floats, parts: Parts, num_classes: int, lines: tuple[Floats, Floats] | None
    ) -> Floats:
        if lines is None:
            return np.zeros(num_classes, np.float32)
        rows, columns = lines
        change = (logits * (rows[:, None] * columns)).ravel()
        return np.bincount(parts["classes"].numpy().ravel(), change, num_classes).astype(np.float32)

    def dense_base(self, encoded: Encoded) -> Tensor:
        return encoded.logits.new_zeros(len(encoded.logits), encoded.num_classes)
