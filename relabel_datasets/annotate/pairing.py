"""Pair published label maps with the images of an ImageFolder."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import PIL.Image

from ..data.joins import split_folder
from ..data.skipped import Skipped
from ..data.sources import ImageFolderSource
from ..errors import DatasetError, ImageError
from ..naming import check_split
from ..shards.images import Header, decode_image, read_header
from ..storage.folders import local_path
from ..storage.regular_files import open_regular
from ..words import counted
from .published import PublishedMaps


class PairedImages(NamedTuple):
    """Images of the label maps of a release.

    Attributes:
        maps: Label map files of the release.
        source: Images.
        indices: Index of the image of each map in `source`, or None if there is none.
        extra: Images without a map.
    """

    maps: PublishedMaps
    source: ImageFolderSource
    indices: list[int | None]
    extra: list[Skipped]

    def check_complete(self) -> None:
        """Check that every label map has an image and every image a label map.

        Raises:
            DatasetError: Images or label maps are missing.
        """
        without_image = [self.maps.keys[i] for i, image in enumerate(self.indices) if image is None]
        refuse_unmatched("label map", without_image, [image.key for image in self.extra])

    def decode(self, index: int) -> PIL.Image.Image:
        """Decode the image of a map.

        Args:
            index: Index of the map.

        Returns:
            RGB image, with its EXIF rotation applied.

        Raises:
            OSError: The image cannot be read.
            ImageError: The image is damaged, or the map has none.
        """
        image = self._image(index)
        return decode_image(self.source.read(image), self.source.name(image))

    def open(self, index: int, *, whole: bool) -> tuple[tuple[int, int], bytes | None]:
        """Read the size of the image of a map from its header, and optionally the whole file.

        Args:
            index: Index of the map.
            whole: Whether to read the whole file.

        Returns:
            (height, width) in pixels with the EXIF rotation applied, and the bytes of the file if `whole`, else None.

        Raises:
            OSError: The image cannot be read.
            ImageError: The header of the image is damaged, or the map has no image.
        """
        header, data = open_image(self.source, self._image(index), whole=whole)
        return header.size, data

    def _image(self, index: int) -> int:
        image = self.indices[index]
        if image is None:
            raise ImageError(f"{self.maps.name(index)}: there is no image of this name")
        return image


def refuse_unmatched(noun: str, without_image: Sequence[str], without_labels: Sequence[str]) -> None:
    """Raise DatasetError if some published labels have no image, or some images no labels.

    Args:
        noun: Word for the labels of one image.
        without_image: Keys of labels without an image.
        without_labels: Keys of images without labels.
    """
    problems = [
        f"{problem}, such as {', '.join(map(repr, keys[:3]))}"
        for keys, problem in (
            (without_image, f"{counted(len(without_image), noun)} without an image"),
            (without_labels, f"{counted(len(without_labels), 'image')} without a {noun}"),
        )
        if keys
    ]
    if problems:
        raise DatasetError(
            f"images and {noun}s do not match by class and name: {'; '.join(problems)}. Give the images of these {noun}s, or use "
            "skip_bad=True to skip the unmatched ones"
        )


def open_image(source: ImageFolderSource, index: int, *, whole: bool) -> tuple[Header, bytes | None]:
    """Read the header of an image, and optionally the whole file.

    Args:
        source: Source of the image.
        index: Index of the image in the source.
        whole: Whether to read the whole file.

    Returns:
        Size and orientation, and the bytes of the file if `whole`, else None.

    Raises:
        OSError: The image cannot be read.
        ImageError: The header of the image is damaged.
    """
    name = source.name(index)
    if whole:
        data = source.read(index)
        return read_header(io.BytesIO(data), name), data
    try:
        with open_regular(Path(name)) as file:
            return read_header(file, name), None
    except DatasetError as error:  # a FIFO or a device
        raise ImageError(str(error)) from None


def find_images(maps: PublishedMaps, images: str | os.PathLike[str], split: str) -> PairedImages:
    """Find the image of each label map by class folder and file stem.

    Args:
        maps: Label map files of a release.
        images: ImageFolder, or its parent folder if it is named like the split.
        split: Name of the split.

    Returns:
        Images of the maps.

    Raises:
        FileNotFoundError: The folder does not exist or has no images.
        DatasetError: Two images of a class differ only in their extension, or no image matches any label map.
    """
    check_split(split, "split=")
    root = split_folder(local_path(images, "the images"), split)
    source = ImageFolderSource(root, maps.key_rule)
    classes = source.classes
    assert classes is not None
    by_name = {(classes[label], key): i for i, (label, key) in enumerate(zip(source.labels, source.keys, strict=True))}
    if len(by_name) != len(source.keys):
        raise DatasetError(
            f"{root}: images of one class have the same stem, so their label maps are ambiguous: rename or remove duplicates"
        )
    indices = [by_name.pop((maps.classes[label], key), None) for label, key in zip(maps.labels, maps.keys, strict=True)]
    if len(by_name) == len(source.keys):
        raise DatasetError(
            f"none of {counted(len(source.keys), 'image')}, such as {source.name(0)}, matches a label map, such as "
            f"{maps.name(0)}: class folders and file names must be the same"
        )
    extra = [Skipped(key, source.name(i), "there is no label map of this name") for (_, key), i in by_name.items()]
    return PairedImages(maps, source, indices, extra)
