"""Options of commands that read images."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .data.joins import Images


def add_column_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where images and classes are in a Hugging Face dataset or in tars."""
    add_image_column(parser)
    parser.add_argument(
        "--label-column",
        metavar="NAME",
        help="Hugging Face dataset: column with the classes (default: the only ClassLabel); tars: extension of the members "
        "with the class index, or name of a value in .json (default: cls)",
    )


def add_image_column(parser: argparse.ArgumentParser) -> None:
    """Add the option that says where images are in a Hugging Face dataset or in tars."""
    parser.add_argument(
        "--image-column",
        metavar="NAME",
        help="Hugging Face dataset: column with the images (default: the only one of type Image); tars: extension of the "
        "images (default: that of an image)",
    )


def images_to_join(images: str | None, split: str, image_column: str | None) -> Images | None:
    """Return what `load_dataset(images=...)` accepts for `--images` and `--image-column`.

    Raises:
        ValueError: A column is given without images, or for an ImageFolder.
        FileNotFoundError: There are no images at the path.
    """
    if image_column is None:
        return images
    if images is None:
        raise ValueError("--image-column is a column of --images: give --images, too")
    from .data.joins import split_folder
    from .data.sources import open_source
    from .storage.folders import local_path

    path = images if images.startswith("hf:") else split_folder(local_path(images, "--images"), split)
    return open_source(path, split, image_column=image_column)
