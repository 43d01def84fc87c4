"""Files of a release of soft labels, in a folder or an uncompressed tar. Files in a tar are read by offset."""

from __future__ import annotations

import os
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..errors import DatasetError, LabelMapError
from ..shards.packed import PackedStrings
from ..storage.folders import local_path

_BLOCK_BYTES = 512  # of a tar


class Layout(NamedTuple):
    """Layout of a release.

    Attributes:
        noun: Name for the content of a file in messages.
        pattern: Path of each file in the release, such as `"<class>/<name>.pt"`.
        max_bytes: Largest size of a file in bytes.
    """

    noun: str
    pattern: str
    max_bytes: int

    @property
    def suffix(self) -> str:
        """End of each file name."""
        return self.pattern.rpartition(">")[2]

    @property
    def depth(self) -> int:
        """Number of components of each path."""
        return len(self.pattern.split("/"))

    def matches(self, name: str) -> bool:
        """Return whether a file of this name belongs to the release. macOS adds a file `._name` for each."""
        return name.endswith(self.suffix) and not name.startswith(".")


class _File(NamedTuple):
    path: str  # with forward slashes, in the folder or the tar
    offset: int = 0  # in the tar, in bytes
    size: int = 0  # in the tar, in bytes


class ReleaseFiles:
    """Files of a release, sorted by path. Other files are ignored.

    Args:
        source: Folder of the files, or uncompressed tar of them, optionally below one common folder.
        layout: Layout of the release.

    Attributes:
        paths: Paths in the folder or the tar, with forward slashes.

    Raises:
        FileNotFoundError: The folder or tar does not exist or has no such files.
        DatasetError: The tar is compressed or truncated, or contains links or paths that lead out of it.
    """

    def __init__(self, source: str | os.PathLike[str], layout: Layout) -> None:
        self._root, self._layout = local_path(source, f"the source of {layout.noun}s"), layout
        self._is_tar = self._root.is_file()
        listed = _list_tar(self._root, layout) if self._is_tar else _list_folder(self._root, layout)
        files = sorted(listed, key=lambda file: file.path.split("/"))
        if not files:
            raise FileNotFoundError(f"{self._root} has no {layout.noun}s: expected {layout.pattern}")
        self.paths: Sequence[str] = PackedStrings(file.path for file in files)
        self._extents = array("q", (number for file in files for number in (file.offset, file.size)))

    def __len__(self) -> int:
        return len(self.paths)

    def __str__(self) -> str:
        return str(self._root)

    def name(self, index: int) -> str:
        """Return the path of a file for messages: its path, or the path of the tar and its name there."""
        return f"{self._root}{': ' if self._is_tar else '/'}{self.paths[index]}"

    def read(self, index: int) -> bytes:
        """Read the bytes of a file. Thread-safe.

        Raises:
            OSError: The file cannot be read.
            LabelMapError: The file is larger than any file of the release, or not a regular file.
        """
        path = self._root if self._is_tar else self._root / self.paths[index]
        if not path.is_file():  # opening a pipe would block
            raise LabelMapError(f"{self.name(index)} is not a regular file")
        with path.open("rb") as file:
            offset, size = self._extents[2 * index : 2 * index + 2]
            if not self._is_tar:
                size = os.fstat(file.fileno()).st_size
            if size > self._layout.max_bytes:
                raise LabelMapError(
                    f"{self.name(index)} has {size} bytes, but a {self._layout.noun} has at most "
                    f"{self._layout.max_bytes} bytes"
                )
            file.seek(offset)
            return file.read(size)


def _list_folder(root: Path, layout: Layout) -> Iterator[_File]:
    if not root.is_dir():
        raise FileNotFoundError(
            f"no {layout.noun}s at {root}: expected a folder of {layout.pattern}, or a tar of these"
        )
    parents = [""] if layout.depth == 1 else [f"{folder.name}/" for folder in os.scandir(root) if folder.is_dir()]
    for parent in parents:
        for name in os.listdir(root / parent):  # noqa: PTH208  a million Path objects take a minute
            if layout.matches(name):
                yield _File(parent + name)


def _list_tar(path: Path, layout: Layout) -> Iterator[_File]:
    """Yield the positions of the files in a tar. Nothing is extracted, so no name can lead out of a folder."""
    top: Sequence[str] | None = None
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps a kilobyte per member
                parts = PurePosixPath(member.name).parts
                if member.isdir() or not layout.matches(parts[-1] if parts else ""):
                    continue
                _check_member(path, member, parts, layout)
                top = parts[: -layout.depth] if top is None else top
                if parts[: -layout.depth] != top:
                    raise DatasetError(
                        f"{path}: {member.name} is not below the same folder as the {layout.noun}s before it"
                    )
                yield _File("/".join(parts), member.offset_data, member.size)
            end = tar.offset
    except tarfile.TarError as error:
        raise DatasetError(
            f"{path} is damaged or not an uncompressed tar: {error}. Decompress a .tar.gz first: files are read by offset"
        ) from error
    with path.open("rb") as file:
        file.seek(end)
        # tarfile treats a truncated file or a damaged header as the end.
        if file.read(2 * _BLOCK_BYTES) != bytes(2 * _BLOCK_BYTES):
            raise DatasetError(f"{path} is truncated or damaged at byte {end}: expected a file or two empty blocks")


def _check_member(path: Path, member: tarfile.TarInfo, parts: Sequence[str], layout: Layout) -> None:
    if not member.isreg() or member.sparse is not None:
        raise DatasetError(f"{path}: {member.name} is a link or a special file, which no release of {layout.noun}s has")
    if member.name.startswith("/") or ".." in parts or len(parts) < layout.depth:
        raise DatasetError(f"{path}: {member.name!r} must be a path {layout.pattern} within the tar")
