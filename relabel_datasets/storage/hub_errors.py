"""Translate errors of the Hugging Face Hub into errors of this package, which say what failed and what to do.

The messages of huggingface_hub, transformers and datasets recommend arguments that users of this package cannot pass
(`force_download=True`), and may quote signed URLs. They are redacted and kept as the cause of the error.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal

from ..errors import DatasetError, RefusedError, UnavailableError
from .redaction import redact, redacted_cause

_TEMPORARY = (408, 409, 412, 425, 429)  # and 5xx
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LOG_IN = "log in with `hf auth login`, set HF_TOKEN, or give token="


@dataclass(frozen=True)
class HubItem:
    """Subject of a request to the Hub.

    Attributes:
        repo_id: Name of the repository, such as `"org/name"`.
        revision: Branch, tag or commit. Default: the default branch.
        name: Name of the requested file. Default: the request is not about a file.
        kind: `"dataset"` for label maps, `"images"` for another dataset that is read by `datasets`, or `"model"`.
        token: Access token of the request, which no message contains. Default: none.
        instead: Advice on what to use instead of the Hub. Default: none.
    """

    repo_id: str
    revision: str | None = None
    name: str | None = None
    kind: Literal["dataset", "images", "model"] = "dataset"
    token: str | None = None
    instead: str = ""

    def __str__(self) -> str:
        where = self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"
        return where if self.name is None else f"{where}/{self.name}"

    @property
    def noun(self) -> str:
        """Noun for the repository in messages."""
        return "model" if self.kind == "model" else "dataset"

    @property
    def page(self) -> str:
        """URL of the repository's page."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{'' if self.kind == 'model' else 'datasets/'}{self.repo_id}"

    @property
    def secrets(self) -> list[str]:
        """Strings that must not occur in any message."""
        return [token for token in (self.token, os.environ.get("HF_TOKEN")) if token]


def explain_hub_error(error: BaseException, item: HubItem) -> Exception | None:
    """Translate an error of huggingface_hub or its HTTP client.

    Args:
        error: The error.
        item: Subject of the request.

    Returns:
        The error to raise instead: a FileNotFoundError if something does not exist, a RefusedError if a permission is missing,
        an UnavailableError if the same request may succeed later, an OSError if the disk is full, and a DatasetError otherwise.
        None if the error comes from elsewhere.
    """
    from huggingface_hub import errors

    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # uploads wrap their errors
    if isinstance(error, errors.HFValidationError):
        return DatasetError(f"{item.repo_id!r} is not the name of a repository on the Hub: expected org/name")
    if isinstance(error, errors.GatedRepoError):
        return RefusedError(f"{item.repo_id} is gated: request access at {item.page}, then {_LOG_IN}")
    if isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)):
        return _not_found(error, item)
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return _not_in_cache(error, item)
    if isinstance(error, errors.EntryNotFoundError):
        expected = {
            "dataset": "a dataset of label maps",
            "images": "a dataset with this file",
            "model": "a model of this library",
        }
        return FileNotFoundError(
            f"there is no {item.name or 'such file'} in {item.repo_id} on the Hub: the repository is not "
            f"{expected[item.kind]}, or the file is in another revision; see {item.page}"
        )
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_status(error, item)
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        from huggingface_hub import constants

        return OSError(
            error.errno,
            f"the disk of the Hub's cache {constants.HF_HUB_CACHE} is full: free some space, or choose another folder with "
            "cache_dir= or the environment variable HF_HOME",
        )
    is_client_error = type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "urllib3")
    is_not_json = isinstance(error, json.JSONDecodeError)  # such as the page of a proxy
    is_truncated = type(error) is OSError and error.errno is None  # a download has the wrong length
    is_refused = isinstance(error, ConnectionError)  # raised by `datasets` without a cause
    if is_client_error or is_not_json or is_truncated or is_refused:
        what = "the Hub cannot be reached" if is_client_error or is_refused else "the request to the Hub failed"
        return UnavailableError(
            f"{item}: {what}: {describe_hub_error(error, item)}: check the connection, the proxy and HF_ENDPOINT, and try again"
        )
    return None


@contextmanager
def explaining_hub_errors(item: HubItem) -> Iterator[None]:
    """Translate the errors of libraries that load from the Hub, see `explain_hub_error`.

    Args:
        item: Subject of the request.
    """
    try:
        yield
    except Exception as error:
        # The error of huggingface_hub at the start of the chain has more details than the library's own.
        for link in sorted(_chain(error), key=lambda link: not type(link).__module__.startswith("huggingface_hub")):
            explained = explain_hub_error(link, item)
            if explained is not None:
                raise explained from redacted_cause(error, item.secrets)
        raise


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, its cause, the cause of that, and so on."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def describe_hub_error(error: BaseException, item: HubItem) -> str:
    """Describe an error in one line, without advice and secrets.

    Args:
        error: The error.
        item: Subject of the request.
    """
    response = getattr(error, "response", None)
    if response is not None:
        status = int(response.status_code)
        phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else ""
        message = getattr(error, "server_message", None)
        text = f"the Hub answers {status} {phrase}".rstrip() + (
            f" ({' '.join(str(message).split())})" if message else ""
        )
    elif isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        text = "the request timed out"
    else:
        first_line = next(iter(str(error).splitlines()), "")  # the rest is advice
        text = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
    return redact(text, item.secrets)


def _not_found(error: BaseException, item: HubItem) -> Exception:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(
            f"{item.repo_id} on the Hub has no branch, tag or commit {item.revision!r}: its revisions are at {item.page}/tree/main"
        )
    return FileNotFoundError(
        f"there is no {item.noun} {item.repo_id} on the Hub at {constants.ENDPOINT}, or it is private: check the name, and if it "
        f"is private, {_LOG_IN}"
    )


def _not_in_cache(error: BaseException, item: HubItem) -> Exception:
    from huggingface_hub import constants

    instead = f", or {item.instead}" if item.instead else ""
    if constants.HF_HUB_OFFLINE:
        whole = ", with download=True to get all of it" if item.kind == "dataset" else ""
        advice = f"load it once with a network{whole}{instead}"
        return FileNotFoundError(f"{item} is not in the Hub's cache, and HF_HUB_OFFLINE is set: {advice}")
    what = describe_hub_error(error.__cause__ or error, item)
    advice = f"check the connection, the proxy and HF_ENDPOINT{instead}"
    return DatasetError(f"{item} is not in the Hub's cache, and the Hub cannot be reached: {what}: {advice}")


def _explain_status(error: BaseException, item: HubItem) -> Exception:
    response = error.response  # type: ignore[attr-defined]
    status = int(response.status_code)
    what = describe_hub_error(error, item)
    if status in (401, 403):
        return RefusedError(
            f"{item}: the Hub refuses access: {what}: check the token and its permissions, or {_LOG_IN}"
        )
    if status == 429:
        return UnavailableError(f"{item}: too many requests: {what}: {_wait(response.headers)}, or {_LOG_IN}")
    if status >= 500 or status in _TEMPORARY:
        return UnavailableError(f"{item}: {what}: try again later")
    if status == 404:
        return FileNotFoundError(f"{item} does not exist on the Hub: see {item.page}")
    return DatasetError(f"{item}: the Hub rejects the request: {what}")


def _wait(headers: Mapping[str, str]) -> str:
    seconds = headers.get("Retry-After", "")
    return f"wait {seconds} s" if seconds.isdecimal() else "wait some minutes"
