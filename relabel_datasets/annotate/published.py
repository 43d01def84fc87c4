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

import os
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
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
from .release_files import Layout, ReleaseFiles
from .torch_files import load_torch_file

MAX_BYTES = 1 << 20  # per file, packed and unpacked; published files have 7 to 14 KB
_MAX_SCORE = float(np.finfo(np.float16).max)  # limit of our encodings
_LAYOUT = Layout("label map", "<class>/<name>.pt", MAX_BYTES)


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
        root, self._files = local_path(source, "the source of label maps"), ReleaseFiles(source, _LAYOUT)
        folders = [path.split("/")[-2] for path in self._files.paths]
        self.classes = class_names(root, sorted(set(folders)), classes)
        self.num_classes = len(self.classes)
        if self.num_classes > FORMATS[source_format].max_classes:
            raise ValueError(
                f"format {source_format!r} stores class indices as {FORMATS[source_format].dtype}, which can represent "
                f"{FORMATS[source_format].max_classes} classes, not {self.num_classes}"
            )
        index = {name: i for i, name in enumerate(self.classes)}
        self.labels: Sequence[int] = array("q", (index[folder] for folder in folders))
        keys = [key_of(path, self.key_rule) for path in self._files.paths]
        if len(set(keys)) != len(keys):
            key, count = Counter(keys).most_common(1)[0]
            raise DatasetError(f"{root}: {count} label maps have the key {key!r}: file names must be unique")
        self.keys: Sequence[str] = PackedStrings(keys)

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, index: int) -> str:
        """Return the path of a file for messages.

        Args:
            index: Index of the file.

        Returns:
            Path of the file, or path of the tar and name of the file in it.
        """
        return self._files.name(index)

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
        return self._files.read(index)

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
    loaded = load_torch_file(data, MAX_BYTES)
    if type(loaded) is not Tensor or loaded.layout != torch.strided or loaded.is_meta:
        got = loaded.layout if type(loaded) is Tensor else type(loaded).__name__
        raise LabelMapError(f"expected a dense tensor, got {got}")
    return loaded


def class_names(root: Path, folders: Sequence[str], classes: Sequence[str] | None) -> tuple[str, ...]:
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
