"""Opening files of a dataset that may be hostile: no devices, no waiting for a FIFO, no writing through a link.

A dataset's files may be symbolic links, as in the snapshots of the Hub's cache: what is read through them is compared with
the manifest's sha256 or parsed. Only the card is neither, see `read_inside`.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from ..errors import DatasetError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path) -> BinaryIO:
    """Return a regular file, open for reading.

    Raises:
        FileNotFoundError: There is no such file.
        DatasetError: The path is a folder, a device, a FIFO or a socket.
        OSError: The file cannot be opened.
    """
    _check_regular(path, path.stat().st_mode)  # before opening: opening some devices has effects
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO put there meanwhile does not block
    try:
        _check_regular(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, max_bytes: int) -> bytes:
    """Return the content of a regular file of at most `max_bytes` bytes.

    Raises:
        FileNotFoundError: There is no such file.
        DatasetError: The file is larger, or no regular file.
        OSError: The file cannot be read.
    """
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise DatasetError(f"{path} has more than {max_bytes} bytes, the most that such a file may have")
    return content


def read_inside(path: Path, max_bytes: int) -> bytes:
    """Return the content of a regular file that does not leave its folder through a link; otherwise as `read_regular`.

    In a snapshot of the Hub's cache the links lead to the blobs of the same repository, which is allowed.

    Raises:
        DatasetError: The file is a link out of the folder.
    """
    target, folder = Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))  # resolve() fails on a loop
    blobs = folder.parent.parent / "blobs"  # <repository>/snapshots/<commit>/README.md -> ../../blobs/<hash>
    is_blob = folder.parent.name == "snapshots" and target.parent == blobs
    if not target.is_relative_to(folder) and not is_blob:
        raise DatasetError(
            f"{path} is a symbolic link to {target}, outside of the dataset: replace it by the file itself"
        )
    return read_regular(target, max_bytes)


def open_without_links(path: Path, flags: int) -> int:
    """Return the descriptor of a regular file that is not a symbolic link.

    Args:
        path: The file.
        flags: As for `os.open`.

    Raises:
        OSError: The file cannot be opened, or is a symbolic link.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK):  # EMLINK: FreeBSD
            raise
        raise OSError(
            error.errno, f"{path} is a symbolic link and is not written through: remove it and run the command again"
        ) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{path} is not a regular file: remove it and run the command again")
    return descriptor


def create_new(path: Path) -> BinaryIO:
    """Return a new empty file, open for writing, in place of whatever has this name; a link is replaced, not followed."""
    path.unlink(missing_ok=True)
    return os.fdopen(open_without_links(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb")


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "a special file")
        raise DatasetError(
            f"{path} is {kind}, expected a regular file: the dataset is damaged or hostile, get it again"
        )
