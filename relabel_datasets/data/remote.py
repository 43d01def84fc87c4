"""Bytes of remote files through fsspec, with what fsspec lacks: nothing is taken for whole that is not.

A file is read range by range. Each answer must have the length asked for; what is short, dropped, stalled or refused for
now is asked for again after a pause that doubles, with jitter. The sha256 of the whole decides in the end.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO
from urllib.parse import urlsplit, urlunsplit

import fsspec
from fsspec.asyn import AsyncFileSystem, sync

from .manifest import DatasetError

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 10  # of one range, without any progress: about two minutes of pauses
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
STALL_S = 60.0  # one range may take so long; the next try asks for less
RANGE_BYTES, SMALLEST_RANGE_BYTES = 8 << 20, 64 << 10
_WHOLE_ATTEMPTS = 3  # downloads of a file whose sha256 is wrong
_RETRIED_STATUS = {408, 416, 425, 429}  # and 5xx; 416: a server that has only the beginning of the file, for now


class RemoteFiles:
    """The files below a URL.

    Args:
        url: of a folder, of any protocol that fsspec has. A query, such as a signature, goes with each request.
        storage_options: what fsspec's file system of this protocol takes, such as credentials.

    Attributes:
        name: the URL without user, password and query, as messages show it.
    """

    def __init__(self, url: str, storage_options: dict[str, Any]) -> None:
        parts = urlsplit(url)
        self._url = urlunsplit(parts._replace(path=parts.path.rstrip("/"), query="", fragment=""))
        self._query = f"?{parts.query}" if parts.query else ""
        self._options = storage_options
        self.name = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="")).rstrip(
            "/"
        )
        self._secrets = sorted(_secrets(parts.query, parts.netloc, storage_options), key=len, reverse=True)
        self._opened: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}  # connections stay in their process

    def read_small(self, name: str, check: Callable[[bytes], object]) -> bytes:
        """Return a whole file whose length is not known.

        Args:
            name: of the file, below the URL.
            check: raises DatasetError if the bytes are not whole.

        Raises:
            FileNotFoundError: there is no such file.
            DatasetError: (a ValueError) it stays damaged, or cannot be reached.
        """
        for attempt in range(_WHOLE_ATTEMPTS):
            data = next(self._retry(name, lambda: self._cat(name)))
            try:
                check(data)
            except DatasetError:
                if attempt == _WHOLE_ATTEMPTS - 1:
                    raise
                time.sleep(FIRST_PAUSE_S)
            else:
                return data
        raise AssertionError

    def download(self, name: str, num_bytes: int, sha256: str, file: BinaryIO) -> None:
        """Complete a local file that may hold the beginning of a remote one.

        Args:
            name: of the remote file, below the URL.
            num_bytes: its length.
            sha256: of the whole, in hex.
            file: open for reading and writing.

        Raises:
            FileNotFoundError: there is no such remote file.
            DatasetError: (a ValueError) it is another one than expected, or cannot be reached.
        """
        for _ in range(_WHOLE_ATTEMPTS):
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]
            if file.tell() > num_bytes:
                file.truncate(0)
                continue
            for data in self._ranges(name, file.tell(), num_bytes):
                file.write(data)
                digest.update(data)
            file.flush()
            if digest.hexdigest() == sha256:
                return
            logger.warning("%s/%s: wrong sha256, fetched anew", self.name, name)
            file.truncate(0)
        raise DatasetError(
            f"{self.name}/{name}: its sha256 is {digest.hexdigest()}, the manifest says {sha256}: it is damaged or of another "
            "build, publish it anew"
        )

    def _ranges(self, name: str, start: int, total: int) -> Iterator[bytes]:
        """Yield the bytes from `start` on, in pieces."""
        size = RANGE_BYTES

        def read() -> bytes:
            nonlocal size
            stop = min(start + size, total)
            began = time.monotonic()
            try:
                data = self._cat(name, start, stop)
            except (OSError, TimeoutError):
                if time.monotonic() - began >= STALL_S:
                    size = max(size // 4, SMALLEST_RANGE_BYTES)  # a slow line gets through with less at a time
                raise
            if len(data) == total != stop - start:
                return data[start:]  # the server ignored the range and sent the whole
            if len(data) != stop - start:
                raise DatasetError(f"answered with {len(data)} instead of {stop - start} bytes from byte {start} on")
            size = min(size * 2, RANGE_BYTES)
            return data

        for data in self._retry(name, read):
            yield data
            start += len(data)
            if start >= total:
                return

    def _retry(self, name: str, read: Callable[[], bytes]) -> Iterator[bytes]:
        """Yield what `read` returns, call after call; a call that fails is made again."""
        attempts = 0
        while True:
            try:
                data = read()
            except FileNotFoundError:
                raise FileNotFoundError(f"there is no {name} in {self.name}") from None
            except Exception as error:  # noqa: BLE001  each protocol's library has its own
                attempts += 1
                # Not chained: the libraries' errors show the URL with all that is secret in it.
                what = self.redact(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
                what = str(error) if isinstance(error, DatasetError) else what
                if not _may_pass(error):
                    raise DatasetError(f"{self.name}/{name} cannot be read: {what}") from None
                if attempts == MAX_ATTEMPTS:
                    raise DatasetError(
                        f"{self.name}/{name} cannot be read, {attempts} times in a row: {what}"
                    ) from None
                pause = min(FIRST_PAUSE_S * 2 ** (attempts - 1), LONGEST_PAUSE_S) * random.uniform(0.5, 1.5)
                pause = max(pause, min(_retry_after(error), LONGEST_PAUSE_S))
                logger.warning("%s/%s: %s; again in %.1f s", self.name, name, what, pause)
                time.sleep(pause)
            else:
                attempts = 0
                yield data

    def _cat(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        files = self._file_system()
        path = files._strip_protocol(f"{self._url}/{name}{self._query}")
        if isinstance(files, AsyncFileSystem):
            data = sync(files.loop, files._cat_file, path, start=start, end=stop, timeout=STALL_S)
        else:
            data = files.cat_file(path, start=start, end=stop)
        return bytes(data)

    def _file_system(self) -> Any:
        """Return this process's file system: those of fsspec do not survive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            protocol = urlsplit(self._url).scheme
            options = dict(self._options)
            if protocol in ("http", "https"):
                # proxies and ~/.netrc, as every other tool has them
                options["client_kwargs"] = {"trust_env": True, **options.get("client_kwargs", {})}
            try:
                self._opened = os.getpid(), fsspec.filesystem(protocol, **options)
            except (ImportError, ValueError) as error:
                raise DatasetError(f"{self.name}: cannot open {protocol}:// URLs: {self.redact(str(error))}") from None
        return self._opened[1]

    def redact(self, text: str) -> str:
        """Return a text without what is secret in URL and options."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return re.sub(r"(https?://)[^/\s@']+@", r"\1***@", text)


def _secrets(query: str, netloc: str, options: Any) -> set[str]:
    found = {query, netloc.rpartition("@")[0]}
    for pair in query.split("&"):
        found.add(pair.partition("=")[2])
    found.update(netloc.rpartition("@")[0].split(":"))
    stack = [options]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            stack.extend(value.values())
        elif isinstance(value, (list, tuple)):
            stack.extend(value)
        elif isinstance(value, str) and "://" not in value:  # an endpoint is not secret, and worth showing
            found.add(value)
    return {secret for secret in found if len(secret) > 3}


def _may_pass(error: Exception) -> bool:
    """Return whether the same request may succeed later."""
    if isinstance(error, (PermissionError, TypeError, NotImplementedError, ImportError)):
        return False
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return not isinstance(status, int) or status >= 500 or status < 400 or status in _RETRIED_STATUS


def _retry_after(error: Exception) -> float:
    """Return the seconds that a server asked to wait."""
    headers = getattr(error, "headers", None) or getattr(getattr(error, "response", None), "headers", None) or {}
    value = headers.get("Retry-After", "") if hasattr(headers, "get") else ""
    return float(value) if str(value).isdecimal() else 0.0
