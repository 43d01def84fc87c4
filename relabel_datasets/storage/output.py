"""Outputs of a build: a local folder, or a URL that fsspec can write to. Each file is written completely or not at all."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import fsspec

from ..compatibility import user_id
from ..errors import DatasetError
from .folders import MAX_SMALL_BYTES, is_url, without_file_scheme
from .local import sha256_of, temp_path_for, write_atomically
from .locks import FileLock
from .output_errors import with_reason
from .regular_files import create_new, read_regular
from .remote import RemoteFiles
from .retries import Failure, retry
from .temp_folders import temporary_folder

T = TypeVar("T")

# Protocols on which a file appears once its upload is complete. On others it is uploaded under a temporary name and moved.
_ATOMIC = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "hf", "memory"}
_STAGING_PREFIX = "relabel-build-"  # of the folder of a shard that is written and uploaded
_PROBE = "probe"  # file that is written to check write access
_PAUSES_S = (0.5, 1, 2, 4, 8, 16, 32)  # between attempts of an upload
_PERMANENT = (PermissionError, ImportError, NotImplementedError, ValueError, TypeError)


class Output(Protocol):
    """Folder of a dataset that is written. File names are relative to it, and its `str()` contains no credentials."""

    def check_writable(self) -> None:
        """Check that files can be created here, without leaving any.

        Raises:
            OSError: Files cannot be created. The message says what to do.
        """
        ...

    def lock(self, name: str, what: str, *, wait: bool = False) -> FileLock:
        """Return a lock, see `FileLock`. The lock of a remote folder holds only between the processes of this machine.

        Args:
            name: Name of the lock file.
            what: Name of what is locked, for the error message.
            wait: Whether to wait for another holder instead of raising. Default: False.
        """
        ...

    def clean(self, names: Iterable[str]) -> None:
        """Remove the temporary files that killed processes left of these files. No other process may be writing them.

        Args:
            names: Names of the complete files.
        """
        ...

    def read(self, name: str) -> bytes:
        """Return the content of a small file.

        Args:
            name: Name of the file.

        Raises:
            FileNotFoundError: There is no such file.
        """
        ...

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, completely or not at all.

        Args:
            name: Name of the file.
            content: Bytes to write.
        """
        ...

    def shard_path(self, name: str) -> Path:
        """Return the local path to write a large file to. Call `publish` with the same name afterwards."""
        ...

    def publish(self, name: str) -> None:
        """Move or upload a file that was written to `shard_path`."""
        ...

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes; None if there is no such file."""
        ...

    def has(self, name: str, num_bytes: int, sha256: str) -> bool:
        """Return whether a file exists with this content. In a remote folder, only the size is compared.

        Args:
            name: Name of the file.
            num_bytes: Expected size in bytes.
            sha256: Expected SHA-256, in hex.
        """
        ...

    def remove(self, name: str) -> None:
        """Remove a folder and its content; no-op if it does not exist."""
        ...

    def find(self, name: str) -> list[str]:
        """Return the relative paths of all files with this name in the direct subfolders."""
        ...


def open_output(root: str | os.PathLike[str], storage_options: dict[str, Any] | None = None) -> Output:
    """Return the output at a path or URL.

    Args:
        root: Local folder, or URL of any protocol that fsspec can write to.
        storage_options: Arguments of fsspec's file system, such as credentials. Default: none.

    Returns:
        A `LocalOutput` or a `RemoteOutput`.

    Raises:
        MissingExtraError: (an ImportError) The package for the protocol of the URL is not installed.
        ValueError: The URL contains characters of patterns.
    """
    text = without_file_scheme(root)
    return RemoteOutput(text, storage_options or {}) if is_url(text) else LocalOutput(text)


class LocalOutput:
    """Local folder. If several machines build together, it must have the same path on all of them.

    Args:
        root: Path of the folder.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = Path(root).absolute()  # workers of an engine may have another working directory

    def __str__(self) -> str:
        return str(self._root)

    def check_writable(self) -> None:
        missing = [path for path in (self._root, *self._root.parents) if not path.exists()]
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            with create_new(temp_path_for(self._root / _PROBE)) as file:
                file.write(b"0")
        except OSError as error:
            raise with_reason(error, f"{self} cannot be written to") from error
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
            prefixes = tuple(f".{path.name}." for path in paths if path.parent == folder)
            with suppress(FileNotFoundError):  # the folder does not exist
                for temp_path in folder.glob(".*.tmp"):
                    if temp_path.name.startswith(prefixes):
                        temp_path.unlink(missing_ok=True)

    def read(self, name: str) -> bytes:
        return read_regular(self._path(name), MAX_SMALL_BYTES)

    def write(self, name: str, content: bytes) -> None:
        # The folder was created with its lock. Creating it here would hide that it was removed during the build.
        write_atomically(self._path(name), content)

    def shard_path(self, name: str) -> Path:
        return self._path(name)

    def publish(self, name: str) -> None:
        """Do nothing: the writer of a shard has already renamed it."""

    def size(self, name: str) -> int | None:
        path = self._path(name)
        try:
            # NFS caches for a while that a file does not exist; listing the folder refreshes that.
            exists = path.exists() or path in path.parent.iterdir()
            return path.stat().st_size if exists else None
        except FileNotFoundError:
            return None

    def has(self, name: str, num_bytes: int, sha256: str) -> bool:
        with suppress(FileNotFoundError):  # it may be removed between the two checks
            return self.size(name) == num_bytes and sha256_of(self._path(name)) == sha256
        return False

    def remove(self, name: str) -> None:
        shutil.rmtree(self._path(name), ignore_errors=True)

    def find(self, name: str) -> list[str]:
        with suppress(FileNotFoundError):  # the folder may be removed meanwhile
            return sorted(path.relative_to(self._root).as_posix() for path in self._root.glob(f"*/{name}"))
        return []

    def _path(self, name: str) -> Path:
        """Return the path of a file.

        Raises:
            DatasetError: A parent folder is a symbolic link to a folder outside of the dataset.
        """
        path = self._root / name
        folder = os.path.realpath(path.parent)
        if not Path(folder).is_relative_to(os.path.realpath(self._root)):
            raise DatasetError(
                f"{path.parent} is a symbolic link to {folder}, outside of {self._root}: a build does not write through "
                "symbolic links in a dataset; remove the link, or build into the folder that it points to"
            )
        return path


class RemoteOutput:
    """Folder at a URL. Each shard is written to a temporary folder and then uploaded.

    Args:
        url: URL of any protocol that fsspec can write to.
        storage_options: Arguments of fsspec's file system, such as credentials.
    """

    def __init__(self, url: str, storage_options: dict[str, Any]) -> None:
        self._url, self._options = url.rstrip("/"), storage_options
        self._files = RemoteFiles(url, storage_options)  # it redacts the secrets of URL and options
        self._staging: dict[str, tuple[ExitStack, Path]] = {}  # shards of this process that are being written
        path = url.partition("://")[2].partition("/")[2].partition("?")[0]
        if set("*[") & set(path):  # fsspec would move and remove all files of the pattern
            raise ValueError(
                f"{self}: a dataset cannot be written to a URL with * or [: choose another name for the folder"
            )

    def __str__(self) -> str:
        return self._files.name

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_staging": {}}  # another process has its own shards

    def check_writable(self) -> None:
        name = f".probe-{platform.node()}-{os.getpid()}"

        def probe(files: Any, path: str) -> None:
            self._upload(files, path, 1, lambda temp_path: files.pipe_file(temp_path, b"0"))
            files.rm_file(path)

        self._try(name, probe, pauses_s=())
        with temporary_folder(_STAGING_PREFIX):  # removes what killed builds have left
            pass

    def lock(self, name: str, what: str, *, wait: bool = False) -> FileLock:
        return FileLock(self._lock_folder() / name.replace("/", "-"), what, wait=wait)

    def clean(self, names: Iterable[str]) -> None:
        """Remove the shards that this process has not completed. `temporary_folder` removes those of killed processes."""
        while self._staging:
            self._staging.popitem()[1][0].close()

    def read(self, name: str) -> bytes:
        return self._try(name, lambda files, path: bytes(files.cat_file(path)))

    def write(self, name: str, content: bytes) -> None:
        def upload(files: Any, path: str) -> None:
            self._upload(files, path, len(content), lambda temp_path: files.pipe_file(temp_path, content))

        self._try(name, upload)

    def shard_path(self, name: str) -> Path:
        if name not in self._staging:
            stack = ExitStack()
            folder = stack.enter_context(temporary_folder(_STAGING_PREFIX))
            self._staging[name] = stack, folder / PurePosixPath(name).name
        return self._staging[name][1]

    def publish(self, name: str) -> None:
        stack, local = self._staging.pop(name)

        def upload(files: Any, path: str) -> None:
            self._upload(files, path, local.stat().st_size, lambda temp_path: files.put_file(str(local), temp_path))

        with stack:
            self._try(name, upload)

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
            return sorted("/".join(PurePosixPath(file).parts[-2:]) for file in files.glob(f"{path}*/{name}"))

        return self._try("", find)

    def _upload(self, files: Any, path: str, num_bytes: int, send: Callable[[str], object]) -> None:
        folder, _, name = path.rpartition("/")
        is_atomic = urlsplit(self._url).scheme in _ATOMIC
        temp_path = path if is_atomic else f"{folder}/.{name}.{platform.node()}-{os.getpid()}.tmp"
        if not is_atomic:  # such protocols have real folders
            files.makedirs(folder, exist_ok=True)
        send(temp_path)
        size = _fresh_size(files, temp_path)
        if size != num_bytes:
            raise OSError(f"the upload is incomplete: {size} of {num_bytes} bytes")
        if temp_path != path:
            files.mv(temp_path, path)

    def _lock_folder(self) -> Path:
        """Return the folder of the locks of this user for this URL."""
        digest = hashlib.sha256(str(self).encode()).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"relabel-locks-{user_id()}-{digest}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()  # in /tmp, another user could have created a link to a folder of this user
        if status.st_uid != user_id() or not stat.S_ISDIR(status.st_mode):
            raise PermissionError(f"{folder} belongs to another user: set TMPDIR to another folder for temporary files")
        return folder

    def _try(self, name: str, call: Callable[[Any, str], T], pauses_s: Iterable[float] = _PAUSES_S) -> T:
        """Call a function with the file system and the path of a file, and retry after temporary failures.

        Raises:
            FileNotFoundError: There is no such file.
            OSError: The call has failed.
        """

        def attempt() -> T:
            files, root = fsspec.core.url_to_fs(self._url, **self._options)
            return call(files, f"{root.rstrip('/')}/{name}")

        def explain(error: Exception) -> Failure:
            # Without a cause: the errors of the libraries quote the URL with its secrets.
            what = self._files.redact(f"{type(error).__name__}: {error}")
            if isinstance(error, FileNotFoundError):
                return Failure(FileNotFoundError(f"{self}/{name}: {what}"))
            is_temporary = not isinstance(error, _PERMANENT)
            summary = f"{self}/{name}: {what}"
            return Failure(
                OSError(f"{self}/{name} cannot be written: {what}"), is_temporary=is_temporary, summary=summary
            )

        return retry(attempt, explain, pauses_s)


def _fresh_size(files: Any, path: str) -> int:
    files.invalidate_cache(re.sub(r"/[^/]*$", "", path))
    return int(files.info(path)["size"])
