"""Label map files as published by ReLabel and TokenLabeling. Files are untrusted and fully validated.

Both releases have one file `<class>/<image>.pt` per image. It stores a tensor `[2, K, H, W]`: the scores (logits) of the K best
classes at each location, then the indices of these classes. The score of other classes at a location is 0.
Shapes: K classes per location, C classes in total, H x W locations, or W x H.

Neither release documents which of the last two axes is the height. The training code of both passes (top, left) to RoIAlign,
which expects x first. This is correct for `[2, K, W, H]`, but TokenLabeling's generate_label.py writes `[2, K, H, W]`. That
script also annotates the center crop of timm's evaluation transform, while the training code assumes maps of whole images.

Reference: utils/relabel_functions.py of naver-ai/relabel_imagenet; generate_label.py and tlt/data/mixup.py of
zihangJiang/TokenLabeling.
"""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.keys import key_of
from ..errors import DatasetError, LabelMapError
from ..shards.packed import PackedStrings
from ..storage.folders import local_path
from ..words import counted
from .classes import is_synset

MAX_BYTES = 1 << 20  # per file, packed and unpacked; published files have 7 to 14 KB
_MAX_SCORE = float(np.finfo(np.float16).max)  # limit of our encodings
_BLOCK_BYTES = 512  # of a tar


class Format(NamedTuple):
    """File format of a release.

    Attributes:
        dtype: Type of scores and class indices.
        max_classes: Number of class indices that this floating-point type represents exactly.
        reference: URL of the release.
    """

    dtype: torch.dtype
    max_classes: int
    reference: str


FORMATS = {
    "relabel": Format(torch.float32, 1 << 24, "https://github.com/naver-ai/relabel_imagenet"),
    "tokenlabeling": Format(torch.float16, 1 << 11, "https://github.com/zihangJiang/TokenLabeling"),
}


class _MapFile(NamedTuple):
    name: str  # with forward slashes, in the folder or the tar
    offset: int = 0  # in the tar, in bytes
    size: int = 0  # in the tar, in bytes


class PublishedMaps:
    """Label map files of a release in a folder or a tar, sorted by name.

    Files in a tar are read by offset. Only tensors are unpickled, so no code in a file is ever executed. Implements the
    `ImageSource` protocol for `.pt` files instead of images.

    Args:
        source: Folder of `<class>/<name>.pt`, or uncompressed tar of these, optionally below one common folder. Other files are
            ignored.
        source_format: Format of the release: `"relabel"` (float32) or `"tokenlabeling"` (float16).
        classes: Names of the class folders in the order of the class indices. Default: the 1000 synsets of ImageNet-1k if all
            folders are synsets, else the sorted names of the folders.

    Attributes:
        classes: Names of the C classes by index.
        keys: Stems of the files, which match those of the images.
        labels: Class index of the folder of each file.
        num_classes: Number C of classes.

    Raises:
        FileNotFoundError: The folder or tar does not exist or has no `.pt` files.
        DatasetError: The tar is compressed, truncated, or contains links or paths that lead out of it, or two files have the
            same stem.
        ValueError: The format is unknown, a folder is not a class, or the format cannot represent that many classes.

    Example:
        >>> maps = PublishedMaps("relabel_imagenet.tar", "relabel")
        >>> logits, classes = maps.load(0)  # [5, 15, 15] each
    """

    key_rule = "stem"
    extension = "pt"

    def __init__(
        self, source: str | os.PathLike[str], source_format: str, classes: Sequence[str] | None = None
    ) -> None:
        if source_format not in FORMATS:
            raise ValueError(f"source_format must be one of {sorted(FORMATS)}, got {source_format!r}")
        self.format = source_format
        self._root = local_path(source, "the source of label maps")
        self._is_tar = self._root.is_file()
        listed = _list_tar(self._root) if self._is_tar else _list_folder(self._root)
        files = sorted(listed, key=lambda file: file.name.split("/"))
        if not files:
            raise FileNotFoundError(f"{self._root} has no label maps: expected <class>/<name>.pt")
        folders = [file.name.split("/")[-2] for file in files]
        self.classes = _classes(self._root, sorted(set(folders)), classes)
        self.num_classes = len(self.classes)
        if self.num_classes > FORMATS[source_format].max_classes:
            raise ValueError(
                f"format {source_format!r} stores class indices as {FORMATS[source_format].dtype}, which can represent "
                f"{FORMATS[source_format].max_classes} classes, not {self.num_classes}"
            )
        index = {name: i for i, name in enumerate(self.classes)}
        self.labels: Sequence[int] = array("q", (index[folder] for folder in folders))
        keys = [key_of(file.name, self.key_rule) for file in files]
        if len(set(keys)) != len(keys):
            key, count = Counter(keys).most_common(1)[0]
            raise DatasetError(f"{self._root}: {count} label maps have the key {key!r}: file names must be unique")
        self.keys: Sequence[str] = PackedStrings(keys)
        self._names = PackedStrings(file.name for file in files)
        self._extents = array("q", (number for file in files for number in (file.offset, file.size)))

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, index: int) -> str:
        """Return the path of a file for messages.

        Args:
            index: Index of the file.

        Returns:
            Path of the file, or path of the tar and name of the file in it.
        """
        return f"{self._root}{': ' if self._is_tar else '/'}{self._names[index]}"

    def read(self, index: int) -> bytes:
        """Read the bytes of a file. Thread-safe.

        Args:
            index: Index of the file.

        Returns:
            Content of the file.

        Raises:
            OSError: The file cannot be read.
            LabelMapError: The file is larger than any label map, or not a regular file.
        """
        path = self._root if self._is_tar else self._root / self._names[index]
        if not path.is_file():  # opening a pipe would block
            raise LabelMapError(f"{self.name(index)} is not a regular file")
        with path.open("rb") as file:
            offset, size = self._extents[2 * index : 2 * index + 2]
            if not self._is_tar:
                size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise LabelMapError(
                    f"{self.name(index)} has {size} bytes, but a label map has at most {MAX_BYTES} bytes"
                )
            file.seek(offset)
            return file.read(size)

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        """Read the label map of a file.

        Args:
            index: Index of the file.

        Returns:
            Logits, float32, and classes, int64, both `[K, H, W]` or `[K, W, H]` as in the file.

        Raises:
            OSError: The file cannot be read.
            LabelMapError: The file is damaged or not a label map of this format.
        """
        data = self.read(index)
        try:
            return parse_map(data, FORMATS[self.format].dtype, self.num_classes)
        except LabelMapError as error:
            raise LabelMapError(f"{self.name(index)}: {error}") from error


def parse_map(data: bytes, dtype: torch.dtype, num_classes: int) -> tuple[Tensor, Tensor]:
    """Parse and validate the bytes of a published file.

    Args:
        data: Bytes written by `torch.save`.
        dtype: Expected type of the tensor.
        num_classes: Number C of classes.

    Returns:
        Logits, float32 `[K, H, W]`, and classes, int64 `[K, H, W]`.

    Raises:
        LabelMapError: The bytes are not such a tensor, or its values are out of range.
    """
    tensor = _load_tensor(data)
    if tensor.dtype != dtype or tensor.ndim != 4 or tensor.shape[0] != 2 or 0 in tensor.shape:
        raise LabelMapError(f"expected {dtype} [2, K, H, W], got {tensor.dtype} {list(tensor.shape)}")
    if tensor.nbytes > min(MAX_BYTES, tensor.untyped_storage().nbytes()):
        raise LabelMapError(f"claims to be {list(tensor.shape)}, but stores less")  # such as a broadcast number
    scores, indices = tensor.numpy()
    if not np.isfinite(scores).all() or np.abs(scores).max() > _MAX_SCORE:
        raise LabelMapError(f"scores must be finite and within float16's +-{_MAX_SCORE:.0f}")
    if not (np.isfinite(indices).all() and (indices == np.floor(indices)).all()):
        raise LabelMapError("class indices must be whole numbers")
    if indices.min() < 0 or indices.max() >= num_classes:
        raise LabelMapError(
            f"class indices must be in 0 .. {num_classes - 1}, got {indices.min():.0f} .. {indices.max():.0f}"
        )
    if (np.diff(np.sort(indices, axis=0), axis=0) == 0).any():
        raise LabelMapError("a class is repeated at one location")
    return torch.from_numpy(scores.astype(np.float32)), torch.from_numpy(indices.astype(np.int64))


def _load_tensor(data: bytes) -> Tensor:
    """Load the tensor of a torch file in the zip or legacy format, without executing pickled code."""
    try:
        if data[:2] == b"PK":
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                unpacked = sum(info.file_size for info in archive.infolist())
            if unpacked > MAX_BYTES:  # torch would unpack it into memory
                raise LabelMapError(f"unpacks to {unpacked} bytes, but a label map has at most {MAX_BYTES} bytes")
        loaded: object = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except LabelMapError:
        raise
    except pickle.UnpicklingError as error:  # the message of torch recommends to execute the code
        raise LabelMapError("is damaged, or contains objects other than a tensor; no code was executed") from error
    except Exception as error:  # damaged files raise nearly any error
        reason = str(error).partition("\n")[0][:200]
        raise LabelMapError(f"is damaged and cannot be read: {type(error).__name__}: {reason}") from error
    if type(loaded) is not Tensor or loaded.layout != torch.strided or loaded.is_meta:
        got = loaded.layout if type(loaded) is Tensor else type(loaded).__name__
        raise LabelMapError(f"expected a dense tensor, got {got}")
    return loaded


def _classes(root: Path, folders: Sequence[str], classes: Sequence[str] | None) -> tuple[str, ...]:
    if classes is None and all(map(is_synset, folders)):
        from timm.data.imagenet_info import ImageNetInfo  # slow import

        classes = ImageNetInfo().label_names()  # type: ignore[no-untyped-call]
    known = tuple(folders if classes is None else classes)
    if len(known) < 2 or len(set(known)) != len(known):
        raise ValueError(f"{root}: expected at least two classes with distinct names, got {_examples(known)}")
    if unknown := sorted(set(folders) - set(known)):
        raise ValueError(
            f"{root}: {counted(len(unknown), 'folder')} not among the {len(known)} classes, such as {_examples(unknown)}: list "
            "the names of all class folders in classes=, in the order of the class indices"
        )
    return known


def _examples(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3]))


def _list_folder(root: Path) -> Iterator[_MapFile]:
    if not root.is_dir():
        raise FileNotFoundError(f"no label maps at {root}: expected a folder of <class>/<name>.pt, or a tar of these")
    for folder in os.scandir(root):
        if folder.is_dir():
            for name in os.listdir(folder.path):  # noqa: PTH208  a million Path objects take a minute
                if _is_map(name):
                    yield _MapFile(f"{folder.name}/{name}")


def _is_map(name: str) -> bool:
    return name.endswith(".pt") and not name.startswith(".")  # macOS adds a file ._name for each


def _list_tar(path: Path) -> Iterator[_MapFile]:
    """Yield the positions of the label maps in a tar. Nothing is extracted, so no name can lead out of a folder."""
    parent: Sequence[str] | None = None
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps a kilobyte per member
                parts = PurePosixPath(member.name).parts
                if member.isdir() or not _is_map(parts[-1] if parts else ""):
                    continue
                _check_member(path, member, parts)
                parent = parts[:-2] if parent is None else parent
                if parts[:-2] != parent:
                    raise DatasetError(
                        f"{path}: {member.name} is not below the same folder as the label maps before it"
                    )
                yield _MapFile("/".join(parts), member.offset_data, member.size)
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


def _check_member(path: Path, member: tarfile.TarInfo, parts: Sequence[str]) -> None:
    if not member.isreg() or member.sparse is not None:
        raise DatasetError(f"{path}: {member.name} is a link or a special file, which no release of label maps has")
    if member.name.startswith("/") or ".." in parts or len(parts) < 2:
        raise DatasetError(f"{path}: {member.name!r} must be a path <class>/<name>.pt within the tar")
