"""Where a builder's images come from: an ImageFolder, WebDataset tars, or a Hugging Face dataset.

A source lists keys and class indices at once and reads the bytes of single images later, from any thread.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..data.images import IMAGE_EXTENSIONS, common_extension, key_of, sample_keys, scan_image_folder
from ..data.manifest import DatasetError

if TYPE_CHECKING:
    import datasets

_MEMBER = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # a key ends at the first dot of the last part, as in webdataset


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


def source_sha256(source: ImageSource) -> str:
    """Return a hash of the source's keys and labels: what a build goes on with must be what it began with."""
    digest = hashlib.sha256()
    for key, label in zip(source.keys, source.labels, strict=True):
        digest.update(f"{key}\t{label}\n".encode())
    return digest.hexdigest()


class ImageFolderSource:
    """The images of `<root>/<class>/**/<image>`, as torchvision's ImageFolder has them.

    Raises:
        FileNotFoundError: no such folder, no class folders, or some without images.
        ValueError: two images differ only by their extension.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = Path(root)
        self.classes, files = scan_image_folder(self._root)
        self._paths = [file.path for file in files]
        self.labels = [file.label for file in files]
        self.key_rule, self.keys = sample_keys(self._paths)
        self.extension = common_extension(self._paths)

    def read(self, index: int) -> bytes:
        return (self._root / self._paths[index]).read_bytes()

    def name(self, index: int) -> str:
        return str(self._root / self._paths[index])


class WebDatasetSource:
    """The images of WebDataset tars: an image member and a `.cls` with the class index for every key.

    Args:
        tars: paths of uncompressed tars.
        classes: names of the classes by index, if known.

    Raises:
        FileNotFoundError: no tars.
        DatasetError: a sample without image or class, a key that stands twice, or a tar that is cut off.
    """

    key_rule = None

    def __init__(self, tars: Sequence[str | os.PathLike[str]], classes: Sequence[str] | None = None) -> None:
        if not tars:
            raise FileNotFoundError("no tars to read images from")
        self.classes = classes
        self.keys: list[str] = []
        self.labels: list[int] = []
        self._images: list[tuple[Path, str, int, int]] = []  # tar, member name, offset, size
        for tar in map(Path, tars):
            for key, members in _samples(tar).items():
                self._add(tar, key, members)
        if len(set(self.keys)) != len(self.keys):
            repeated = next(key for key in self.keys if self.keys.count(key) > 1)
            raise DatasetError(f"key {repeated!r} stands in more than one of the {len(tars)} tars")
        self.extension = common_extension([name for _, name, _, _ in self._images])

    def _add(self, tar: Path, key: str, members: dict[str, tarfile.TarInfo]) -> None:
        images = [member for field, member in members.items() if f".{field.lower()}" in IMAGE_EXTENSIONS]
        if len(images) != 1 or "cls" not in members:
            raise DatasetError(
                f"{tar}: sample {key!r} must have one image and a .cls with its class index, it has {sorted(members)}"
            )
        label = _read_at(tar, members["cls"].offset_data, members["cls"].size)
        try:
            self.labels.append(int(label))
        except ValueError:
            raise DatasetError(f"{tar}: {key}.cls must hold a class index, it holds {label[:40]!r}") from None
        self.keys.append(key)
        self._images.append((tar, images[0].name, images[0].offset_data, images[0].size))

    def read(self, index: int) -> bytes:
        tar, _, offset, size = self._images[index]
        return _read_at(tar, offset, size)

    def name(self, index: int) -> str:
        tar, name, _, _ = self._images[index]
        return f"{tar}: {name}"


def _samples(tar: Path) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Return the members of every key of a tar by their extension."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    end = 0
    try:
        with tarfile.open(tar, "r:") as opened:
            for member in opened:
                match = _MEMBER.match(member.name)
                end = max(end, member.offset_data + member.size)
                if (
                    member.isfile()
                    and match
                    and samples.setdefault(match[1], {}).setdefault(match[2], member) != member
                ):
                    raise DatasetError(f"{tar}: {member.name} stands twice")
    except tarfile.TarError as error:
        raise DatasetError(f"{tar} is not an uncompressed tar, or damaged: {error}") from error
    # A tar ends with two empty blocks; tarfile takes the end of the file as the end of the tar as well.
    size = tar.stat().st_size
    if size < end + 1024:
        raise DatasetError(f"{tar} is cut off: {size} bytes, but its last member alone needs {end + 1024}")
    return samples


def _read_at(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


class HFSource:
    """The images of a Hugging Face dataset (`datasets.Dataset`) with an image column and a class column.

    Keys are the image files' stems where the dataset has their names, else running numbers.

    Args:
        dataset: one split, not streaming.
        image: name of the image column. Default: the only one.
        label: name of the ClassLabel or integer column. Default: the only ClassLabel.

    Raises:
        ValueError: no such column, or several to choose from.
    """

    def __init__(self, dataset: datasets.Dataset, image: str | None = None, label: str | None = None) -> None:
        import datasets  # heavy, and only needed here

        features = dataset.features
        image = _only_column(features, datasets.Image, image, "image")
        label = _only_column(features, datasets.ClassLabel, label, "label")
        self._image = image
        self._dataset = dataset.cast_column(image, datasets.Image(decode=False)).select_columns([image])
        names = getattr(features[label], "names", None)
        self.classes: Sequence[str] | None = None if names is None else tuple(names)
        self.labels = [int(value) for value in dataset.with_format(None)[label]]
        paths = self._paths()
        self.key_rule: str | None = None
        self.keys = [f"{i:08d}" for i in range(len(dataset))]
        self.extension = common_extension([path for path in paths if path])
        if all(paths) and len({Path(path).stem for path in paths}) == len(paths):
            self.key_rule, self.keys = "stem", [key_of(path, "stem") for path in paths]

    def _paths(self) -> list[str]:
        column = self._dataset.data.column(self._image).combine_chunks()
        paths = column.field("path").to_pylist() if "path" in column.type.names else [None] * len(column)
        return [path or "" for path in paths]

    def read(self, index: int) -> bytes:
        value: Mapping[str, Any] = self._dataset[index][self._image]
        return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()

    def name(self, index: int) -> str:
        return f"row {index} ({self.keys[index]})"


def _only_column(features: Mapping[str, Any], kind: type, name: str | None, argument: str) -> str:
    if name is not None:
        if name not in features:
            raise ValueError(f"{argument}={name!r} is not a column; there are {sorted(features)}")
        return name
    names = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(names) != 1:
        raise ValueError(f"name the {argument} column: {names or sorted(features)} to choose from")
    return names[0]


def open_source(images: str | os.PathLike[str], split: str = "train") -> ImageSource:
    """Return the source for a path, by what is there.

    Args:
        images: an ImageFolder root; a tar, a glob of tars or a folder of tars; a folder that
            `datasets.Dataset.save_to_disk` wrote; or `hf:<name>` for `datasets.load_dataset(<name>)`.
        split: which split of a Hugging Face dataset.

    Raises:
        FileNotFoundError: nothing there.
    """
    text = os.fspath(images)
    if text.startswith("hf:"):
        import datasets  # see HFSource

        return HFSource(datasets.load_dataset(text[3:], split=split))
    path = Path(text)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        import datasets  # see HFSource

        loaded = datasets.load_from_disk(text)
        return HFSource(loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded)
    tars = sorted(glob.glob(str(path / "*.tar") if path.is_dir() else text))  # noqa: PTH207  the pattern may be absolute
    if tars and not Path(tars[0]).is_dir():
        return WebDatasetSource(tars)
    return ImageFolderSource(path)
