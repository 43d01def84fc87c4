"""Remove credentials from paths, URLs and messages.

Every path or URL that appears in a message, a `repr`, a log record or a written file passes through `redact_path`; texts that
may quote a URL, such as the messages of other libraries, pass through `redact`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, unquote_plus

HIDDEN = "***"

_SCHEME = r"(?<![\w+.-])[a-z][\w+.-]+:[/\\]+"  # one slash is enough: `s3:/bucket` is a typo of a URL
_HEAD = re.compile(_SCHEME, re.IGNORECASE)
_URL = re.compile(rf"{_SCHEME}[^\s'\"]*", re.IGNORECASE)
_ENCODED_URL = re.compile(r"(?<![\w+.-])[a-z][\w+.-]+%3A(?:%2F|/)+[^\s'\"&]*", re.IGNORECASE)
_CHAIN = re.compile(rf"::(?={_SCHEME})", re.IGNORECASE)
# A host whose port cannot be the beginning of a password. `user:1234/5@host` may be one that contains a slash.
_HOST = re.compile(r"[^:]*|(?:\[[^\]]*\]|localhost|[\d.]+)(?::\d*)?", re.IGNORECASE)
_END_OF_HOST = re.compile(r"[/\\?#]")
# A scheme without its colon. A single slash may also follow a folder, unless its name is that of a scheme.
_TYPO = r"(?:[a-z][\w+.-]*[;.]?//|(?:https?|s3|gs|hf|az|abfs|s?ftp|ssh|hdfs)[;.]?[/\\]+)"
_LOGIN = re.compile(rf"(?:{_TYPO}|//)?[^/\s:@]+:[^@]+@", re.IGNORECASE)  # a URL whose scheme is missing or misspelled
_LOGIN_IN_TEXT = re.compile(rf"(?<![\w+.:/-]){_TYPO}[^/\s:@'\"]+:[^\s@'\"]+@[^\s'\"]*", re.IGNORECASE)
_PARAMETER = re.compile(
    r"(?<![\w-])(x-(?:amz|goog)-(?:signature|credential|security-token)|sig|signature|awsaccesskeyid|access_?token|token"
    r"|api_?key|password|secret|policy|key-pair-id)=[^\s&'\"]+",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b|(?<=bearer )[^\s'\"]+", re.IGNORECASE)


def redact(text: object, secrets: Iterable[str] = ()) -> str:
    """Return a text without the user, password, query and fragment of the URLs in it.

    Access tokens of the Hub and the values of parameters that sign a request are also hidden outside of URLs.

    Args:
        text: A message, or any object to convert with `str`.
        secrets: Strings to replace by `***`, see `secrets_of`. Default: none.

    Example:
        >>> redact("403 for https://user:pw@host/a.tar?X-Amz-Signature=1f#part")
        '403 for https://host/a.tar'
    """
    result = str(text)
    for secret in sorted(secrets, key=len, reverse=True):
        result = result.replace(secret, HIDDEN)
    result = _ENCODED_URL.sub(lambda match: unquote(match[0]), result)
    for urls in (_URL, _LOGIN_IN_TEXT):
        result = urls.sub(lambda match: redact_path(match[0]), result)
    return _TOKEN.sub(HIDDEN, _PARAMETER.sub(rf"\1={HIDDEN}", result))


def redact_path(path: object) -> str:
    """Return a path or URL as messages and files may show it; local paths are unchanged.

    Args:
        path: A path, or a URL of any scheme. The URL may be misspelled, or a chain such as `simplecache::https://...`. The
            whole text counts as the URL, since a password or a query may contain spaces and quotes.

    Example:
        >>> redact_path("s3:/key:secret@bucket/data?sig=1")
        's3:/bucket/data'
    """
    text = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else str(path)
    return "::".join(f"{link.head}{link.rest}" for link in _links(text))


def redact_values(value: Any) -> Any:
    """Return a JSON value in which every string has passed through `redact`."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: redact_values(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [redact_values(item) for item in value]
    return value


def secrets_of(url: object, options: object = None, *, min_length: int = 4) -> set[str]:
    """Return the secrets of a URL and its options, in every usual encoding.

    Args:
        url: A URL, or a path, which has no secrets.
        options: `storage_options` of fsspec. URLs among the values, such as an endpoint, are not secret. Default: none.
        min_length: Minimum number of characters. Shorter strings would also match parts of words. Default: 4.

    Returns:
        Strings that must not occur in any message.
    """
    secrets = set(_texts_in(options))
    for link in _links(str(url)):
        name, _, password = link.user.partition(":")
        secrets |= {link.user, password or name, link.query}
        secrets |= {pair.partition("=")[2] if "=" in pair else pair for pair in re.split("[?&#;]", link.query)}
    secrets = {secret for secret in secrets if len(secret) >= min_length}
    for secret in list(secrets):
        secrets |= {unquote(secret), unquote_plus(secret), quote(unquote(secret)), quote(unquote(secret), safe="")}
    return {secret for secret in secrets if len(secret) >= min_length}


def check_login(url: str) -> None:
    """Check that every library finds the same password in a URL. Otherwise its end would be sent to the network as the host.

    Args:
        url: URL, or chain of URLs.

    Raises:
        ValueError: An "@" follows a slash, question mark or number sign, which belong to the password or to the path.
    """
    for link in _links(url):
        host = _END_OF_HOST.split(link.user, maxsplit=1)[0]
        if host != link.user and ":" in host and not re.fullmatch(r"[^@:]*:\d+", host):
            raise ValueError(
                f"{redact_path(url)}: it is not clear where the password of this URL ends: write @ as %40, / as %2F, ? as %3F and # as "
                "%23 in the password, and @ as %40 after the host, or pass the password in storage_options="
            )


class RedactedError(Exception):
    """Redacted error of another library, used as the `__cause__` of an error of this package."""


def redacted_cause(error: BaseException, secrets: Iterable[str] = ()) -> RedactedError:
    """Return a redacted copy of an error, to be raised from (`raise ... from`).

    Args:
        error: Error whose message may quote a URL.
        secrets: Strings to replace by `***`. Default: none.
    """
    return RedactedError(f"{type(error).__name__}: {redact(error, secrets)}").with_traceback(error.__traceback__)


class _Link(NamedTuple):
    """One URL of a chain. A path is stored in `rest`."""

    head: str  # scheme and slashes
    user: str
    rest: str
    query: str


def _links(text: str) -> Iterator[_Link]:
    if _ENCODED_URL.match(text):
        text = unquote(text)
    for link in _CHAIN.split(text):
        head = _HEAD.match(link)
        if head is None:
            is_login = _LOGIN.match(link) and not _HEAD.search(text)
            yield _link("", link, has_login=True) if is_login else _Link("", "", link, "")
            continue
        body = link[head.end() :]
        host = _END_OF_HOST.split(body, maxsplit=1)[0]
        yield _link(head[0], body, has_login="@" in body and ("@" in host or not _HOST.fullmatch(host)))


def _link(head: str, body: str, *, has_login: bool) -> _Link:
    """Return the parts of a URL. Everything up to the last "@" may be a password, which may contain every character."""
    user, _, location = body.rpartition("@") if has_login else ("", "", body)
    if re.search("[?#]", user):  # the last "@" may be one of the query, which must not be shown either
        return _Link(head, user, HIDDEN, location)
    rest = re.split("[?#]", location, maxsplit=1)[0]
    return _Link(head, user, rest, location[len(rest) + 1 :])


def _texts_in(options: object) -> Iterator[str]:
    values = options.values() if isinstance(options, Mapping) else options
    if isinstance(options, str):
        if "://" not in options:
            yield options
    elif isinstance(values, Iterable):
        for value in values:
            yield from _texts_in(value)
