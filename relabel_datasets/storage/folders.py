"""Folders of a dataset, local or remote. Both open their files as verified local files."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

import yaml

from ..errors import DatasetError, RefusedError
from ..naming import CONFIG_RULE, check_config, check_file_name, is_config
from .cache import ShardCache
from .recheck import has_other_content
from .redaction import redact_path
from .regular_files import open_regular, read_inside, read_regular
from .remote import RemoteFiles

logger = logging.getLogger(__name__)
T = TypeVar("T")

MANIFEST_NAME = "_info.json"  # a folder that holds it is a config
CARD_NAME = "README.md"
MAX_SMALL_BYTES = 64 << 20  # of a manifest, as in `schema.parse_json`; 1000 shards need about 1 MB
MAX_CARD_BYTES = 16 << 20  # a card lists all classes of all configs; 21,000 classes need about 0.5 MB
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class Folder(Protocol):
    """Folder of a dataset. Its `str()` is its path, or its URL without credentials."""

    @property
    def is_remote(self) -> bool:
        """Whether files are downloaded when they are opened."""
        ...

    def child(self, name: str) -> Folder:
        """Return a subfolder.

        Args:
            name: Name of a config.
        """
        ...

    def configs(self) -> list[str] | None:
        """Return the sorted names of the configs in this folder; None if the folder itself is a config.

        Raises:
            FileNotFoundError: There is no dataset.
        """
        ...

    def card(self) -> str | None:
        """Return the text of the dataset's card; None if there is no card.

        Raises:
            DatasetError: The card cannot be read. It is a ValueError.
        """
        ...

    def read(self, name: str, parse: Callable[[bytes], T]) -> T:
        """Read and parse a small file that is not in the manifest. A damaged remote file is downloaded again.

        Args:
            name: Name of the file.
            parse: Function that parses the content. It raises DatasetError if the content is damaged.

        Returns:
            The result of `parse`.

        Raises:
            FileNotFoundError: There is no such file.
            DatasetError: The file is damaged or cannot be reached. It is a ValueError.
        """
        ...

    def open(self, name: str, num_bytes: int, sha256: str) -> BinaryIO:
        """Open a file of the manifest.

        Args:
            name: Name of the file.
            num_bytes: Expected size in bytes.
            sha256: Expected SHA-256, in hex.

        Returns:
            A local file with this content, open for reading.

        Raises:
            FileNotFoundError: There is no such file.
            DatasetError: The file differs from the expected one, or cannot be reached. It is a ValueError.
        """
        ...

    def has(self, sha256: str) -> bool:
        """Return whether a file that was opened is still on disk; the cache may have deleted it.

        Args:
            sha256: SHA-256 of the file, in hex.
        """
        ...

    def check_room(self, num_bytes: int, what: str) -> None:
        """Raise an error if `num_bytes` exceeds the limit of the cache.

        Args:
            num_bytes: Number of bytes that are needed at the same time.
            what: Name of what needs them, for the error message.

        Raises:
            DatasetError: The limit is exceeded.
        """
        ...


class LocalFolder:
    """Folder on disk. Sizes are compared with the manifest, and SHA-256s if `RELABEL_CHECK_ON_OPEN` is set.

    Args:
        path: Path of the folder.
    """

    is_remote = False

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)

    def __str__(self) -> str:
        return str(self._path)

    def child(self, name: str) -> LocalFolder:
        return LocalFolder(self._path / check_config(name, str(self)))

    def configs(self) -> list[str] | None:
        if (self._path / MANIFEST_NAME).is_file():
            return None
        if not self._path.is_dir():
            problem = "it is a file, not a folder" if self._path.exists() else "there is no such folder"
            raise FileNotFoundError(f"no dataset at {self}: {problem}")
        names = sorted(path.parent.name for path in self._path.glob(f"*/{MANIFEST_NAME}"))
        for name in names:
            if not is_config(name):
                logger.warning("folder %.120r in %s is ignored, its name is not valid: %s", name, self, CONFIG_RULE)
        return list(filter(is_config, names))

    def card(self) -> str | None:
        root = self._path.absolute().parent if self.configs() is None else self._path
        return read_card(root / CARD_NAME)

    def read(self, name: str, parse: Callable[[bytes], T]) -> T:
        path = self._path / name
        try:
            data = read_regular(path, MAX_SMALL_BYTES)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{self._path} has no {name}: it is not a config, or its build is unfinished"
            ) from None
        return parse(data)

    def open(self, name: str, num_bytes: int, sha256: str) -> BinaryIO:
        path = self._path / check_file_name(name, str(self))
        try:
            file = open_regular(path)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path} is in the manifest but not on disk: download or build the dataset again"
            ) from None
        size = os.fstat(file.fileno()).st_size
        if size != num_bytes:
            file.close()
            raise DatasetError(
                f"{path} has {size} bytes, its manifest says {num_bytes}: it is damaged or from another build; download or build "
                "the dataset again"
            )
        if has_other_content(file, sha256):
            file.close()
            raise DatasetError(
                f"{path} is damaged: its SHA-256 is not {sha256}, which its manifest says: download or build the dataset again"
            )
        return file

    def has(self, sha256: str) -> bool:
        return True

    def check_room(self, num_bytes: int, what: str) -> None:
        pass


class RemoteFolder:
    """Folder at a URL. Files are downloaded to the cache, and their size and SHA-256 are compared with the manifest.

    Args:
        files: Remote files of the dataset.
        cache: Cache for the downloaded files.
        below: Path of the folder in the dataset, empty or ending in a slash. Default: the root.
    """

    is_remote = True

    def __init__(self, files: RemoteFiles, cache: ShardCache, below: str = "") -> None:
        self._files, self._cache, self._below = files, cache, below

    def __str__(self) -> str:
        return f"{self._files.name}/{self._below}".rstrip("/")

    def child(self, name: str) -> RemoteFolder:
        return RemoteFolder(self._files, self._cache, f"{self._below}{check_config(name, str(self))}/")

    def configs(self) -> list[str] | None:
        try:
            self.read(MANIFEST_NAME, bytes)
        except (FileNotFoundError, RefusedError) as error:  # S3 may answer 403 for what does not exist
            no_manifest = error
        else:
            return None
        # The card names all configs. Plain HTTP cannot list a folder.
        where = f"{self}/{CARD_NAME}"
        try:
            return self.read(CARD_NAME, lambda data: card_configs(data, where))
        except FileNotFoundError:
            if isinstance(no_manifest, RefusedError):
                raise no_manifest from None
            raise FileNotFoundError(
                f"no dataset at {self}: it has neither {CARD_NAME} nor {MANIFEST_NAME} ({no_manifest})"
            ) from None

    def card(self) -> str | None:
        try:
            return decode_card(self._files.read_small(CARD_NAME, lambda _: None, MAX_CARD_BYTES), f"{self}/{CARD_NAME}")
        except (FileNotFoundError, RefusedError):  # S3 may answer 403 for what does not exist
            return None

    def read(self, name: str, parse: Callable[[bytes], T]) -> T:
        return parse(self._files.read_small(self._below + name, parse, MAX_SMALL_BYTES))

    def open(self, name: str, num_bytes: int, sha256: str) -> BinaryIO:
        path = self._below + check_file_name(name, str(self))
        return self._cache.open(sha256, num_bytes, lambda file: self._files.download(path, num_bytes, sha256, file))

    def has(self, sha256: str) -> bool:
        return self._cache.has(sha256)

    def check_room(self, num_bytes: int, what: str) -> None:
        self._cache.check_room(num_bytes, f"{what} of {self}")


def remote_folder(
    url: str,
    storage_options: dict[str, Any] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_limit: int | str | None = None,
) -> RemoteFolder:
    """Return the folder at a URL.

    Args:
        url: URL of any protocol of fsspec.
        storage_options: Arguments of fsspec's file system. Default: none.
        cache_dir: Folder of the cache, see `open_folder`.
        cache_limit: Limit of the cache, see `open_folder`.

    Returns:
        The folder. It is not opened yet.

    Raises:
        ValueError: The limit cannot be parsed, or the URL is a chain of URLs.
        MissingExtraError: (an ImportError) The package for the protocol of the URL is not installed.
    """
    folder = default_cache() if cache_dir is None else Path(cache_dir)
    limit = find_limit(cache_limit)
    cache = ShardCache(folder / "shards", limit)
    return RemoteFolder(RemoteFiles(url, dict(storage_options or {})), cache)


def without_file_scheme(path: str | os.PathLike[str]) -> str:
    """Return the path of a `file://` URL, and any other path or URL unchanged."""
    text = os.fspath(path)
    return unquote(urlsplit(text).path) if text[:7].lower() == "file://" else text


def is_url(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a URL, or a chain of URLs."""
    return re.match(r"(?:[a-z]\w*::)*[a-z][a-z0-9+.-]*://", os.fspath(path), re.IGNORECASE) is not None


def is_like_url(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a URL, a URL with a typo (`s3:/bucket`), or a `Path` made from a URL."""
    return is_url(path) or re.match(r"[a-z][a-z0-9+.-]+:/", os.fspath(path), re.IGNORECASE) is not None


def local_path(path: str | os.PathLike[str], what: str) -> Path:
    """Return an argument as a local path.

    Args:
        path: A path, or a `file://` URL.
        what: Name of the argument, for the error message.

    Raises:
        ValueError: The path is a URL.
    """
    text = without_file_scheme(path)
    if (is_like_url(text) or redact_path(text) != text) and not Path(text).exists():  # the scheme may be missing
        raise ValueError(f"{what} must be a local path, got the URL {redact_path(path)}: copy it to this machine first")
    return Path(text)


def default_cache() -> Path:
    """Return the default cache folder: the environment variable `RELABEL_CACHE`, else `~/.cache/relabel_datasets`.

    Raises:
        OSError: Neither the variable nor a home directory exists.
    """
    folder = os.environ.get("RELABEL_CACHE")
    if folder:
        return Path(folder)
    try:
        return Path.home() / ".cache" / "relabel_datasets"
    except RuntimeError:
        raise OSError(
            "there is no home directory for the cache: choose a folder with cache_dir= or the environment variable "
            "RELABEL_CACHE"
        ) from None


def find_limit(limit: int | str | None) -> int | None:
    """Parse the limit of the cache.

    Args:
        limit: Number of bytes, or text such as `"200G"`. None uses the environment variable `RELABEL_CACHE_LIMIT`.

    Returns:
        The limit in bytes; None if there is no limit.

    Raises:
        ValueError: The limit cannot be parsed.
    """
    limit = os.environ.get("RELABEL_CACHE_LIMIT") or None if limit is None else limit
    if limit is None:
        return None
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", str(limit).upper().replace(" ", ""))
    if match is None or int(match[1]) == 0:
        raise ValueError(f"cache_limit= must be a number of bytes, such as 200000000000 or '200G', got {limit!r}")
    return int(match[1]) * _UNITS[match[2]]


def card_configs(card: bytes, where: str) -> list[str]:
    """Return the names of the configs in a card's YAML, sorted.

    Args:
        card: Content of the card.
        where: Name of the card in error messages.

    Raises:
        DatasetError: The card is not UTF-8, names no configs, or names one that is not valid.
    """
    match = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", decode_card(card, where), re.DOTALL)
    if match is None:
        raise DatasetError(f"{where} is not the card of a dataset: its YAML header is missing or truncated")
    try:
        names = [config["config_name"] for config in yaml.safe_load(match[1])["configs"]]
    except (yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DatasetError(f"{where} is not the card of a dataset: {type(error).__name__}: {reason}") from error
    return sorted(check_config(name, f"{where}, config_name") for name in names)


def read_card(path: Path) -> str | None:
    """Return the text of a dataset's card on disk; None if there is no card.

    Raises:
        DatasetError: The card is not UTF-8, is larger than `MAX_CARD_BYTES`, is not a regular file, or is a symbolic link to
            a file outside of the dataset.
    """
    try:
        return decode_card(read_inside(path, MAX_CARD_BYTES), str(path))
    except FileNotFoundError:
        return None


def decode_card(card: bytes, where: str) -> str:
    """Return the text of a card.

    Args:
        card: Content of the card.
        where: Name of the card in error messages.

    Raises:
        DatasetError: The card is not UTF-8, or is larger than `MAX_CARD_BYTES`.
    """
    if len(card) > MAX_CARD_BYTES:
        raise DatasetError(f"{where} has more than {MAX_CARD_BYTES} bytes, the limit for a card")
    try:
        return card.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{where} is not UTF-8: {error}. Save it as UTF-8") from error
