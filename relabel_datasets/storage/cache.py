"""Size-limited cache of verified files, shared by all processes of a machine.

Files are named by the SHA-256 of their content. No URL, and no credential in a URL, is therefore on disk, and mirrors of a
dataset share their files. A download is written to `<sha256>.part` under an exclusive `flock`, compared with its SHA-256,
synced and renamed. A file without `.part` is therefore complete, whichever process is killed at whatever time. The kernel
releases the lock of a killed process.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..compatibility import HAS_FILE_LOCKS, lock_file
from ..errors import DatasetError
from ..naming import check_sha256
from .local import is_explained
from .locks import acquire, is_open_at, release
from .recheck import has_other_content

logger = logging.getLogger(__name__)

_PART = ".part"
_FILE = re.compile(r"[0-9a-f]{64}(\.part)?")  # other files in the folder are neither counted nor deleted
_FREE_SHARE = 10  # without a limit, a tenth of the disk stays free,
_MAX_FREE = 5_000_000_000  # or less: on a full disk of 10 TB, files would be deleted as soon as they are downloaded
_ADVICE = "choose another folder with cache_dir= or the environment variable RELABEL_CACHE"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

Download = Callable[[BinaryIO], None]  # completes a file that may already hold the first bytes


class ShardCache:
    """Cache of files by their SHA-256. The least recently opened files are deleted first.

    A deleted file stays readable for processes that have it open (POSIX). The folder may be removed at any time.

    Args:
        folder: Folder of the files, created when it is first needed.
        limit: Maximum total size of complete files in bytes; downloads in progress are not counted. None keeps a tenth of the
            disk free, at most 5 GB.
    """

    def __init__(self, folder: Path, limit: int | None) -> None:
        self.folder, self.limit = folder, limit
        self._has_warned = False

    def open(self, sha256: str, num_bytes: int, download: Download) -> BinaryIO:
        """Open a file of the cache, downloading it first if it is missing.

        One process or thread downloads the file. Others that open the same file wait for it.

        Args:
            sha256: SHA-256 of the content, in hex.
            num_bytes: Size of the file in bytes.
            download: Function that writes the remaining bytes to a file open for reading and writing, and verifies the result.

        Returns:
            The file, open for reading.

        Raises:
            DatasetError: The file alone exceeds the limit, or `sha256` is not a SHA-256. It is a ValueError.
            OSError: The disk is full and there is nothing left to delete.
            Exception: Any error of `download`.
        """
        check_sha256(sha256, "the manifest")  # it becomes a path, and the manifest may be hostile
        self.check_room(num_bytes, "one shard")
        path, part_path = self.folder / sha256, self.folder / (sha256 + _PART)
        while True:
            file = _open_whole(path, num_bytes)
            if file is not None and not has_other_content(file, sha256):
                return file
            if file is not None:
                logger.warning("%s is damaged and is downloaded again: its SHA-256 differs from its name", path)
                file.close()
                path.unlink(missing_ok=True)
            with _locked(part_path) as part:
                if not path.exists():  # else another process has downloaded it
                    self._make_room(num_bytes - os.fstat(part.fileno()).st_size, keep=path)
                    self._complete(part, download)
                    file = _open_whole(
                        part_path, num_bytes
                    )  # before renaming: another process may delete it afterwards
                    with suppress(FileNotFoundError):  # the folder was removed; the open file stays readable
                        part_path.rename(path)
            if file is not None:
                self._make_room(0, keep=path)
                return file

    def check_room(self, num_bytes: int, what: str) -> None:
        """Raise an error if `num_bytes` exceeds the limit.

        Args:
            num_bytes: Number of bytes that are needed at the same time.
            what: Name of what needs them, for the error message.

        Raises:
            DatasetError: The limit is exceeded.
        """
        if self.limit is not None and num_bytes > self.limit:
            raise DatasetError(
                f"the limit of the cache {self.folder} is {self.limit} bytes, but {what} needs {num_bytes} bytes: raise the limit "
                "with cache_limit= or the environment variable RELABEL_CACHE_LIMIT"
            )

    def has(self, sha256: str) -> bool:
        """Return whether the cache has the file with this SHA-256."""
        return (self.folder / check_sha256(sha256, "the manifest")).exists()

    def _complete(self, part: BinaryIO, download: Download) -> None:
        while True:
            try:
                download(part)
                os.fsync(part.fileno())
            except OSError as error:
                if error.errno not in _DISK_FULL:
                    raise
                if not self._delete_oldest():
                    raise OSError(
                        error.errno,
                        f"the disk of the cache {self.folder} is full: free some space, or {_ADVICE}",
                    ) from None
            else:
                return

    def _make_room(self, num_bytes: int, keep: Path) -> None:
        """Delete the least recently opened files until `num_bytes` more bytes fit, or no file is left."""
        with _locked(self.folder / ".evict"):
            used = sum(entry.st_size for _, entry in self._files())
            allowed = self.limit
            if allowed is None:
                try:
                    disk = shutil.disk_usage(self.folder)
                except FileNotFoundError:  # the folder was removed
                    return
                allowed = used + disk.free - min(disk.total // _FREE_SHARE, _MAX_FREE)
            for path, entry in self._files():
                if used + num_bytes <= allowed:
                    return
                if path != keep and _delete(path):
                    used -= entry.st_size
        if self.limit is None and used + num_bytes > allowed and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the disk of the cache %s is almost full, so each downloaded file is soon deleted, and downloaded again when it "
                "is needed: free some space, or %s",
                self.folder,
                _ADVICE,
            )

    def _delete_oldest(self) -> bool:
        with _locked(self.folder / ".evict"):
            return any(_delete(path) for path, _ in self._files())

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        """Return complete files and the remains of killed downloads, least recently opened first."""
        files: list[tuple[Path, os.stat_result]] = []
        try:
            entries = list(os.scandir(self.folder))
        except FileNotFoundError:  # the folder was removed
            return files
        for entry in entries:
            with suppress(FileNotFoundError):  # renamed or deleted since the listing
                if _FILE.fullmatch(entry.name):
                    files.append((Path(entry.path), entry.stat()))
        return sorted(files, key=lambda file: file[1].st_mtime_ns)


def _open_whole(path: Path, num_bytes: int) -> BinaryIO | None:
    try:
        with _explaining(path.parent, "cannot be read"):
            file = path.open("rb")
    except FileNotFoundError:
        return None
    if os.fstat(file.fileno()).st_size == num_bytes:
        with suppress(OSError):  # the file is another user's, or its file system is read-only
            os.utime(file.fileno())  # mark it as the most recently opened
        return file
    file.close()  # it was changed after it was stored
    path.unlink(missing_ok=True)
    return None


def _delete(path: Path) -> bool:
    """Delete a file unless it is a download in progress; return whether it was deleted."""
    if path.suffix != _PART:
        path.unlink(missing_ok=True)
        return True
    try:
        with path.open("r+b") as file:  # for writing: NFS cannot lock a read-only file exclusively
            lock_file(file.fileno(), wait=False)
            if is_open_at(path, file.fileno()):
                path.unlink()
                return True
    except (BlockingIOError, FileNotFoundError):
        pass
    return False


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading and writing under an exclusive lock. The file and its folder are created if missing."""
    if not HAS_FILE_LOCKS:
        raise OSError(
            errno.ENOTSUP,
            "the cache of remote datasets does not work on Windows, which lacks its file locks: copy the dataset to a local folder, "
            "or use Linux, macOS or WSL",
        )

    def lock(descriptor: int) -> None:
        with _explaining(path.parent, "is on a file system without file locks"):
            lock_file(descriptor, wait=True)

    with _explaining(path.parent, "cannot be written to"):
        descriptor = acquire(path, lock)
    try:
        file = os.fdopen(descriptor, "r+b", closefd=False)
        try:
            yield file
        finally:
            with suppress(OSError):  # a full disk
                file.close()  # flush before unlocking: the next holder's file must not receive these bytes
            if path.suffix == _PART and is_open_at(path, descriptor) and os.fstat(descriptor).st_size == 0:
                path.unlink(missing_ok=True)
    finally:
        release(descriptor)


@contextmanager
def _explaining(folder: Path, problem: str) -> Iterator[None]:
    """Replace errors of the operating system by errors that name the folder of the cache and say what to do."""
    try:
        yield
    except OSError as error:
        if is_explained(error):
            raise
        raise OSError(
            error.errno, f"the cache {folder} {problem} ({os.strerror(error.errno or 0)}): {_ADVICE}"
        ) from None
