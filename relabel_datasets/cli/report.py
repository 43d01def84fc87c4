"""`relabel report`: write the HTML report of a dataset."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .image_options import IMAGES_HELP, add_image_column, images_to_join
from .next_step import config_words, say_next
from .options import (
    add_boxes,
    add_command,
    add_config,
    add_num_crops,
    add_num_samples,
    add_path,
    add_split,
    path_argument,
)


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "report",
        "write an HTML page with statistics, label maps or stored crops, and samples to click through",
        _run,
        examples=["relabel report OUT --out report.html", "relabel report OUT --no-images --num-samples 200"],
        note="The page is one file without external resources. Images are included as JPEGs of at most 256 pixels, about 10 KB each.",
    )
    add_path(parser)
    add_config(parser)
    add_split(parser)
    parser.add_argument(
        "--out",
        type=path_argument,
        default=Path("report.html"),
        metavar="FILE",
        help="HTML file to write (default: %(default)s)",
    )
    add_num_samples(parser, "in the page, evenly spaced (statistics cover all samples)", default=1000)
    add_boxes(parser)
    add_num_crops(parser)
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--images", metavar="PATH", help=IMAGES_HELP)
    images.add_argument("--no-images", action="store_true", help="show heatmaps without images")
    add_image_column(parser)
    parser.add_argument(
        "--restricted-images", metavar="NAME",
        help="include the images even though the card says that images of NAME must not be redistributed",
    )  # fmt: skip


def _run(args: argparse.Namespace) -> None:
    from ..report.html_report import write_report

    path = write_report(
        args.path,
        args.out,
        args.config,
        args.split,
        num_samples=args.num_samples,
        images=False if args.no_images else images_to_join(args.images, args.split, args.image_column) or True,
        restricted_images=args.restricted_images,
        boxes=args.boxes,
        num_crops=args.num_crops,
    )
    sys.stderr.write(f"{path.stat().st_size / 1e6:.1f} MB; open it in a browser:\n")
    sys.stdout.write(f"{path}\n")
    say_next("relabel", "train", args.path, *config_words(args.config), "--out", "run")
