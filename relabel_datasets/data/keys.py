"""Make sample keys from the names of files and tar members."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from urllib.parse import unquote_to_bytes

from ..naming import escape_key
from ..words import counted

KEY_RULES = ("stem", "path")

_PLAIN = re.compile(
    r"(?!__|\s)[^/%.\\\x00-\x1f\x7f]+(?<!\s)(/(?!__|\s)[^/%.\\\x00-\x1f\x7f]+(?<!\s))*"
)  # already a valid key


def key_from_path(path: str) -> str:
    """Return the sample key for a path without extension, such as webdataset's key of a tar member.

    All sources use the same two steps:

    1. The path is normalized as in tar extraction: a leading `/`, `.` components and doubled slashes are dropped.
    2. Characters that are invalid in a key are percent-encoded, see `naming.escape_key`. The first `_` of a component that
       begins with `__` and spaces at the ends of a component are also encoded, since `datasets` drops `__` members and other
       programs trim the spaces.

    Percent-decoding returns the normalized path, so different paths have different keys.

    Example:
        >>> key_from_path("./v1.0/__a")
        'v1%2E0/%5F_a'
    """
    if _PLAIN.fullmatch(path) and path.isascii():
        return path  # fast path for most keys, five times as fast
    return "/".join(_escape_component(part) for part in path.split("/") if part not in ("", "."))


def key_from_member(key: str) -> str:
    """Return the sample key for webdataset's key of a tar member.

    A key that is already percent-encoded is kept, so tars written by this package keep their keys. Other keys are converted by
    `key_from_path`.
    """
    return key if is_escaped(key) else key_from_path(key)


def is_escaped(key: str) -> bool:
    """Return whether a key has percent-encoded characters and all are encoded as by `key_from_path`."""
    return "%" in key and key_from_path(unquote_to_bytes(key).decode(errors="surrogateescape")) == key


def _escape_component(part: str) -> str:
    escaped = escape_key(part)
    if escaped.startswith("__"):
        escaped = f"%5F{escaped[1:]}"
    stripped = escaped.strip()
    if stripped == escaped:
        return escaped
    start = len(escaped) - len(escaped.lstrip())
    return _quote(escaped[:start]) + stripped + _quote(escaped[start + len(stripped) :])


def _quote(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode())


def key_of(path: str, rule: str) -> str:
    """Return the sample key of an image path.

    Args:
        path: Path of the image with forward slashes, relative to its dataset.
        rule: `"stem"` for the file name without extension, or `"path"` for the whole path without extension.

    Returns:
        The key, with invalid characters percent-encoded.
    """
    if rule == "stem":
        path = path.rstrip("/").rpartition("/")[2]
    return key_from_path(without_extension(path))


def without_extension(path: str) -> str:
    """Return a path without its last extension. A leading dot does not start an extension."""
    return re.sub(r"(?<=[^/])(\.[^./]*)$", "", path)


def sample_keys(paths: Sequence[str]) -> tuple[str, list[str]]:
    """Return the key rule of a dataset and its keys: stems if they are unique, else paths.

    Raises:
        ValueError: Two paths differ only by their extension.
    """
    for rule in KEY_RULES:
        keys = [key_of(path, rule) for path in paths]
        if len(set(keys)) == len(keys):
            return rule, keys
    repeated = [key for key, count in Counter(keys).items() if count > 1]
    raise ValueError(
        f"{counted(len(repeated), 'name')} of images occur with several extensions, such as {repeated[0]!r}: rename these images"
    )
