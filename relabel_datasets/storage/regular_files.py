"""Open files of a dataset that may be hostile: never a device, never blocking on a FIFO, never writing through a link.

A dataset's files may be symbolic links, as in the snapshots of the Hub's cache. Their content is compared with the SHA-256 in
the manifest or parsed. The card is the exception, see `read_inside`.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from ..compatibility import open_flags
from ..errors import DatasetError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Args:
        path: Path of the file.

    Returns:
        The open file.

    Raises:
        FileNotFoundError: There is no such file.
        DatasetError: The path is a folder, a device, a FIFO or a socket.
        OSError: The file cannot be opened.
    """
    _check_regular(path, path.stat().st_mode)  # before opening: opening some devices has effects
    descriptor = os.open(
        path, open_flags("O_RDONLY", "O_NONBLOCK", "O_CLOEXEC")
    )  # does not block if it has become a FIFO
    try:
        _check_regular(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, max_bytes: int) -> bytes:
    """Read a regular file.

    Args:
        path: Path of the file.
        max_bytes: Maximum size in bytes.

    Returns:
        The content of the file.

    Raises:
        FileNotFoundError: There is no such file.
        DatasetError: The file is larger, or is not a regular file.
        OSError: The file cannot be read.
    """
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise DatasetError(f"{path} has more than {max_bytes} bytes, the limit for such a file")
    return content


def read_inside(path: Path, max_bytes: int) -> bytes:
    """Read a regular file, unless it is a symbolic link to a file outside of its folder.

    In snapshots of the Hub's cache, links to the blobs of the same repository are allowed.

    Args:
        path: Path of the file.
        max_bytes: Maximum size in bytes.

    Returns:
        The content of the file.

    Raises:
        FileNotFoundError: There is no such file.
        DatasetError: The file is a link to a file outside of the folder, is larger, or is not a regular file.
        OSError: The file cannot be read.
    """
    target, folder = Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))  # resolve() fails on a loop
    blobs = folder.parent.parent / "blobs"  # <repository>/snapshots/<commit>/README.md -> ../../blobs/<hash>
    is_blob = folder.parent.name == "snapshots" and target.parent == blobs
    if not target.is_relative_to(folder) and not is_blob:
        raise DatasetError(f"{path} is a symbolic link to {target}, outside of the dataset: replace it by the file")
    return read_regular(target, max_bytes)


def open_without_links(path: Path, flags: int) -> int:
    """Open a regular file that is not a symbolic link.

    Args:
        path: Path of the file.
        flags: Flags of `os.open`.

    Returns:
        Descriptor of the open file.

    Raises:
        OSError: The file cannot be opened, is a symbolic link, or is not a regular file.
    """
    try:
        if not hasattr(os, "O_NOFOLLOW") and path.is_symlink():  # Windows
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        descriptor = os.open(path, flags | open_flags("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"), 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK):  # EMLINK: FreeBSD
            raise
        raise OSError(
            error.errno, f"{path} is a symbolic link, expected a regular file: remove it and run the command again"
        ) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{path} is not a regular file: remove it and run the command again")
    return descriptor


def create_new(path: Path) -> BinaryIO:
    """Create an empty file and open it for writing. An existing file is replaced; a link is replaced, not followed.

    Args:
        path: Path of the file.

    Returns:
        The open file.

    Raises:
        OSError: The file cannot be created.
    """
    path.unlink(missing_ok=True)
    return os.fdopen(open_without_links(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb")


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "a special file")
        raise DatasetError(
            f"{path} is {kind}, expected a regular file: the dataset is damaged or hostile; download or build it again"
        )
