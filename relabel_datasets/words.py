"""Words for messages."""

from __future__ import annotations

import unicodedata

_SAFE_CATEGORIES = {"Zs", "Co", "Cn"}  # spaces, private use and unassigned: `str.isprintable` rejects them, too


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number and a noun, in the plural unless the number is 1.

    Args:
        number: The number.
        noun: The noun in the singular.
        plural: The noun in the plural. Default: the noun and an s.

    Example:
        >>> counted(1, "file"), counted(2, "file"), counted(0, "box", "boxes")
        ('1 file', '2 files', '0 boxes')
    """
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def printable(text: object, *, keep: str = "") -> str:
    r"""Return a text in which characters that could control a terminal are escaped as in Python: `\x1b`, `\u202e`.

    Escaped are the control characters C0 and C1 including newlines, bidirectional overrides and other invisible format
    characters (zero-width space, joiners, tags), line and paragraph separators, and lone surrogates, which stand for bytes of
    file names that are not UTF-8.

    Args:
        text: A class name, key, file name or message; other objects are converted with `str`.
        keep: Characters that stay.

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
