"""Resolve the path of a dataset: a local folder, a URL, `org/name` on the Hub, or a short name."""

from __future__ import annotations

import logging
import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import DatasetError
from ..keywords import checked_keywords
from .folders import (
    Folder,
    LocalFolder,
    default_cache,
    find_limit,
    is_like_url,
    is_url,
    remote_folder,
    without_file_scheme,
)
from .hub import HubFolder, HubRepo
from .redaction import redact_path

logger = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]

# Short names are folders in the cache, or repositories of that name on the Hub. Datasets that need no data are made by
# "module:function", which is imported by name because it is in a higher layer. The others are built with the named builder.
NAMESPACE = "relabel-datasets"
_REPO_ID = re.compile(r"(?!\.{1,2}/)[\w.-]+/[\w.-]+")  # ./name and ../name are folders
_MAKERS = {"scenes-relabel": "relabel_datasets.demo:make_scenes_relabel"}
_BUILDERS = {
    "imagenet-relabel": "imagenet_relabel.py (its option --published converts published labels, without a GPU)",
    "imagenette-relabel": "imagenette_relabel.py",
}


@checked_keywords()
def open_folder(
    path: PathLike | Folder,
    *,
    namespace: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    storage_options: dict[str, Any] | None = None,
    cache_dir: PathLike | None = None,
    cache_limit: int | str | None = None,
) -> Folder:
    """Open the folder of a dataset, local or remote. The result is accepted wherever a dataset path is.

    Args:
        path: One of the following. A local folder. A URL of any protocol of fsspec: `https://`, `s3://` (extra `s3`),
            `gs://` (extra `gcs`), `file://`, `memory://`, ... A dataset repository `"org/name"` on the Hub. A short name:
            `"scenes-relabel"` is drawn and built in the cache on first use (about 20 seconds); `"imagenet-relabel"` and
            `"imagenette-relabel"` are looked up in the cache, where their builders write them, and then on the Hub.
        namespace: User or organization on the Hub that owns a short name's repository. If it is given, the cache is not
            searched. Default: the environment variable `RELABEL_NAMESPACE`, else `relabel-datasets`.
        revision: Branch, tag or commit of a dataset on the Hub. It is resolved to a commit once, which all users of the
            returned folder read. Default: the default branch.
        token: Access token for the Hub. Default: the token of `hf auth login`, or of the environment variable `HF_TOKEN`.
        storage_options: Arguments of fsspec's file system for a URL, such as `{"anon": True}` for a public bucket. Credentials
            are better left in their usual places (environment, ~/.aws, ~/.netrc, `hf auth login`).
        cache_dir: Folder for short names and downloads. Default: the environment variable `RELABEL_CACHE`, else
            `~/.cache/relabel_datasets`; for the Hub its own cache (`HF_HOME`, `HF_HUB_CACHE`).
        cache_limit: Maximum size of downloaded shards, in bytes or as text such as `"200G"`. The least recently used shards
            are deleted first. The Hub's cache has no limit: with one, shards from the Hub are stored in this package's cache.
            Default: the environment variable `RELABEL_CACHE_LIMIT`, else a tenth of the disk stays free, at most
            5 GB.

    Returns:
        The folder. Its `str()` is its path, or its URL without credentials.

    Raises:
        FileNotFoundError: There is no dataset at this path. The message says how to make one.
        RefusedError: Access to the dataset on the Hub must be requested, or the token is not valid. It is a ValueError.
        DatasetError: The Hub cannot be reached. It is a ValueError.
        ValueError: A limit cannot be parsed, or an argument does not apply to this kind of path.
        MissingExtraError: (an ImportError) The package for the protocol of a URL is not installed.
    """
    if not isinstance(path, (str, os.PathLike)):
        if not hasattr(path, "configs"):
            raise TypeError(f"the path of a dataset must be a str or a path, got {type(path).__name__}")
        return path
    location = find(path, namespace=namespace, revision=revision, token=token, cache_dir=cache_dir)
    if isinstance(location, Path):
        return LocalFolder(location)
    if isinstance(location, str):
        return remote_folder(location, storage_options, cache_dir, cache_limit)
    if storage_options:
        raise ValueError(f"storage_options= is for URLs, not for {redact_path(path)} on the Hub")
    if find_limit(cache_limit) is None:
        return HubFolder(location)
    return remote_folder(*hub_url(location), cache_dir, cache_limit)


def find(
    path: PathLike, *, namespace: str | None = None, revision: str | None = None, token: str | None = None,
    cache_dir: PathLike | None = None,
) -> Path | str | HubRepo:  # fmt: skip
    """Find the location of a dataset.

    Args:
        path: See `open_folder`.
        namespace: See `open_folder`.
        revision: See `open_folder`.
        token: See `open_folder`.
        cache_dir: See `open_folder`.

    Returns:
        A local path, a URL, or a repository of the Hub at a commit.

    Raises:
        FileNotFoundError, RefusedError, DatasetError, ValueError: As for `open_folder`.
    """
    text = without_file_scheme(path)
    if text in (*_MAKERS, *_BUILDERS) and not (namespace is None and Path(text).exists()):
        return _find_short_name(text, namespace, revision, token, cache_dir)
    is_on_hub = not is_url(text) and not Path(text).exists() and _REPO_ID.fullmatch(text) is not None
    for name, value in {"namespace": namespace, "revision": None if is_on_hub else revision,
                        "token": None if is_on_hub else token}.items():  # fmt: skip
        if value:
            raise ValueError(
                f"{name}= is for {'short names' if name == 'namespace' else 'datasets on the Hub'}, not for {redact_path(path)}"
            )
    if is_on_hub:
        try:
            return _pinned(HubRepo(text, revision, token, None if cache_dir is None else Path(cache_dir)))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no folder {redact_path(path)}, and {error}") from error
    if is_url(text):
        return text
    if not Path(text).exists():
        if is_like_url(text):
            raise ValueError(
                f"{redact_path(path)} is not a URL: a URL begins with a scheme and two slashes, such as s3://"
            )
        home = "; ~ is not expanded, see os.path.expanduser" if text.startswith("~") else ""
        raise FileNotFoundError(
            f"no dataset at {redact_path(path)}: there is no such folder{home}, and it is neither org/name on the Hub nor one of the short names "
            f"{', '.join(sorted([*_MAKERS, *_BUILDERS]))}"
        )
    return Path(text)


def hub_url(repo: HubRepo) -> tuple[str, dict[str, Any]]:
    """Return the URL of a repository at its revision, and its storage options."""
    return f"hf://datasets/{repo}", {"token": repo.token} if repo.token else {}


def _find_short_name(
    name: str, namespace: str | None, revision: str | None, token: str | None, cache_dir: PathLike | None
) -> Path | HubRepo:
    cached = (default_cache() if cache_dir is None else Path(cache_dir)) / name
    if name in _MAKERS:
        if namespace or revision or token:
            raise ValueError(
                f"{name} is built locally and is not on the Hub: namespace=, revision= and token= do not apply"
            )
        if not cached.exists():
            _make(name, cached)
        return cached
    if cached.exists() and not (namespace or revision):
        return cached
    repo_id = f"{namespace or os.environ.get('RELABEL_NAMESPACE') or NAMESPACE}/{name}"
    try:
        return _pinned(HubRepo(repo_id, revision, token, None if cache_dir is None else Path(cache_dir)))
    except (FileNotFoundError, DatasetError) as error:
        raise type(error)(
            f"{name} is not at {cached}, and {repo_id} is not available: {error}. Build it with builders/{_BUILDERS[name]}, give the "
            "path of the folder that contains it, or name its owner on the Hub with namespace= or the environment variable "
            "RELABEL_NAMESPACE"
        ) from None


def _pinned(repo: HubRepo) -> HubRepo:
    pinned = repo.pinned()
    logger.info("reading %s at commit %s", repo, pinned.revision)
    return pinned


def _make(name: str, folder: Path) -> None:
    module, _, function = _MAKERS[name].partition(":")
    try:
        getattr(import_module(module), function)(folder)
    except OSError:
        if not folder.exists():  # else another process, such as another rank, has built it
            raise
