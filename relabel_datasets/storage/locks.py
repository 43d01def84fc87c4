"""Locks between processes (`flock`). The kernel releases them when their holder is killed."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from ..compatibility import HAS_FILE_LOCKS, lock_file, read_at, unlock_file
from ..errors import DatasetError
from .regular_files import open_without_links

logger = logging.getLogger(__name__)
_held: set[int] = set()  # descriptors of the files that this process has locked, or waits to lock


def acquire(path: Path, flock: Callable[[int], None]) -> int:
    """Lock a file, which is created with its folder if it is missing.

    Args:
        path: Path of the file.
        flock: Function that locks a descriptor, and waits or raises if another process holds the lock.

    Returns:
        Descriptor of the locked file, open for reading and writing. Pass it to `release`.

    Raises:
        OSError: The file cannot be created, or it is a symbolic link, whose target would be overwritten.
        Exception: Any error of `flock`.
    """
    while True:
        descriptor = _open(path)
        _held.add(descriptor)
        try:
            flock(descriptor)
            if is_open_at(path, descriptor):
                return descriptor
        except BaseException:
            release(descriptor)
            raise
        release(descriptor)  # the previous holder renamed or deleted this file: lock the one that is there now


def is_held(descriptor: int) -> bool:
    """Return whether this process has locked a file, and not the one from which it was forked."""
    return descriptor in _held


def release(descriptor: int) -> None:
    """Unlock and close a file. No-op in a process that was forked while the file was locked."""
    if descriptor in _held:
        with suppress(OSError):  # the file system has no locks
            unlock_file(descriptor)  # closing is not enough: a forked process also has the file open
        _held.discard(descriptor)
        os.close(descriptor)


def _close_in_child() -> None:
    """Close lock files in a forked process: a lock lasts until all processes have closed the file, also after its holder was killed."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def is_open_at(path: Path, descriptor: int) -> bool:
    """Return whether a path still leads to an open file."""
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def _open(path: Path) -> int:
    for attempts_left in reversed(range(100)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return open_without_links(path, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:  # another process has just removed the folder
            if not attempts_left:
                raise
    raise AssertionError


class FileLock:
    """Lock on a path, for a `with` statement. The lock file exists only while the lock is held.

    On NFS the lock holds between machines if the file system supports locks. If it does not, and on
    Windows, a warning is logged instead.

    Args:
        path: Path of the lock file, which records host and process of the holder. Its folder is created if it is missing.
        what: Name of what is locked, for the error message.
        wait: Whether to wait for another holder instead of raising. Default: False.

    Raises:
        DatasetError: Another process holds the lock.
    """

    def __init__(self, path: Path, what: str, *, wait: bool = False) -> None:
        self._path, self._what, self._wait = path, what, wait
        self._file = -1

    def __enter__(self) -> FileLock:
        if not HAS_FILE_LOCKS:
            logger.warning("%s cannot be locked on Windows: make sure that no other process builds it", self._what)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            return self
        self._file = acquire(self._path, self._lock)
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps({"host": platform.node(), "pid": os.getpid()}).encode(), 0)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not HAS_FILE_LOCKS:
            self._remove_empty_folder()
            return
        # Otherwise the folder was removed, and another process may have its own lock.
        if is_held(self._file) and is_open_at(self._path, self._file):
            self._path.unlink(missing_ok=True)
            self._remove_empty_folder()
        release(self._file)

    def _remove_empty_folder(self) -> None:
        with suppress(OSError):  # the folder is not empty
            self._path.parent.rmdir()

    def _lock(self, descriptor: int) -> None:
        try:
            lock_file(descriptor, wait=self._wait)
        except BlockingIOError:
            raise DatasetError(
                f"{self._what} is being built by {_holder(descriptor)}: wait for it, or stop it"
            ) from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s): make sure that no other process builds it", self._what, error)


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(read_at(descriptor, 1000, 0))
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"  # it has not recorded itself yet
