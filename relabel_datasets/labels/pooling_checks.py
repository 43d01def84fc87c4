"""Argument checks of pooling. None of them waits for a GPU.

Shapes are as in `pooling`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def check_inputs(
    logits: Tensor, classes: Tensor, num_classes: int, base: Tensor | None, temperature: float
) -> tuple[int, int, int, int]:
    """Return the shape (B, K, H, W) of the logits after checking all that pooling gets but where to pool.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or a number is out of range.
        TypeError: An argument is of a wrong type, or inside a transform of `torch.func`.
    """
    for name, value in (("logits", logits), ("classes", classes), ("base", base)):
        if value is not None:
            check_tensor(name, value)
    if logits.ndim != 4 or not logits.is_floating_point() or logits.layout is not torch.strided:
        raise ValueError(
            f"logits must be dense floating point [B, K, H, W], got {logits.dtype} {tuple(logits.shape)} {logits.layout}"
        )
    batch, num_logits, height, width = logits.shape
    if height < 1 or width < 1:
        raise ValueError(f"logits must have at least one location, got {tuple(logits.shape)}")
    if classes.shape not in ((batch, num_logits, height, width), (batch, num_logits, 1, 1)):
        raise ValueError(
            f"classes must have shape {(batch, num_logits, height, width)} or {(batch, num_logits, 1, 1)}, "
            f"got {tuple(classes.shape)}"
        )
    if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise ValueError(f"classes must be integers, got {classes.dtype}")
    check_positive_int("num_classes", num_classes)
    if base is not None and (base.shape != (batch, num_classes) or base.is_complex()):
        raise ValueError(f"base must be real of shape {(batch, num_classes)}, got {base.dtype} {tuple(base.shape)}")
    for name, value in (("classes", classes), ("base", base)):
        if value is not None and value.device != logits.device:
            raise ValueError(f"{name} must be on the device of the logits, {logits.device}, got {value.device}")
    check_temperature(temperature)
    return batch, num_logits, height, width


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a tensor outside the transforms of `torch.func`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        raise TypeError(
            f"{name} is inside a transform of torch.func, such as vmap or grad, which pooling does not support: it pools a "
            "whole batch in one call, and torch.autograd differentiates it"
        )


def check_positive_int(name: str, value: object) -> int:
    """Return an integer of at least 1.

    Raises:
        ValueError: It is less than 1.
        TypeError: It is not an integer.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")
    return number


def check_temperature(temperature: object) -> None:
    """Raise unless `temperature` is a positive, finite number."""
    if not isinstance(temperature, Real):
        raise TypeError(f"temperature must be a number, got {temperature!r}")
    if not 0 < float(temperature) < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature!r}")


def check_label_weight(weight: object) -> None:
    """Raise unless `weight` is a number from 0 to 1."""
    if not isinstance(weight, Real):
        raise TypeError(f"label_weight must be a number, got {weight!r}")
    if not 0 <= float(weight) <= 1:
        raise ValueError(f"label_weight must be from 0 to 1, got {weight!r}")


def check_labels(labels: Tensor | None, batch: int, num_classes: int) -> Tensor:
    """Return class labels `[B]` after checking them. The range is checked on the CPU only, without waiting for a GPU.

    Raises:
        ValueError: They are missing, have another shape, are not integers, or are out of range.
        TypeError: They are not a tensor.
    """
    if labels is None:
        raise ValueError(
            "label_weight above 0 blends in class labels, but labels is None: pass labels, or label_weight=0"
        )
    check_tensor("labels", labels)
    if labels.shape != (batch,) or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers of shape ({batch},), got {labels.dtype} {tuple(labels.shape)}")
    if labels.device.type == "cpu":
        outside = ((labels < 0) | (labels >= num_classes)).nonzero().flatten().tolist()
        if outside:
            raise ValueError(
                f"labels must be in 0 .. {num_classes - 1}, got {int(labels[outside[0]])} for image {outside[0]} of the batch"
            )
    return labels


def resolve_grid(output_size: int | Sequence[int]) -> tuple[int, int]:
    """Return an output size as (height, width).

    Raises:
        ValueError: It is not one or two integers of at least 1.
        TypeError: It is not made of integers.
    """
    if output_size == 1:  # the common case
        return 1, 1
    sides = list(output_size) if isinstance(output_size, Sequence) else [output_size]
    if len(sides) not in (1, 2):
        raise ValueError(f"output_size must be a positive int or two of them (h, w), got {output_size!r}")
    height, width = check_positive_int("output_size", sides[0]), check_positive_int("output_size", sides[-1])
    return height, width


def to_array(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> npt.NDArray[Any]:
    """Return the values of a tensor, copied only if its device or dtype differs.

    Raises:
        ValueError: The tensor has another shape, or is not of real numbers.
        TypeError: It is not a tensor, or has no values that can be read.
    """
    check_tensor(name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, one per image, got {tuple(tensor.shape)}")
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must be real numbers, got {tensor.dtype}")
    if tensor.requires_grad:
        tensor = tensor.detach()
    try:
        if tensor.dtype != dtype or tensor.device.type != "cpu":
            tensor = tensor.to("cpu", dtype)
        array: npt.NDArray[Any] = tensor.numpy()
    except (RuntimeError, TypeError) as error:  # meta and fake tensors, and those of torch.func
        raise TypeError(
            f"{name} must have values that can be read, got a tensor on {tensor.device} ({type(tensor).__name__}): make "
            "it outside of meta devices, FakeTensorMode and the transforms of torch.func"
        ) from error
    return array


def check_finite(name: str, rows: npt.NDArray[Any]) -> None:
    """Raise ValueError unless all numbers of `[B, n]` are finite."""
    finite = np.isfinite(rows)
    if not finite.all():
        row = int(finite.all(1).argmin())
        raise ValueError(f"{name} must be finite, got {rows[row].tolist()} for image {row} of the batch")


def check_class_range(classes: Tensor, num_classes: int) -> None:
    """Raise ValueError if a class index is out of range; waits for the device."""
    if classes.numel():
        low, high = (int(end) for end in classes.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(f"class indices must be in 0 .. {num_classes - 1}, got {low} .. {high}") from None
