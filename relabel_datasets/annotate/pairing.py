"""Which image of an ImageFolder each published label map is of, and how large it is."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import NamedTuple

import PIL.Image

from ..data.skipped import Skipped
from ..data.sources import ImageFolderSource
from ..errors import DatasetError, ImageError
from ..naming import check_split
from ..shards.configs import SPLIT_ALIASES
from ..shards.images import decode_image, read_size
from ..storage.folders import local_path
from ..storage.regular_files import open_regular
from .published import PublishedMaps


class FoundImages(NamedTuple):
    """The images of a release's label maps."""

    maps: PublishedMaps
    source: ImageFolderSource
    indices: list[int | None]  # for each map, which image of the source
    extra: list[Skipped]  # images without a map

    def check_complete(self) -> None:
        """Raise DatasetError unless every label map has an image and every image a label map."""
        missing = [self.maps.keys[i] for i, image in enumerate(self.indices) if image is None]
        extra = [image.key for image in self.extra]
        problems = [
            f"{len(keys)} {what}, such as {', '.join(map(repr, keys[:3]))}"
            for keys, what in ((missing, "label maps have no image"), (extra, "images have no label map"))
            if keys
        ]
        if problems:
            raise DatasetError(
                f"images and label maps, by class and name, do not match: {'; '.join(problems)}. Give the images that "
                "the maps are of, or skip_bad=True (--skip-bad) to leave these out"
            )

    def decode(self, index: int) -> PIL.Image.Image:
        """Return the RGB image of a map, upright.

        Raises:
            OSError: it cannot be read.
            ImageError: (a ValueError) it is damaged, or there is none.
        """
        image = self._image(index)
        return decode_image(self.source.read(image), self.source.name(image))

    def open(self, index: int, *, whole: bool) -> tuple[tuple[int, int], bytes | None]:
        """Return the (height, width) of a map's image, upright, and its bytes if asked for. Only its header is decoded.

        Raises:
            OSError: it cannot be read.
            ImageError: (a ValueError) its header is damaged, or there is none.
        """
        image = self._image(index)
        name = self.source.name(image)
        if whole:
            data = self.source.read(image)
            return read_size(io.BytesIO(data), name), data
        try:
            with open_regular(Path(name)) as file:
                return read_size(file, name), None
        except DatasetError as error:  # a FIFO or a device
            raise ImageError(str(error)) from None

    def _image(self, index: int) -> int:
        image = self.indices[index]
        if image is None:
            raise ImageError(f"{self.maps.name(index)}: there is no image of this name")
        return image


def find_images(maps: PublishedMaps, images: str | os.PathLike[str], split: str) -> FoundImages:
    """Return which image of an ImageFolder each label map is of, by the names of their folders and their stems.

    Args:
        maps: the label maps.
        images: the ImageFolder, or the folder above it where that is named like the split.
        split: name of the split.

    Raises:
        FileNotFoundError: there is no such folder, or no images in it.
        DatasetError: (a ValueError) two images of a class differ only by their extension, or none is that of a label map.
    """
    check_split(split, "split=")
    names, root = (split, *SPLIT_ALIASES.get(split, ())), local_path(images, "the images")
    root = next((root / name for name in names if (root / name).is_dir()), root)
    source = ImageFolderSource(root, maps.key_rule)
    classes = source.classes
    assert classes is not None
    by_name = {(classes[label], key): i for i, (label, key) in enumerate(zip(source.labels, source.keys, strict=True))}
    if len(by_name) != len(source.keys):
        raise DatasetError(
            f"{root}: images of one class have the same stem, so that it is not clear which of them a label map is of"
        )
    indices = [by_name.pop((maps.classes[label], key), None) for label, key in zip(maps.labels, maps.keys, strict=True)]
    if len(by_name) == len(source.keys):
        raise DatasetError(
            f"none of {len(source.keys)} images, such as {source.name(0)}, is that of a label map, such as "
            f"{maps.name(0)}: class folders and file names must be the same"
        )
    extra = [Skipped(key, source.name(i), "there is no label map of this name") for (_, key), i in by_name.items()]
    return FoundImages(maps, source, indices, extra)
