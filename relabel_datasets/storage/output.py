"""Where a build writes: a folder on disk, or any URL that fsspec can write to. A file is there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import platform
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import fsspec

from ..errors import DatasetError
from .folders import MAX_SMALL_BYTES, is_url, without_file_scheme
from .local import FileLock, is_explained, sha256_of, temp_path_for, write_atomically
from .regular_files import create_new, read_regular
from .remote import RemoteFiles

logger = logging.getLogger(__name__)
T = TypeVar("T")

# These put a file when all of it has come. On others it is uploaded under another name and moved.
_ATOMIC = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "hf", "memory"}
_PROBE = "probe"  # file that is written to see whether files can be
_PAUSES_S = (0.5, 1, 2, 4, 8, 16, 32)  # between tries of an upload


class Output(Protocol):
    """The folder of a dataset that is written; names are relative to it. `str()` of it holds no credentials."""

    def check_writable(self) -> None:
        """Raise OSError, with what to do, unless files can be made here. Leaves nothing behind."""
        ...

    def lock(self, name: str, what: str, *, wait: bool = False) -> FileLock:
        """Return a lock of this name, see `FileLock`; of a remote folder, only among the processes of this machine."""
        ...

    def clean(self, names: Iterable[str]) -> None:
        """Remove what killed processes left of these files in the making; nobody else may be writing them."""
        ...

    def read(self, name: str) -> bytes:
        """Return the content of a small file; raise FileNotFoundError if there is none."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all."""
        ...

    def shard_path(self, name: str) -> Path:
        """Return where to write a large file, before `publish` is called with its name."""
        ...

    def publish(self, name: str) -> None:
        """Bring a file that was written to `shard_path` to its place."""
        ...

    def size(self, name: str) -> int | None:
        """Return the bytes that a file has, or None."""
        ...

    def has(self, name: str, num_bytes: int, sha256: str) -> bool:
        """Return whether the file is there with this content; on a remote folder, with this size."""
        ...

    def remove(self, name: str) -> None:
        """Remove a folder with all that is in it, if it is there."""
        ...

    def find(self, name: str) -> list[str]:
        """Return the paths, below this folder, of the files of a name in its subfolders."""
        ...


def open_output(root: str | os.PathLike[str], storage_options: dict[str, Any] | None = None) -> Output:
    """Return the output for a path or a URL, see `build`."""
    text = without_file_scheme(root)
    return RemoteOutput(text, storage_options or {}) if is_url(text) else LocalOutput(text)


class LocalOutput:
    """A folder on disk; where several machines build, one that all of them have under the same path."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = Path(root).absolute()  # the workers of an engine may run in another folder

    def __str__(self) -> str:
        return str(self._root)

    def check_writable(self) -> None:
        missing = [path for path in (self._root, *self._root.parents) if not path.exists()]
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            with create_new(temp_path_for(self._root / _PROBE)) as file:
                file.write(b"0")
        except OSError as error:
            raise _explained(error, f"{self} cannot be written to") from error
        finally:
            with suppress(OSError):
                self.clean([_PROBE])
            for path in missing:
                with suppress(OSError):
                    path.rmdir()

    def lock(self, name: str, what: str, *, wait: bool = False) -> FileLock:
        return FileLock(self._path(name), what, wait=wait)

    def clean(self, names: Iterable[str]) -> None:
        paths = [self._path(name) for name in names]
        for folder in {path.parent for path in paths}:
            asides = tuple(f".{path.name}." for path in paths if path.parent == folder)
            with suppress(FileNotFoundError):  # without the folder, nothing is left
                for left in folder.glob(".*.tmp"):
                    if left.name.startswith(asides):
                        left.unlink(missing_ok=True)

    def read(self, name: str) -> bytes:
        return read_regular(self._path(name), MAX_SMALL_BYTES)

    def write(self, name: str, content: bytes) -> None:
        # The folder is there since its lock was taken. Were it made again here, nobody would note that it was removed.
        write_atomically(self._path(name), content)

    def shard_path(self, name: str) -> Path:
        return self._path(name)

    def publish(self, name: str) -> None:
        """A shard's writer has renamed it to its place already."""

    def size(self, name: str) -> int | None:
        path = self._path(name)
        try:
            # NFS remembers for a while that there was no such file; reading the folder makes it look again.
            there = path.exists() or path in path.parent.iterdir()
            return path.stat().st_size if there else None
        except FileNotFoundError:
            return None

    def has(self, name: str, num_bytes: int, sha256: str) -> bool:
        with suppress(FileNotFoundError):  # it may be removed between the two looks at it
            return self.size(name) == num_bytes and sha256_of(self._path(name)) == sha256
        return False

    def remove(self, name: str) -> None:
        shutil.rmtree(self._path(name), ignore_errors=True)

    def find(self, name: str) -> list[str]:
        return sorted(str(path.relative_to(self._root)) for path in self._root.glob(f"*/{name}"))

    def _path(self, name: str) -> Path:
        """Return the path of a file.

        Raises:
            DatasetError: A folder on the way to it is a symbolic link out of the dataset.
        """
        path = self._root / name
        folder = os.path.realpath(path.parent)
        if not Path(folder).is_relative_to(os.path.realpath(self._root)):
            raise DatasetError(
                f"{path.parent} leads to {folder}, outside of {self._root}: nothing is written through symbolic links in a "
                "dataset; remove the link, or build into the folder that it points to"
            )
        return path


class RemoteOutput:
    """A folder behind a URL. Shards are written to a temporary folder and uploaded whole.

    Args:
        url: of any protocol that fsspec can write to.
        storage_options: what fsspec's file system takes.
    """

    def __init__(self, url: str, storage_options: dict[str, Any]) -> None:
        self._url, self._options = url.rstrip("/"), storage_options
        self._files = RemoteFiles(url, storage_options)  # knows what is secret in URL and options

    def __str__(self) -> str:
        return self._files.name

    def check_writable(self) -> None:
        name = f".probe-{platform.node()}-{os.getpid()}"

        def probe(files: Any, path: str) -> None:
            self._upload(files, path, 1, lambda aside: files.pipe_file(aside, b"0"))
            files.rm_file(path)

        self._try(name, probe, pauses=())
        self._scratch()

    def lock(self, name: str, what: str, *, wait: bool = False) -> FileLock:
        return FileLock(self._scratch() / "locks" / name.replace("/", "-"), what, wait=wait)

    def clean(self, names: Iterable[str]) -> None:
        """Remove the temporary files of this machine's dead processes, whatever they were making."""
        for folder in self._scratch().glob(f"{platform.node()}-*"):
            if not _is_alive(int(folder.name.rpartition("-")[2])):
                shutil.rmtree(folder, ignore_errors=True)

    def read(self, name: str) -> bytes:
        return self._try(name, lambda files, path: bytes(files.cat_file(path)))

    def write(self, name: str, content: bytes) -> None:
        def upload(files: Any, path: str) -> None:
            self._upload(files, path, len(content), lambda aside: files.pipe_file(aside, content))

        self._try(name, upload)

    def shard_path(self, name: str) -> Path:
        path = self._scratch() / f"{platform.node()}-{os.getpid()}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def publish(self, name: str) -> None:
        local = self.shard_path(name)

        def upload(files: Any, path: str) -> None:
            self._upload(files, path, local.stat().st_size, lambda aside: files.put_file(str(local), aside))

        self._try(name, upload)
        local.unlink()

    def size(self, name: str) -> int | None:
        try:
            return self._try(name, _fresh_size)
        except FileNotFoundError:
            return None

    def has(self, name: str, num_bytes: int, sha256: str) -> bool:
        return self.size(name) == num_bytes

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._try(name, lambda files, path: (files.invalidate_cache(), files.rm(path, recursive=True)))

    def find(self, name: str) -> list[str]:
        def find(files: Any, path: str) -> list[str]:
            files.invalidate_cache()
            return sorted("/".join(PurePosixPath(found).parts[-2:]) for found in files.glob(f"{path}*/{name}"))

        return self._try("", find)

    def _upload(self, files: Any, path: str, num_bytes: int, send: Callable[[str], object]) -> None:
        folder, _, name = path.rpartition("/")
        is_atomic = urlsplit(self._url).scheme in _ATOMIC
        aside = path if is_atomic else f"{folder}/.{name}.{platform.node()}-{os.getpid()}.tmp"
        if not is_atomic:  # nor has it folders that are there when something is in them
            files.makedirs(folder, exist_ok=True)
        send(aside)
        size = _fresh_size(files, aside)
        if size != num_bytes:
            raise OSError(f"{size} of {num_bytes} bytes have arrived")
        if aside != path:
            files.mv(aside, path)

    def _scratch(self) -> Path:
        """Return this user's temporary folder for this URL, so that the next build finds what a killed one left."""
        digest = hashlib.sha256(str(self).encode()).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"relabel-build-{os.getuid()}-{digest}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()  # others may put a link into /tmp that leads to a folder of this user's
        if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode):
            raise PermissionError(f"{folder} is another user's: set TMPDIR to another folder for temporary files")
        return folder

    def _try(self, name: str, do: Callable[[Any, str], T], pauses: Iterable[float] = _PAUSES_S) -> T:
        """Return what `do` returns for the file system and the path of a name, after some tries.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: it cannot be done.
        """
        waits = iter(pauses)
        while True:
            try:
                files, root = fsspec.core.url_to_fs(self._url, **self._options)
                return do(files, f"{root.rstrip('/')}/{name}")
            except Exception as error:  # noqa: BLE001  each protocol's library has its own
                # Not chained: the libraries' errors show the URL with all that is secret in it.
                what = self._files.redact(f"{type(error).__name__}: {error}")
                if isinstance(error, FileNotFoundError):
                    raise FileNotFoundError(f"{self}/{name}: {what}") from None
                pause = next(waits, None)
                final = isinstance(error, (PermissionError, ImportError, NotImplementedError, ValueError, TypeError))
                if pause is None or final:
                    raise OSError(f"{self}/{name} cannot be written: {what}") from None
                logger.warning("%s/%s: %s; again in %.1f s", self, name, what, pause)
            time.sleep(pause)


@contextmanager
def explaining_errors(folder: object) -> Iterator[None]:
    """Say what is wrong with the folder that is written to, and what to do, where the system says only "no space left"."""
    try:
        yield
    except OSError as error:
        if is_explained(error):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = f"the disk of {folder} is full: free some space, and the same command goes on"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            text = f"{folder} can no longer be written to"
        elif isinstance(error, FileNotFoundError) and (removed := _removed(error, str(folder))):
            text = f"{removed} was removed during the build: the same command makes it anew"
        else:
            raise
        raise _explained(error, text) from error


def _removed(error: FileNotFoundError, folder: str) -> str | None:
    """Return what is not there any more, if it is the folder or a file in it: `rm -r` takes the files first."""
    if is_url(folder):
        return None
    if not Path(folder).is_dir():
        return f"the folder {folder}"
    path = str(error.filename2 or error.filename)  # of a file that could not be renamed, its own name
    return path if path.startswith(f"{folder}/") else None


def _explained(error: OSError, text: str) -> OSError:
    return type(error)(error.errno, f"{text} ({error.strerror})")


def _fresh_size(files: Any, path: str) -> int:
    files.invalidate_cache(re.sub(r"/[^/]*$", "", path))
    return int(files.info(path)["size"])


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
