"""`relabel inspect`: show a dataset or a shard in the terminal."""

from __future__ import annotations

import argparse
import shutil
import sys
from typing import Any

from .next_step import config_words, say_next
from .options import add_command, add_config


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "inspect",
        "show the contents of a dataset or a shard in the terminal",
        _run,
        examples=["relabel inspect OUT", "relabel inspect OUT/CONFIG/train-00000-of-00002.tar --num-samples 10"],
    )
    parser.add_argument(
        "path", metavar="PATH", help="a shard (.tar), a folder, a URL of either, org/name on the Hub, or a short name"
    )
    add_config(parser, default="the first")
    parser.add_argument("--split", help="name of the split whose samples are shown (default: the first)")
    parser.add_argument(
        "--num-samples", type=int, default=3, metavar="N", help="number of samples to show (default: %(default)s)"
    )


def _run(args: argparse.Namespace) -> None:
    from ..report.terminal import describe

    width = shutil.get_terminal_size((100, 24)).columns
    sys.stdout.write(f"{describe(args.path, args.config, args.split, num_samples=args.num_samples, width=width)}\n")
    if args.path.endswith(".tar"):
        say_next("relabel", "verify", "PATH", note="with the folder of the dataset")
    else:
        say_next("relabel", "report", args.path, *config_words(args.config))
