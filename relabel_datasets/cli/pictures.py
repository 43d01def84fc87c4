"""`relabel pictures`: draw label maps over their images."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..words import printable
from .image_options import add_images, images_to_join
from .next_step import config_words, say_next
from .options import add_command, add_config, add_num_samples, add_path, add_split, path_argument, positive


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "pictures",
        "draw label maps, heatmaps and crops over their images",
        _run,
        examples=["relabel pictures OUT --out figures", "relabel pictures OUT --out figures --key n01440764_10026"],
    )
    add_path(parser)
    parser.add_argument("--out", type=path_argument, metavar="FOLDER", required=True, help="folder for the PNG files")
    add_config(parser)
    add_split(parser)
    add_images(parser)
    parser.add_argument(
        "--key", nargs="+", default=[], metavar="KEY",
        help="keys of the samples to draw (default: contact sheets of the images with the most classes and of those with suspect "
        "labels, and figures of single images)",
    )  # fmt: skip
    parser.add_argument(
        "--class", nargs="+", default=[], dest="classes", metavar="NAME",
        help="names of the classes whose heatmaps are drawn (default: the three strongest of each image)",
    )  # fmt: skip
    parser.add_argument(
        "--count",
        type=positive,
        default=12,
        metavar="N",
        help="number of images per contact sheet, and number of figures (default: %(default)s)",
    )
    add_num_samples(parser, "to choose from, evenly spaced")


def _run(args: argparse.Namespace) -> None:
    from ..data.loading import load_dataset
    from ..report.pictures import draw_pictures

    images = images_to_join(args.images, args.split, args.image_column)
    dataset = load_dataset(args.path, args.config, args.split, images=images)
    paths = draw_pictures(
        dataset, args.out, keys=args.key, classes=args.classes, count=args.count, num_samples=args.num_samples
    )
    sys.stdout.writelines(f"{printable(path)}\n" for path in paths)
    say_next("relabel", "report", args.path, *config_words(args.config), "--split", args.split)
