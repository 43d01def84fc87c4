"""Read remote files through fsspec, with the checks and retries that fsspec lacks.

A file is read range by range. Each response must have the requested length. Truncated, dropped, stalled and temporarily
refused requests are repeated after pauses that double, with jitter. The SHA-256 of the complete file is verified at the end.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO
from urllib.parse import quote

from ..compatibility import import_fsspec, is_timeout, sha256_digest
from ..errors import DatasetError, RefusedError
from ..extras import check_protocol
from .redaction import check_login, redact, redact_path, redacted_cause, secrets_of
from .retries import Failure, growing_pauses, retry

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 10  # for one range, about two minutes of pauses in total
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
STALL_S = 60.0  # timeout of one range; the next attempt requests fewer bytes
RANGE_BYTES, SMALLEST_RANGE_BYTES = 8 << 20, 64 << 10
_WHOLE_ATTEMPTS = 3  # downloads of a file whose content is wrong
_RETRIED_STATUS = {408, 416, 425, 429}  # and 5xx; 416: the server does not have the whole file yet
_REFUSED_STATUS = {401, 403, 407}
_MISCONFIGURED = {  # classes of botocore: credentials or settings of this machine are missing or wrong
    "ConfigNotFound", "ConfigParseError", "InvalidConfigError", "LoginError", "NoAuthTokenError", "NoCredentialsError",
    "PartialCredentialsError", "ProfileNotFound", "SSOError", "UnknownCredentialError",
}  # fmt: skip

# Never freed: a forked child that frees its parent's file system removes the parent's connections from the epoll that both
# share, and the parent then waits forever for a response. (fsspec keeps its own references only until a fork.)
_file_systems: list[Any] = []


class _WrongLengthError(Exception):
    pass


class _TooLargeError(ValueError):  # not temporary
    pass


class RemoteFiles:
    """The files below a URL.

    Args:
        url: URL of a folder, of any protocol of fsspec. Its query, such as a signature, is part of every request.
        storage_options: Arguments of fsspec's file system of this protocol, such as credentials.

    Attributes:
        name: The URL without user, password, query and fragment, as messages show it.

    Raises:
        ValueError: The URL is a chain, such as `simplecache::https://...`, or its password contains unescaped characters.
        MissingExtraError: (an ImportError) The package for the protocol is not installed.
    """

    def __init__(self, url: str, storage_options: dict[str, Any]) -> None:
        self.name = redact_path(url).rstrip("/")
        if "::" in re.sub(r"\[[^\]]*\]", "", self.name):  # but an IPv6 address may contain it
            raise ValueError(
                f"{self.name}: chains of URLs are not supported: give the URL of the folder alone, what is remote is cached anyway"
            )
        check_login(url)
        self._protocol, _, rest = url.partition("://")
        self._protocol = self._protocol.lower()
        check_protocol(self._protocol)
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

    def read_small(self, name: str, check: Callable[[bytes], object], max_bytes: int) -> bytes:
        """Read a file of unknown length.

        Args:
            name: Name of the file, relative to the URL.
            check: Function that raises DatasetError if the bytes are damaged.
            max_bytes: Maximum size of the file in bytes. No more is read from the server.

        Returns:
            The content of the file.

        Raises:
            FileNotFoundError: There is no such file.
            DatasetError: The file is damaged after several downloads, is too large, or cannot be reached. It is a ValueError.
        """
        for attempt in range(_WHOLE_ATTEMPTS):
            data = self._retry(name, lambda: self._cat_small(name, max_bytes))
            try:
                check(data)
            except DatasetError as error:
                if attempt == _WHOLE_ATTEMPTS - 1:
                    raise
                logger.warning("%s; downloading it again", error)
                time.sleep(FIRST_PAUSE_S)
            else:
                return data
        raise AssertionError

    def download(self, name: str, num_bytes: int, sha256: str, file: BinaryIO) -> None:
        """Complete a local file that may already hold the first bytes of a remote file.

        Args:
            name: Name of the remote file, relative to the URL.
            num_bytes: Size of the complete file in bytes.
            sha256: SHA-256 of the complete file, in hex.
            file: Local file, open for reading and writing.

        Raises:
            FileNotFoundError: There is no such remote file.
            DatasetError: The file differs from the expected one, or cannot be reached. It is a ValueError.
        """
        for _ in range(_WHOLE_ATTEMPTS):
            file.seek(0)
            digest = sha256_digest(file)
            if file.tell() > num_bytes:
                file.truncate(0)
                continue
            for data in self._ranges(name, file.tell(), num_bytes):
                file.write(data)
                digest.update(data)
            file.flush()
            if digest.hexdigest() == sha256:
                return
            logger.warning("%s/%s: wrong SHA-256; downloading it again", self.name, name)
            file.truncate(0)
        raise DatasetError(
            f"{self.name}/{name}: its SHA-256 is {digest.hexdigest()}, the manifest says {sha256}: it is damaged or from another "
            "build; publish the dataset again"
        )

    def _ranges(self, name: str, start: int, total: int) -> Iterator[bytes]:
        """Yield the bytes from `start` to `total`, range by range."""
        size = RANGE_BYTES

        def read() -> bytes:
            nonlocal size
            stop = min(start + size, total)
            began = time.monotonic()
            try:
                data = self._cat(name, total, start, stop)
            except Exception:
                if time.monotonic() - began >= STALL_S:
                    size = max(size // 4, SMALLEST_RANGE_BYTES)  # fewer bytes fit within the timeout
                raise
            if len(data) == total != stop - start:
                return data[start:]  # the server ignored the range and sent the whole file
            if len(data) != stop - start:
                raise _WrongLengthError(
                    f"the server sent {len(data)} instead of {stop - start} bytes from byte {start} on"
                )
            size = min(size * 2, RANGE_BYTES)
            return data

        while start < total:  # a killed download may have all bytes, and S3 answers 416 to an empty range
            data = self._retry(name, read)
            yield data
            start += len(data)

    def _retry(self, name: str, read: Callable[[], bytes]) -> bytes:
        self._file_system()  # a file system that cannot be opened is not tried again
        pauses = growing_pauses(FIRST_PAUSE_S, LONGEST_PAUSE_S, MAX_ATTEMPTS - 1)
        return retry(read, lambda error: self._explain(name, error), pauses)

    def _explain(self, name: str, error: Exception) -> Failure:
        self._file_system().invalidate_cache()  # the Hub's file system looks up files and sizes in an old listing
        if isinstance(error, FileNotFoundError) and not _is_of_credentials(error, name):
            return Failure(
                FileNotFoundError(f"there is no {name} in {self.name}: check the URL, or publish the dataset again")
            )
        what, cause = self._describe(error), redacted_cause(error, self._secrets)
        text = f"{self.name}/{name} cannot be read"
        if _is_refusal(error) or _is_of_credentials(error, name):
            advice = (
                "check the URL, and that credentials are given and valid (storage_options=, environment, ~/.aws, ~/.netrc; a "
                "signed URL may have expired)"
            )
            return Failure(RefusedError(f"{text}: {what}: {advice}"), cause)
        if not _is_temporary(error):
            return Failure(DatasetError(f"{text}: {what}"), cause)
        advice = "check the address, the network and the proxy, and try again later"
        return Failure(
            DatasetError(f"{text}, {MAX_ATTEMPTS} times in a row: {what}: {advice}"),
            cause,
            is_temporary=True,
            summary=f"{self.name}/{name}: {what}",
            min_pause_s=min(_retry_after(error), LONGEST_PAUSE_S),
        )

    def _cat_small(self, name: str, max_bytes: int) -> bytes:
        """Read a whole file of at most `max_bytes`."""
        if self._is_http:
            return self._cat(name, max_bytes)
        try:
            data = self._cat(name, max_bytes, 0, max_bytes + 1)  # other protocols send no more than a range
        except Exception as error:
            if _response_of(error)[0] == 416:  # S3 and GCS have no range of an empty file
                return b""
            raise
        if len(data) > max_bytes:
            raise _TooLargeError(_too_large(max_bytes))
        return data

    def _cat(self, name: str, max_bytes: int, start: int | None = None, stop: int | None = None) -> bytes:
        """Read a range of a file. An HTTP server may send another range, but no more than `max_bytes` are read."""
        files = self._file_system()
        name = quote(name) if self._is_http else name
        path = files._strip_protocol(f"{self._url}/{name}{self._query}")
        asyn = import_fsspec().asyn
        if self._is_http:
            data = asyn.sync(files.loop, _get, files, path, max_bytes, start, stop, timeout=STALL_S)
        elif isinstance(files, asyn.AsyncFileSystem):
            data = asyn.sync(files.loop, files._cat_file, path, start=start, end=stop, timeout=STALL_S)
        else:
            # by default, the Hub's file system reads 5 MiB more with each range and discards them
            more = {"cache_type": "none"} if self._protocol == "hf" else {}
            data = files.cat_file(path, start=start, end=stop, **more)
        return bytes(data)

    def _file_system(self) -> Any:
        """Return the file system of this process; fsspec's do not work after a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            options, is_s3 = _copy(self._options), self._protocol in ("s3", "s3a")
            if self._is_http:
                # use proxies and ~/.netrc as other tools do
                options["client_kwargs"] = {"trust_env": True, **options.get("client_kwargs", {})}
            if is_s3:  # retries are made here, not in botocore too
                options["config_kwargs"] = {"retries": {"max_attempts": 0}, **options.get("config_kwargs", {})}
            try:
                files = import_fsspec().filesystem(self._protocol, **options)
            except Exception as error:  # noqa: BLE001  each protocol's library has its own
                raise DatasetError(
                    f"{self.name}: cannot open {self._protocol}:// URLs: {self.redact(error)}"
                ) from redacted_cause(error, self._secrets)
            if is_s3:
                files.retries = 1  # disables the retries of s3fs
            _file_systems.append(files)
            self._opened = os.getpid(), files
        return self._opened[1]

    def _describe(self, error: Exception) -> str:
        if isinstance(error, (_WrongLengthError, _TooLargeError)):
            return str(error)
        if is_timeout(error) and not str(error):
            return f"no complete response within {STALL_S:g} s"
        if isinstance(getattr(error.__cause__, "response", None), dict):
            error = error.__cause__  # type: ignore[assignment]  # the error of botocore has more details
        text = " ".join(str(error).split())  # the Hub's errors have several lines
        return self.redact(f"{type(error).__name__}: {text}" if text else type(error).__name__)

    def redact(self, text: object) -> str:
        """Return a text without the secrets of this URL and its options, and without those of other URLs in it.

        Args:
            text: A message, or any object to convert with `str`.
        """
        return redact(text, self._secrets)


async def _get(files: Any, url: str, max_bytes: int, start: int | None, stop: int | None) -> bytes:
    """Read a URL as fsspec's HTTP file system does, but at most `max_bytes`, also of a compressed answer.

    Raises:
        _TooLargeError: The server sends more.
    """
    options = dict(files.kwargs)
    if stop is not None:
        options["headers"] = {**options.get("headers", {}), "Range": f"bytes={start}-{stop - 1}"}
    session = await files.set_session()
    data = bytearray()
    async with session.get(files.encode_url(url), **options) as response:
        files._raise_not_found_for_status(response, url)
        async for part in response.content.iter_any():
            data += part
            if len(data) > max_bytes:
                raise _TooLargeError(_too_large(max_bytes))
    return bytes(data)


def _too_large(max_bytes: int) -> str:
    return f"it has more than {max_bytes} bytes, the limit for this file: check that the URL is that of a dataset"


def _copy(options: Any) -> Any:
    """Return a deep copy of options: botocore changes its arguments."""
    return {name: _copy(value) for name, value in options.items()} if isinstance(options, dict) else options


def _response_of(error: Exception) -> tuple[int | None, Mapping[str, str]]:
    """Return status and headers of the HTTP response in an error of aiohttp, httpx, requests, botocore, s3fs or gcsfs."""
    response = getattr(error, "response", None)
    if response is None:
        response = getattr(error.__cause__, "response", error)
    if isinstance(response, dict):
        response = response.get("ResponseMetadata", {})
        return response.get("HTTPStatusCode"), response.get("HTTPHeaders", {})
    names = ("status", "status_code", "code")  # the last one of gcsfs
    status = next((value for name in names if (value := getattr(response, name, None)) is not None), None)
    return status if isinstance(status, int) else None, getattr(response, "headers", None) or {}


def _is_refusal(error: Exception) -> bool:
    return (
        isinstance(error, PermissionError)
        or (type(error) is OSError and str(error).startswith("Forbidden: "))  # gcsfs, for 403
        or any(parent.__name__ in _MISCONFIGURED for parent in type(error).__mro__)
        or _response_of(error)[0] in _REFUSED_STATUS
    )


def _is_of_credentials(error: Exception, name: str) -> bool:
    """Return whether an error is about a local file, such as one with credentials, instead of the requested file."""
    return isinstance(error, OSError) and error.filename is not None and not str(error.filename).endswith(name)


def _is_temporary(error: Exception) -> bool:
    """Return whether the same request may succeed later."""
    if is_timeout(error):
        return True
    # ValueError: an invalid URL or certificate
    if isinstance(error, (TypeError, ValueError, NotImplementedError, ImportError)):
        return False
    status, _ = _response_of(error)
    return status is None or status >= 500 or status in _RETRIED_STATUS


def _retry_after(error: Exception) -> float:
    """Return the number of seconds in the header `Retry-After`; 0 without it."""
    _, headers = _response_of(error)
    value = headers.get("Retry-After") or headers.get("retry-after") or ""
    return float(value) if value.isdecimal() else 0.0
