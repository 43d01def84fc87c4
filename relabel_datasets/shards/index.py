"""The index of a split: where every sample's bytes are in the shards, found by row or by key without reading a tar.

One safetensors file, memory-mapped, so that it opens at once and all processes of a node share its pages. Columns of N
rows, in the order of the shards: `label` int32; `map_offset`, `map_size`, and `image_offset`, `image_size` where there
are images, uint64, bytes in the shard; `key_end` uint64, where a row's key ends in `key_bytes`. For look-ups,
`sorted_hash` uint64 holds all keys' hashes in order and `sorted_row` uint32 their rows.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from ..errors import DatasetError
from ..naming import check_key, is_key
from ..schema import Rule, fields, integer, one_of, parse_json, record, tuple_of
from ..storage.folders import Folder
from ..storage.open_maps import within_file_limit
from .manifest import Split

Column = npt.NDArray[Any]
_NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(stored) for name, stored in {"I32": "<i4", "U32": "<u4", "U64": "<u8", "U8": "u1"}.items()
}
_DTYPES = {
    "label": "I32",
    "map_offset": "U64",
    "map_size": "U64",
    "key_bytes": "U8",
    "key_end": "U64",
    "sorted_hash": "U64",
    "sorted_row": "U32",
}
_IMAGE_DTYPES = {"image_offset": "U64", "image_size": "U64"}
_MAX_HEADER = 1 << 16  # bytes; an index has some 700


class Row(NamedTuple):
    """One sample of a shard, as its writer records it."""

    key: str
    label: int
    map_offset: int
    map_size: int
    image_offset: int = 0
    image_size: int = 0


def hash_key(key: str) -> int:
    """Return the 64-bit hash of a key."""
    return int.from_bytes(hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def make_index(rows: Sequence[Row], *, images: bool) -> bytes:
    """Return the bytes of the index file of these rows.

    Raises:
        DatasetError: a key stands twice.
    """
    encoded = [row.key.encode() for row in rows]
    hashes = np.array([hash_key(row.key) for row in rows], np.uint64)
    order = np.argsort(hashes, kind="stable")
    if len(set(encoded)) != len(encoded):
        repeated = next(key for key in encoded if encoded.count(key) > 1).decode()
        raise DatasetError(f"key {repeated!r} stands more than once in the split")
    names = ["map_offset", "map_size", *(["image_offset", "image_size"] if images else [])]
    columns: dict[str, Column] = {name: np.array([getattr(row, name) for row in rows], np.uint64) for name in names}
    columns["label"] = np.array([row.label for row in rows], np.int32)
    columns["key_bytes"] = np.frombuffer(b"".join(encoded), np.uint8)
    columns["key_end"] = np.cumsum([len(key) for key in encoded], dtype=np.uint64)
    columns["sorted_hash"], columns["sorted_row"] = hashes[order], order.astype(np.uint32)
    return save(columns)


def _read_columns(mapped: mmap.mmap, num_rows: int, *, images: bool) -> dict[str, Column]:
    """Return the columns of an index file.

    Raises:
        ValueError: It has other columns, dtypes or shapes, or bytes that belong to no column or to several.
    """
    length = int.from_bytes(mapped[:8], "little")
    if len(mapped) < 8 or length > min(_MAX_HEADER, len(mapped) - 8):
        raise ValueError(f"its {len(mapped)} bytes are not a whole safetensors file")
    dtypes = _DTYPES | (_IMAGE_DTYPES if images else {})
    entries = parse_json(mapped[8 : 8 + length])
    fields({name: _column_rule(name, dtype, num_rows) for name, dtype in dtypes.items()})(entries, "")
    columns, end = {}, 0
    for name, entry in sorted(entries.items(), key=lambda named: named[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        dtype = _NUMPY_DTYPES[entry["dtype"]]
        if begin != end or stop - begin != entry["shape"][0] * dtype.itemsize:
            raise ValueError(
                f"{name}.data_offsets must be {end} to {end + entry['shape'][0] * dtype.itemsize}, got {begin} to {stop}"
            )
        end = stop
        if 8 + length + end > len(mapped):
            break
        columns[name] = np.ndarray(entry["shape"], dtype, mapped, 8 + length + begin)
    if 8 + length + end != len(mapped):
        raise ValueError(f"its header describes {8 + length + end} bytes or more, but it has {len(mapped)}")
    return columns


def _column_rule(name: str, dtype: str, num_rows: int) -> Rule:
    rows = integer() if name == "key_bytes" else integer(num_rows, num_rows)
    return record(dtype=one_of(dtype), shape=tuple_of(rows), data_offsets=tuple_of(integer(), integer()))


def _check_columns(columns: dict[str, Column], num_classes: int) -> None:
    """Check the values that are used without a further check.

    Raises:
        ValueError: A value is out of range.
    """
    labels, ends, rows = columns["label"], columns["key_end"], columns["sorted_row"]
    num_bytes = len(columns["key_bytes"])
    if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
        wrong = int(np.flatnonzero((labels < 0) | (labels >= num_classes))[0])
        raise ValueError(f"label of row {wrong} must be in 0 .. {num_classes - 1}, got {labels[wrong]}")
    if len(rows) and rows.max() >= len(rows):
        raise ValueError(f"sorted_row must be in 0 .. {len(rows) - 1}, got {rows.max()}")
    if len(ends) and not (ends[0] > 0 and (ends[1:] > ends[:-1]).all()):
        raise ValueError("key_end must increase from row to row: no key is empty")
    if num_bytes != (ends[-1] if len(ends) else 0):
        raise ValueError(f"key_end must reach the end of key_bytes, {num_bytes}, got {ends[-1] if len(ends) else 0}")


class Index:
    """The index of a split, open for reading.

    Opening checks the header, the labels and where keys end, which takes a millisecond for a million rows. The place of a
    sample in its shard is checked when the sample is read, and `relabel verify` compares every row with the shards.

    Args:
        folder: Folder of the config.
        split: The split's entry in the manifest.
        num_classes: Number of classes, which bounds the labels.

    Raises:
        FileNotFoundError: There is no such file.
        DatasetError: The file is damaged, or not the index of these shards. The message names the column.
    """

    def __init__(self, folder: Folder, split: Split, num_classes: int) -> None:
        self._folder, self._split, self._num_classes = folder, split, num_classes
        self._num_samples = split.num_samples
        self._last = -1, ""
        self._path = f"{folder}/{split.index}"
        mapped = within_file_limit(self._map)
        try:
            self._columns = _read_columns(mapped, split.num_samples, images=split.image_extension is not None)
            _check_columns(self._columns, num_classes)
        except ValueError as error:
            raise DatasetError(f"{self._path} is damaged or not the index of these shards: {error}") from None

    def _map(self) -> mmap.mmap:
        split = self._split
        with self._folder.open(split.index, split.index_bytes, split.index_sha256) as file:
            try:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError as error:  # an empty file
                raise DatasetError(f"{self._path} is damaged or not the index of these shards: {error}") from None

    def __reduce__(self) -> tuple[type[Index], tuple[Folder, Split, int]]:
        return Index, (self._folder, self._split, self._num_classes)  # another process opens its own memory map

    def __len__(self) -> int:
        return self._num_samples

    @property
    def labels(self) -> Column:
        """`[N]` int32 class indices."""
        return self._columns["label"]

    @property
    def has_images(self) -> bool:
        """Whether the shards hold the images' bytes."""
        return "image_offset" in self._columns

    def key(self, row: int) -> str:
        """Return the key of a row.

        Raises:
            DatasetError: The key is not UTF-8.
        """
        last = self._last  # a sample asks for its key several times; threads may share the index
        if row != last[0]:
            ends = self._columns["key_end"]
            start = int(ends[row - 1]) if row else 0
            try:
                key = self._columns["key_bytes"][start : int(ends[row])].tobytes().decode()
            except UnicodeDecodeError as error:
                raise DatasetError(f"{self._path} is damaged: key_bytes of row {row} must be UTF-8: {error}") from None
            if not is_key(key):
                check_key(key, f"{self._path}, row {row}")
            last = self._last = row, key
        return last[1]

    def row(self, key: str) -> int | None:
        """Return the row of a key, or None."""
        hashed = np.uint64(hash_key(key))
        hashes = self._columns["sorted_hash"]
        position = int(np.searchsorted(hashes, hashed))
        while position < len(hashes) and hashes[position] == hashed:  # some keys may share a hash
            row = int(self._columns["sorted_row"][position])
            if self.key(row) == key:
                return row
            position += 1
        return None

    def rows(self, keys: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return the rows of many keys, -1 where there is none; much faster than one by one."""
        if not len(self):
            return np.full(len(keys), -1, np.int64)
        sorted_hash, sorted_row = self._columns["sorted_hash"], self._columns["sorted_row"]
        hashes = np.fromiter(map(hash_key, keys), np.uint64, len(keys))
        order = np.argsort(hashes)  # neighbours in the index one after the other, for the processor's caches
        positions = np.empty(len(keys), np.int64)
        positions[order] = np.searchsorted(sorted_hash, hashes[order]).clip(max=len(self) - 1)
        rows = np.where(sorted_hash[positions] == hashes, sorted_row[positions].astype(np.int64), -1)
        for place, (key, row) in enumerate(zip(keys, rows.tolist(), strict=True)):
            if row >= 0 and self.key(row) != key:  # another key of the same hash
                found = self.row(key)
                rows[place] = -1 if found is None else found
        return rows

    def extent(self, row: int, member: str) -> tuple[int, int]:
        """Return (offset, size) in bytes of a row's `"map"` or `"image"` in its shard."""
        return int(self._columns[f"{member}_offset"][row]), int(self._columns[f"{member}_size"][row])

    def mean_size(self, member: str) -> float:
        """Return the mean size in bytes of the samples' `"map"` or `"image"`."""
        return float(self._columns[f"{member}_size"].mean()) if len(self) else 0.0
