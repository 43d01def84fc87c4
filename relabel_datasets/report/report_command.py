"""`relabel report`: the page of a dataset."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..image_options import add_image_column, images_to_join
from ..runner import path_argument


def add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of `relabel`."""
    parser = commands.add_parser(
        "report", help="write one HTML file to look at label maps with: statistics, and samples to pool crops of",
        epilog="The file opens from disk and loads nothing. Images in it are JPEGs of at most 256 pixels, about 10 KB each.",
    )  # fmt: skip
    parser.add_argument("dataset", help="folder, URL, org/name on the Hub, or short name")
    parser.add_argument("--config", help="may be left out where there is only one")
    parser.add_argument("--split", default="train", help="(default: %(default)s)")
    parser.add_argument(
        "--out", type=path_argument, default=Path("report.html"), metavar="FILE", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--samples", type=int, default=1000, metavar="N",
        help="at most so many to look at, spread evenly; statistics are of all (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--boxes",
        type=path_argument,
        metavar="PATH",
        help="objects: COCO JSON, CSV, PASCAL VOC XML, or a folder of XML",
    )
    parser.add_argument(
        "--crops", type=int, default=100_000, metavar="N", help="that statistics are of (default: %(default)s)"
    )
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--images", metavar="PATH", help="where the images of label-only shards are")
    images.add_argument("--no-images", action="store_true", help="leave them out: heatmaps are shown alone")
    add_image_column(parser)
    parser.add_argument(
        "--restricted-images", metavar="NAME",
        help="put images into the page although the card says those of NAME may not be redistributed (default: left out)",
    )  # fmt: skip
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> None:
    from .html_report import write_report

    path = write_report(
        args.dataset,
        args.out,
        args.config,
        args.split,
        num_samples=args.samples,
        images=False if args.no_images else images_to_join(args.images, args.split, args.image_column) or True,
        restricted_images=args.restricted_images,
        boxes=args.boxes,
        num_crops=args.crops,
    )
    sys.stderr.write(f"{path.stat().st_size / 1e6:.1f} MB; open it in a browser:\n")
    sys.stdout.write(f"{path}\n")
