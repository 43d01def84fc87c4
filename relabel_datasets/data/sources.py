"""Where images come from: an ImageFolder, WebDataset tars, or a Hugging Face dataset.

A source lists keys and class indices and reads the bytes of single images later, from any thread or forked process. Label
maps are built from one, and label-only shards are joined with one.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np

from ..errors import DatasetError, ImageError
from ..naming import check_key
from ..shards.configs import SPLIT_ALIASES
from ..shards.images import common_extension, key_of, sample_keys, scan_image_folder
from ..shards.packed import PackedStrings
from ..storage.folders import local_path
from ..storage.regular_files import open_regular
from .tar_scan import scan_tar

if TYPE_CHECKING:
    import datasets

_SCANNERS = 8  # tars read at a time: their headers lie far apart, so that disks answer many requests better than one


class ImageSource(Protocol):
    """Images with keys and class indices; all sequences are in the order of the source."""

    @property
    def classes(self) -> Sequence[str] | None:
        """Names by index; None if the source has only indices."""
        ...

    @property
    def keys(self) -> Sequence[str]:
        """Unique in the source, without dots."""
        ...

    @property
    def labels(self) -> Sequence[int]:
        """Class indices."""
        ...

    @property
    def extension(self) -> str:
        """Extension of the images in the shards, without dot."""
        ...

    @property
    def key_rule(self) -> str | None:
        """How keys come from file names, see `images.key_of`; None if the source has its own."""
        ...

    def read(self, index: int) -> bytes:
        """Return the bytes of an image file; called from several threads."""
        ...

    def name(self, index: int) -> str:
        """Return what a message calls the image."""
        ...


def _read_image(path: Path) -> bytes:
    """Return the bytes of an image file.

    Raises:
        OSError: The file cannot be read.
        ImageError: The path is a folder, a device, a FIFO or a socket.
    """
    try:
        with open_regular(path) as file:
            return file.read()
    except DatasetError as error:
        raise ImageError(str(error)) from None


def source_sha256(source: ImageSource) -> str:
    """Return a hash of the source's keys and labels, which must not change between the runs of a build.

    Raises:
        DatasetError: A key is not valid.
    """
    digest = hashlib.sha256()
    for key, label in zip(source.keys, source.labels, strict=True):
        digest.update(f"{check_key(key, 'the images')}\t{label}\n".encode())
    return digest.hexdigest()


class ImageFolderSource:
    """The images of `<root>/<class>/**/<image>`, as torchvision's ImageFolder has them.

    Args:
        root: the folder.
        key_rule: how keys come from file names, see `images.key_of`; they may then not be unique. Default: the first rule
            by which they are.

    Raises:
        FileNotFoundError: no such folder, no class folders, or some without images.
        ValueError: two images differ only by their extension.
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
        self.extension = common_extension(paths)
        self._paths = PackedStrings(paths)

    def read(self, index: int) -> bytes:
        return _read_image(self._root / self._paths[index])

    def name(self, index: int) -> str:
        return str(self._root / self._paths[index])


class WebDatasetSource:
    """The images of WebDataset tars: one image member for every key and, where labels are asked for, its class in `.cls`.

    Only the tars' headers are read at first.

    Args:
        tars: paths of uncompressed tars.
        classes: names of the classes by index, if known.

    Raises:
        FileNotFoundError: no tars.
        DatasetError: a sample without image or, when labels are first asked for, without class index; a key that stands
            twice; or a tar that is cut off or damaged.
    """

    key_rule = None

    def __init__(self, tars: Sequence[str | os.PathLike[str]], classes: Sequence[str] | None = None) -> None:
        if not tars:
            raise FileNotFoundError("no tars to read images from")
        self.classes = classes
        self._tars = [local_path(tar, "a tar of images") for tar in tars]
        keys: dict[str, None] = {}  # in order, unlike a set
        fields: set[str] = set()
        extents, self._ends = array("q"), []
        with ThreadPoolExecutor(_SCANNERS, thread_name_prefix="scan") as pool:
            for tar, scan in zip(self._tars, pool.map(scan_tar, self._tars), strict=True):
                for key in scan.keys:
                    if key in keys:
                        raise DatasetError(f"{tar}: key {key!r} stands in more than one of the {len(tars)} tars")
                    keys[key] = None
                fields |= scan.fields
                extents += scan.extents
                self._ends.append(len(keys))
        self.keys: Sequence[str] = PackedStrings(keys)
        self.extension = common_extension([f"image.{field}" for field in fields])
        self._extents = np.frombuffer(extents, np.int64).reshape(-1, 4)

    @cached_property
    def labels(self) -> Sequence[int]:
        """Class indices, read when first asked for."""
        labels = array("q")
        for tar, (start, end) in zip(self._tars, itertools.pairwise([0, *self._ends]), strict=True):
            with tar.open("rb") as file:
                labels.extend(self._label(file, index) for index in range(start, end))
        return labels

    def _label(self, file: BinaryIO, index: int) -> int:
        offset, size = self._extents[index, 2:].tolist()
        if offset < 0:
            raise DatasetError(f"{file.name}: sample {self.keys[index]!r} has no .cls with its class index")
        label = os.pread(file.fileno(), size, offset)
        try:
            return int(label)
        except ValueError:
            raise DatasetError(
                f"{file.name}: {self.keys[index]}.cls must hold a class index, it holds {label[:40]!r}"
            ) from None

    def read(self, index: int) -> bytes:
        offset, size = self._extents[index, :2].tolist()
        with self._tars[bisect_right(self._ends, index)].open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def name(self, index: int) -> str:
        return f"{self._tars[bisect_right(self._ends, index)]}: {self.keys[index]}"


class HFSource:
    """The images of a Hugging Face dataset (`datasets.Dataset`) with an image column and, if labels are asked for, classes.

    Keys are the image files' stems where the dataset has their names, else running numbers.

    Args:
        dataset: one split, not streaming.
        image: name of the image column. Default: the only one.
        label: name of the ClassLabel or integer column. Default: the only ClassLabel.

    Raises:
        ValueError: no such column, or several to choose from; of labels, when they are first asked for.
    """

    def __init__(self, dataset: datasets.Dataset, image: str | None = None, label: str | None = None) -> None:
        import datasets  # heavy, and only needed here

        features = dataset.features
        self._image = image = _only_column(features, datasets.Image, image, "image")
        self._table = dataset.with_format("arrow")
        images = dataset.with_format(None).select_columns([image]).cast_column(image, datasets.Image(decode=False))
        self._images = images
        labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        if label is not None or len(labels) == 1:
            label = _only_column(features, datasets.ClassLabel, label, "label")
        self._label = label
        names = getattr(features.get(label), "names", None)
        self.classes: Sequence[str] | None = None if names is None else tuple(names)
        paths = _image_paths(images, image)
        self.extension = common_extension([path for path in paths if path])
        self.key_rule: str | None = None
        keys: Iterable[str] = (f"{i:08d}" for i in range(len(dataset)))
        if all(paths):
            stems = [key_of(path, "stem") for path in paths]
            if len(set(stems)) == len(stems):
                self.key_rule, keys = "stem", stems
        self.keys: Sequence[str] = PackedStrings(keys)

    @cached_property
    def labels(self) -> Sequence[int]:
        """Class indices, read when first asked for."""
        import datasets  # see __init__

        label = _only_column(self._table.features, datasets.ClassLabel, self._label, "label")
        column = self._table.select_columns([label])[:].column(label)
        return array("q", (int(value) for chunk in column.chunks for value in chunk.to_pylist()))

    def read(self, index: int) -> bytes:
        value: Mapping[str, Any] = self._images[index][self._image]
        return value["bytes"] if value["bytes"] is not None else _read_image(Path(value["path"]))

    def name(self, index: int) -> str:
        return f"row {index} ({self.keys[index]})"


def _image_paths(images: datasets.Dataset, column: str) -> list[str]:
    """Return the images' file names as the dataset has them, in the order of its rows; "" where there is none."""
    flat = images.flatten()  # so that no bytes of images are read; what select() or shuffle() chose still holds
    name = f"{column}.path"
    if name not in flat.column_names:
        return [""] * len(images)
    return [path or "" for path in flat.select_columns([name]).with_format("arrow")[:].column(name).to_pylist()]


def _only_column(features: Mapping[str, Any], kind: type, name: str | None, argument: str) -> str:
    if name is not None:
        if name not in features:
            raise ValueError(f"{argument}={name!r} is not a column; there are {sorted(features)}")
        return name
    names = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(names) != 1:
        raise ValueError(f"name the {argument} column: {names or sorted(features)} to choose from")
    return names[0]


def open_source(images: str | os.PathLike[str], split: str = "train", *, key_rule: str | None = None) -> ImageSource:
    """Return the source for a path, by what is there.

    Args:
        images: an ImageFolder root; a tar, a glob of tars or a folder of tars; a folder that
            `datasets.Dataset.save_to_disk` wrote; or `hf:<name>` for `datasets.load_dataset(<name>)`.
        split: which split of a Hugging Face dataset.
        key_rule: of an ImageFolder, see `ImageFolderSource`.

    Raises:
        FileNotFoundError: nothing there.
        DatasetError: a Hugging Face dataset has no such split.
    """
    text = os.fspath(images)
    if text.startswith("hf:"):
        import datasets  # see HFSource

        return HFSource(datasets.load_dataset(text[3:], split=split))
    path = local_path(text, "the images")
    text = str(path)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        import datasets  # see HFSource

        loaded = datasets.load_from_disk(text)
        return HFSource(loaded if isinstance(loaded, datasets.Dataset) else pick_split(loaded, split, text))
    tars = sorted(glob.glob(str(path / "*.tar") if path.is_dir() else text))  # noqa: PTH207  the pattern may be absolute
    if tars and not Path(tars[0]).is_dir():
        return WebDatasetSource(tars)
    return ImageFolderSource(path, key_rule)


def pick_split(splits: Mapping[str, datasets.Dataset], split: str, where: str) -> datasets.Dataset:
    """Return a split of a Hugging Face dataset; "val" and "validation" are the same.

    Raises:
        DatasetError: there is none of this name.
    """
    for name in (split, *SPLIT_ALIASES.get(split, ())):
        if name in splits:
            return splits[name]
    raise DatasetError(f"{where} has no split {split!r}, only {sorted(splits)}")
