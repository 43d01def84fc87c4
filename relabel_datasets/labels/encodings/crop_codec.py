"""Stored crops: the annotator's logits for N random crops (*views*) of one image, compressed together.

Two forms store the views of an image as a few small arrays. The names of the arrays determine the form.

    `compact`, see `crop_compact`: made of logits by `compress_crops`; approximate, about 20 bytes per view of 1000 classes
    `sparse`, see `crop_sparse`: made of the k best probabilities of each view by `sparse_crops`; exact, for published files

Both are checked and read by the functions of this module. Class indices and probabilities are those of one annotator with C
classes. Softmax ignores a constant added to the logits of a view, so a form may change this constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import numpy as np
from torch import Tensor

from ...errors import LabelMapError
from ..limits import MAX_DENSE
from . import crop_compact, crop_sparse
from .base import Array, StoredTensor
from .crop_sparse import sparse_crops
from .sparse import Floats

__all__ = [
    "check_crops",
    "check_crops_header",
    "compress_crops",
    "decompress_crops",
    "decompress_labels",
    "sparse_crops",
]

_FEW_CLASSES = 4
_FORMS: tuple[ModuleType, ...] = (crop_compact, crop_sparse)


def compress_crops(logits: Tensor, k: int = 16) -> dict[str, Array]:
    """Compress the logits of all views of one image. Equal logits give equal bytes.

    Up to 4 classes are stored exactly, as probabilities in the sparse form, which takes as few bytes.

    Args:
        logits: Finite logits `[N, C]`.
        k: Number of components that the views share. More are more exact and take more bytes. Default: 16.

    Returns:
        Arrays to store, by name.

    Raises:
        ValueError: The logits are not finite `[N, C]` with N of at least 1 and C of 2 to 65536.
    """
    if logits.ndim == 2 and len(logits) and 2 <= logits.shape[1] <= _FEW_CLASSES and bool(logits.isfinite().all()):
        probs = logits.detach().cpu().float().softmax(1).numpy()
        classes = np.broadcast_to(np.arange(logits.shape[1]), probs.shape)
        return sparse_crops(classes, probs, logits.shape[1], spread_rest=False)
    return crop_compact.compress(logits, k)


def check_crops_header(tensors: Mapping[str, StoredTensor], num_classes: int) -> int:
    """Return the number of views N after checking the names, shapes and dtypes of the stored arrays.

    Args:
        tensors: Shape and dtype of each stored array, without a batch dimension.
        num_classes: Number of classes C.

    Raises:
        LabelMapError: The arrays are not those of a form, shapes or dtypes do not fit together, or the dense logits would be
            too large.
    """
    num_views: int = _form_of(tensors).check_header(tensors, num_classes)
    if num_views * num_classes > MAX_DENSE:
        raise LabelMapError(
            f"{num_views} crops of {num_classes} classes exceed {MAX_DENSE} crops x classes: store fewer"
        )
    return num_views


def check_crops(arrays: Mapping[str, Array], num_classes: int) -> None:
    """Check the values of stored arrays whose header has passed `check_crops_header`. Call it once after reading a file.

    Args:
        arrays: Stored arrays of one image.
        num_classes: Number of classes C.

    Raises:
        LabelMapError: A class index is out of range, or a value is not finite.
    """
    _form_of(arrays).check_values(arrays, num_classes)


def decompress_crops(arrays: Mapping[str, Array], num_classes: int, rows: Sequence[int] | Array) -> Floats:
    """Return the logits of some views.

    Args:
        arrays: Stored arrays of one image, which have passed `check_crops_header` and `check_crops`.
        num_classes: Number of classes C.
        rows: Indices of n views, 0 to N - 1, in any order and with repetition.

    Returns:
        Logits `[n, C]` in a new array, up to a constant per view. In the sparse form they are logarithms of probabilities, -inf for 0.
    """
    logits: Floats = _form_of(arrays).decompress(arrays, num_classes, np.asarray(rows, np.intp))
    return logits


def decompress_labels(
    arrays: Mapping[str, Array], num_classes: int, rows: Sequence[int] | Array, temperature: float = 1.0
) -> Floats:
    """Return the soft labels of some views: the softmax of their logits over the temperature.

    At temperature 1, labels of the sparse form are the stored probabilities themselves, without rounding.

    Args:
        arrays: Stored arrays of one image, see `decompress_crops`.
        num_classes: Number of classes C.
        rows: Indices of n views, 0 to N - 1.
        temperature: Divisor of the logits, above 0. Default: 1.

    Returns:
        Soft labels `[n, C]`.
    """
    form = _form_of(arrays)
    if form is crop_sparse and temperature == 1:
        return crop_sparse.probabilities(arrays, num_classes, np.asarray(rows, np.intp))
    logits = decompress_crops(arrays, num_classes, rows)
    logits -= logits.max(1, keepdims=True)
    if temperature != 1:
        logits *= np.float32(1 / temperature)
    np.exp(logits, out=logits)
    logits /= logits.sum(1, keepdims=True)
    return logits


def _form_of(tensors: Mapping[str, object]) -> ModuleType:
    for form in _FORMS:
        if tensors.keys() == set(form.NAMES):
            return form
    raise LabelMapError(
        f"stored crops have the tensors {' or '.join(map(str, (f.NAMES for f in _FORMS)))}, got {sorted(tensors)}"
    )
