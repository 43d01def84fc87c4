"""Rules for names in a dataset: configs, splits, files, sample keys and hashes.

Names become paths, URLs, glob patterns, tar members, YAML and Python code of the dataset card. The rules are those of
`datasets` for configs (`INVALID_WINDOWS_CHARACTERS_IN_PATH`) and splits (`_split_re`, no `all`), restricted to ASCII, so a
name needs no escaping and is unambiguous on Linux, macOS and Windows, in URLs and in glob patterns. Every name that enters
the package is checked.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from .errors import DatasetError

MAX_NAME_BYTES = 100  # of a config or split: derived file names stay below the limit of most file systems, 255 bytes
MAX_FILE_NAME_BYTES = 255
MAX_KEY_BYTES = 4096
RESERVED_NAMES = frozenset({"readme.md", "_info.json"})  # files of the dataset itself
RESERVED_SPLITS = frozenset({"all"})  # `datasets` interprets it as all splits together

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(?<!\.)")
_SPLIT = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_EXTENSION = re.compile(r"[a-z0-9]{1,16}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Every WebDataset reader ends a key at its first dot. The other characters are unsafe in a path component.
_KEY_PART = r"[^/\\.\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+"
_KEY = re.compile(rf"{_KEY_PART}(/{_KEY_PART})*")
_UNSAFE_IN_KEY = re.compile(r"[%.\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_SHOWN = 80  # largest number of characters of an invalid value in an error

_NAME_RULE = (
    "letters A-Z and a-z, digits, '_', '-' and '.'; it must start with a letter, a digit or '_', must not end with '.', and "
    "must not be a device name of Windows (con, prn, aux, nul, com0 to com9, lpt0 to lpt9)"
)
CONFIG_RULE = f"a config name has 1 to {MAX_NAME_BYTES} {_NAME_RULE}, README.md or _info.json"
SPLIT_RULE = (
    f"a split name has 1 to {MAX_NAME_BYTES} letters A-Z and a-z, digits, '_', and single dots between them; it must not be "
    "'all', which `datasets` interprets as all splits, or a device name of Windows (con, nul, ...)"
)
FILE_NAME_RULE = f"a file of a config is in its folder and its name has 1 to {MAX_FILE_NAME_BYTES} {_NAME_RULE}"
KEY_RULE = (
    f"a key is a relative path of at most {MAX_KEY_BYTES} bytes with '/' between its parts, none of them empty, without dots, "
    "backslashes and control characters"
)


def check_config(name: object, source: str) -> str:
    """Return a config name if it is valid.

    Args:
        name: Config name to check.
        source: Option, argument or file that the name comes from, as shown in errors, such as `--config`.

    Returns:
        The name.

    Raises:
        DatasetError: The name is not valid. The message contains the source, the name and the rule.
    """
    return _checked(isinstance(name, str) and is_config(name), name, source, "config name", CONFIG_RULE)


def check_case(name: str, existing: Iterable[str], source: str) -> None:
    """Raise DatasetError if an existing name differs only in case: macOS and Windows usually have one folder for both.

    Args:
        name: Config name.
        existing: Names of the configs of the dataset.
        source: Option, argument or file that the name comes from, as shown in errors, such as `--config`.
    """
    for other in existing:
        if other != name and other.lower() == name.lower():
            raise DatasetError(
                f"{source} {name!r} differs only in case from the existing config {other!r}, which is the same folder on macOS "
                f"and Windows: use {other!r} or a different name"
            )


def check_split(name: object, source: str) -> str:
    """Return a split name if it is valid, see `check_config`."""
    return _checked(is_split(name), name, source, "split name", SPLIT_RULE)


def check_file_name(name: object, source: str, suffix: str = "") -> str:
    """Return the name of a file in a config's folder if it is valid.

    Args:
        name: File name to check, without a folder.
        source: File that the name comes from, as shown in errors.
        suffix: Required end of the name, such as `.tar`. Default: Any end.

    Returns:
        The name.

    Raises:
        DatasetError: The name is not valid.
    """
    valid = isinstance(name, str) and _is_name(name, _NAME, MAX_FILE_NAME_BYTES) and name.endswith(suffix)
    rule = f"{FILE_NAME_RULE}, and ends with {suffix}" if suffix else FILE_NAME_RULE
    return _checked(valid, name, source, "file name", rule)


def check_key(key: object, source: str) -> str:
    """Return a sample key if it is valid, see `check_config`."""
    return _checked(isinstance(key, str) and is_key(key), key, source, "sample key", KEY_RULE)


def check_extension(extension: object, source: str) -> str:
    """Return the extension of the images in shards if it is valid, see `check_config`."""
    valid = isinstance(extension, str) and _EXTENSION.fullmatch(extension) and extension not in ("cls", "safetensors")
    rule = "1 to 16 letters a-z or digits, without a dot, and neither 'cls' nor 'safetensors'"
    return _checked(bool(valid), extension, source, "image extension", rule)


def check_sha256(digest: object, source: str) -> str:
    """Return a sha256 if it is 64 lower-case hexadecimal digits, see `check_config`."""
    valid = isinstance(digest, str) and _SHA256.fullmatch(digest) is not None
    return _checked(valid, digest, source, "sha256", "64 digits 0-9 and a-f")


def is_config(name: str) -> bool:
    """Return whether a config name is valid."""
    return _is_name(name, _NAME, MAX_NAME_BYTES) and name.lower() not in RESERVED_NAMES


def is_split(name: object) -> bool:
    """Return whether a split name is valid."""
    return isinstance(name, str) and _is_name(name, _SPLIT, MAX_NAME_BYTES) and name.lower() not in RESERVED_SPLITS


def is_key(key: str) -> bool:
    """Return whether a sample key is valid."""
    return _KEY.fullmatch(key) is not None and len(key) <= MAX_KEY_BYTES and len(key.encode()) <= MAX_KEY_BYTES


def escape_key(path: str) -> str:
    """Percent-encode `%` and all characters that are invalid in a key.

    Bytes of a file name that are not UTF-8 (lone surrogates in Python) become their hexadecimal code.

    Example:
        >>> escape_key("v1.0/100%")
        'v1%2E0/100%25'
    """
    return _UNSAFE_IN_KEY.sub(_percent_encoded, path)


def default_config(annotator: str) -> str:
    """Return the config name for an annotator: its name, with dashes instead of invalid characters.

    Example:
        >>> default_config("google/vit-base-patch16-224")
        'google-vit-base-patch16-224'
    """
    plain = unicodedata.normalize("NFKD", annotator).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", plain)[:MAX_NAME_BYTES].strip(".-")
    return name if is_config(name) else f"annotator-{name}"


def _is_name(name: str, pattern: re.Pattern[str], max_bytes: int) -> bool:
    return len(name) <= max_bytes and pattern.fullmatch(name) is not None and _DEVICE.fullmatch(name) is None


def _checked(valid: bool, value: object, source: str, what: str, rule: str) -> str:
    if valid:
        assert isinstance(value, str)
        return value
    shown = repr(value[: 2 * _SHOWN] if isinstance(value, (str, bytes)) else value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    raise DatasetError(f"{source}: {shown} is not a valid {what}: {rule}")


def _percent_encoded(match: re.Match[str]) -> str:
    errors = "surrogateescape" if "\udc80" <= match[0] <= "\udcff" else "surrogatepass"
    return "".join(f"%{byte:02X}" for byte in match[0].encode(errors=errors))
