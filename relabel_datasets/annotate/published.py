"""Label map files as ReLabel and TokenLabeling publish them: listed once, read one by one, and nothing in them believed.

Both releases hold `<class>/<image>.pt` for each image: a tensor `[2, K, H, W]`, the scores (logits) of the K best
classes at each location in [0], and these classes' indices in [1]. A class without a score at a location counts as 0.
Shapes: K classes a location, C classes in all, H x W locations, or W x H.

Which of the last two axes is the height, neither release says. The training code of both gives RoIAlign (top, left), where
it takes x first, which is right for `[2, K, W, H]`; TokenLabeling's generate_label.py writes `[2, K, H, W]`. That script
also annotates the middle crop of timm's evaluation transform, while the training code takes its maps for whole images.

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
from .classes import _is_synset

MAX_BYTES = 1 << 20  # of one file, also when unpacked; published ones have 7 to 14 KB
_MAX_SCORE = float(np.finfo(np.float16).max)  # what label maps can store
_BLOCK = 512


class Format(NamedTuple):
    """How a release stores its label maps."""

    dtype: torch.dtype  # of scores and class indices
    max_classes: int  # class indices are floats: from here on, two may have become one
    reference: str


FORMATS = {
    "relabel": Format(torch.float32, 1 << 24, "https://github.com/naver-ai/relabel_imagenet"),
    "tokenlabeling": Format(torch.float16, 1 << 11, "https://github.com/zihangJiang/TokenLabeling"),
}


class _Member(NamedTuple):
    name: str  # with forward slashes, in the folder or the tar
    offset: int = 0  # in the tar, in bytes
    size: int = 0


class PublishedMaps:
    """The files of a release of label maps, in the order of their names, whether in a folder or a tar.

    Files are read by offset from the tar, and only as tensors: no pickled code is ever run. It has what an `ImageSource`
    has, of `.pt` files instead of images.

    Args:
        source: a folder of `<class>/<name>.pt`, or an uncompressed tar of these, below one folder or none. Other files
            are left alone.
        source_format: `"relabel"` (float32) or `"tokenlabeling"` (float16).
        classes: the names of the classes' folders, in the order of the files' class indices. Default: ImageNet-1k's
            1000 synsets in their order if the folders are some of these, else the folders' names, sorted.

    Attributes:
        classes: the C classes' names by index.
        keys: the files' stems, by which images are found.
        labels: index of each file's folder among the classes.
        num_classes: C.

    Raises:
        FileNotFoundError: there is no such folder or tar, or no `.pt` file in it.
        DatasetError: (a ValueError) the tar is compressed, cut off, or holds links or names that lead out of it; or two
            files have the same stem.
        ValueError: an unknown format, a folder that is no class, or more classes than the format can tell apart.

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
        listed = _tar_members(self._root) if self._is_tar else _folder_members(self._root)
        members = sorted(listed, key=lambda member: member.name.split("/"))
        if not members:
            raise FileNotFoundError(f"{self._root} holds no label maps: expected <class>/<name>.pt")
        folders = [member.name.split("/")[-2] for member in members]
        self.classes = _classes(self._root, sorted(set(folders)), classes)
        self.num_classes = len(self.classes)
        if self.num_classes > FORMATS[source_format].max_classes:
            raise ValueError(
                f"format {source_format!r} stores class indices as {FORMATS[source_format].dtype}, which can tell "
                f"{FORMATS[source_format].max_classes} classes apart, not {self.num_classes}"
            )
        index = {name: i for i, name in enumerate(self.classes)}
        self.labels: Sequence[int] = array("q", (index[folder] for folder in folders))
        keys = [key_of(member.name, self.key_rule) for member in members]
        if len(set(keys)) != len(keys):
            key, count = Counter(keys).most_common(1)[0]
            raise DatasetError(f"{self._root}: {count} label maps have the key {key!r}: file names must be unique")
        self.keys: Sequence[str] = PackedStrings(keys)
        self._names = PackedStrings(member.name for member in members)
        self._extents = array("q", (number for member in members for number in (member.offset, member.size)))

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, index: int) -> str:
        """Return what a message calls the file."""
        return f"{self._root}{': ' if self._is_tar else '/'}{self._names[index]}"

    def read(self, index: int) -> bytes:
        """Return a file's bytes; called from several threads.

        Raises:
            OSError: it cannot be read.
            LabelMapError: (a ValueError) it is larger than any label map, or no plain file.
        """
        path = self._root if self._is_tar else self._root / self._names[index]
        if not path.is_file():  # opening a pipe would wait for ever
            raise LabelMapError(f"{self.name(index)} is not a file")
        with path.open("rb") as file:
            offset, size = self._extents[2 * index : 2 * index + 2]
            if not self._is_tar:
                size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise LabelMapError(f"{self.name(index)} has {size} bytes: no label map has more than {MAX_BYTES}")
            file.seek(offset)
            return file.read(size)

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        """Return float32 logits and int64 classes of a file, `[K, H, W]`, with the axes as they are in the file.

        Raises:
            OSError: it cannot be read.
            LabelMapError: (a ValueError) it is not a label map of this format; the message names the file and says why.
        """
        data = self.read(index)
        try:
            return parse_map(data, FORMATS[self.format].dtype, self.num_classes)
        except LabelMapError as error:
            raise LabelMapError(f"{self.name(index)}: {error}") from error


def parse_map(data: bytes, dtype: torch.dtype, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return float32 logits and int64 classes, `[K, H, W]`, of the bytes of a published file.

    Args:
        data: what `torch.save` wrote.
        dtype: of the tensor in it.
        num_classes: C.

    Raises:
        LabelMapError: the bytes are not such a tensor, or its values are no label map's.
    """
    tensor = _load_tensor(data)
    if tensor.dtype != dtype or tensor.ndim != 4 or tensor.shape[0] != 2 or 0 in tensor.shape:
        raise LabelMapError(f"expected {dtype} [2, K, H, W], got {tensor.dtype} {list(tensor.shape)}")
    if tensor.nbytes > min(MAX_BYTES, tensor.untyped_storage().nbytes()):
        raise LabelMapError(f"claims to be {list(tensor.shape)}, but holds less")  # one number shown many times
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
        raise LabelMapError("a class stands twice at one location")
    return torch.from_numpy(scores.astype(np.float32)), torch.from_numpy(indices.astype(np.int64))


def _load_tensor(data: bytes) -> Tensor:
    """Return the tensor in a file of torch, of the present (zip) or the earlier kind, without running what is pickled."""
    try:
        if data[:2] == b"PK":
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                unpacked = sum(info.file_size for info in archive.infolist())
            if unpacked > MAX_BYTES:  # torch would unpack it into memory
                raise LabelMapError(f"unpacks to {unpacked} bytes: no label map has more than {MAX_BYTES}")
        loaded: object = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except LabelMapError:
        raise
    except pickle.UnpicklingError as error:  # its own message advises to run the code
        raise LabelMapError("is damaged, or holds other objects than a tensor; nothing of it was run") from error
    except Exception as error:  # damaged files raise nearly anything
        reason = str(error).partition("\n")[0][:200]
        raise LabelMapError(f"cannot be read, it is damaged: {type(error).__name__}: {reason}") from error
    if type(loaded) is not Tensor or loaded.layout != torch.strided or loaded.is_meta:
        got = loaded.layout if type(loaded) is Tensor else type(loaded).__name__
        raise LabelMapError(f"expected a tensor with all its values, got {got}")
    return loaded


def _classes(root: Path, folders: Sequence[str], classes: Sequence[str] | None) -> tuple[str, ...]:
    if classes is None and all(map(_is_synset, folders)):
        from timm.data.imagenet_info import ImageNetInfo  # timm takes seconds to import

        classes = ImageNetInfo().label_names()  # type: ignore[no-untyped-call]
    known = tuple(folders if classes is None else classes)
    if len(known) < 2 or len(set(known)) != len(known):
        raise ValueError(f"{root}: there must be two classes at least, each named once, got {_some(known)}")
    if unknown := sorted(set(folders) - set(known)):
        raise ValueError(
            f"{root}: {len(unknown)} folders are none of the {len(known)} classes, such as {_some(unknown)}: name the "
            "classes in the order of the files' class indices"
        )
    return known


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3]))


def _folder_members(root: Path) -> Iterator[_Member]:
    if not root.is_dir():
        raise FileNotFoundError(f"no label maps at {root}: expected a folder of <class>/<name>.pt, or a tar of these")
    for folder in os.scandir(root):
        if folder.is_dir():
            for name in os.listdir(folder.path):  # noqa: PTH208  a Path for each of a million names takes a minute
                if _is_map(name):
                    yield _Member(f"{folder.name}/{name}")


def _is_map(name: str) -> bool:
    return name.endswith(".pt") and not name.startswith(".")  # macOS puts a ._name beside each


def _tar_members(path: Path) -> Iterator[_Member]:
    """Yield where the label maps are in a tar; nothing is unpacked, so no name can lead anywhere."""
    above: Sequence[str] | None = None
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps a kilobyte for each
                parts = PurePosixPath(member.name).parts
                if member.isdir() or not _is_map(parts[-1] if parts else ""):
                    continue
                _check_member(path, member, parts)
                above = parts[:-2] if above is None else above
                if parts[:-2] != above:
                    raise DatasetError(
                        f"{path}: {member.name} is not below the same folder as the label maps before it"
                    )
                yield _Member("/".join(parts), member.offset_data, member.size)
            end = tar.offset
    except tarfile.TarError as error:
        raise DatasetError(
            f"{path} is no uncompressed tar, or damaged: {error}. Decompress a .tar.gz first: files are read by offset"
        ) from error
    with path.open("rb") as file:
        file.seek(end)
        if file.read(2 * _BLOCK) != bytes(2 * _BLOCK):  # tarfile takes a cut, or a damaged header, for the end
            raise DatasetError(
                f"{path} is cut off or damaged at byte {end}: a file or two empty blocks should be there"
            )


def _check_member(path: Path, member: tarfile.TarInfo, parts: Sequence[str]) -> None:
    if not member.isreg() or member.sparse is not None:
        raise DatasetError(f"{path}: {member.name} is a link or a special file: a release of label maps has none")
    if member.name.startswith("/") or ".." in parts or len(parts) < 2:
        raise DatasetError(f"{path}: {member.name!r} must be a path <class>/<name>.pt within the tar")
