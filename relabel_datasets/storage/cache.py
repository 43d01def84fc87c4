"""A bounded folder of verified files, shared by all processes of a machine.

Files are named by the sha256 of their content, so that no URL, and no credential in one, is on disk, and mirrors of a
dataset share them. A download goes into `<sha256>.part` under an exclusive flock, is compared with its sha256, synced and
renamed: whatever is killed when, a file without `.part` is whole. The lock is the kernel's, so a killed process holds none.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import DatasetError
from ..naming import check_sha256
from .local import open_for_lock
from .recheck import has_other_content

logger = logging.getLogger(__name__)

_PART = ".part"
_FILE = re.compile(r"[0-9a-f]{64}(\.part)?")  # nothing else in the folder is ours to count or delete
_FREE_SHARE = 10  # without a limit, a tenth of the disk is left free
_ELSEWHERE = "choose another folder with cache_dir= or the environment variable RELABEL_CACHE"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

Download = Callable[[BinaryIO], None]  # completes a file that may hold the beginning already


class ShardCache:
    """Files by sha256, least recently opened ones deleted first.

    Args:
        folder: where they are; made when first needed.
        limit: bytes that finished files may take, at most; the files being downloaded come on top. None leaves a tenth
            of the disk free.

    A deleted file stays readable for those who have it open, as POSIX has it. The folder may be removed at any time.
    """

    def __init__(self, folder: Path, limit: int | None) -> None:
        self.folder, self.limit = folder, limit

    def open(self, sha256: str, num_bytes: int, download: Download) -> BinaryIO:
        """Return the file with this content, open for reading, after a download unless it is there.

        One process or thread downloads, others that ask for the same file wait for it.

        Args:
            sha256: of the content, in hex.
            num_bytes: its size.
            download: writes the rest of a file that is open for reading and writing, and verifies the whole.

        Raises:
            DatasetError: (a ValueError) the file alone is larger than the limit, or `sha256` is none.
            OSError: the disk is full, and nothing is left to delete.
            Exception: whatever `download` raises.
        """
        check_sha256(sha256, "the manifest")  # it becomes a path, and comes from strangers
        self.check_room(num_bytes, "one shard")
        path, part_path = self.folder / sha256, self.folder / (sha256 + _PART)
        while True:
            file = _open_whole(path, num_bytes)
            if file is not None and not has_other_content(file, sha256):
                return file
            if file is not None:
                logger.warning("%s is damaged and is downloaded again: its SHA-256 is not its name", path)
                file.close()
                path.unlink(missing_ok=True)
            with _locked(part_path) as part:
                if not path.exists():  # else another was first
                    self._make_room(num_bytes - os.fstat(part.fileno()).st_size, keep=path)
                    self._complete(part, download)
                    file = _open_whole(part_path, num_bytes)  # once it is renamed, another process may delete it
                    with suppress(FileNotFoundError):  # somebody removed it: what is open stays readable
                        part_path.rename(path)
            if file is not None:
                self._make_room(0, keep=path)
                return file

    def check_room(self, num_bytes: int, what: str) -> None:
        """Raise DatasetError if so many bytes are more than the limit."""
        if self.limit is not None and num_bytes > self.limit:
            raise DatasetError(
                f"the cache {self.folder} may take {self.limit} bytes, but {what} takes {num_bytes}: raise the limit "
                "(cache_limit=, or the environment variable RELABEL_CACHE_LIMIT)"
            )

    def has(self, sha256: str) -> bool:
        """Return whether the file with this content is there."""
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
                        f"the disk of the cache {self.folder} is full: free some space, or {_ELSEWHERE}",
                    ) from None
            else:
                return

    def _make_room(self, num_bytes: int, keep: Path) -> None:
        """Delete the least recently opened files until so many bytes fit, or none is left."""
        with _locked(self.folder / ".evict"):
            used = sum(entry.st_size for _, entry in self._files())
            allowed = self.limit
            if allowed is None:
                try:
                    disk = shutil.disk_usage(self.folder)
                except FileNotFoundError:  # somebody removed it
                    return
                allowed = used + disk.free - disk.total // _FREE_SHARE
            for path, entry in self._files():
                if used + num_bytes <= allowed:
                    break
                if path != keep and _delete(path):
                    used -= entry.st_size

    def _delete_oldest(self) -> bool:
        with _locked(self.folder / ".evict"):
            return any(_delete(path) for path, _ in self._files())

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        """Return files and what is left of dead downloads, least recently opened first."""
        files: list[tuple[Path, os.stat_result]] = []
        try:
            entries = list(os.scandir(self.folder))
        except FileNotFoundError:  # somebody removed it
            return files
        for entry in entries:
            with suppress(FileNotFoundError):  # renamed or deleted meanwhile
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
        with suppress(OSError):  # another user's, or on a read-only file system
            os.utime(file.fileno())  # now it is the most recently opened
        return file
    file.close()  # somebody cut it off: it is not what was put there
    path.unlink(missing_ok=True)
    return None


def _delete(path: Path) -> bool:
    """Return whether the file could be deleted: a download that is going on is left alone."""
    if path.suffix != _PART:
        path.unlink(missing_ok=True)
        return True
    try:
        with path.open("r+b") as file:  # for writing, else NFS does not lock it
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, file.fileno()):
                path.unlink()
                return True
    except (BlockingIOError, FileNotFoundError):
        pass
    return False


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading and writing, made if need be with its folder, as the only one; others wait."""
    while True:
        with _explaining(path.parent, "cannot be written to"):
            descriptor = open_for_lock(path)
        try:
            with _explaining(path.parent, "is on a file system without file locks"):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Else whoever held the lock renamed or deleted the file: this lock is on nothing.
            if _is_at(path, descriptor):
                file = os.fdopen(descriptor, "r+b", closefd=False)
                try:
                    yield file
                finally:
                    with suppress(OSError):  # a full disk
                        file.close()  # bytes in its buffer must not go into a file that is another's by then
                    if path.suffix == _PART and _is_at(path, descriptor) and os.fstat(descriptor).st_size == 0:
                        path.unlink(missing_ok=True)
                return
        finally:
            # Not left to close(): a process forked meanwhile holds the file open, too.
            with suppress(OSError):  # the file system has no locks
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


@contextmanager
def _explaining(folder: Path, problem: str) -> Iterator[None]:
    """Say of an OSError what is wrong with the folder of the cache, and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno, f"the cache {folder} {problem} ({os.strerror(error.errno or 0)}): {_ELSEWHERE}"
        ) from None


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False
