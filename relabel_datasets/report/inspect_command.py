"""`relabel inspect`: what is inside a dataset or a shard, in the terminal."""

from __future__ import annotations

import argparse
import shutil
import sys


def add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of `relabel`."""
    parser = commands.add_parser("inspect", help="show what is inside a dataset or a shard, in the terminal")
    parser.add_argument("path", help="a shard (.tar), a folder, a URL of either, org/name on the Hub, or a short name")
    parser.add_argument("--config", help="whose samples are shown (default: the first)")
    parser.add_argument("--split", help="whose samples are shown (default: the first)")
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="how many (default: %(default)s)")
    parser.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> None:
    from .terminal import describe

    width = shutil.get_terminal_size((100, 24)).columns
    sys.stdout.write(f"{describe(args.path, args.config, args.split, num_samples=args.samples, width=width)}\n")
