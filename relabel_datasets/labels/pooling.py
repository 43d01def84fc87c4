"""LabelPooling: the mean of sparse logits over a part of the image, then softmax.

Shapes: B images, C classes, K stored logits, H x W locations, h x w output cells. Boxes and views are in units of the
whole image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from .blending import blend_labels
from .calibration import Calibration, calibrated_temperature
from .eager import eagerly
from .encodings.base import Encoded, Temperature
from .encodings.grid_pooling import pool_weighted
from .encodings.registry import get_map_encoding
from .encodings.sparse import SparseEncoding
from .label_map import LabelMap
from .pooling_checks import (
    check_class_range,
    check_finite,
    check_inputs,
    check_label_weight,
    check_labels,
    check_temperature,
    resolve_grid,
    to_array,
)
from .precision import pooling_dtype
from .view import View, to_rows
from .weights import box_weights

_TOPK, _HEATMAPS = (cast(SparseEncoding, get_map_encoding(name)) for name in ("topk", "heatmaps"))


@eagerly
def pool_labels(
    logits: Tensor,
    classes: Tensor,
    boxes_xyxy: Tensor,
    *,
    num_classes: int,
    base: Tensor | None = None,
    output_size: int | Sequence[int] = 1,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    label_weight: float = 0.0,
) -> Tensor:
    """Pool the logits under one box of each of B images into soft labels, on the device of the logits.

    For a box inside the image the result equals `softmax(roi_align(dense, box, output_size, aligned=True))`. If a box
    leaves the image, each output cell is the mean over its part inside the image, or the base if no part is inside. A
    box without width or height is pooled as the point or line that it has shrunk to.

    The arithmetic is float32, or float64 for float64 logits, under `torch.autocast` and with any default dtype. As with
    `torchvision.ops.roi_align`, gradients reach `logits` and `base` but not `boxes_xyxy`. Under `torch.compile` the call
    is a graph break and runs eagerly.

    Args:
        logits: Stored logits `[B, K, H, W]`, floating point, in any memory format. NaN and infinite logits are not
            rejected and give NaN labels.
        classes: Class indices of the logits, integers `[B, K, H, W]` or `[B, K, 1, 1]` in 0 .. C - 1. The K classes of
            a location must differ, which is not checked. The range is checked on the CPU only: on a GPU the check would
            wait for the device, and an index out of range ends in a device-side assertion.
        boxes_xyxy: Boxes (x1, y1, x2, y2) `[B, 4]`, finite, in units of the whole image (0..1), on any device. Boxes on
            the CPU avoid a synchronisation with a GPU. x1 > x2 or y1 > y2 mirrors the grid of output cells.
        num_classes: Number of classes C.
        base: Logits `[B, C]` of the classes that are not stored. Default: 0.
        output_size: 1 for one label `[B, C]` per box; (h, w), or n for (n, n), for one label per cell of a grid over
            the box.
        temperature: Positive divisor of the pooled logits before the softmax; values above 1 soften the labels.
        labels: Class index of each image, integers `[B]` in 0 .. C - 1, for `label_weight`. The range is checked on the CPU
            only; on a GPU, an index out of range has no one-hot label. Default: none.
        label_weight: Weight w of the one-hot label of each image, 0 to 1. The result is `(1 - w) * softmax(pooled /
            temperature) + w * one_hot(labels)`, in every cell of a grid. Default: 0.

    Returns:
        Soft labels `[B, C]` or `[B, C, h, w]` that sum to 1 over C: float64 for float64 logits, else float32.

    Raises:
        ValueError: The shapes, dtypes or devices do not fit together, a box is not finite, a class index is out of
            range (CPU), `num_classes`, `output_size` or `temperature` is not positive, `label_weight` is not in 0 .. 1, or it
            is above 0 without `labels`.
        TypeError: An argument is not a tensor or not a number, the call is inside a transform of `torch.func` such as
            `vmap`, or `boxes_xyxy` has no values that can be read, such as a meta tensor or a `FakeTensor`.
    """
    batch, _, height, width = check_inputs(logits, classes, num_classes, base, temperature)
    boxes = to_array("boxes_xyxy", boxes_xyxy, (batch, 4), pooling_dtype(logits))
    check_finite("boxes_xyxy", boxes)
    check_label_weight(label_weight)
    if label_weight:
        labels = check_labels(labels, batch, num_classes)
    weights = box_weights(boxes, resolve_grid(output_size), (height, width)).to(logits.device)
    encoding = _TOPK if classes.shape == logits.shape else _HEATMAPS
    if base is None and encoding is _HEATMAPS:
        base = logits.new_zeros(batch, num_classes)
    tensors = {"logits": logits, "classes": classes, **({} if base is None else {"base": base})}
    encoded = Encoded(encoding, tensors, num_classes)
    try:
        soft = pool_weighted(encoded, weights, encoding.mean_logits, output_size, temperature)
    except RuntimeError:
        check_class_range(classes.long(), num_classes)  # here, as torch's own check on the CPU costs nothing extra
        raise
    return blend_labels(soft, labels, label_weight) if label_weight and labels is not None else soft


@eagerly
def pool_label_map(
    label_map: LabelMap,
    view: View,
    output_size: int | Sequence[int] = 1,
    temperature: float = 1.0,
    *,
    calibrated: bool = False,
) -> Tensor:
    """Return the soft label `[C]`, or `[C, h, w]`, of one view of one label map."""
    encoding, parts, num_classes, *_ = label_map._metadata
    divisor: Temperature = temperature
    if calibrated:
        divisor = calibrated_divisor([label_map.calibration], [label_map.key], [view], output_size, temperature)
    return encoding.pool_one(label_map.logits, parts, num_classes, view, output_size, divisor)


def calibrated_divisor(
    calibrations: Sequence[Calibration | None],
    keys: Sequence[str | None],
    views: Sequence[View],
    output_size: int | Sequence[int],
    temperature: float,
) -> Temperature:
    """Return `calibrated_temperature` after checking the arguments.

    Raises:
        ValueError: An image has no calibration, a view is not finite, or an argument is out of range.
    """
    check_temperature(temperature)
    rows = to_rows(views)
    check_finite("views", rows)
    return calibrated_temperature(calibrations, keys, rows, resolve_grid(output_size), temperature)
