"""Write shards as deterministic WebDataset tars, and read them by offset.

A sample has up to three members with the same key: the original image file, `.cls` with the class index in decimal, and
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

from ..compatibility import read_at
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
# Exceptions that Python's tarfile may raise for a damaged or hostile tar.
DAMAGED_TAR = (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError, EOFError, LookupError)
_SYNC_BYTES = 32 << 20


class ShardInfo(NamedTuple):
    """Entries of a complete shard in the manifest and the index.

    Attributes:
        rows: Samples, in order.
        num_bytes: Size in bytes.
        sha256: SHA-256, in hex.
        statistics: Statistics of the label maps, set by the builder. Default: empty.
    """

    rows: list[Row]
    num_bytes: int
    sha256: str
    statistics: Statistics = Statistics()


class ShardWriter:
    """Writer of one shard, for a `with` statement. The shard has a temporary name until `close`; an exception removes it.

    Args:
        path: Path of the complete shard.
        image_extension: Extension of the image members, without dot. None writes label-only samples.
    """

    def __init__(self, path: Path, image_extension: str | None) -> None:
        self._path, self._image_extension = path, image_extension
        self._temp_path = temp_path_for(path)
        self._file = create_new(self._temp_path)
        self._hash = hashlib.sha256()
        self._offset = self._synced = 0
        self._rows: list[Row] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._file.close()  # on a full disk, flushing the buffer fails
        finally:
            self._temp_path.unlink(missing_ok=True)

    def add(self, key: str, label: int, image: bytes | None, label_map: bytes) -> None:
        """Write one sample.

        Args:
            key: Key of the sample, unique in the dataset; see `naming.check_key`.
            label: Class index.
            image: Content of the image file. It is ignored for label-only shards.
            label_map: Label map as safetensors bytes.

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
        """Write a member and return the offset of its data."""
        member = tarfile.TarInfo(name)  # owner and time of a new TarInfo are 0
        member.size, member.mode = len(data), 0o444
        self._write(member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))  # not the encoding of the locale
        offset = self._offset
        self._write(data + bytes(-len(data) % _BLOCK))
        return offset

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._offset += len(data)
        if self._offset - self._synced >= _SYNC_BYTES:  # otherwise close() would have to write all of it to the disk
            self._sync()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._synced = self._offset

    def close(self) -> ShardInfo:
        """Complete the shard and rename it to its path.

        Returns:
            Entries of the shard in the manifest and the index.
        """
        self._write(bytes(2 * _BLOCK))
        self._sync()
        self._file.close()
        self._temp_path.replace(self._path)
        return ShardInfo(self._rows, self._offset, self._hash.hexdigest())


class ShardReader:
    """Reader of the members of a split's shards by offset, through memory maps that are opened on first use.

    All readers of a process share its limit of open files, see `storage.open_maps`.

    Args:
        folder: Folder of the config. Remote shards are downloaded on first use.
        split: The split's entry in the manifest.
    """

    def __init__(self, folder: Folder, split: Split) -> None:
        self._folder, self._split = folder, split
        self._ends = list(itertools.accumulate(split.shard_lengths))
        self._maps = MapTable()

    def __reduce__(self) -> tuple[type[ShardReader], tuple[Folder, Split]]:
        return ShardReader, (self._folder, self._split)  # another process opens its own memory maps

    def read(self, row: int, extent: tuple[int, int], name: str) -> bytes:
        """Read a member.

        Args:
            row: Row of the sample in the index.
            extent: (offset, size) of the member's data in its shard, in bytes.
            name: Name of the member, which is compared with the tar header before the data.

        Returns:
            The content of the member.

        Raises:
            FileNotFoundError: The shard is missing.
            DatasetError: The shard differs from the one in the manifest or in the index, or cannot be reached.
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
        # Index and shard may be from different builds. Comparing the name in the header (100 bytes) takes a microsecond.
        expected = name.encode()[:100]
        if mapped[offset - _BLOCK : offset - _BLOCK + len(expected)] != expected:
            raise DatasetError(
                f"{self._folder}/{self._split.filenames[shard]}: {name} is not at byte {offset}, its position in the "
                "index: index and shard are from different builds; download or build both again"
            )
        return mapped[offset : offset + size]

    @property
    def urls(self) -> list[str]:
        """Paths of the shards, or their URLs without credentials."""
        return [f"{self._folder}/{name}" for name in self._split.filenames]

    @property
    def is_remote(self) -> bool:
        """Whether shards are downloaded when they are read."""
        return self._folder.is_remote

    def fetch(self, shard: int) -> None:
        """Download a remote shard to the cache.

        Args:
            shard: Number of the shard.
        """
        split = self._split
        self._folder.open(split.filenames[shard], split.shard_bytes[shard], split.shard_sha256[shard]).close()

    def check_room(self, num_shards: int, what: str) -> None:
        """Raise an error if the `num_shards` largest shards exceed the limit of the cache.

        Args:
            num_shards: Number of shards that are needed at the same time.
            what: Name of what needs them, for the error message.

        Raises:
            DatasetError: The limit is exceeded.
        """
        self._folder.check_room(sum(sorted(self._split.shard_bytes)[-num_shards:]), what)

    def fetch_all(self, num_threads: int, *, progress: bool) -> None:
        """Download all shards to the cache.

        Args:
            num_threads: Number of simultaneous downloads.
            progress: Whether to show a progress bar on stderr.

        Raises:
            DatasetError: The shards exceed the limit of the cache, or cannot be reached.
        """
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
        # Close the maps of shards that the cache has deleted, since they occupy disk space.
        self._maps.keep(lambda other: self._folder.has(split.shard_sha256[other]))
        extent = split.filenames[shard], split.shard_bytes[shard], split.shard_sha256[shard]
        return self._maps.open(shard, lambda: self._folder.open(*extent))


def parse_label(text: bytes) -> int | None:
    """Parse a `.cls` member.

    Args:
        text: Content of the member.

    Returns:
        The class index; None if the text is not a decimal number of at most 9 digits.
    """
    return int(text) if re.fullmatch(rb"[0-9]{1,9}", text) else None


def read_rows(path: Path) -> list[Row]:
    """Read the positions of all samples from the tar headers of a shard, without an index.

    Args:
        path: Path of the shard.

    Returns:
        The samples, in order.

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
            missing = {"cls", "safetensors"} - members.keys()
            if missing:
                raise DatasetError(f"{path} is not a shard of label maps: sample {key!r} has no .{min(missing)}")
            offset, size = members["cls"]
            text = read_at(file.fileno(), min(size, 20), offset)
            label = parse_label(text)
            if label is None:
                raise DatasetError(f"{path}: sample {key!r}: .cls must be a class index, got {text!r}")
            rows.append(Row(key, label, *members["safetensors"], *members.get("image", ())))
        return rows


def _member_extents(file: BinaryIO) -> dict[str, dict[str, tuple[int, int]]]:
    """Return (offset, size) of the members of each sample, by `"cls"`, `"safetensors"` or `"image"`.

    Raises:
        Exception: The tar is damaged; one of `DAMAGED_TAR`.
    """
    extents: dict[str, dict[str, tuple[int, int]]] = {}
    num_bytes = os.fstat(file.fileno()).st_size
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
        for member in tar:
            # A negative size would send tarfile back to earlier members, in an endless loop.
            if not member.isfile() or member.issparse() or not 0 <= member.size <= num_bytes - member.offset_data:
                raise tarfile.TarError(f"member {member.name!r} is not a complete regular file")
            folder, _, name = member.name.rpartition("/")
            stem, _, field = name.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            role = field if field in ("cls", "safetensors") else "image"
            extents.setdefault(key, {})[role] = member.offset_data, member.size
    return extents


def make_split(name: str, filenames: Sequence[str], shards: Sequence[ShardInfo], index: bytes, **more: Any) -> Split:
    """Return the manifest's entry of a split.

    Args:
        name: Name of the split.
        filenames: File names of the shards.
        shards: Results of `ShardWriter.close`, one per shard.
        index: Content of the index file, see `index.make_index`.
        more: Other fields of the entry.
    """
    return Split(
        name=name,
        num_samples=sum(len(shard.rows) for shard in shards),
        filenames=list(filenames),
        shard_lengths=[len(shard.rows) for shard in shards],
        shard_bytes=[shard.num_bytes for shard in shards],
        shard_sha256=[shard.sha256 for shard in shards],
        shard_statistics=[shard.statistics.to_list() for shard in shards],
        index=index_name(name),
        index_bytes=len(index),
        index_sha256=hashlib.sha256(index).hexdigest(),
        **more,
    )


def index_name(split: str) -> str:
    """Return the file name of the index of a split.

    Args:
        split: Name of the split.
    """
    return f"{split}.index.safetensors"


def shard_names(split: str, num_shards: int) -> Sequence[str]:
    """Return the file names of the shards of a split.

    Args:
        split: Name of the split.
        num_shards: Number of shards.
    """
    return [f"{split}-{i:05d}-of-{num_shards:05d}.tar" for i in range(num_shards)]
