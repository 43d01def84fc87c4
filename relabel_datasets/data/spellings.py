"""Spellings of sample keys, to join label maps and images that have no key in common.

Datasets name the same image in several ways. ImageNet's `n01440764/n01440764_10026.JPEG` is `n01440764_10026_n01440764.JPEG` on
the Hub and `ILSVRC/Data/CLS-LOC/train/n01440764/n01440764_10026` in a tar of Kaggle's files; macOS decomposes accented
letters (NFD) where other systems compose them (NFC). A spelling maps all of these names to one text. Spellings are tried from
the strictest to the loosest. A spelling is used only if no two names become equal.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from ..errors import DatasetError
from ..shards.formats import IMAGE_EXTENSIONS

Rows = npt.NDArray[np.int64]
Spell = Callable[[str], str]

_CLASS_SUFFIX = re.compile(r"(?<=.)_n\d{8}$")  # of ImageNet's files on the Hub
_NUM_PROBES = 2000
_ROW_NUMBER = re.compile(r"\d{8}")  # key of a row without a file name


class Spelling(NamedTuple):
    """One way to compare keys."""

    what: str  # name of what is compared, for messages
    spell: Spell  # from a key to the text that is compared


def _normal(key: str) -> str:
    if key.isascii() and "%" not in key:
        return key  # fast path for most keys; there may be a million
    return unicodedata.normalize("NFC", unquote(key))


def _without_extension(key: str) -> str:
    name = _normal(key)
    while "." in name and name.lower().endswith(IMAGE_EXTENSIONS):
        name = name.rpartition(".")[0]
    return name


def _last_parts(count: int) -> Spell:
    def spell(key: str) -> str:
        name = _without_extension(key)
        return "/".join(name.rsplit("/", count)[-count:]) if "/" in name else name

    return spell


def _without_class(key: str) -> str:
    name = _without_extension(key).rpartition("/")[2]
    return _CLASS_SUFFIX.sub("", name) if name[-10:-8] == "_n" else name


SPELLINGS = (
    Spelling("the same Unicode form (NFC)", _normal),
    Spelling("their names without extension", _without_extension),
    Spelling("the last three parts of their paths", _last_parts(3)),
    Spelling("the last two parts of their paths", _last_parts(2)),
    Spelling("their file names without folders", _last_parts(1)),
    Spelling("their file names without class suffix (_n########)", _without_class),
    Spelling("their file names in lower case", lambda key: _without_class(key).casefold()),
)


def is_row_number(key: str) -> bool:
    """Return whether a key is the row number of a dataset without file names, so that it names no file."""
    return _ROW_NUMBER.fullmatch(key) is not None


def show_key(key: str) -> str:
    """Return the repr of a key, with the code points of its non-ASCII letters, which may look like others."""
    return repr(key) if key.isascii() else f"{key!r} ({ascii(key)[1:-1]})"


class SpellingTable:
    """Table to look up keys by one spelling.

    Args:
        keys: Keys in the table, by row.
        spell: Function from a key to its spelling.

    Attributes:
        is_unique: Whether no two keys of the table have the same spelling.
    """

    def __init__(self, keys: Sequence[str], spell: Spell) -> None:
        self._keys, self.spell = keys, spell
        hashes = np.fromiter((hash(spell(key)) for key in keys), np.int64, len(keys))
        self._order = np.argsort(hashes)
        self._hashes = hashes[self._order]
        self.is_unique = not bool((self._hashes[1:] == self._hashes[:-1]).any())

    def rows(self, keys: Sequence[str]) -> Rows:
        """Return the row of the key with the same spelling for each of `keys`, -1 for none."""
        if not len(self._hashes):
            return np.full(len(keys), -1, np.int64)
        hashes = np.fromiter((hash(self.spell(key)) for key in keys), np.int64, len(keys))
        candidates = np.searchsorted(self._hashes, hashes).clip(max=len(self._hashes) - 1)
        rows = np.where(self._hashes[candidates] == hashes, self._order[candidates], -1)
        for position in np.flatnonzero(rows >= 0).tolist():
            if self.spell(self._keys[int(rows[position])]) != self.spell(keys[position]):  # a collision of hashes
                rows[position] = -1
        return rows


class SpellingMatch(NamedTuple):
    """Result of the strictest spelling by which any key matches."""

    spelling: Spelling
    rows: Rows | None  # row of the label map for each image, -1 for none; None if the spelling is ambiguous


def match_spellings(label_keys: Sequence[str], keys: Sequence[str]) -> SpellingMatch | None:
    """Match images and label maps by the strictest spelling by which any key matches.

    Args:
        label_keys: Keys of the label maps, by row.
        keys: Keys of the images, at least one. A sample of 2000 keys decides whether any key matches by a spelling.

    Returns:
        The spelling with the row of each image, or None if no spelling matches.
    """
    label_keys, keys = list(label_keys), list(keys)  # decoded once: they are read several times
    probes = [keys[i] for i in np.unique(np.linspace(0, len(keys) - 1, _NUM_PROBES, dtype=int)).tolist()]
    for spelling in SPELLINGS:
        table = SpellingTable(label_keys, spelling.spell)
        if not (table.rows(probes) >= 0).any():
            continue
        rows = table.rows(keys)
        matched = rows[rows >= 0]
        if len(matched):
            is_unique = table.is_unique and len(np.unique(matched)) == len(matched)
            return SpellingMatch(spelling, rows if is_unique else None)
    return None


class StreamSpelling:
    """Lookup of the label maps of a stream. The first key that matches by any spelling chooses the spelling.

    Args:
        label_keys: Keys of the label maps, by row.
        on_chosen: Function that is called once, with the chosen spelling, the sample's key and its row.
    """

    _MAX_TRIES = (
        20  # keys that are looked up in all spellings; each spelling needs a table of all label maps, made once
    )

    def __init__(self, label_keys: Sequence[str], on_chosen: Callable[[Spelling, str, int], object]) -> None:
        self._label_keys, self._on_chosen = label_keys, on_chosen
        self._tables: dict[Spelling, SpellingTable] = {}
        self._chosen: SpellingTable | None = None
        has_row_numbers = len(label_keys) > 0 and is_row_number(label_keys[0])
        self._tries = 0 if has_row_numbers else self._MAX_TRIES

    @property
    def spell(self) -> Spell | None:
        """Function of the chosen spelling, or None before one is chosen."""
        return None if self._chosen is None else self._chosen.spell

    def close(self) -> None:
        """Stop looking for a spelling, since a key was found unchanged."""
        self._tries = 0
        self._tables.clear()

    def row(self, key: str) -> int | None:
        """Return the row of a key, or None if it has no label map."""
        if self._chosen is not None:
            row = int(self._chosen.rows([key])[0])
            return row if row >= 0 else None
        if self._tries <= 0 or is_row_number(key):
            return None
        self._tries -= 1
        for spelling in SPELLINGS:
            table = self._tables.get(spelling)
            if table is None:
                table = self._tables[spelling] = SpellingTable(self._label_keys, spelling.spell)
            row = int(table.rows([key])[0])
            if row >= 0:
                if not table.is_unique:
                    return None
                self._chosen = table
                self.close()
                self._on_chosen(spelling, key, row)
                return row
        return None


def check_distinct(keys: Iterable[str], where: str) -> None:
    """Raise DatasetError if two keys differ only by their Unicode form, since file systems and joins treat them as equal."""
    first: dict[str, str] = {}
    for key in keys:
        if not key.isascii() and first.setdefault(_normal(key), key) != key:
            raise DatasetError(
                f"{where}: {show_key(first[_normal(key)])} and {show_key(key)} differ only by their Unicode form: many "
                "programs treat them as the same name, so rename one"
            )
