"""The index of a split: where every sample's bytes are in the shards, found by row or by key without reading a tar.

One safetensors file, memory-mapped, so that it opens at once and all processes of a node share its pages. Columns of N
rows, in the order of the shards: `label` int32; `map_offset`, `map_size`, and `image_offset`, `image_size` where there
are images, uint64, bytes in the shard; `key_end` uint64, where a row's key ends in `key_bytes`. For look-ups,
`sorted_hash` uint64 holds all keys' hashes in order and `sorted_row` uint32 their rows.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from ..errors import DatasetError
from ..naming import check_key, is_key
from ..storage.folders import Folder
from .manifest import Split

Column = npt.NDArray[Any]
_DTYPES = {"I32": np.int32, "U32": np.uint32, "U64": np.uint64, "U8": np.uint8}


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
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


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


class Index:
    """The index of a split, open for reading.

    Args:
        folder: of the config.
        split: from the manifest.

    Raises:
        FileNotFoundError: there is no such file.
        DatasetError: it is damaged, or not the index of these shards.
    """

    def __init__(self, folder: Folder, split: Split) -> None:
        self._folder, self._split = folder, split
        self._num_samples = num_samples = split.num_samples
        self._last = -1, ""
        path = f"{folder}/{split.index}"
        file = folder.open(split.index, split.index_bytes, split.index_sha256)
        try:
            with file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            start = 8 + int.from_bytes(mapped[:8], "little")
            self._columns = {
                name: np.ndarray(entry["shape"], _DTYPES[entry["dtype"]], mapped, start + entry["data_offsets"][0])
                for name, entry in json.loads(mapped[8:start]).items()
            }
            lengths = {len(column) for name, column in self._columns.items() if name != "key_bytes"}
            complete = {"label", "key_end", "sorted_hash", "sorted_row", "map_offset", "map_size"} <= set(self._columns)
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"{path} is damaged: {error!r}") from error
        if lengths != {num_samples} or not complete:
            raise DatasetError(f"{path} is not the index of these shards: {num_samples} rows expected, got {lengths}")

    def __reduce__(self) -> tuple[type[Index], tuple[Folder, Split]]:
        return Index, (self._folder, self._split)  # a memory map is opened anew in another process

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
        """Return the key of a row."""
        last = self._last  # a sample asks for its key several times; threads may share the index
        if row != last[0]:
            ends = self._columns["key_end"]
            start = int(ends[row - 1]) if row else 0
            key = self._columns["key_bytes"][start : int(ends[row])].tobytes().decode()
            if not is_key(key):
                check_key(key, f"{self._folder}/{self._split.index}, row {row}")
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
