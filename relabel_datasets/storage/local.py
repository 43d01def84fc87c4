"""Local files: atomic writes, hashes, and locks between processes, which the kernel releases if the holder is killed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from ..errors import DatasetError
from .regular_files import create_new, open_regular, open_without_links

logger = logging.getLogger(__name__)

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, no quota, or a limit of the size of files


def temp_path_for(path: Path) -> Path:
    """Return where this process writes a file before it renames it, beside its place: no other process of any node."""
    return path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.tmp")


@contextmanager
def explaining_full_disk(path: Path) -> Iterator[None]:
    """Name the disk and the file in the error of the operating system that says only "no space left".

    Args:
        path: The file that is written.

    Raises:
        OSError: The disk is full; the message says what to do.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL or is_explained(error):
            raise
        raise OSError(
            error.errno,
            f"the disk of {path.parent} is full ({error.strerror}), {path.name} was not written: free some space and run the same "
            "command again",
        ) from error


def is_explained(error: OSError) -> bool:
    """Return whether an error has a message of this package instead of the operating system's."""
    return error.errno is None or error.strerror != os.strerror(error.errno)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it, so that it exists whole or not at all, also after a power cut.

    Raises:
        OSError: The file cannot be written; the previous one is unchanged, and no temporary file is left.
    """
    aside = temp_path_for(path)
    try:
        with explaining_full_disk(path), create_new(aside) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def open_for_lock(path: Path) -> int:
    """Return the descriptor of a lock file, open for reading and writing; create it and its folder if missing.

    Raises:
        OSError: The file cannot be created, or it is a symbolic link: what it points to would be overwritten.
    """
    for attempts_left in reversed(range(100)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return open_without_links(path, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:  # another process has just removed the folder
            if not attempts_left:
                raise
    raise AssertionError


def sha256_of(path: Path) -> str:
    """Return the sha256 of a regular file in hex."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


class FileLock:
    """A lock on a path, for a `with` statement; its file is there only meanwhile.

    On NFS it holds for all machines where the file system has locks; where it has none, a warning is all there is.

    Args:
        path: of its file, which says host and process of the holder; the folder is made if need be.
        what: is locked, as the error says it.
        wait: for another holder, instead of raising.

    Raises:
        DatasetError: (a ValueError) another process holds it.
    """

    def __init__(self, path: Path, what: str, *, wait: bool = False) -> None:
        self._path, self._what, self._wait = path, what, wait
        self._file = -1

    def __enter__(self) -> FileLock:
        while True:
            self._file = open_for_lock(self._path)  # whoever lets go of it removes an empty folder
            try:
                self._lock()
                if self._is_at_path():  # else the holder before removed the file: this lock is on nothing
                    break
            except BaseException:
                os.close(self._file)
                raise
            os.close(self._file)
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps({"host": platform.node(), "pid": os.getpid()}).encode(), 0)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_at_path():  # else its folder was removed, and another process may have made it anew
            self._path.unlink(missing_ok=True)
            with suppress(OSError):  # there is something in it
                self._path.parent.rmdir()
        with suppress(OSError):  # the file system has no locks
            fcntl.flock(self._file, fcntl.LOCK_UN)  # not left to close(): a forked process holds the file open, too
        os.close(self._file)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | (0 if self._wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise DatasetError(f"{self._what} is being built by {self._holder()}: wait for it, or stop it") from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s): make sure that nobody else builds it", self._what, error)

    def _holder(self) -> str:
        try:
            holder = json.loads(os.pread(self._file, 1000, 0))
            return f"process {holder['pid']} on {holder['host']}"
        except (ValueError, KeyError, TypeError):
            return "another process"  # which has not yet written who it is

    def _is_at_path(self) -> bool:
        try:
            return self._path.stat().st_ino == os.fstat(self._file).st_ino
        except FileNotFoundError:
            return False
