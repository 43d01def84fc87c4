"""Image sources: an ImageFolder, WebDataset tars, or a Hugging Face dataset.

A source lists keys and class indices, and reads the bytes of single images in any thread or forked process. Builds read their
images from a source, and label-only shards are joined with one.
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
from ..keywords import checked_keywords
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
    """Images with keys and class indices. All sequences are in the order of the source.

    A source may also have the attribute `skipped`, a sequence of `Skipped` with the images that it cannot read. A build lists
    them in the manifest.
    """

    @property
    def classes(self) -> Sequence[str] | None:
        """Class names by index, or None if the source has only indices."""
        ...

    @property
    def keys(self) -> Sequence[str]:
        """Sample keys, valid (see `naming.is_key`) and unique."""
        ...

    @property
    def labels(self) -> Sequence[int]:
        """Class indices, -1 for images without a class, which a build skips."""
        ...

    @property
    def extension(self) -> str:
        """Extension of the images in the shards, without a dot, see `formats.common_field`."""
        ...

    @property
    def key_rule(self) -> str | None:
        """Rule from file name to key, see `keys.key_of`, or None if keys do not come from file names."""
        ...

    def read(self, index: int) -> bytes:
        """Return the bytes of an image file. Must be thread-safe."""
        ...

    def name(self, index: int) -> str:
        """Return the name of an image for messages."""
        ...


def source_sha256(source: ImageSource) -> str:
    """Return a hash of the keys and labels of a source, which must not change when a build is resumed.

    Raises:
        DatasetError: A key is not valid.
    """
    digest = hashlib.sha256()
    for key, label in zip(source.keys, source.labels, strict=True):
        digest.update(f"{check_key(key, 'the images')}\t{label}\n".encode())
    return digest.hexdigest()


class ImageFolderSource:
    """Images in `<path>/<class>/**/<image>`, in the order of torchvision's ImageFolder.

    Images of all formats in `formats.IMAGE_EXTENSIONS` are found. One warning counts the other files.

    Args:
        path: Folder with one folder per class.
        key_rule: Rule from file name to key: `"stem"` or `"path"`, see `keys.key_of`. With a given rule, keys may be repeated.
            Default: The first rule by which all keys are unique.

    Attributes:
        path: The folder.
        classes: Class names, by index.
        keys: Sample keys.
        labels: Class indices.

    Raises:
        FileNotFoundError: The folder does not exist, has no class folders, or has class folders without images.
        ValueError: Two images differ only by their extension.
    """

    @checked_keywords()
    def __init__(self, path: str | os.PathLike[str], key_rule: str | None = None) -> None:
        self.path = local_path(path, "an image folder")
        self.classes, files = scan_image_folder(self.path)
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
            with open_regular(self.path / self._paths[index]) as file:
                return file.read(HEAD_BYTES)
        except (OSError, DatasetError):
            return None

    def read(self, index: int) -> bytes:
        """Return the bytes of an image file. Thread-safe.

        Raises:
            OSError: The file cannot be read.
            ImageError: (a ValueError) The path is a folder, a device, a FIFO or a socket.
        """
        return read_image_file(self.path / self._paths[index])

    def name(self, index: int) -> str:
        """Return the path of an image, for messages."""
        return str(self.path / self._paths[index])


def open_source(
    images: str | os.PathLike[str],
    split: str = "train",
    *,
    key_rule: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImageSource:
    """Open the image source at a path. The type is detected.

    Args:
        images: Root of an ImageFolder; a tar, a glob of tars or a folder of tars; a folder written by
            `datasets.Dataset.save_to_disk`; or `hf:<name>` for `datasets.load_dataset(<name>)`.
        split: Split of a Hugging Face dataset. With `hf:<name>`, also an expression such as `train[:10%]`.
        key_rule: Rule from file name to key for an ImageFolder, see `ImageFolderSource`.
        image_column: Column or extension of the images, see `HFSource` and `WebDatasetSource`.
        label_column: Column or extension of the labels, see `HFSource` and `WebDatasetSource`.

    Returns:
        An `ImageFolderSource`, `WebDatasetSource` or `HFSource`.

    Raises:
        FileNotFoundError: The path does not exist.
        DatasetError: (a ValueError) The Hugging Face dataset does not have the split.
        ValueError: Columns are given for an ImageFolder, whose classes are its folders.
    """
    text = os.fspath(images)
    if text.startswith("hf:") and not text.startswith("hf://"):  # a URL is refused below, without its secrets
        import datasets  # heavy

        with explaining_hub_errors(HubItem(redact_path(text[3:]), kind="images")):
            loaded = datasets.load_dataset(text[3:], split=split)
        return HFSource(loaded, image_column, label_column)
    path = local_path(text, "the images")
    text = str(path)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return HFSource(_load_saved(path, split), image_column, label_column)
    tars = _find_tars(path)
    if tars and not Path(tars[0]).is_dir():
        return WebDatasetSource(tars, image_column=image_column, label_column=label_column)
    if image_column is not None or label_column is not None:
        raise ValueError(
            f"image_column= and label_column= are for Hugging Face datasets and tars; {path} "
            "is read as an ImageFolder, whose classes are its folders"
        )
    return ImageFolderSource(path, key_rule)


def _find_tars(path: Path) -> list[str]:
    """Return the tars in a folder, or the files of a glob. Characters of patterns in names of existing folders stand for themselves."""
    if path.is_file():
        return [str(path)]
    folder = path if path.is_dir() else next(parent for parent in path.parents if parent.is_dir())
    pattern = "*.tar" if path.is_dir() else str(path.relative_to(folder))
    return sorted(glob.glob(str(Path(glob.escape(str(folder)), pattern))))  # noqa: PTH207  without hidden files


def _load_saved(path: Path, split: str) -> datasets.Dataset:
    """Load a folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    import datasets  # heavy

    splits = path / "dataset_dict.json"
    if splits.is_file():
        try:
            names = list(map(str, json.loads(splits.read_bytes())["splits"]))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DatasetError(f"{splits} is not a file of DatasetDict.save_to_disk: {error!r}") from None
        path = path / pick_split({name: name for name in names}, split, str(path))
    try:
        return datasets.load_from_disk(str(path))
    except IndexError:  # `datasets` writes no files for a split without rows and cannot load it
        raise DatasetError(f"{path} has no rows") from None


def pick_split(splits: Mapping[str, T], split: str, where: str) -> T:
    """Return a split of a Hugging Face dataset. "validation", "val" and "valid" are aliases.

    Args:
        splits: Splits by name.
        split: Split name.
        where: Name of the dataset for messages.

    Raises:
        DatasetError: The split does not exist.
    """
    for name in (split, *SPLIT_ALIASES.get(split, ())):
        if name in splits:
            return splits[name]
    raise DatasetError(f"{where} has no split {split!r}, only {sorted(splits)}")
