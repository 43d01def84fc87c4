"""Format numbers and names for messages."""

from __future__ import annotations

import unicodedata

_SAFE_CATEGORIES = {"Zs", "Co", "Cn"}  # spaces, private use and unassigned, which `str.isprintable` also rejects


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number and a noun, in the plural unless the number is 1.

    Args:
        number: Number of things.
        noun: Noun in the singular.
        plural: Noun in the plural. Default: The noun with an s.

    Returns:
        The number and the noun, separated by a space.

    Example:
        >>> counted(1, "file"), counted(2, "file"), counted(0, "box", "boxes")
        ('1 file', '2 files', '0 boxes')
    """
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def printable(text: object, *, keep: str = "") -> str:
    r"""Escape characters of a text that could control a terminal, as in Python: `\x1b`, `\u202e`.

    These are the control characters C0 and C1 including newlines, bidirectional overrides and other invisible format characters
    (zero-width space, joiners, tags), line and paragraph separators, and lone surrogates, which represent bytes of file names
    that are not UTF-8.

    Args:
        text: Class name, key, file name or message. Other objects are converted with `str`.
        keep: Characters that are not escaped.

    Returns:
        The escaped text.

    Example:
        >>> printable("cat\x1b[2J\u202e")
        'cat\\x1b[2J\\u202e'
    """
    text = str(text)
    return text if text.isprintable() else "".join(map(_Escaped(keep).__getitem__, text))


class _Escaped(dict[str, str]):
    def __init__(self, keep: str) -> None:
        self.update(zip(keep, keep, strict=True))

    def __missing__(self, character: str) -> str:
        is_safe = character.isprintable() or unicodedata.category(character) in _SAFE_CATEGORIES
        self[character] = character if is_safe else character.encode("unicode_escape").decode()
        return self[character]
