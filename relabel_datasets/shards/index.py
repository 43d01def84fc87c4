"""The index of a split: the position of every sample in the shards, by row or by key, without reading a tar.

The index is one memory-mapped safetensors file. It opens instantly, and all processes of a node share its pages. Its columns
have N rows in the order of the shards: `label` (int32); `map_offset` and `map_size`, and for shards with images `image_offset`
and `image_size` (uint64, bytes in the shard); `key_end` (uint64, end of the row's key in `key_bytes`). For lookups by key,
`sorted_hash` (uint64) holds the sorted hashes of all keys and `sorted_row` (uint32) their rows.
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
_NUM_RECENT = 4096  # keys that are kept
_MAX_HEADER = 1 << 16  # bytes; the header of an index has about 700


class Row(NamedTuple):
    """Sample of a shard.

    Attributes:
        key: Key of the sample.
        label: Class index.
        map_offset: Position of the label map in the shard, in bytes.
        map_size: Size of the label map in bytes.
        image_offset: Position of the image in the shard, in bytes. Default: 0.
        image_size: Size of the image in bytes. Default: 0, for shards without images.
    """

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
    """Build an index.

    Args:
        rows: Samples of all shards, in order.
        images: Whether the shards contain images.

    Returns:
        The bytes of the index file.

    Raises:
        DatasetError: A key is repeated.
    """
    encoded = [row.key.encode() for row in rows]
    hashes = np.array([hash_key(row.key) for row in rows], np.uint64)
    order = np.argsort(hashes, kind="stable")
    if len(set(encoded)) != len(encoded):
        repeated = next(key for key in encoded if encoded.count(key) > 1).decode()
        raise DatasetError(f"key {repeated!r} is repeated in the split")
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
        ValueError: The columns, dtypes or shapes are wrong, or some bytes belong to no column or to several.
    """
    length = int.from_bytes(mapped[:8], "little")
    if len(mapped) < 8 or length > min(_MAX_HEADER, len(mapped) - 8):
        raise ValueError(f"its {len(mapped)} bytes are not a complete safetensors file")
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
    """Check the values that are not checked when they are used.

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

    Opening checks the header, the labels and the ends of the keys, which takes a millisecond for a million rows. The position
    of a sample in its shard is checked when the sample is read, and `relabel verify` compares every row with the shards.

    Args:
        folder: Folder of the config.
        split: The split's entry in the manifest.
        num_classes: Number of classes. Labels must be smaller.

    Raises:
        FileNotFoundError: There is no such file.
        DatasetError: The file is damaged, or is not the index of these shards. The message names the column.
    """

    def __init__(self, folder: Folder, split: Split, num_classes: int) -> None:
        self._folder, self._split, self._num_classes = folder, split, num_classes
        self._num_samples = split.num_samples
        self._recent: dict[int, str] = {}
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
        """Class indices, `[N]` int32."""
        return self._columns["label"]

    @property
    def has_images(self) -> bool:
        """Whether the shards contain images."""
        return "image_offset" in self._columns

    def key(self, row: int) -> str:
        """Return the key of a row.

        Args:
            row: Row in `[0, N)`.

        Raises:
            DatasetError: The key is not valid, or not UTF-8.
        """
        key = self._recent.get(row)  # reading a batch looks up each key several times; threads may share the index
        if key is None:
            ends = self._columns["key_end"]
            start = ends.item(row - 1) if row else 0
            try:
                key = self._columns["key_bytes"][start : ends.item(row)].tobytes().decode()
            except UnicodeDecodeError as error:
                raise DatasetError(f"{self._path} is damaged: key_bytes of row {row} must be UTF-8: {error}") from None
            if not is_key(key):
                check_key(key, f"{self._path}, row {row}")
            if len(self._recent) >= _NUM_RECENT:
                self._recent.clear()
            self._recent[row] = key
        return key

    def row(self, key: str) -> int | None:
        """Return the row of a key; None if there is no such key.

        Args:
            key: Key of a sample.
        """
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
        """Return the rows of many keys, which is much faster than one call of `row` per key.

        Args:
            keys: Keys of samples.

        Returns:
            `[len(keys)]` rows; -1 for keys that do not exist.
        """
        if not len(self):
            return np.full(len(keys), -1, np.int64)
        sorted_hash, sorted_row = self._columns["sorted_hash"], self._columns["sorted_row"]
        hashes = np.fromiter(map(hash_key, keys), np.uint64, len(keys))
        order = np.argsort(hashes)  # in the order of the index, for the caches of the CPU
        positions = np.empty(len(keys), np.int64)
        positions[order] = np.searchsorted(sorted_hash, hashes[order]).clip(max=len(self) - 1)
        rows = np.where(sorted_hash[positions] == hashes, sorted_row[positions].astype(np.int64), -1)
        for i, (key, row) in enumerate(zip(keys, rows.tolist(), strict=True)):
            if row >= 0 and self.key(row) != key:  # another key with the same hash
                actual = self.row(key)
                rows[i] = -1 if actual is None else actual
        return rows

    def extent(self, row: int, member: str) -> tuple[int, int]:
        """Return (offset, size) of a member in its shard, in bytes.

        Args:
            row: Row of the sample.
            member: `"map"` or `"image"`.
        """
        return self._columns[f"{member}_offset"].item(row), self._columns[f"{member}_size"].item(row)

    def mean_size(self, member: str) -> float:
        """Return the mean size of a member in bytes; 0 for an empty split.

        Args:
            member: `"map"` or `"image"`.
        """
        return float(self._columns[f"{member}_size"].mean()) if len(self) else 0.0
