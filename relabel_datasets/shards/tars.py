"""Shards: WebDataset tars whose bytes depend on nothing but their samples, and their reading by offset.

A sample is up to three members that share a key: the image's own bytes, `.cls` with the class index in decimal, and
`.safetensors` with the label map.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import mmap
import os
import re
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

from tqdm.auto import tqdm

from ..errors import DatasetError
from ..labels.statistics import Statistics
from ..naming import check_key
from ..schema import shown
from ..storage.folders import Folder
from ..storage.local import temp_path_for
from ..storage.open_maps import MapTable
from ..storage.regular_files import create_new, open_regular
from .index import Row
from .manifest import Split

_BLOCK = 512
# What Python's tarfile may raise for a damaged or hostile tar.
DAMAGED_TAR = (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError, EOFError, LookupError)
_SYNC_BYTES = 32 << 20


class ShardInfo(NamedTuple):
    """What the manifest and the index hold of a finished shard."""

    rows: list[Row]
    num_bytes: int
    sha256: str
    statistics: Statistics = Statistics()  # whoever makes the maps measures them


class ShardWriter:
    """Writes one shard aside and renames it on `close`; an exception in the `with` block leaves nothing behind.

    Args:
        path: where the finished shard will be.
        image_extension: of the image members, without dot; None writes label-only samples.
    """

    def __init__(self, path: Path, image_extension: str | None) -> None:
        self._path, self._image_extension = path, image_extension
        self._aside = temp_path_for(path)
        self._file = create_new(self._aside)
        self._hash = hashlib.sha256()
        self._offset = self._synced = 0
        self._rows: list[Row] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._file.close()  # on a full disk, it fails to write what is left
        finally:
            self._aside.unlink(missing_ok=True)

    def add(self, key: str, label: int, image: bytes | None, label_map: bytes) -> None:
        """Write one sample.

        Args:
            key: Key of the sample, unique in the dataset; see `naming.check_key`.
            label: class index.
            image: bytes of the image file; not written to label-only shards.
            label_map: safetensors bytes.

        Raises:
            DatasetError: The key is not valid.
        """
        check_key(key, str(self._path))
        image_offset = image_size = 0
        if self._image_extension is not None:
            assert image is not None
            image_offset, image_size = self._add_member(f"{key}.{self._image_extension}", image), len(image)
        self._add_member(f"{key}.cls", str(label).encode())
        map_offset = self._add_member(f"{key}.safetensors", label_map)
        self._rows.append(Row(key, label, map_offset, len(label_map), image_offset, image_size))

    def _add_member(self, name: str, data: bytes) -> int:
        """Return the offset of the data."""
        member = tarfile.TarInfo(name)  # owner and time are 0 in a new TarInfo
        member.size, member.mode = len(data), 0o444
        self._write(member.tobuf(tarfile.GNU_FORMAT))
        offset = self._offset
        self._write(data + bytes(-len(data) % _BLOCK))
        return offset

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._offset += len(data)
        if self._offset - self._synced >= _SYNC_BYTES:  # else close() would wait for the disk to take all of it
            self._sync()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._synced = self._offset

    def close(self) -> ShardInfo:
        """Finish the shard under its own name and return what to record of it."""
        self._write(bytes(2 * _BLOCK))
        self._sync()
        self._file.close()
        self._aside.replace(self._path)
        return ShardInfo(self._rows, self._offset, self._hash.hexdigest())


class ShardReader:
    """Reads members of a split's shards by offset, through memory maps that are opened when first needed.

    All readers of a process share its limit of open files, see `storage.open_maps`.

    Args:
        folder: Folder of the config. Remote shards are fetched when first needed.
        split: The split's entry in the manifest.
    """

    def __init__(self, folder: Folder, split: Split) -> None:
        self._folder, self._split = folder, split
        self._ends = list(itertools.accumulate(split.shard_lengths))
        self._maps = MapTable()

    def __reduce__(self) -> tuple[type[ShardReader], tuple[Folder, Split]]:
        return ShardReader, (self._folder, self._split)  # another process opens its own memory maps

    def read(self, row: int, extent: tuple[int, int], name: str) -> bytes:
        """Return a member's bytes.

        Args:
            row: the sample's row in the index.
            extent: (offset, size) of the member's data in its shard.
            name: the member's name, to be found in the tar header before the data.

        Raises:
            FileNotFoundError: the shard is missing.
            DatasetError: the shard is not the one in the manifest, or cannot be reached.
        """
        shard = bisect.bisect_right(self._ends, row)
        mapped = self._maps.get(shard)
        if mapped is None:
            mapped = self._open(shard)
        offset, size = extent
        if not _BLOCK <= offset <= len(mapped) - size:
            raise DatasetError(
                f"{self._folder}/{self._split.index} is damaged: it has {name} at bytes {offset} to {offset + size}, but "
                f"{self._split.filenames[shard]} has {len(mapped)} bytes"
            )
        # Index and shard may be of different builds; comparing the header, which holds 100 bytes, costs a microsecond.
        expected = name.encode()[:100]
        if mapped[offset - _BLOCK : offset - _BLOCK + len(expected)] != expected:
            raise DatasetError(
                f"{self._folder}/{self._split.filenames[shard]}: {name} is not at byte {offset}, where the index has it: "
                "index and shard are of different builds, fetch or build both anew"
            )
        return mapped[offset : offset + size]

    @property
    def is_remote(self) -> bool:
        """Whether reading from a shard may take long."""
        return self._folder.is_remote

    def fetch(self, shard: int) -> None:
        """Bring a remote shard into the cache, so that reading it later does not wait."""
        split = self._split
        self._folder.open(split.filenames[shard], split.shard_bytes[shard], split.shard_sha256[shard]).close()

    def check_room(self, num_shards: int, what: str) -> None:
        """Raise DatasetError if so many shards, the largest, do not fit in the cache at a time."""
        self._folder.check_room(sum(sorted(self._split.shard_bytes)[-num_shards:]), what)

    def fetch_all(self, num_threads: int, *, progress: bool) -> None:
        """Bring all shards into the cache, see `RelabelDataset.download`."""
        sizes = self._split.shard_bytes
        self.check_room(len(sizes), "the download")
        with (
            ThreadPoolExecutor(num_threads) as pool,
            tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="download", disable=not progress) as bar,
        ):
            for size, _ in zip(sizes, pool.map(self.fetch, range(len(sizes))), strict=True):
                bar.update(size)

    def _open(self, shard: int) -> mmap.mmap:
        split = self._split
        # A map keeps the disk space of a shard that the cache deleted.
        self._maps.keep(lambda other: self._folder.has(split.shard_sha256[other]))
        extent = split.filenames[shard], split.shard_bytes[shard], split.shard_sha256[shard]
        return self._maps.open(shard, lambda: self._folder.open(*extent))


def parse_label(text: bytes) -> int | None:
    """Return the class index in a `.cls` member; None if it is not a decimal number of at most 9 digits."""
    return int(text) if re.fullmatch(rb"[0-9]{1,9}", text) else None


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a whole shard from its tar headers, for a shard without an index.

    Raises:
        FileNotFoundError: There is no such file.
        DatasetError: The file is not a shard of label maps. The message names the sample.
    """
    with open_regular(path) as file:
        try:
            extents = _member_extents(file)
        except DAMAGED_TAR as error:
            raise DatasetError(f"{path} is not an uncompressed tar, or damaged: {shown(str(error))}") from error
        rows = []
        for key, members in extents.items():
            lacking = {"cls", "safetensors"} - members.keys()
            if lacking:
                raise DatasetError(f"{path} is not a shard of label maps: sample {key!r} has no .{min(lacking)}")
            offset, size = members["cls"]
            text = os.pread(file.fileno(), min(size, 20), offset)
            label = parse_label(text)
            if label is None:
                raise DatasetError(f"{path}: sample {key!r}: .cls must be a class index, got {text!r}")
            rows.append(Row(key, label, *members["safetensors"], *members.get("image", ())))
        return rows


def _member_extents(file: BinaryIO) -> dict[str, dict[str, tuple[int, int]]]:
    """Return (offset, size) of the members of each sample, by `"cls"`, `"safetensors"` or `"image"`.

    Raises:
        tarfile.TarError, or another of `DAMAGED_TAR`: The tar is damaged.
    """
    extents: dict[str, dict[str, tuple[int, int]]] = {}
    num_bytes = os.fstat(file.fileno()).st_size
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            # A negative size would lead tarfile back to members that it has read, for ever.
            if not member.isfile() or member.issparse() or not 0 <= member.size <= num_bytes - member.offset_data:
                raise tarfile.TarError(f"member {member.name!r} is not a whole file")
            folder, _, name = member.name.rpartition("/")
            stem, _, field = name.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            kind = field if field in ("cls", "safetensors") else "image"
            extents.setdefault(key, {})[kind] = member.offset_data, member.size
    return extents


def make_split(name: str, filenames: Sequence[str], shards: Sequence[ShardInfo], index: bytes, **more: Any) -> Split:
    """Return the manifest's entry of a split.

    Args:
        name: of the split.
        filenames: of the shards.
        shards: what their writers returned.
        index: content of the index file, see `index.make_index`.
        more: the entry's other fields.
    """
    return Split(
        name=name,
        num_samples=sum(len(shard.rows) for shard in shards),
        filenames=list(filenames),
        shard_lengths=[len(shard.rows) for shard in shards],
        shard_bytes=[shard.num_bytes for shard in shards],
        shard_sha256=[shard.sha256 for shard in shards],
        shard_statistics=[list(shard.statistics) for shard in shards],
        index=index_name(name),
        index_bytes=len(index),
        index_sha256=hashlib.sha256(index).hexdigest(),
        **more,
    )


def index_name(split: str) -> str:
    """Return the file name of a split's index."""
    return f"{split}.index.safetensors"


def shard_names(split: str, num_shards: int) -> Sequence[str]:
    """Return the file names of a split's shards."""
    return [f"{split}-{i:05d}-of-{num_shards:05d}.tar" for i in range(num_shards)]
