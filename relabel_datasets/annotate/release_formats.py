"""Recognize the format of a release of soft labels by its files."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

from ..errors import DatasetError, LabelMapError
from ..storage.folders import local_path
from .crop_files import MAX_BYTES
from .published import FORMATS
from .published_crops import CONFIG_NAME, LAYOUTS
from .torch_files import load_torch_file

_NUM_SEEN = 100  # files after which a format is recognized or not
_MAP_SUFFIX = ".pt"
_KNOWN = "<class>/<name>.pt of ReLabel or TokenLabeling, <class>/<name>.tar of FKD, or <index>.pth.tar of ImageNet+"


def find_format(source: str | os.PathLike[str]) -> str:
    """Return the format of a release.

    Args:
        source: Folder or uncompressed tar of the release.

    Returns:
        `"relabel"`, `"tokenlabeling"`, `"fkd"` (also for FerKD) or `"imagenet-plus"`.

    Raises:
        FileNotFoundError: The release does not exist.
        DatasetError: The files are not those of a known release, or the tar is compressed or damaged.
        LabelMapError: The first label map is damaged.
    """
    root = local_path(source, "the release")
    if not root.exists():
        raise FileNotFoundError(f"no release of soft labels at {root}: expected {_KNOWN}, in a folder or a tar")
    files = _files_in_tar(root) if root.is_file() else _files_in_folder(root)
    for name, read in islice(files, _NUM_SEEN):
        if name.endswith(LAYOUTS["imagenet-plus"].suffix) and (name == CONFIG_NAME or name.split(".")[0].isdecimal()):
            return "imagenet-plus"
        if name.endswith(LAYOUTS["fkd"].suffix):
            return "fkd"
        if name.endswith(_MAP_SUFFIX):
            return _map_format(f"{root}: {name}", read)
    raise DatasetError(f"{root} has no files of a known release: expected {_KNOWN}")


def _map_format(name: str, data: bytes) -> str:
    """Return the format of label maps by the type of their numbers."""
    try:
        tensor = load_torch_file(data, MAX_BYTES)
    except LabelMapError as error:
        raise LabelMapError(f"{name}: {error}") from error
    dtype = tensor.dtype if isinstance(tensor, torch.Tensor) else None
    found = [name for name, known in FORMATS.items() if known.dtype == dtype]
    if not found:
        raise LabelMapError(f"{name}: expected a tensor in float32 or float16, got {dtype or type(tensor).__name__}")
    return found[0]


def _files_in_folder(root: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the names and the first bytes of files, those of the root first. Links to other folders are not followed."""
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            if name.startswith(".") or not path.is_file():
                continue
            with path.open("rb") as file:
                yield name, file.read(MAX_BYTES) if name.endswith(_MAP_SUFFIX) else b""


def _files_in_tar(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as tar:
            while (member := tar.next()) is not None:
                name = member.name.rpartition("/")[2]
                content = tar.extractfile(member) if member.isreg() and not name.startswith(".") else None
                if content is not None:
                    yield name, content.read(MAX_BYTES) if name.endswith(_MAP_SUFFIX) else b""
    except tarfile.TarError as error:
        raise DatasetError(
            f"{path} is damaged or not an uncompressed tar: {error}. Decompress a .tar.gz first: files are read by offset"
        ) from error
