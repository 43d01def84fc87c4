"""Releases of labels of fixed crops, paired with the images of an ImageFolder: FKD, FerKD and ImageNet+."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from pathlib import Path

from ..data.joins import split_folder
from ..data.skipped import Skipped
from ..data.sources import ImageFolderSource
from ..errors import DatasetError, LabelMapError
from ..naming import check_split
from ..storage.folders import local_path
from ..words import counted
from .crop_files import MAX_BYTES, CropFile, PlusConfig, find_label_type, parse_fkd, parse_imagenet_plus
from .pairing import refuse_unmatched
from .published import class_names
from .release_files import Layout, ReleaseFiles

_NOUN = "crop label file"
LAYOUTS = {
    "fkd": Layout(_NOUN, "<class>/<name>.tar", MAX_BYTES),
    "imagenet-plus": Layout(_NOUN, "<index>.pth.tar", MAX_BYTES),
}
REFERENCES = {"fkd": "https://github.com/szq0214/FKD", "imagenet-plus": "https://github.com/apple/ml-dr"}
CONFIG_NAME = "config.pth.tar"  # of ImageNet+


class PublishedCrops:
    """Labels of crops of a release, for the images of an ImageFolder. Only data is unpickled, so no code is ever executed.

    Implements the `ImageSource` protocol for the images.

    FKD's files are found by class folder and by the name of the image up to its first dot. ImageNet+ numbers the images in
    torchvision's order, so the folder must have exactly the images of the release.

    Args:
        source: Folder or uncompressed tar of the release. A folder of FKD may have one folder per split.
        source_format: Format of the release: `"fkd"`, also for FerKD, or `"imagenet-plus"`.
        images: ImageFolder with the images, or its parent folder if it is named like the split.
        split: Name of the split. Default: `"train"`.
        label_type: Type of FKD's labels: `"hard"`, `"smoothing"`, `"marginal_smoothing_k5"`, `"marginal_smoothing_k10"` or
            `"marginal_renorm"`. Default: by the shape of the labels, with marginal smoothing rather than renormalization.
        classes: Names of the class folders in the order of the class indices. Default: the 1000 synsets of ImageNet-1k if all
            folders are synsets, else the sorted names of the folders.

    Attributes:
        format: Format of the release.
        split: Name of the split.
        label_type: Type of FKD's labels, or None for the one by their shape.
        images: Images, in the order of torchvision's ImageFolder.
        classes: Names of the C classes by index.
        labels: Class index of the folder of each image.
        missing: Images without a file, by index.
        skipped: Files without an image.

    Raises:
        FileNotFoundError: The release or the images do not exist.
        DatasetError: The tar is damaged, files are ambiguous, or no image matches any file.
        LabelMapError: The configuration of ImageNet+ is damaged, or has operations other than crop and flip.
        ValueError: The format or the label type is unknown, or a folder is not a class.

    Example:
        >>> crops = PublishedCrops("FKD_soft_label_500_crops_marginal_smoothing_k_5", "fkd", "/path/to/imagenet")
        >>> crops.load(0).boxes.shape
        (500, 4)
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        source_format: str,
        images: str | os.PathLike[str],
        *,
        split: str = "train",
        label_type: str | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        if source_format not in LAYOUTS:
            raise ValueError(f"source_format must be one of {sorted(LAYOUTS)}, got {source_format!r}")
        if label_type is not None and source_format != "fkd":
            raise ValueError(f"label_type={label_type!r} is for files of FKD, not for {source_format!r}")
        self.split = check_split(split, "split=")
        self.format, self.label_type = source_format, find_label_type(label_type)
        root = local_path(source, f"the source of {_NOUN}s")
        root = split_folder(root, split) if source_format == "fkd" else root
        self._files = ReleaseFiles(root, LAYOUTS[source_format])
        self.images = ImageFolderSource(split_folder(local_path(images, "the images"), split))
        folders = self.images.classes
        assert folders is not None
        self.classes = class_names(root, folders, classes)
        index = {name: i for i, name in enumerate(self.classes)}
        self.skipped: list[Skipped] = []
        self.labels: Sequence[int] = array("i", (index[folders[label]] for label in self.images.labels))
        paired = self._by_name(folders) if source_format == "fkd" else self._by_index()
        self._file_of = array("q", paired)  # -1 for an image without a file
        self.missing = [i for i, file in enumerate(self._file_of) if file < 0]
        if len(self.missing) == len(self._file_of):
            raise DatasetError(
                f"none of {counted(len(self._file_of), 'image')}, such as {self.images.name(0)}, matches a {_NOUN}, such as "
                f"{self._files.name(0)}: class folders and file names must be the same"
            )

    @property
    def keys(self) -> Sequence[str]:
        """Keys of the images."""
        return self.images.keys

    @property
    def key_rule(self) -> str | None:
        """Rule from the file name of an image to its key."""
        return self.images.key_rule

    @property
    def extension(self) -> str:
        """Extension of the images in shards."""
        return self.images.extension

    @property
    def num_classes(self) -> int:
        """Number C of classes."""
        return len(self.classes)

    def __len__(self) -> int:
        return len(self._file_of)  # the number of images

    def _by_name(self, folders: Sequence[str]) -> list[int]:
        """Return the file of each image by class folder and by the name up to its first dot."""
        found: dict[tuple[str, str], int] = {}
        for i, path in enumerate(self._files.paths):
            folder, name = path.split("/")[-2:]
            found[folder, name.removesuffix(".tar")] = i
        names = [
            (folders[label], Path(self.images.name(i)).name.partition(".")[0])
            for i, label in enumerate(self.images.labels)
        ]
        if len(set(names)) != len(names):
            raise DatasetError(
                "two images of one class have the same name up to its first dot, by which FKD names its files, so these are "
                "ambiguous: rename or remove duplicates"
            )
        paired = [found.pop(name, -1) for name in names]
        self.skipped = [self._skipped(file, "there is no image of this name") for file in found.values()]
        return paired

    def _by_index(self) -> list[int]:
        """Return the file of each image by its index in the ImageFolder, and read the configuration."""
        found: dict[str, int] = {path.rpartition("/")[2]: i for i, path in enumerate(self._files.paths)}
        config = found.pop(CONFIG_NAME, None)
        if config is None:
            raise FileNotFoundError(f"{self._files} has no {CONFIG_NAME}, which tells how the crops were made")
        try:
            self.config = PlusConfig.parse(self._files.read(config))
        except LabelMapError as error:
            raise LabelMapError(f"{self._files.name(config)}: {error}") from error
        count = len(self.images.keys)
        paired = [found.pop(f"{i}.pth.tar", -1) for i in range(count)]
        if found:
            name = self._files.name(next(iter(found.values())))
            raise DatasetError(
                f"{name} belongs to none of the {counted(count, 'image')}, which the release numbers from 0 in the order of "
                "torchvision's ImageFolder: give the complete folder of images, and only these"
            )
        return paired

    def _skipped(self, file: int, reason: str) -> Skipped:
        stem = self._files.paths[file].rpartition("/")[2].partition(".")[0]
        return Skipped(stem, self._files.name(file), reason)

    def check_complete(self) -> None:
        """Check that every image has a file and every file an image.

        Raises:
            DatasetError: Images or files are missing.
        """
        refuse_unmatched(_NOUN, [skipped.key for skipped in self.skipped], [self.images.keys[i] for i in self.missing])

    def name(self, index: int) -> str:
        """Return the path of an image for messages.

        Args:
            index: Index of the image.
        """
        return self.images.name(index)

    def read(self, index: int) -> bytes:
        """Return the bytes of an image. Thread-safe.

        Args:
            index: Index of the image.
        """
        return self.images.read(index)

    def file_name(self, index: int) -> str:
        """Return the path of the file of an image for messages.

        Args:
            index: Index of an image that has a file.
        """
        return self._files.name(self._file_of[index])

    def load(self, index: int) -> CropFile:
        """Read the labels of the crops of an image. Thread-safe.

        Args:
            index: Index of the image.

        Returns:
            Labels of its crops.

        Raises:
            OSError: The file cannot be read.
            LabelMapError: The file is damaged or not of this format, or the image has none.
        """
        file = self._file_of[index]
        if file < 0:
            raise LabelMapError(f"{self.images.name(index)}: there is no {_NOUN} of this image")
        data = self._files.read(file)
        try:
            if self.format == "fkd":
                return parse_fkd(data, self.num_classes, self.label_type)
            return parse_imagenet_plus(data, index, self.config, self.num_classes)
        except LabelMapError as error:
            raise LabelMapError(f"{self._files.name(file)}: {error}") from error
