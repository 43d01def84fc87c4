"""Bytes of remote files through fsspec, with what fsspec lacks: nothing is taken for whole that is not.

A file is read range by range. Each answer must have the length asked for; what is short, dropped, stalled or refused for
now is asked for again after a pause that doubles, with jitter. The sha256 of the whole decides in the end.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO
from urllib.parse import quote

import fsspec
from fsspec.asyn import AsyncFileSystem, sync

from ..errors import DatasetError, RefusedError
from .redaction import redact, redact_path, redacted_cause, secrets_of

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 10  # of one range, without any progress: about two minutes of pauses
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
STALL_S = 60.0  # one range may take so long; the next try asks for less
RANGE_BYTES, SMALLEST_RANGE_BYTES = 8 << 20, 64 << 10
_WHOLE_ATTEMPTS = 3  # downloads of a file whose sha256 is wrong
_RETRIED_STATUS = {408, 416, 425, 429}  # and 5xx; 416: a server that has only the beginning of the file, for now
_REFUSED_STATUS = {401, 403, 407}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError"}  # botocore's

# Never freed: a forked child that frees a file system of its parent takes the parent's connections out of its epoll, which
# they share, and the parent then waits for an answer in vain. (fsspec holds its own references only until a fork.)
_file_systems: list[Any] = []


class _WrongLengthError(Exception):
    pass


class RemoteFiles:
    """The files below a URL.

    Args:
        url: URL of a folder, of any protocol of fsspec. Its query, such as a signature, is part of every request.
        storage_options: Arguments of fsspec's file system of this protocol, such as credentials.

    Attributes:
        name: The URL without user, password, query and fragment, as messages show it.

    Raises:
        ValueError: The URL is a chain, such as `simplecache::https://...`.
    """

    def __init__(self, url: str, storage_options: dict[str, Any]) -> None:
        self.name = redact_path(url).rstrip("/")
        if "::" in self.name:
            raise ValueError(
                f"{self.name}: chains of URLs are not supported: give the URL of the folder alone, what is remote is cached anyway"
            )
        self._protocol, _, rest = url.partition("://")
        self._protocol = self._protocol.lower()
        self._is_http = self._protocol in ("http", "https")
        if self._is_http:
            rest = rest.partition("#")[0]  # elsewhere it may be part of a name
        rest, mark, query = rest.partition("?")
        rest = rest.rstrip("/")
        self._url, self._query = f"{self._protocol}://{rest}", mark + query
        self._options = storage_options
        self._secrets = secrets_of(url, storage_options)
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
            except DatasetError as error:
                if attempt == _WHOLE_ATTEMPTS - 1:
                    raise
                logger.warning("%s; fetched anew", error)
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
            except Exception:
                if time.monotonic() - began >= STALL_S:
                    size = max(size // 4, SMALLEST_RANGE_BYTES)  # a slow line gets through with less at a time
                raise
            if len(data) == total != stop - start:
                return data[start:]  # the server ignored the range and sent the whole
            if len(data) != stop - start:
                raise _WrongLengthError(
                    f"answered with {len(data)} instead of {stop - start} bytes from byte {start} on"
                )
            size = min(size * 2, RANGE_BYTES)
            return data

        answers = self._retry(name, read)
        while start < total:  # a killed download may have left all bytes, and S3 answers 416 to an empty range
            data = next(answers)
            yield data
            start += len(data)

    def _retry(self, name: str, read: Callable[[], bytes]) -> Iterator[bytes]:
        """Yield what `read` returns, call after call; a call that fails is made again."""
        self._file_system()  # what cannot be opened at all is not tried again
        attempts = 0
        while True:
            try:
                data = read()
            except Exception as error:  # noqa: BLE001  each protocol's library has its own
                attempts += 1
                self._file_system().invalidate_cache()  # the Hub's looks into an old listing for what is there, how long
                if isinstance(error, FileNotFoundError):
                    raise FileNotFoundError(
                        f"there is no {name} in {self.name}: check the URL, or publish the dataset again"
                    ) from None
                what, cause = self._describe(error), redacted_cause(error, self._secrets)
                if _is_refusal(error):
                    raise RefusedError(
                        f"{self.name}/{name} cannot be read: {what}: check the URL, and that credentials are given and valid "
                        "(storage_options=, environment, ~/.aws, ~/.netrc; a signed URL may have expired)"
                    ) from cause
                if not _may_pass(error):
                    raise DatasetError(f"{self.name}/{name} cannot be read: {what}") from cause
                if attempts == MAX_ATTEMPTS:
                    raise DatasetError(
                        f"{self.name}/{name} cannot be read, {attempts} times in a row: {what}: check the address, the network and the "
                        "proxy, and try again later"
                    ) from cause
                pause = min(FIRST_PAUSE_S * 2 ** (attempts - 1), LONGEST_PAUSE_S) * random.uniform(0.5, 1.5)
                pause = max(pause, min(_retry_after(error), LONGEST_PAUSE_S))
                logger.warning("%s/%s: %s; again in %.1f s", self.name, name, what, pause)
                time.sleep(pause)
            else:
                attempts = 0
                yield data

    def _cat(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        files = self._file_system()
        name = quote(name) if self._is_http else name
        path = files._strip_protocol(f"{self._url}/{name}{self._query}")
        if isinstance(files, AsyncFileSystem):
            data = sync(files.loop, files._cat_file, path, start=start, end=stop, timeout=STALL_S)
        else:
            # the Hub's file system would fetch five more MiB with each range, and drop them
            more = {"cache_type": "none"} if self._protocol == "hf" else {}
            data = files.cat_file(path, start=start, end=stop, **more)
        return bytes(data)

    def _file_system(self) -> Any:
        """Return this process's file system: those of fsspec do not survive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            options, is_s3 = _copy(self._options), self._protocol in ("s3", "s3a")
            if self._is_http:
                # proxies and ~/.netrc, as every other tool has them
                options["client_kwargs"] = {"trust_env": True, **options.get("client_kwargs", {})}
            if is_s3:  # we try again; botocore would before, four times each time
                options["config_kwargs"] = {"retries": {"max_attempts": 0}, **options.get("config_kwargs", {})}
            try:
                files = fsspec.filesystem(self._protocol, **options)
            except Exception as error:  # noqa: BLE001  each protocol's library has its own
                raise DatasetError(
                    f"{self.name}: cannot open {self._protocol}:// URLs: {self.redact(error)}"
                ) from redacted_cause(error, self._secrets)
            if is_s3:
                files.retries = 1  # s3fs's own loop around botocore's
            _file_systems.append(files)
            self._opened = os.getpid(), files
        return self._opened[1]

    def _describe(self, error: Exception) -> str:
        if isinstance(error, _WrongLengthError):
            return str(error)
        if isinstance(error, TimeoutError) and not str(error):
            return f"no whole answer within {STALL_S:g} s"
        if isinstance(getattr(error.__cause__, "response", None), dict):
            error = error.__cause__  # type: ignore[assignment]  # botocore's, which says more than s3fs makes of it
        text = " ".join(str(error).split())  # the Hub's have several lines
        return self.redact(f"{type(error).__name__}: {text}" if text else type(error).__name__)

    def redact(self, text: object) -> str:
        """Return a text without the secrets of this URL, of its options, and of other URLs in the text."""
        return redact(text, self._secrets)


def _copy(options: Any) -> Any:
    """Return a copy of options: botocore changes those that it is given."""
    return {name: _copy(value) for name, value in options.items()} if isinstance(options, dict) else options


def _answer(error: Exception) -> tuple[int | None, Mapping[str, str]]:
    """Return status and headers of the answer that an error of aiohttp, httpx, requests, botocore or s3fs is about."""
    response = getattr(error, "response", None)
    if response is None:
        response = getattr(error.__cause__, "response", error)
    if isinstance(response, dict):
        response = response.get("ResponseMetadata", {})
        return response.get("HTTPStatusCode"), response.get("HTTPHeaders", {})
    status = getattr(response, "status", None) or getattr(response, "status_code", None)
    return status if isinstance(status, int) else None, getattr(response, "headers", None) or {}


def _is_refusal(error: Exception) -> bool:
    return (
        isinstance(error, PermissionError)
        or type(error).__name__ in _NO_CREDENTIALS
        or _answer(error)[0] in _REFUSED_STATUS
    )


def _may_pass(error: Exception) -> bool:
    """Return whether the same request may succeed later."""
    if isinstance(error, TimeoutError):
        return True
    # ValueError: not a URL, or a certificate that is not valid
    if isinstance(error, (TypeError, ValueError, NotImplementedError, ImportError)):
        return False
    status, _ = _answer(error)
    return status is None or status >= 500 or status in _RETRIED_STATUS


def _retry_after(error: Exception) -> float:
    """Return the seconds that a server asked to wait."""
    _, headers = _answer(error)
    value = headers.get("Retry-After") or headers.get("retry-after") or ""
    return float(value) if value.isdecimal() else 0.0
