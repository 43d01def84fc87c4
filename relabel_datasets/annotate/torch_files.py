"""Read untrusted files of `torch.save`: tensors, NumPy arrays and plain Python values, but never code."""

from __future__ import annotations

import io
import pickle
import tarfile
import threading
import zipfile
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..compatibility import safe_globals
from ..errors import LabelMapError
from .numpy_pickles import ALLOWED, PickledArray

_MAX_NUMBERS = 1 << 22  # in nested lists
_MAX_LEVELS = 8  # of nested lists
_ZIP = b"PK\x03\x04"
_NUMPY_TYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64,
)  # fmt: skip
_lock = threading.Lock()  # what torch may unpickle is a setting of the process


def load_torch_file(data: bytes, max_bytes: int, *, expected: str = "a tensor", arrays: bool = False) -> object:
    """Load a file in the zip or legacy format of `torch.save` with `weights_only=True`.

    Args:
        data: Content of the file.
        max_bytes: Largest size of the unpacked content in bytes.
        expected: Content that is expected, for error messages. Default: a tensor.
        arrays: Whether the file may contain NumPy arrays, which become `PickledArray`. Default: False.

    Returns:
        Content of the file.

    Raises:
        LabelMapError: The file is damaged, too large, or contains other objects.
    """
    _check_container(data, max_bytes)
    try:
        if not arrays:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        with _lock, safe_globals(ALLOWED):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # the message of torch recommends to execute the code
        raise LabelMapError(f"is damaged, or contains objects other than {expected}; no code was executed") from error
    except Exception as error:  # damaged files raise nearly any error
        raise _damaged(error) from error


def load_plain_file(data: bytes, max_bytes: int) -> object:
    """Load a file of `torch.save` that contains only None, bools, numbers, text, lists, tuples and dicts.

    Such files may be written with pickle protocol 4, which `torch.load(weights_only=True)` does not read.

    Args:
        data: Content of the file in the zip format.
        max_bytes: Largest size of the unpacked content in bytes.

    Returns:
        Content of the file.

    Raises:
        LabelMapError: The file is damaged, too large, or contains other objects.
    """
    _check_container(data, max_bytes)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            pickled = archive.read(names[0])
        return _PlainUnpickler(io.BytesIO(pickled)).load()
    except _OtherObjectError as error:
        raise LabelMapError(
            f"contains {error}, expected only numbers, text, lists and dicts; no code was executed"
        ) from None
    except Exception as error:  # damaged files raise nearly any error
        raise _damaged(error) from error


class _OtherObjectError(Exception):
    """A pickle refers to code."""


# The implementation in C reserves memory for any index that a pickle contains.
class _PlainUnpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise _OtherObjectError(f"{module}.{name}")

    def persistent_load(self, pid: object) -> NoReturn:
        raise _OtherObjectError("tensors")


def _check_container(data: bytes, max_bytes: int) -> None:
    """Refuse zip files that would fill the memory, and tars, which old versions of torch would unpack."""
    if data.startswith(_ZIP):
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                entries = archive.infolist()
        except Exception as error:
            raise _damaged(error) from error
        # A compressed entry may unpack to a thousand times the size that it states.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise LabelMapError("is a compressed zip file, but torch.save does not compress")
        unpacked = sum(entry.file_size for entry in entries)
    else:
        unpacked = len(data)
        if tarfile.is_tarfile(io.BytesIO(data)):
            raise LabelMapError("is a tar archive, expected a file of torch.save")
    if unpacked > max_bytes:
        raise LabelMapError(f"unpacks to {unpacked} bytes, but a file of a release has at most {max_bytes} bytes")


def _damaged(error: Exception) -> LabelMapError:
    reason = str(error).partition("\n")[0][:200]
    return LabelMapError(f"is damaged and cannot be read: {type(error).__name__}: {reason}")


def as_array(value: object, name: str) -> npt.NDArray[Any]:
    """Return the array of a tensor, a NumPy array or a list of numbers in a loaded file.

    Args:
        value: Part of what `load_torch_file` returned.
        name: Name of the part in error messages.

    Raises:
        LabelMapError: The value is no array of numbers, or claims more than it stores.
    """
    if type(value) is Tensor:
        if value.layout != torch.strided or value.is_meta or value.dtype not in _NUMPY_TYPES:
            raise LabelMapError(f"{name} must be a dense tensor of numbers, got {value.layout} {value.dtype}")
        if value.nbytes > value.untyped_storage().nbytes():  # such as a broadcast number
            raise LabelMapError(f"{name} claims to be {list(value.shape)}, but stores less")
        return value.detach().numpy()
    array = value.array if isinstance(value, PickledArray) else value
    if isinstance(array, list):
        array = _array_of_list(array)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise LabelMapError(f"{name} must be an array of numbers, got {type(value).__name__}")
    return array


def _array_of_list(values: list[Any]) -> npt.NDArray[Any] | None:
    """Return the array of nested lists of numbers, or None for everything else.

    A pickle of a kilobyte can contain one list in another a billion times, so the numbers are counted first.
    """
    level: list[Any] = values
    for _ in range(_MAX_LEVELS):
        if all(isinstance(item, (int, float)) for item in level):
            try:
                return np.asarray(values)
            except (ValueError, OverflowError):  # lists of different lengths
                return None
        if not all(isinstance(item, (list, tuple)) for item in level) or sum(map(len, level)) > _MAX_NUMBERS:
            return None
        level = [item for part in level for item in part]
    return None
