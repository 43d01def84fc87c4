"""Words for messages."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Return a number and a noun whose plural ends in s.

    Example:
        >>> counted(1, "file"), counted(2, "file")
        ('1 file', '2 files')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
