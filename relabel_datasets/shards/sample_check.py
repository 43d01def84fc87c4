"""Check the samples of one shard.

The shard is read with Python's tarfile, without the index, past damaged headers to its end. It is read from an open file, one
member at a time, instead of a memory map: if the disk fails, reading raises an error that can be reported, while access to a
memory map kills the process.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from ..errors import DatasetError, ImageError, LabelMapError
from ..labels.crop_labels import CropLabels
from ..labels.reading import read_label
from ..naming import KEY_RULE, is_key
from .formats import field_of
from .images import decode_reduced
from .index import Index
from .tars import DAMAGED_TAR, parse_label

if TYPE_CHECKING:
    from .check import ShardScan, SplitToCheck

_BLOCK = 512
_COLUMNS = {"safetensors": "map"}  # names in the index; images have any extension


class _Sample(NamedTuple):
    label: int | None  # None: not valid
    extents: dict[str, tuple[int, int]]  # (offset, size) of "map" and "image", if they exist


class SampleCheck:
    """Check of the samples of one shard.

    Args:
        split: Split of the shard.
        number: Number of the shard in its split.
        scan: Result to which problems, keys and counts are added.
    """

    def __init__(self, split: SplitToCheck, number: int, scan: ShardScan) -> None:
        self._split, self._number, self._scan = split, number, scan
        self._num_classes = len(split.manifest.classes)
        image = split.split.image_extension
        self._extensions = (*([image] if image else []), "cls", "safetensors")

    def run(self, file: BinaryIO, size: int) -> None:
        """Check all samples.

        Args:
            file: Shard, open for reading.
            size: Size of the shard in bytes.
        """
        split, number = self._split.split, self._number
        samples: dict[str, _Sample] = {}
        for key, members in self._samples(file, size):
            label = self._check_sample(file, key, members)
            extents = {
                _COLUMNS.get(name, "image"): (m.offset_data, m.size) for name, m in members.items() if name != "cls"
            }
            samples.setdefault(key, _Sample(label, extents))
            self._scan.keys.append(key)
        self._scan.num_samples = len(self._scan.keys)
        if len(self._scan.keys) != split.shard_lengths[number]:
            self._report(None, f"has {len(self._scan.keys)} samples, the manifest says {split.shard_lengths[number]}")
        if self._split.index is not None:
            self._compare_with_index(self._split.index, samples)

    def _report(self, key: str | None, problem: str) -> None:
        self._scan.problems.append((key, problem))

    def _samples(self, file: BinaryIO, size: int) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
        """Yield the key of each sample and its members by extension. Consecutive members with one key form a sample."""
        key, members = "", dict[str, tarfile.TarInfo]()
        for member in self._members(file, size):
            stem, _, extension = member.name.partition(".")
            if not member.isfile() or not stem or extension not in self._extensions:
                self._report(
                    None, f"member {member.name!r} is unexpected: expected KEY.{' or .'.join(self._extensions)}"
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
        """Yield the members of the tar. `ignore_zeros` continues after damaged headers, where tarfile would stop silently."""
        start = end = 0
        while start < size:
            file.seek(start)
            try:
                with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True, encoding="utf-8") as tar:
                    for member in tar:
                        if member.offset != end:
                            self._report(None, f"bytes {end} to {member.offset} are not members: a header is damaged")
                        if not 0 <= member.size <= size - member.offset_data:
                            self._report(None, f"member {member.name!r} is truncated: expected {member.size} bytes")
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
            self._report(
                None, f"does not end with two empty blocks after its last member, at byte {end}: it is truncated"
            )

    def _check_sample(self, file: BinaryIO, key: str, members: dict[str, tarfile.TarInfo]) -> int | None:
        """Check a sample and return its label; None if the label is not valid."""
        if not is_key(key):
            self._report(key, f"the key is not valid: {KEY_RULE}")
        label: int | None = None
        size: tuple[int, int] | None = None
        for extension in (
            "cls",
            "safetensors",
            *self._extensions[:-2],
        ):  # the image last: its size is compared with the map's
            if extension not in members:
                self._report(key, f"has no .{extension}")
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
        self._report(key, f".cls must be a class index in 0 .. {self._num_classes - 1}, got {text[:20]!r}")
        return None

    def _check_label_map(self, key: str, blob: bytes) -> tuple[int, int] | None:
        """Check a label map and return the (height, width) of its image."""
        try:
            label_map = read_label(blob)
        except LabelMapError as error:
            self._report(key, f"label map: {error}")
            return None
        if label_map.num_classes != self._num_classes:
            self._report(key, f"label map: has {label_map.num_classes} classes, the manifest has {self._num_classes}")
        elif (damage := label_map.find_damage()) is not None:
            self._report(key, f"label map: {damage}")
        encoding = self._split.manifest.encoding
        if label_map.encoding != encoding["name"]:
            self._report(key, f"label map: has the encoding {label_map.encoding}, the manifest says {encoding['name']}")
        elif isinstance(label_map, CropLabels):
            if label_map.num_crops != encoding.get("num_crops"):
                self._report(
                    key, f"label map: has {label_map.num_crops} crops, the manifest says {encoding.get('num_crops')}"
                )
        elif (expected := self._split.manifest.map_sizes) and label_map.map_sizes != expected:
            actual, wanted = (sizes if len(sizes) > 1 else sizes[0] for sizes in (label_map.map_sizes, expected))
            self._report(key, f"label map: has size {actual}, the manifest says {wanted}")
        return label_map.canvas_size

    def _check_image(self, key: str, data: bytes, size: tuple[int, int] | None) -> None:
        try:
            _, image_size = decode_reduced(data, None)
        except ImageError as error:
            self._report(key, str(error))
            return
        actual, extension = field_of(data), self._split.split.image_extension
        self._scan.image_fields.add(actual)
        if extension in ("png", "webp") and actual != extension:
            self._report(
                key,
                f"the image is not {extension.upper()}, although its extension is .{extension}: build the split again",
            )
        if size is not None and size != image_size:
            height, width = image_size
            self._report(key, f"the image is {height}x{width}, its label map is for an image of {size[0]}x{size[1]}")

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
                self._report(None, str(error))
        if samples and not rows.keys() & samples.keys():
            self._report(
                None, "has none of the samples that the index lists for it: index and shard are from different builds"
            )
            return
        misplaced = []
        for key, row in rows.items():
            if key not in samples:
                self._report(key, "is in the index, but not in the shard")
                continue
            label, extents = samples[key]
            if label not in (None, int(index.labels[row])):
                self._report(key, f".cls is {label}, the index says {index.labels[row]}")
            if any(extent != index.extent(row, member) for member, extent in extents.items()):
                misplaced.append(key)
        for key in samples:
            if key not in rows:
                self._report(key, "is in the shard, but not in the index")
        for key in lost:
            self._report(key, "the index returns another sample for its key")
        if misplaced:  # one problem for all: a single wrong member moves all that follow
            only = misplaced[0] if len(misplaced) == 1 else None
            self._report(
                only,
                f"{len(misplaced)} of {len(rows)} samples are not at their positions in the index, first {misplaced[0]!r}",
            )
