"""Options of commands that read images."""

from __future__ import annotations

import argparse


def add_column_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where images and classes are in a Hugging Face dataset or in tars."""
    parser.add_argument(
        "--image-column",
        metavar="NAME",
        help="Hugging Face dataset: column with the images (default: the only one of type Image); tars: extension of the "
        "images (default: that of an image)",
    )
    parser.add_argument(
        "--label-column",
        metavar="NAME",
        help="Hugging Face dataset: column with the classes (default: the only ClassLabel); tars: extension of the members "
        "with the class index, or name of a value in .json (default: cls)",
    )
