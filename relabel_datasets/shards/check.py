"""Check one shard: its size and SHA-256, and its samples through `sample_check`."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from ..compatibility import sha256_digest
from ..errors import DatasetError
from ..storage.folders import Folder
from ..storage.regular_files import open_regular
from ..storage.resolve import open_folder
from .formats import FIELDS
from .index import Index
from .manifest import Manifest, Split

_MAX_EXCESS = 16 << 20  # a shard that exceeds its size by more bytes is not searched for samples


@dataclass(frozen=True)
class Source:
    """Location of a dataset that is opened with several caches.

    Attributes:
        path: Local path or URL.
        storage_options: Arguments of fsspec's file system.
        scratch: Folder for temporary files of a remote dataset; None for a local one.
    """

    path: str | os.PathLike[str]
    storage_options: dict[str, Any] | None
    scratch: Path | None

    def open(self, cache: str | Path | None) -> Folder:
        """Return the dataset's folder, with this cache folder."""
        return open_folder(self.path, storage_options=self.storage_options, cache_dir=cache)


@dataclass(frozen=True)
class SplitToCheck:
    """Split to check.

    Attributes:
        source: Location of the dataset.
        config: Folder of the config; None if the dataset's folder itself is the config.
        manifest: Manifest of the config.
        split: Entry of the split in the manifest.
        index: Index of the split; None if it is damaged.
        quick: Whether to read the samples only of shards whose size or SHA-256 is wrong.
    """

    source: Source
    config: str | None
    manifest: Manifest
    split: Split
    index: Index | None
    quick: bool

    @property
    def name(self) -> str:
        """Name of the config."""
        return self.config or self.manifest.config

    def open(self, cache: str | Path | None) -> Folder:
        """Return the config's folder, with this cache folder."""
        root = self.source.open(cache)
        return root if self.config is None else root.child(self.config)


def check_image_extension(split: Split, fields: set[str | None]) -> str | None:
    """Check the extension of a split's images, see `formats.common_field`.

    Args:
        split: Entry of the split in the manifest.
        fields: Results of `formats.field_of` for its images.

    Returns:
        Description of the problem; None if there is none.
    """
    extension = split.image_extension
    if extension is not None and extension not in FIELDS:
        return f"the images have the extension .{extension}, but readers find only .{', .'.join(FIELDS)}: build the split again"
    (only,) = fields if len(fields) == 1 else (None,)
    if extension == "jpg" and only in ("png", "webp") and not split.skipped:
        return f"all images are {only.upper()}, but their extension is .jpg: build the split again"
    return None


def compare_sha256(file: BinaryIO, name: str, expected: str) -> None:
    """Check the SHA-256 of an open file.

    Args:
        file: File open for reading.
        name: Name of the file, for the error message.
        expected: Expected SHA-256, in hex.

    Raises:
        DatasetError: The SHA-256 differs.
    """
    sha256 = sha256_digest(file).hexdigest()
    if sha256 != expected:
        raise DatasetError(
            f"{name}: its SHA-256 is {sha256}, the manifest says {expected}: it is damaged or from another build; download or "
            "build it again"
        )


@dataclass
class ShardScan:
    """Result of the check of one shard.

    Attributes:
        problems: (key, description) of each problem. The key is None for problems of the whole shard.
        keys: Keys of the samples, in order.
        num_samples: Number of samples.
        num_bytes: Size of the shard in bytes.
        image_fields: Results of `formats.field_of` for all images that can be decoded.
    """

    problems: list[tuple[str | None, str]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    num_samples: int = 0
    num_bytes: int = 0
    image_fields: set[str | None] = field(default_factory=set)


class Shards:
    """Map-style dataset of the shards of several splits. Item `i` is the check of shard `i`."""

    def __init__(self, splits: list[SplitToCheck]) -> None:
        self._shards = [(split, number) for split in splits for number in range(len(split.split.filenames))]

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> ShardScan:
        return ShardCheck(*self._shards[index]).run()


class ShardCheck:
    """Check of one shard."""

    def __init__(self, split: SplitToCheck, number: int) -> None:
        self._split, self._number = split, number
        self._scan = ShardScan()

    def run(self) -> ShardScan:
        """Check the shard."""
        scratch = self._split.source.scratch
        try:
            # A separate cache, deleted after the check, so that no shard with the same content is used instead of this one.
            with nullcontext() if scratch is None else TemporaryDirectory(dir=scratch) as cache:
                folder = self._split.open(cache)
                with self._open(folder) as file:
                    self._check(file)
        except (OSError, DatasetError) as error:
            self._report(None, str(error))
        return self._scan

    def _report(self, key: str | None, problem: str) -> None:
        self._scan.problems.append((key, problem))

    def _open(self, folder: Folder) -> BinaryIO:
        split, number = self._split.split, self._number
        name = split.filenames[number]
        try:
            return folder.open(name, split.shard_bytes[number], split.shard_sha256[number])
        except DatasetError as error:
            if folder.is_remote:
                raise
            file = open_regular(Path(str(folder), name))  # its size is wrong: find the samples that are lost
            self._report(None, str(error))
            return file

    def _check(self, file: BinaryIO) -> None:
        split, number = self._split.split, self._number
        self._scan.num_bytes = size = os.fstat(file.fileno()).st_size
        if size > split.shard_bytes[number] + _MAX_EXCESS:
            return  # its size has been reported; reading it all could take days
        if size == split.shard_bytes[number]:
            try:
                compare_sha256(file, split.filenames[number], split.shard_sha256[number])
            except DatasetError as error:
                self._report(None, str(error))
        if self._split.quick and not self._scan.problems:
            self._scan.num_samples = split.shard_lengths[number]
            return
        from .sample_check import SampleCheck  # imports torch, which hashing does not need

        SampleCheck(self._split, self._number, self._scan).run(file, size)
