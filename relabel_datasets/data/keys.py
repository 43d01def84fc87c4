"""Sample keys from the names of files, tar members and rows."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from urllib.parse import unquote_to_bytes

from ..naming import escape_key

KEY_RULES = ("stem", "path")

_PLAIN = re.compile(
    r"(?!__|\s)[^/%.\\\x00-\x1f\x7f]+(?<!\s)(/(?!__|\s)[^/%.\\\x00-\x1f\x7f]+(?<!\s))*"
)  # nothing to change


def key_from_path(path: str) -> str:
    """Return the sample key for a path without extension, such as the key that webdataset has for a tar member.

    Two steps, the same for every source:

    1. The path is normalized as tar does when it extracts: a leading `/`, `.` components and doubled slashes are dropped.
    2. What a key must not hold is percent-encoded, see `naming.escape_key`. So are the first `_` of a component that begins
       with `__`, and spaces at either end of one: `datasets` drops `__` members, and other programs trim the spaces.

    Percent-decoding returns the normalized path, so different paths have different keys.

    Example:
        >>> key_from_path("./v1.0/__a")
        'v1%2E0/%5F_a'
    """
    if _PLAIN.fullmatch(path) and path.isascii():
        return path  # most keys, in a fifth of the time
    return "/".join(_escape_component(part) for part in path.split("/") if part not in ("", "."))


def key_from_member(key: str) -> str:
    """Return the sample key for the key that webdataset has for a tar member.

    A key that is percent-encoded already is kept, so tars that this package wrote keep their keys. Others are changed by
    `key_from_path`.
    """
    return key if is_escaped(key) else key_from_path(key)


def is_escaped(key: str) -> bool:
    """Return whether a key has percent-encoded characters, all as `key_from_path` encodes them."""
    return "%" in key and key_from_path(os.fsdecode(unquote_to_bytes(key))) == key


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
    """Return the sample key of an image path: by its stem or, with the rule "path", by the whole path without extension."""
    if rule == "stem":
        path = path.rstrip("/").rpartition("/")[2]
    return key_from_path(without_extension(path))


def without_extension(path: str) -> str:
    """Return a path without its last extension. A leading dot does not start an extension."""
    return re.sub(r"(?<=[^/])(\.[^./]*)$", "", path)


def sample_keys(paths: Sequence[str]) -> tuple[str, list[str]]:
    """Return the key rule of a dataset and its keys: stems where they are unique, else paths.

    Raises:
        ValueError: Two paths differ only by their extension.
    """
    for rule in KEY_RULES:
        keys = [key_of(path, rule) for path in paths]
        if len(set(keys)) == len(keys):
            return rule, keys
    repeated = [key for key, count in Counter(keys).items() if count > 1]
    raise ValueError(
        f"{len(repeated)} images have the name of another but for the extension, such as {repeated[0]!r}: rename them"
    )
