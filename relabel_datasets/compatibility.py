"""What differs between the supported versions of Python and the operating systems. Each function says where it is needed."""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from hashlib import _Hash

fcntl: Any
try:
    fcntl = importlib.import_module("fcntl")
except ImportError:  # Windows
    fcntl = None
HAS_FILE_LOCKS = fcntl is not None

_BLOCK = 1 << 18


def sha256_digest(file: BinaryIO) -> _Hash:
    """Return the SHA-256 of a file from its current position to its end. Python 3.10 has no `hashlib.file_digest`."""
    digest = hashlib.sha256()
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest


def qualified_name(frame: FrameType) -> str:
    """Return the name of a frame's function with its class, such as `Loader.__iter__`. Python 3.10 has no `co_qualname`."""
    name: str | None = getattr(frame.f_code, "co_qualname", None)
    return _name_by_class(frame) if name is None else name


def _name_by_class(frame: FrameType) -> str:
    code = frame.f_code
    for cls in type(frame.f_locals.get("self")).__mro__:
        if getattr(vars(cls).get(code.co_name), "__code__", None) is code:
            return f"{cls.__qualname__}.{code.co_name}"
    return code.co_name


@contextmanager
def safe_globals(classes: list[Any]) -> Iterator[None]:
    """Let `torch.load` read instances of these classes. Torch 2.4 has no `torch.serialization.safe_globals`."""
    from torch import serialization  # slow to import

    if hasattr(serialization, "safe_globals"):
        with serialization.safe_globals(classes):
            yield
        return
    before = list(serialization.get_safe_globals())  # a copy: the list itself changes
    serialization.add_safe_globals(classes)
    try:
        yield
    finally:
        serialization.clear_safe_globals()
        serialization.add_safe_globals(before)


@cache
def import_fsspec() -> Any:
    """Import fsspec with its module `asyn`, slow and not needed for local files, and let forked processes use it.

    Before fsspec 2025.5 they wait for an event loop whose thread they do not have.
    """
    import fsspec
    import fsspec.asyn

    if hasattr(os, "register_at_fork") and not hasattr(fsspec.asyn, "reset_after_fork"):
        os.register_at_fork(after_in_child=fsspec.asyn.reset_lock)
    return fsspec


def is_timeout(error: BaseException) -> bool:
    """Return whether an error is a timeout. Python 3.10 has a class of its own for those of asyncio."""
    from asyncio import TimeoutError as AsyncTimeoutError  # slow to import

    return isinstance(error, (TimeoutError, AsyncTimeoutError))


def lock_file(descriptor: int, *, wait: bool) -> None:
    """Lock an open file for this process (`flock`). Only call it if `HAS_FILE_LOCKS`.

    Args:
        descriptor: Descriptor of the file.
        wait: Whether to wait for another holder instead of raising.

    Raises:
        BlockingIOError: Another process holds the lock.
        OSError: The file system has no locks.
    """
    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def unlock_file(descriptor: int) -> None:
    """Release the lock of `lock_file`.

    Raises:
        OSError: The file system has no locks.
    """
    fcntl.flock(descriptor, fcntl.LOCK_UN)


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Read bytes at an offset, and keep the position of the file. Windows has no `os.pread`."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    position = os.lseek(descriptor, 0, os.SEEK_CUR)
    try:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, size)
    finally:
        os.lseek(descriptor, position, os.SEEK_SET)


def open_flags(*names: str) -> int:
    """Return the flags of `os.open` with these names. Windows lacks some, and needs `O_BINARY` for exact bytes."""
    flags = getattr(os, "O_BINARY", 0)
    for name in names:
        flags |= getattr(os, name, 0)
    return int(flags)


def user_id() -> int:
    """Return the id of the user. Windows has none, and a folder for temporary files for each user."""
    return os.getuid() if hasattr(os, "getuid") else 0
