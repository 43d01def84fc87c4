"""Find the samples of a foreign WebDataset tar by its headers."""

from __future__ import annotations

import os
import re
import tarfile
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..errors import DatasetError
from ..shards.images import IMAGE_EXTENSIONS
from ..storage.regular_files import open_regular

_MEMBER = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # a key ends at the first dot of the last part, as in webdataset
_BLOCK = 512

Extent = tuple[int, int]  # offset and size in a tar, in bytes


class Scan(NamedTuple):
    """The samples of a tar."""

    keys: list[str]
    fields: set[str]  # extensions of the images
    extents: array[int]  # image offset and size, class offset and size, for every key; class offset -1: there is none


def scan_tar(tar: Path) -> Scan:
    """Return the samples of a tar: one image each, and maybe a class.

    Raises:
        DatasetError: a sample without image or with several, a key that stands twice, or a tar that is cut off or damaged.
    """
    scan = Scan([], set(), array("q"))
    for key, members in _samples(tar).items():
        field = _image_field(tar, key, members)
        scan.keys.append(key)
        scan.fields.add(field)
        scan.extents.extend((*members[field], *members.get("cls", (-1, 0))))
    return scan


def _image_field(tar: Path, key: str, members: Mapping[str, Extent]) -> str:
    fields = [field for field in members if f".{field.lower()}" in IMAGE_EXTENSIONS]
    if len(fields) != 1:
        raise DatasetError(f"{tar}: sample {key!r} must have one image, it has {sorted(members)}")
    return fields[0]


def _samples(tar: Path) -> dict[str, dict[str, Extent]]:
    """Return where the members of every key of a tar are, by their extension."""
    samples: dict[str, dict[str, Extent]] = {}
    end = 0
    with open_regular(tar) as file:
        try:
            for name, extent in _members(file):
                end = sum(extent) + -extent[1] % _BLOCK
                match = _MEMBER.match(name)
                if match and samples.setdefault(match[1], {}).setdefault(match[2], extent) != extent:
                    raise DatasetError(f"{tar}: {name} stands twice")
        except tarfile.TarError as error:
            raise DatasetError(f"{tar} is not an uncompressed tar, or damaged: {error}") from error
        # A tar ends with two empty blocks; tarfile takes the end of the file, and damaged headers, as the end as well.
        if os.pread(file.fileno(), 2 * _BLOCK, end) != bytes(2 * _BLOCK):
            raise DatasetError(
                f"{tar} is cut off or damaged at byte {end}: a member or two empty blocks should be there"
            )
    return samples


def _members(file: BinaryIO) -> Iterator[tuple[str, Extent]]:
    """Yield the names of a tar's files and where they are.

    Plain headers are read here, in a sixth of tarfile's time, which reads all from the first other one on.
    """
    offset = 0
    while plain := _plain_member(os.pread(file.fileno(), _BLOCK, offset)):
        name, size = plain
        yield name, (offset + _BLOCK, size)
        offset += _BLOCK + size + -size % _BLOCK
    file.seek(offset)
    with tarfile.open(fileobj=file, mode="r:") as rest:
        for member in rest:
            yield (member.name, (member.offset_data, member.size)) if member.isfile() else ("", (member.offset_data, 0))


def _plain_member(header: bytes) -> tuple[str, int] | None:
    """Return the name and the size of a regular file, if that is all the header says: no link, no long name, no extras."""
    name = header[:100].partition(b"\0")[0].decode(errors="surrogateescape")
    regular = header[156:157] in (b"0", b"\0") and header[257:262] == b"ustar" and not name.endswith("/")
    if not regular or header[345:346] != b"\0":  # the name goes on there
        return None
    try:
        size, checksum = int(header[124:136].rstrip(b"\0"), 8), int(header[148:156].split(b"\0")[0], 8)
    except ValueError:  # empty, or a number of another kind, as of a file above 8 GiB
        return None
    return (name, size) if sum(header) - sum(header[148:156]) + 8 * ord(" ") == checksum else None
