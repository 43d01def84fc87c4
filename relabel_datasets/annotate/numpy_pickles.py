"""NumPy arrays in pickles of untrusted files.

`torch.load(weights_only=True)` refuses NumPy arrays unless the functions that rebuild them are allowed. These functions trust
their arguments: a pickle of 100 bytes can make `numpy.ndarray` allocate a terabyte. Stand-ins with the same names check them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pickle import UnpicklingError
from typing import Any

import numpy as np
import numpy.typing as npt

_CODES = ("b1", "u1", "i1", "i2", "i4", "i8", "f2", "f4", "f8")
_MAX_DIMENSIONS = 8
_SHOWN = 80  # characters of a value in an error


def brief(value: object) -> str:
    """Return a short description of an unpickled value for an error message. Its `repr` may fill the memory or fail."""
    if isinstance(value, (str, float)) or (isinstance(value, int) and abs(value) < 1 << 64):
        text = repr(value)
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return f"a value of type {type(value).__name__}"


class _Dtype:
    """Stand-in for `numpy.dtype` of a number or a bool."""

    def __init__(self, code: object, align: object = False, copy: object = False) -> None:
        if code not in _CODES:
            raise UnpicklingError(f"arrays of dtype {brief(code)} are not read, only of {', '.join(_CODES)}")
        self.dtype = np.dtype(str(code))

    def __setstate__(self, state: Sequence[object]) -> None:
        order = state[1]
        if order not in ("<", ">", "=", "|"):
            raise UnpicklingError("a dtype has no valid byte order")
        self.dtype = self.dtype.newbyteorder(order)


class PickledArray:
    """Stand-in for `numpy.ndarray`, with the array that a pickle describes.

    Attributes:
        array: The array, or None if the pickle does not set its content.
    """

    array: npt.NDArray[Any] | None = None

    def __setstate__(self, state: Sequence[object]) -> None:
        _, shape, dtype, is_fortran, data = state
        if not (isinstance(shape, tuple) and isinstance(dtype, _Dtype) and isinstance(data, bytes)):
            raise UnpicklingError("an array has no shape, dtype or bytes")
        if len(shape) > _MAX_DIMENSIONS or any(type(size) is not int or size < 0 for size in shape):
            raise UnpicklingError("an array has no valid shape")
        if math.prod(shape) * dtype.dtype.itemsize != len(data):
            raise UnpicklingError(f"an array of shape {shape} has {len(data)} bytes")
        array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if is_fortran else "C")
        self.array = array.astype(array.dtype.newbyteorder("="))


def _make_reconstruct() -> Callable[..., PickledArray]:
    def reconstruct(array_type: object, shape: object, code: object) -> PickledArray:
        return PickledArray()  # the arguments only describe an empty array, which __setstate__ replaces

    return reconstruct


def _encode(text: str, encoding: str) -> bytes:
    """Stand-in for `_codecs.encode`, by which pickles of protocol 2 store bytes. Newer versions of torch allow it anyway."""
    if encoding != "latin1":
        raise UnpicklingError(f"bytes in the encoding {brief(encoding)} are not read")
    return text.encode(encoding)


def _named(stand_in: Any, module: str, name: str) -> Any:
    # torch looks globals up by these.
    stand_in.__module__ = module
    stand_in.__name__ = stand_in.__qualname__ = name
    return stand_in


ALLOWED: list[Any] = [
    _named(_make_reconstruct(), "numpy._core.multiarray", "_reconstruct"),
    _named(_make_reconstruct(), "numpy.core.multiarray", "_reconstruct"),  # of NumPy 1
    _named(PickledArray, "numpy", "ndarray"),
    _named(_Dtype, "numpy", "dtype"),
    _named(_encode, "_codecs", "encode"),
]
