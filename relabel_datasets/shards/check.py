"""Find what is wrong with one shard.

It is walked with Python's tarfile, which knows nothing of the index, past damaged headers to its end. It is read through an
open file, a member at a time, and not through a memory map: where a disk fails, a read raises an error that can be
reported, while touching a map kills the process.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, NamedTuple

from torch.utils.data import Dataset

from ..errors import DatasetError, ImageError, LabelMapError
from ..labels.label_map import LabelMap
from ..naming import KEY_RULE, is_key
from ..storage.folders import Folder
from ..storage.regular_files import open_regular
from ..storage.resolve import open_folder
from .formats import FIELDS, field_of
from .images import decode_reduced
from .index import Index
from .manifest import Manifest, Split
from .tars import DAMAGED_TAR, parse_label

_BLOCK = 512
_MAX_EXCESS = 16 << 20  # bytes beyond the size in the manifest up to which a shard is searched for its samples
_COLUMNS = {"safetensors": "map"}  # of the index; images have any extension


@dataclass(frozen=True)
class Source:
    """Where the dataset is, for processes that open it with a cache of their own."""

    path: str | os.PathLike[str]
    storage_options: dict[str, Any] | None
    scratch: str | None  # folder for temporary files of a remote dataset, None for a local one

    def open(self, cache: str | None) -> Folder:
        return open_folder(self.path, storage_options=self.storage_options, cache_dir=cache)


@dataclass(frozen=True)
class SplitToCheck:
    """A split to check."""

    source: Source
    config: str | None  # folder in the dataset; None where the dataset's folder itself is the config
    manifest: Manifest
    split: Split
    index: Index | None  # if it is whole
    quick: bool

    @property
    def name(self) -> str:
        """Of the config."""
        return self.config or self.manifest.config

    def open(self, cache: str | None) -> Folder:
        root = self.source.open(cache)
        return root if self.config is None else root.child(self.config)


def check_image_extension(split: Split, fields: set[str | None]) -> str | None:
    """Return what is wrong with the extension of a split's images, see `formats.common_field`.

    Args:
        split: From the manifest.
        fields: What `formats.field_of` returns for its images.
    """
    extension = split.image_extension
    if extension is not None and extension not in FIELDS:
        return f"the images have the extension .{extension}; readers find only those with {', .'.join(FIELDS)}: build the split again"
    (only,) = fields if len(fields) == 1 else (None,)
    if extension == "jpg" and only in ("png", "webp") and not split.skipped:
        return f"all images are {only.upper()}, but their extension is .jpg: build the split again"
    return None


def compare_sha256(file: BinaryIO, name: str, expected: str) -> None:
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    if sha256 != expected:
        raise DatasetError(
            f"{name}: its sha256 is {sha256}, the manifest says {expected}: it is damaged or of another build, fetch or "
            "build it anew"
        )


@dataclass
class ShardScan:
    """What was found in a shard."""

    problems: list[tuple[str | None, str]] = field(default_factory=list)  # (key, text)
    keys: list[str] = field(default_factory=list)
    num_samples: int = 0
    num_bytes: int = 0
    image_fields: set[str | None] = field(
        default_factory=set
    )  # see `formats.field_of`, of all images that can be decoded


class Shards(Dataset[ShardScan]):
    """The shards of some splits: `[i]` checks one."""

    def __init__(self, splits: list[SplitToCheck]) -> None:
        self._shards = [(split, number) for split in splits for number in range(len(split.split.filenames))]

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> ShardScan:
        return ShardCheck(*self._shards[index]).run()


class _Sample(NamedTuple):
    label: int | None  # None: no valid one
    places: dict[str, tuple[int, int]]  # (offset, size) of "map" and "image", as far as they are there


class ShardCheck:
    """Finds what is wrong with one shard."""

    def __init__(self, split: SplitToCheck, number: int) -> None:
        self._split, self._number = split, number
        self._num_classes = len(split.manifest.classes)
        image = split.split.image_extension
        self._extensions = (*([image] if image else []), "cls", "safetensors")
        self._found = ShardScan()

    def run(self) -> ShardScan:
        scratch = self._split.source.scratch
        try:
            # A cache of its own: it is gone after the check, and no other shard of equal content is taken for this one.
            with nullcontext() if scratch is None else TemporaryDirectory(dir=scratch) as cache:
                folder = self._split.open(cache)
                with self._open(folder) as file:
                    self._check(file)
        except (OSError, DatasetError) as error:
            self._say(None, str(error))
        return self._found

    def _say(self, key: str | None, problem: str) -> None:
        self._found.problems.append((key, problem))

    def _open(self, folder: Folder) -> BinaryIO:
        split, number = self._split.split, self._number
        name = split.filenames[number]
        try:
            return folder.open(name, split.shard_bytes[number], split.shard_sha256[number])
        except DatasetError as error:
            if folder.is_remote:
                raise
            file = open_regular(Path(str(folder), name))  # of the wrong size: look which samples are lost
            self._say(None, str(error))
            return file

    def _check(self, file: BinaryIO) -> None:
        split, number = self._split.split, self._number
        self._found.num_bytes = size = os.fstat(file.fileno()).st_size
        if size > split.shard_bytes[number] + _MAX_EXCESS:
            return  # its size is a problem already; walking through it could take days
        if size == split.shard_bytes[number]:
            try:
                compare_sha256(file, split.filenames[number], split.shard_sha256[number])
            except DatasetError as error:
                self._say(None, str(error))
        if self._split.quick and not self._found.problems:
            self._found.num_samples = split.shard_lengths[number]
            return
        samples: dict[str, _Sample] = {}
        for key, members in self._samples(file, size):
            label = self._check_sample(file, key, members)
            places = {
                _COLUMNS.get(name, "image"): (m.offset_data, m.size) for name, m in members.items() if name != "cls"
            }
            samples.setdefault(key, _Sample(label, places))
            self._found.keys.append(key)
        self._found.num_samples = len(self._found.keys)
        if len(self._found.keys) != split.shard_lengths[number]:
            self._say(None, f"has {len(self._found.keys)} samples, the manifest says {split.shard_lengths[number]}")
        if self._split.index is not None:
            self._compare_with_index(self._split.index, samples)

    def _samples(self, file: BinaryIO, size: int) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
        """Yield each sample's key and its members by extension: neighbours that share a key, as WebDataset has it."""
        key, members = "", dict[str, tarfile.TarInfo]()
        for member in self._members(file, size):
            stem, _, extension = member.name.partition(".")
            if not member.isfile() or not stem or extension not in self._extensions:
                self._say(
                    None, f"member {member.name!r} does not belong here: expected KEY.{' or .'.join(self._extensions)}"
                )
                continue
            if members and (stem != key or extension in members):
                yield key, members
                members = {}
            key = stem
            members[extension] = member
        if members:
            yield key, members

    def _members(self, file: BinaryIO, size: int) -> Iterator[tarfile.TarInfo]:
        """Yield the tar's members; `ignore_zeros` goes on after damaged headers, where tarfile else ends silently."""
        start = end = 0
        while start < size:
            file.seek(start)
            try:
                with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
                    for member in tar:
                        if member.offset != end:
                            self._say(None, f"bytes {end} to {member.offset} are no members: a header is damaged")
                        if not 0 <= member.size <= size - member.offset_data:
                            self._say(None, f"member {member.name!r} is cut off: {member.size} bytes expected")
                            start = member.offset_data
                            break
                        start = end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                        yield member
                    else:
                        break
            except DAMAGED_TAR:
                start = max(start + _BLOCK, file.tell() // _BLOCK * _BLOCK)
        file.seek(end)
        if file.read(2 * _BLOCK + 1) != bytes(2 * _BLOCK):
            self._say(None, f"does not end with two empty blocks after its last member, at byte {end}: it is cut off")

    def _check_sample(self, file: BinaryIO, key: str, members: dict[str, tarfile.TarInfo]) -> int | None:
        """Return the sample's label, if it has a valid one."""
        if not is_key(key):
            self._say(key, f"the key is not valid: {KEY_RULE}")
        label: int | None = None
        size: tuple[int, int] | None = None
        for extension in ("cls", "safetensors", *self._extensions[:-2]):  # the image last: its size is the map's
            if extension not in members:
                self._say(key, f"has no .{extension}")
                continue
            file.seek(members[extension].offset_data)
            data = file.read(members[extension].size)
            if extension == "cls":
                label = self._check_label(key, data)
            elif extension == "safetensors":
                size = self._check_label_map(key, data)
            else:
                self._check_image(key, data, size)
        return label

    def _check_label(self, key: str, text: bytes) -> int | None:
        label = parse_label(text)
        if label is not None and label < self._num_classes:
            return label
        self._say(key, f".cls must be a class index in 0 .. {self._num_classes - 1}, got {text[:20]!r}")
        return None

    def _check_label_map(self, key: str, blob: bytes) -> tuple[int, int] | None:
        """Return the size of the image that the label map is of."""
        try:
            label_map = LabelMap.from_safetensors(blob)
        except LabelMapError as error:
            self._say(key, f"label map: {error}")
            return None
        if label_map.num_classes != self._num_classes:
            self._say(key, f"label map: of {label_map.num_classes} classes, the manifest has {self._num_classes}")
        elif _has_repeated_classes(label_map):
            self._say(key, "label map: a class is stored more than once at a location")
        expected = self._split.manifest.encoding["map_size"]
        if expected and list(label_map.shape[1:]) != list(expected):
            self._say(key, f"label map: of size {list(label_map.shape[1:])}, the manifest says {expected}")
        return label_map.canvas_size

    def _check_image(self, key: str, data: bytes, size: tuple[int, int] | None) -> None:
        try:
            _, image_size = decode_reduced(data, None)
        except ImageError as error:
            self._say(key, str(error))
            return
        actual, extension = field_of(data), self._split.split.image_extension
        self._found.image_fields.add(actual)
        if extension in ("png", "webp") and actual != extension:
            self._say(
                key, f"the image is no {extension.upper()}, as its extension .{extension} says: build the split again"
            )
        if size is not None and size != image_size:
            height, width = image_size
            self._say(key, f"the image is {height}x{width}, its label map is of one of {size[0]}x{size[1]}")

    def _compare_with_index(self, index: Index, samples: dict[str, _Sample]) -> None:
        first = sum(self._split.split.shard_lengths[: self._number])
        rows, lost = dict[str, int](), []
        for row in range(first, first + self._split.split.shard_lengths[self._number]):
            try:
                key = index.key(row)
                rows[key] = row
                if index.row(key) != row:
                    lost.append(key)
            except DatasetError as error:
                self._say(None, str(error))
        if samples and not rows.keys() & samples.keys():
            self._say(None, "has none of the samples that the index has there: one of the two is of another build")
            return
        misplaced = []
        for key, row in rows.items():
            if key not in samples:
                self._say(key, "is in the index, but not in the shard")
                continue
            label, places = samples[key]
            if label not in (None, int(index.labels[row])):
                self._say(key, f".cls is {label}, the index says {index.labels[row]}")
            if any(place != index.extent(row, member) for member, place in places.items()):
                misplaced.append(key)
        for key in samples:
            if key not in rows:
                self._say(key, "is in the shard, but not in the index")
        for key in lost:
            self._say(key, "the index finds another sample by its key")
        if misplaced:  # one that is too long or too many moves all that follow: they are not each a problem
            only = misplaced[0] if len(misplaced) == 1 else None
            self._say(
                only,
                f"{len(misplaced)} of {len(rows)} samples are not where the index has them, first {misplaced[0]!r}",
            )


def _has_repeated_classes(label_map: LabelMap) -> bool:
    """Return whether a class has several logits at a location: reading does not check it, since it takes long."""
    return bool((label_map.classes.sort(0).values.diff(dim=0) == 0).any())
