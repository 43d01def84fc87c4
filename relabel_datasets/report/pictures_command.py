"""`relabel pictures`: draw label maps over their images."""

from __future__ import annotations

import argparse
import sys

from ..image_options import add_image_column, images_to_join
from ..runner import path_argument


def add_pictures(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of `relabel`."""
    parser = commands.add_parser("pictures", help="draw label maps, heatmaps and pooled crops over their images")
    parser.add_argument("dataset", help="folder, URL, org/name on the Hub, or short name")
    parser.add_argument("--out", type=path_argument, metavar="FOLDER", required=True, help="for the PNG files")
    parser.add_argument("--config", help="may be left out where there is only one")
    parser.add_argument("--split", default="train", help="(default: %(default)s)")
    parser.add_argument(
        "--images", metavar="DIR", help="where label-only shards find their images: an ImageFolder, tars"
    )
    add_image_column(parser)
    parser.add_argument(
        "--key", nargs="+", default=[], metavar="KEY",
        help="draw these samples (default: sheets of the images of most classes and of suspect labels, and some figures)",
    )  # fmt: skip
    parser.add_argument(
        "--class", nargs="+", default=[], dest="classes", metavar="NAME",
        help="show these classes' heatmaps (default: each image's strongest three)",
    )  # fmt: skip
    parser.add_argument(
        "--count", type=int, default=12, metavar="N", help="images a sheet, and figures (default: %(default)s)"
    )
    parser.add_argument("--samples", type=int, metavar="N", help="look for them among this many only, spread evenly")
    parser.set_defaults(run=_pictures)


def _pictures(args: argparse.Namespace) -> None:
    from ..data.loading import load_dataset
    from .pictures import draw_pictures

    dataset = load_dataset(
        args.dataset, args.config, args.split, images=images_to_join(args.images, args.split, args.image_column)
    )
    paths = draw_pictures(
        dataset, args.out, keys=args.key, classes=args.classes, count=args.count, num_samples=args.samples
    )
    sys.stdout.writelines(f"{path}\n" for path in paths)
