"""`compact` form of stored crops: a base shared by all views of an image, and the best logits of each view."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ...errors import LabelMapError
from .base import Array, StoredTensor
from .levels import float16_range, round_to_levels
from .sparse import Floats, check_highest, class_dtype, to_finite

NAMES = ("crop_base", "crop_base_range", "crop_classes", "crop_levels", "crop_ranges")
MAX_VIEWS = 1 << 16


def layout(num_views: int, num_classes: int, k: int) -> dict[str, StoredTensor]:
    half, byte = np.dtype(np.float16), np.dtype(np.uint8)
    return {
        "crop_base": StoredTensor((num_classes,), byte),
        "crop_base_range": StoredTensor((2,), half),
        "crop_classes": StoredTensor((num_views, k), class_dtype(num_classes)),
        "crop_levels": StoredTensor((num_views, k), byte),
        "crop_ranges": StoredTensor((num_views, 2), half),
    }


def compress_crops(logits: Tensor, k: int = 8) -> dict[str, Array]:
    """Compress the logits of all views of one image. Equal logits give equal bytes.

    Args:
        logits: Finite logits `[N, C]`.
        k: Number of classes stored for each view. Default: 8.

    Returns:
        Arrays to store, by name.

    Raises:
        ValueError: The logits are not finite `[N, C]` with N of at least 1 and C of at least 2.
    """
    if logits.ndim != 2 or logits.shape[0] < 1 or logits.shape[1] < 2:
        raise ValueError(f"logits must be [N, C] with C of at least 2, got {tuple(logits.shape)}")
    logits = logits.detach().cpu().float()
    if not torch.isfinite(logits).all():
        raise ValueError("logits must be finite, got nan or inf: try the annotator in a wider dtype")
    logits = (logits - logits.mean(1, keepdim=True)).clamp(-60000, 60000)
    base = logits.mean(0)
    classes = logits.topk(min(k, logits.shape[1]), dim=1).indices
    kept = logits.gather(1, classes)
    base_low, base_high = float16_range(base[None])
    low, high = float16_range(kept)
    return {
        "crop_base": round_to_levels(base, base_low, base_high, 256).numpy(),
        "crop_base_range": torch.cat([base_low, base_high]).half().numpy(),
        "crop_classes": classes.numpy().astype(class_dtype(logits.shape[1])),
        "crop_levels": round_to_levels(kept, low[:, None], high[:, None], 256).numpy(),
        "crop_ranges": torch.stack([low, high], 1).half().numpy(),
    }


def check_header(tensors: Mapping[str, StoredTensor], num_classes: int) -> int:
    shape = tensors["crop_classes"].shape
    if len(shape) != 2 or not 1 <= shape[0] <= MAX_VIEWS or not 1 <= shape[1] <= num_classes:
        raise LabelMapError(
            f"crop_classes must be [N, K] with N of 1 to {MAX_VIEWS} and K of 1 to {num_classes}, got {shape}"
        )
    for name, expected in layout(shape[0], num_classes, shape[1]).items():
        if tensors[name] != expected:
            raise LabelMapError(
                f"{name} must be {expected.dtype} {expected.shape}, got {tensors[name].dtype} {tensors[name].shape}"
            )
    return shape[0]


def check_values(arrays: Mapping[str, Array], num_classes: int) -> None:
    check_highest(int(arrays["crop_classes"].max()), num_classes)
    for name in ("crop_base_range", "crop_ranges"):
        to_finite(arrays[name], name)


def decompress(arrays: Mapping[str, Array], num_classes: int, rows: Array) -> Floats:
    low, high = arrays["crop_base_range"].astype(np.float32)
    base = arrays["crop_base"] * ((high - low) / np.float32(255)) + low
    logits = np.empty((len(rows), num_classes), np.float32)
    logits[:] = base
    low, high = arrays["crop_ranges"][rows].astype(np.float32).T[:, :, None]
    values = arrays["crop_levels"][rows] * ((high - low) / np.float32(255)) + low
    logits[np.arange(len(rows))[:, None], arrays["crop_classes"][rows]] = values
    return logits
