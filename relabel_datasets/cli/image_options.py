"""Options of commands that read images: the path of the images, and the columns of images and classes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..data.joins import Images

IMAGES_HELP = (
    "images to join with label maps that are stored without images: an ImageFolder, WebDataset tars, or a Hugging Face dataset "
    "(saved, or hf:NAME)"
)


def add_images(parser: argparse.ArgumentParser, help_text: str = IMAGES_HELP) -> None:
    """Add `--images` and `--image-column`. Convert their values with `images_to_join`."""
    parser.add_argument("--images", metavar="PATH", help=help_text)
    add_image_column(parser)


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Add `--image-column` and `--label-column`."""
    add_image_column(parser)
    parser.add_argument(
        "--label-column", metavar="NAME",
        help="Hugging Face dataset: column of the classes (default: the only ClassLabel column); tars: extension of the "
        "members with the class index, or name of a value in .json (default: cls)",
    )  # fmt: skip


def add_image_column(parser: argparse.ArgumentParser) -> None:
    """Add `--image-column`."""
    parser.add_argument(
        "--image-column", metavar="NAME",
        help="Hugging Face dataset: column of the images (default: the only Image column); tars: extension of the images "
        "(default: any image extension)",
    )  # fmt: skip


def images_to_join(images: str | None, split: str, image_column: str | None) -> Images | None:
    """Convert the values of `--images` and `--image-column` to the argument `images=` of `load_dataset`.

    Args:
        images: Value of `--images`.
        split: Split of the label maps.
        image_column: Value of `--image-column`.

    Returns:
        A path, a source of images, or None.

    Raises:
        ValueError: A column is given without images, or for an ImageFolder.
        FileNotFoundError: There are no images at the path.
    """
    if image_column is None:
        return images
    if images is None:
        raise ValueError(f"--image-column {image_column} is a column of --images, which is missing: give --images")
    from ..data.joins import split_folder
    from ..data.sources import open_source
    from ..storage.folders import local_path

    path = images if images.startswith("hf:") else split_folder(local_path(images, "--images"), split)
    return open_source(path, split, image_column=image_column)
