"""Local files: atomic writes and hashes."""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..compatibility import sha256_digest
from .regular_files import create_new, open_regular

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, quota exceeded, or file size limit exceeded


def temp_path_for(path: Path) -> Path:
    """Return the temporary path under which this process writes a file before renaming it, unique per host and process."""
    return path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.tmp")


@contextmanager
def explaining_full_disk(path: Path) -> Iterator[None]:
    """Replace the operating system's "no space left" by an error that names the disk and the file.

    Args:
        path: Path of the file that is written.

    Raises:
        OSError: The disk is full. The message says what to do.
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
    """Write a file under a temporary name and rename it: the whole file exists or none, even after a power failure.

    Args:
        path: Path of the file.
        content: Bytes to write.

    Raises:
        OSError: The file cannot be written. The previous file is unchanged, and no temporary file is left.
    """
    temp_path = temp_path_for(path)
    try:
        with explaining_full_disk(path), create_new(temp_path) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temp_path.replace(path)
    finally:
        temp_path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a regular file, in hex."""
    with open_regular(path) as file:
        return sha256_digest(file).hexdigest()
