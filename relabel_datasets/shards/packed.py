"""Sequences of strings that are stored in arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np


class IndexedStrings(Sequence[str], ABC):
    """Sequence of strings that are created on access."""

    @abstractmethod
    def _at(self, position: int) -> str:
        """Return the string at a non-negative position."""

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        positions = range(len(self))[index]
        return self._at(positions) if isinstance(positions, int) else [self._at(position) for position in positions]


class PackedStrings(IndexedStrings):
    """Sequence of strings that is stored in two arrays.

    A million string objects would be copied into every worker, since access changes their reference counts.

    Args:
        strings: The strings.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [string.encode(errors="surrogateescape") for string in strings]  # file names may not be UTF-8
        self._ends = np.cumsum([len(string) for string in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[str]:
        start, data = 0, self._bytes.tobytes()
        for end in self._ends.tolist():
            yield data[start:end].decode(errors="surrogateescape")
            start = end

    def _at(self, position: int) -> str:
        start = int(self._ends[position - 1]) if position else 0
        return self._bytes[start : int(self._ends[position])].tobytes().decode(errors="surrogateescape")
