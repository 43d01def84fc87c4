"""What a dataset may be called: a folder, a URL, `org/name` on the Hub, or a short name."""

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

# Short names are folders in the cache, or repositories of this name on the Hub. What can be made without data has its maker
# here, "module:function", called with the folder and imported by name since it stands above this module; the others are
# made by the builder named.
NAMESPACE = "relabel-datasets"
_MAKERS = {"scenes-relabel": "relabel_datasets.demo:make_scenes_relabel"}
_BUILDERS = {"imagenet-relabel": "imagenet_relabel.py", "imagenette-relabel": "imagenette_relabel.py"}


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
    """Return the folder of a dataset, local or remote; everything that takes the folder of a dataset takes it.

    Args:
        path: a local folder; a URL of any protocol that fsspec has: `https://`, `s3://` (with s3fs installed), `gs://`
            (gcsfs), `file://`, `memory://`, ...; `"org/name"` on the Hub; or a short name: `"scenes-relabel"`, which is drawn
            and built in the cache on first use (about a minute), `"imagenet-relabel"` or `"imagenette-relabel"`, which are
            looked for in the cache, where their builders put them, and then on the Hub.
        namespace: the user or organisation on the Hub that has the short name; its repository is then taken whatever is in
            the cache. Default: the environment variable `RELABEL_NAMESPACE`, else `relabel-datasets`.
        revision: of a dataset on the Hub: a branch, a tag or a commit. Whichever it is, the commit that it is now is read,
            by all who share the folder, until it is opened anew.
        token: for the Hub. Default: that of `hf auth login`, or of the environment variable `HF_TOKEN`.
        storage_options: for URLs, what fsspec's file system takes, such as `{"anon": True}` for a public bucket. Credentials
            are best left in their usual places (environment, ~/.aws, ~/.netrc, `hf auth login`).
        cache_dir: where short names are looked up and what is remote is kept. Default: the environment variable
            `RELABEL_CACHE`, else `~/.cache/relabel_datasets`; and for the Hub its own cache (`HF_HOME`, `HF_HUB_CACHE`).
        cache_limit: bytes that remote shards may take, as a number or such as `"200G"`; the least recently used are deleted
            first. Default: the environment variable `RELABEL_CACHE_LIMIT`, else until a tenth of the disk is free. The Hub's
            cache knows no limit: where there is one, what comes from the Hub is kept in ours.

    Raises:
        FileNotFoundError: no dataset of that name; the message says how to make one.
        RefusedError: (a ValueError) access to a dataset on the Hub must be asked for, or the token is not valid.
        DatasetError: (a ValueError) the Hub cannot be reached.
        ValueError: a limit that cannot be read, or an argument that does not go with the path.
    """
    if not isinstance(path, (str, os.PathLike)):
        return path
    found = find(path, namespace=namespace, revision=revision, token=token, cache_dir=cache_dir)
    if isinstance(found, Path):
        return LocalFolder(found)
    if isinstance(found, str):
        return remote_folder(found, storage_options, cache_dir, cache_limit)
    if storage_options:
        raise ValueError(f"storage_options= are for URLs, not for {redact_path(path)} on the Hub")
    if find_limit(cache_limit) is None:
        return HubFolder(found)
    return remote_folder(*hub_url(found), cache_dir, cache_limit)


def find(
    path: PathLike, *, namespace: str | None = None, revision: str | None = None, token: str | None = None,
    cache_dir: PathLike | None = None,
) -> Path | str | HubRepo:  # fmt: skip
    """Return where a dataset is, see `open_folder`: a local path, a URL, or a repository at a commit of the Hub."""
    text = without_file_scheme(path)
    if text in (*_MAKERS, *_BUILDERS) and not (namespace is None and Path(text).exists()):
        return _find_short_name(text, namespace, revision, token, cache_dir)
    is_on_hub = not is_url(text) and not Path(text).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None
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
        raise FileNotFoundError(
            f"no dataset at {redact_path(path)}: there is no such folder, and it is neither org/name on the Hub nor one of the short names "
            f"{sorted([*_MAKERS, *_BUILDERS])}"
        )
    return Path(text)


def hub_url(repo: HubRepo) -> tuple[str, dict[str, Any]]:
    """Return the URL of a repository's revision, and the storage options that it needs."""
    return f"hf://datasets/{repo}", {"token": repo.token} if repo.token else {}


def _find_short_name(
    name: str, namespace: str | None, revision: str | None, token: str | None, cache_dir: PathLike | None
) -> Path | HubRepo:
    cached = (default_cache() if cache_dir is None else Path(cache_dir)) / name
    if name in _MAKERS:
        if namespace or revision or token:
            raise ValueError(f"{name} is drawn here, not on the Hub: it has no namespace=, revision= or token=")
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
            f"{name} is not at {cached}, and not to be had as {repo_id}: {error}. Build it with builders/{_BUILDERS[name]}, give "
            "the folder that holds it, or say who has it on the Hub with namespace= or the environment variable "
            "RELABEL_NAMESPACE"
        ) from None


def _pinned(repo: HubRepo) -> HubRepo:
    pinned = repo.pinned()
    logger.info("%s is read at commit %s", repo, pinned.revision)
    return pinned


def _make(name: str, folder: Path) -> None:
    module, _, function = _MAKERS[name].partition(":")
    try:
        getattr(import_module(module), function)(folder)
    except OSError:
        if not folder.exists():  # else another process, such as another rank, was first
            raise
