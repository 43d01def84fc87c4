"""Blend soft labels with the original class index of each image.

Shapes: B images, C classes, and any number of dimensions of output cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .threads import in_one_thread


def blend_labels(soft: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Return `(1 - weight) * soft + weight * one_hot(labels)` in the dtype of `soft`, on its device.

    Args:
        soft: Soft labels `[B, C, ...]`. Every cell of an image is blended with the same class.
        labels: Class indices `[B]` on any device. Their range is not checked.
        weight: Weight of the class indices, 0 to 1.
    """
    # A comparison instead of a scatter, because it is deterministic and has no device-side assertions.
    with in_one_thread(soft.numel()):
        classes = torch.arange(soft.shape[1], device=soft.device)
        one_hot = (labels.to(soft.device, non_blocking=True)[:, None] == classes).to(soft.dtype)
        return soft * (1 - weight) + weight * one_hot.reshape(*one_hot.shape, *[1] * (soft.ndim - 2))


def label_tensor(labels: Sequence[int | None], keys: Sequence[str | None], num_classes: int) -> Tensor:
    """Return class indices as int64 `[B]` on the CPU.

    Args:
        labels: Class index of each image, or None.
        keys: Key of each image, which errors name.
        num_classes: Number of classes C.

    Raises:
        ValueError: An image has no class index, or it is out of range.
    """
    for label, key in zip(labels, keys, strict=True):
        if label is None or not 0 <= label < num_classes:
            problem = "has no class label" if label is None else f"has class label {label} of {num_classes} classes"
            raise ValueError(
                f"the label map of {key!r} {problem}, which label_weight= blends into the soft label: set label_weight=0, "
                "or give every LabelMap its label="
            )
    return torch.tensor(labels, dtype=torch.int64, device="cpu")
