"""List the samples of a WebDataset tar from its headers."""

from __future__ import annotations

import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..compatibility import read_at
from ..errors import DatasetError
from ..naming import KEY_RULE, is_key
from ..shards.formats import IMAGE_EXTENSIONS
from ..storage.regular_files import open_regular
from .clutter import is_clutter
from .keys import key_from_member
from .skipped import Skipped

_MEMBER = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # a key ends at the first dot of the last part, as in webdataset
_METADATA = re.compile(r"__[^/]*__($|/)")  # members that webdataset skips
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BLOCK = 512

_LINKS = {tarfile.LNKTYPE: "hard link", tarfile.SYMTYPE: "symbolic link"}
_UNREADABLE = {  # kinds of members that cannot be read, with the advice in errors
    "sparse": "a sparse file: write the tar without --sparse",
    "symbolic link": "a symbolic link: write the tar with --dereference (-h)",
}

Extent = tuple[int, int]  # offset and size in a tar, in bytes


class _Member(NamedTuple):
    name: str
    extent: Extent
    kind: str  # "file", "sparse", "hard link", "symbolic link" or "other"
    target: str = ""  # name of the member that a link points to


class Scan(NamedTuple):
    """Samples of a tar."""

    keys: list[str]
    extents: array[int]  # image offset and size, label offset (-1: no label) and size, for every key
    skipped: list[Skipped]
    num_nameless: int  # files without an extension, which belong to no sample
    num_hidden: int  # hidden files and those of file managers, which are ignored


def scan_tar(tar: Path, image: str | None = None, label: str | None = None) -> Scan:
    """List the samples of a tar.

    Members are grouped as in webdataset: the path up to the first dot of the file name is the key, and the rest is the field, in
    lower case. Members of one key need not be adjacent. Keys are made valid by `keys.key_from_member`.

    Args:
        tar: Path of an uncompressed tar.
        image: Field with the image. Default: The only field whose extension is that of an image.
        label: Field with the class index, or the name of a value in the field `json`. Default: `cls`.

    Returns:
        The keys, byte ranges and skipped samples.

    Raises:
        DatasetError: A sample has several images, a key is repeated, or the tar is truncated, compressed or corrupt.
    """
    contents = _read_contents(tar)
    scan = Scan([], array("q"), contents.unreadable, contents.counts["nameless"], contents.counts["hidden"])
    unreadable = {skipped.key for skipped in contents.unreadable}
    seen: dict[str, str] = {}
    for member_key, members in contents.samples.items():
        key, name = key_from_member(member_key), f"{tar}: {member_key}"
        field = _image_field(name, members, image)
        if field is None:
            if member_key in unreadable:  # already listed with a better reason
                continue
            lack = "no image" if image is None else f"no .{image}"
            scan.skipped.append(Skipped(key, name, f"{name} has {lack}, only {_fields(members)}"))
            continue
        if not is_key(key):
            scan.skipped.append(Skipped(key, name, f"{name[:200]}: its name makes no valid key: {KEY_RULE}"))
            continue
        if key in seen:
            raise DatasetError(
                f"{tar}: {seen[key]!r} and {member_key!r} are the same path and have the same key: rename one"
            )
        seen[key] = member_key
        scan.keys.append(key)
        scan.extents.extend((*members[field], *_label_extent(members, label)))
    return scan


def _label_extent(members: Mapping[str, Extent], label: str | None) -> Extent:
    none = (-1, 0)
    return members.get("cls", none) if label is None else members.get(label.lower(), members.get("json", none))


def _image_field(name: str, members: Mapping[str, Extent], image: str | None) -> str | None:
    if image is not None:
        return image.lower() if image.lower() in members else None
    fields = [field for field in members if f".{field}".endswith(IMAGE_EXTENSIONS)]
    fields = [field for field in fields if "." not in field] or fields  # `seg.png` next to `jpg` is not the image
    if len(fields) > 1:
        raise DatasetError(
            f"{name} has several images, {_fields(fields)}: choose one with image_column=, such as {min(fields)!r}"
        )
    return fields[0] if fields else None


def _fields(members: Mapping[str, Extent] | list[str]) -> str:
    return ", ".join(f".{field}" for field in sorted(members))


class _Contents(NamedTuple):
    """Files of a tar."""

    samples: dict[str, dict[str, Extent]]  # byte ranges of the members of every key, by field
    unreadable: list[Skipped]  # images that are not stored as plain files
    counts: Counter[str]  # counts of the files that belong to no sample: "nameless" and "hidden"


def _read_contents(tar: Path) -> _Contents:
    contents = _Contents({}, [], Counter())
    end = 0
    with open_regular(tar) as file:
        try:
            for member in _members(file):
                end = sum(member.extent) + -member.extent[1] % _BLOCK
                _add_member(contents, tar, member)
        except tarfile.TarError as error:
            _refuse_compressed(tar, read_at(file.fileno(), 6, 0))
            raise DatasetError(f"{tar} is not an uncompressed tar, or it is corrupt: {error}") from error
        # A tar ends with two empty blocks, but tarfile also stops at the end of the file and at corrupt headers.
        if read_at(file.fileno(), 2 * _BLOCK, end) != bytes(2 * _BLOCK):
            raise DatasetError(
                f"{tar} is truncated or corrupt at byte {end}: expected a member or two empty blocks there"
            )
    return contents


def _add_member(contents: _Contents, tar: Path, member: _Member) -> None:
    name, match = member.name, _MEMBER.match(member.name)
    if member.kind == "other" or _METADATA.match(name):
        return
    if is_clutter(name):
        contents.counts["hidden"] += 1
        return
    if match is None:
        contents.counts["nameless"] += 1
        return
    key, field = match[1], match[2].lower()
    extent: Extent | None = member.extent
    if member.kind == "hard link":  # points to an earlier member, which has the bytes
        target = _MEMBER.match(member.target)
        extent = contents.samples.get(target[1], {}).get(target[2].lower()) if target else None
    if member.kind in _UNREADABLE or extent is None:
        if f".{field}".endswith(IMAGE_EXTENSIONS):
            reason = _UNREADABLE.get(member.kind, "a hard link to a file that is not in the tar: write the tar again")
            contents.unreadable.append(Skipped(key, f"{tar}: {name}", f"{tar}: {name} is stored as {reason}"))
    elif contents.samples.setdefault(key, {}).setdefault(field, extent) != extent:
        raise DatasetError(f"{tar}: {name} is repeated: rename one of the members")


def _refuse_compressed(tar: Path, magic: bytes) -> None:
    for start, program in _COMPRESSED.items():
        if magic.startswith(start):
            raise DatasetError(f"{tar} is compressed by {program}: images are read in place, so decompress it first")


def _members(file: BinaryIO) -> Iterator[_Member]:
    """Yield the members of a tar.

    Plain headers are parsed here, six times as fast as in tarfile. From the first other header on, tarfile reads all of them.
    """
    offset = 0
    while plain := _plain_member(read_at(file.fileno(), _BLOCK, offset)):
        name, size = plain
        yield _Member(name, (offset + _BLOCK, size), "file")
        offset += _BLOCK + size + -size % _BLOCK
    file.seek(offset)
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as rest:
        for member in rest:
            if member.issparse():  # its data is shorter than its size, and tarfile knows the next offset
                yield _Member(member.name, (rest.offset, 0), "sparse")
            elif member.isfile():
                yield _Member(member.name, (member.offset_data, member.size), "file")
            else:
                kind = _LINKS.get(member.type, "other")
                yield _Member(member.name, (member.offset_data, 0), kind, member.linkname)


def _plain_member(header: bytes) -> tuple[str, int] | None:
    """Return the name and size of a regular file, or None for headers of links, long names and other extensions."""
    name = header[:100].partition(b"\0")[0].decode(errors="surrogateescape")
    regular = header[156:157] in (b"0", b"\0") and header[257:262] == b"ustar" and not name.endswith("/")
    if not regular or header[345:346] != b"\0":  # the rest of a long name is there
        return None
    try:
        size, checksum = int(header[124:136].rstrip(b"\0"), 8), int(header[148:156].split(b"\0")[0], 8)
    except ValueError:  # empty, or encoded otherwise, as for a file above 8 GiB
        return None
    return (name, size) if sum(header) - sum(header[148:156]) + 8 * ord(" ") == checksum else None
