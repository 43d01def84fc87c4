"""Strings in arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np


class IndexedStrings(Sequence[str], ABC):
    """Strings that are not objects until they are asked for."""

    @abstractmethod
    def _at(self, place: int) -> str:
        """Return one, counted from the beginning."""

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        places = range(len(self))[index]
        return self._at(places) if isinstance(places, int) else [self._at(place) for place in places]


class PackedStrings(IndexedStrings):
    """Strings in two arrays: a million of them as objects would be copied into every worker as their counts are touched."""

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

    def _at(self, place: int) -> str:
        start = int(self._ends[place - 1]) if place else 0
        return self._bytes[start : int(self._ends[place])].tobytes().decode(errors="surrogateescape")
