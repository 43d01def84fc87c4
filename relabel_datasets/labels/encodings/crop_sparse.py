"""`sparse` form of stored crops: the k best probabilities of each view, stored exactly. Published files have this form.

stored tensor    dtype               shape
crop_classes     U8, U16 or U32      [N, k]: the narrowest dtype that holds C - 1; classes of a view differ
crop_probs       F16 or F32          [N, k], 0 to 1
crop_rest        U8                  []: 0 if the other classes have probability 0, 1 if they share what is left of 1 evenly
                                     ("marginal smoothing")
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...errors import LabelMapError
from ..limits import MAX_CROPS
from .base import Array, StoredTensor
from .sparse import Floats, check_highest, class_dtype

NAMES = ("crop_classes", "crop_probs", "crop_rest")
_DTYPES = (np.dtype(np.float16), np.dtype(np.float32))


def sparse_crops(classes: Array, probs: Array, num_classes: int, *, spread_rest: bool) -> dict[str, Array]:
    """Return the arrays that store the best probabilities of each view exactly.

    Args:
        classes: Class indices `[N, k]`, of any numeric dtype. The classes of one view differ.
        probs: Probabilities `[N, k]`, 0 to 1, float16 or float32. They are stored in this dtype.
        num_classes: Number of classes C.
        spread_rest: Whether the other C - k classes share what is left of 1 evenly, as in marginal smoothing. Otherwise their
            probability is 0.

    Returns:
        Arrays to store, by name.

    Raises:
        ValueError: Shapes or dtypes do not fit together, or a value is out of range.
    """
    classes, probs = np.asarray(classes), np.asarray(probs)
    if classes.ndim != 2 or classes.shape != probs.shape or probs.dtype not in _DTYPES:
        raise ValueError(
            f"classes and probs must be [N, k] and probs float16 or float32, got {classes.shape}, {probs.shape} {probs.dtype}"
        )
    if not ((classes >= 0) & (classes < num_classes) & (classes == np.floor(classes))).all():  # false for nan, too
        raise ValueError(f"class indices must be integers in 0 .. {num_classes - 1}")
    stored = {
        "crop_classes": classes.astype(class_dtype(num_classes)),
        "crop_probs": np.array(probs),
        "crop_rest": np.array(int(spread_rest), np.uint8),
    }
    try:
        check_header({name: StoredTensor(array.shape, array.dtype) for name, array in stored.items()}, num_classes)
        check_values(stored, num_classes)
    except LabelMapError as error:
        raise ValueError(str(error)) from None
    return stored


def check_header(tensors: Mapping[str, StoredTensor], num_classes: int) -> int:
    shape, dtype = tensors["crop_classes"].shape, tensors["crop_probs"].dtype
    if len(shape) != 2 or not 1 <= shape[0] <= MAX_CROPS or not 1 <= shape[1] <= num_classes or dtype not in _DTYPES:
        raise LabelMapError(
            f"crop_classes must be [N, k] with N of 1 to {MAX_CROPS} and k of 1 to {num_classes}, and crop_probs float16 or "
            f"float32, got {shape} and {dtype}"
        )
    expected = {
        "crop_classes": StoredTensor(shape, class_dtype(num_classes)),
        "crop_probs": StoredTensor(shape, dtype),
        "crop_rest": StoredTensor((), np.dtype(np.uint8)),
    }
    for name, tensor in expected.items():
        if tensors[name] != tensor:
            raise LabelMapError(
                f"{name} must be {tensor.dtype} {tensor.shape}, got {tensors[name].dtype} {tensors[name].shape}"
            )
    return shape[0]


def check_values(arrays: Mapping[str, Array], num_classes: int) -> None:
    classes, probs, rest = (arrays[name] for name in NAMES)
    check_highest(int(classes.max()), num_classes)
    ordered = np.sort(classes, 1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise LabelMapError("the classes of a view must differ")
    if not ((probs >= 0) & (probs <= 1)).all():  # false for nan, too
        raise LabelMapError("crop_probs must be 0 to 1")
    if rest > 1:
        raise LabelMapError(f"crop_rest must be 0 or 1, got {rest}")


def probabilities(arrays: Mapping[str, Array], num_classes: int, rows: Array) -> Floats:
    """Return the probabilities `[n, C]` of some views."""
    classes, probs = arrays["crop_classes"][rows], arrays["crop_probs"][rows].astype(np.float32)
    others = num_classes - classes.shape[1]
    labels = np.zeros((len(rows), num_classes), np.float32)
    if arrays["crop_rest"] and others:
        labels[:] = np.maximum(1 - probs.sum(1, keepdims=True), 0) / np.float32(others)
    np.put_along_axis(labels, classes.astype(np.intp), probs, 1)
    return labels


def decompress(arrays: Mapping[str, Array], num_classes: int, rows: Array) -> Floats:
    with np.errstate(divide="ignore"):
        logits: Floats = np.log(probabilities(arrays, num_classes, rows))
    return logits
