"""Where images come from: an ImageFolder, WebDataset tars, or a Hugging Face dataset.

A source lists keys and class indices and reads the bytes of single images later, from any thread or forked process. Label
maps are built from one, and label-only shards are joined with one.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from array import array
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from ..errors import DatasetError
from ..naming import check_key
from ..shards.configs import SPLIT_ALIASES
from ..shards.formats import HEAD_BYTES, common_field
from ..shards.packed import PackedStrings
from ..storage.folders import local_path
from ..storage.hub_errors import HubItem, explaining_hub_errors
from ..storage.redaction import redact_path
from ..storage.regular_files import open_regular
from .folder_scan import read_image_file, scan_image_folder
from .hf_source import HFSource
from .keys import key_of, sample_keys
from .tar_source import WebDatasetSource

if TYPE_CHECKING:
    import datasets

T = TypeVar("T")


class ImageSource(Protocol):
    """Images with keys and class indices; all sequences are in the order of the source.

    A source may also have `skipped`, a sequence of `Skipped`: images that it found but cannot read. A build lists them in the
    manifest.
    """

    @property
    def classes(self) -> Sequence[str] | None:
        """Names by index; None if the source has only indices."""
        ...

    @property
    def keys(self) -> Sequence[str]:
        """Valid and unique sample keys, see `naming.is_key`."""
        ...

    @property
    def labels(self) -> Sequence[int]:
        """Class indices; -1 for images without class, which a build skips."""
        ...

    @property
    def extension(self) -> str:
        """Extension of the images in the shards, without dot, see `formats.common_field`."""
        ...

    @property
    def key_rule(self) -> str | None:
        """How keys come from file names, see `keys.key_of`; None if the source has its own."""
        ...

    def read(self, index: int) -> bytes:
        """Return the bytes of an image file; called from several threads."""
        ...

    def name(self, index: int) -> str:
        """Return what a message calls the image."""
        ...


def source_sha256(source: ImageSource) -> str:
    """Return a hash of the keys and labels of a source: a resumed build must have the same.

    Raises:
        DatasetError: A key is not valid.
    """
    digest = hashlib.sha256()
    for key, label in zip(source.keys, source.labels, strict=True):
        digest.update(f"{check_key(key, 'the images')}\t{label}\n".encode())
    return digest.hexdigest()


class ImageFolderSource:
    """The images of `<root>/<class>/**/<image>`, as torchvision's ImageFolder finds them.

    Images of all formats in `formats.IMAGE_EXTENSIONS` are found. One warning says how many other files are ignored.

    Args:
        root: The folder.
        key_rule: How keys come from file names, see `keys.key_of`; they may then not be unique. Default: the first rule
            by which they are.

    Raises:
        FileNotFoundError: There is no such folder, it has no class folders, or some of them contain no images.
        ValueError: Two images differ only by their extension.
    """

    def __init__(self, root: str | os.PathLike[str], key_rule: str | None = None) -> None:
        self._root = local_path(root, "an image folder")
        self.classes, files = scan_image_folder(self._root)
        paths = [file.path for file in files]
        self.labels: Sequence[int] = array("i", [file.label for file in files])
        if key_rule is None:
            self.key_rule, keys = sample_keys(paths)
        else:
            self.key_rule, keys = key_rule, [key_of(path, key_rule) for path in paths]
        self.keys: Sequence[str] = PackedStrings(keys)
        self._paths = PackedStrings(paths)

    @cached_property
    def extension(self) -> str:
        """Extension of the images in shards, see `formats.common_field`."""
        return common_field(len(self.keys), self._head)

    def _head(self, index: int) -> bytes | None:
        try:
            with open_regular(self._root / self._paths[index]) as file:
                return file.read(HEAD_BYTES)
        except (OSError, DatasetError):
            return None

    def read(self, index: int) -> bytes:
        """Return the bytes of an image file; called from several threads.

        Raises:
            OSError: The file cannot be read.
            ImageError: (a ValueError) The path is a folder, a device, a FIFO or a socket.
        """
        return read_image_file(self._root / self._paths[index])

    def name(self, index: int) -> str:
        """Return what a message calls the image."""
        return str(self._root / self._paths[index])


def open_source(
    images: str | os.PathLike[str],
    split: str = "train",
    *,
    key_rule: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImageSource:
    """Return the source for a path, by what is there.

    Args:
        images: An ImageFolder root; a tar, a glob of tars or a folder of tars; a folder that
            `datasets.Dataset.save_to_disk` wrote; or `hf:<name>` for `datasets.load_dataset(<name>)`.
        split: Split of a Hugging Face dataset. With `hf:<name>`, also an expression such as `train[:10%]`.
        key_rule: For an ImageFolder, see `ImageFolderSource`.
        image_column: Where the images of a Hugging Face dataset or of tars are, see `HFSource` and `WebDatasetSource`.
        label_column: Where their classes are.

    Raises:
        FileNotFoundError: There is nothing at the path.
        DatasetError: (a ValueError) A Hugging Face dataset has no such split.
        ValueError: Columns are given for an ImageFolder, whose classes are its folders.
    """
    text = os.fspath(images)
    if text.startswith("hf:"):
        import datasets  # heavy

        with explaining_hub_errors(HubItem(redact_path(text[3:]), kind="images")):
            loaded = datasets.load_dataset(text[3:], split=split)
        return HFSource(loaded, image_column, label_column)
    path = local_path(text, "the images")
    text = str(path)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return HFSource(_load_saved(path, split), image_column, label_column)
    tars = sorted(glob.glob(str(path / "*.tar") if path.is_dir() else text))  # noqa: PTH207  the pattern may be absolute
    if tars and not Path(tars[0]).is_dir():
        return WebDatasetSource(tars, image_column=image_column, label_column=label_column)
    if image_column is not None or label_column is not None:
        raise ValueError(
            f"image_column= and label_column= (--image-column, --label-column) are for Hugging Face datasets and tars; {path} "
            "is read as an ImageFolder, whose classes are its folders"
        )
    return ImageFolderSource(path, key_rule)


def _load_saved(path: Path, split: str) -> datasets.Dataset:
    """Return what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    import datasets  # heavy

    splits = path / "dataset_dict.json"
    if splits.is_file():
        try:
            names = list(map(str, json.loads(splits.read_bytes())["splits"]))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DatasetError(f"{splits} is not what DatasetDict.save_to_disk writes: {error!r}") from None
        path = path / pick_split({name: name for name in names}, split, str(path))
    try:
        return datasets.load_from_disk(str(path))
    except IndexError:  # `datasets` saves a split without rows as no files, which it cannot load
        raise DatasetError(f"{path} has no rows") from None


def pick_split(splits: Mapping[str, T], split: str, where: str) -> T:
    """Return a split of a Hugging Face dataset; "val" and "validation" are the same.

    Raises:
        DatasetError: There is no split of this name.
    """
    for name in (split, *SPLIT_ALIASES.get(split, ())):
        if name in splits:
            return splits[name]
    raise DatasetError(f"{where} has no split {split!r}, only {sorted(splits)}")
