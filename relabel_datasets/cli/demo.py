"""`relabel demo`: run the whole method on generated images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .next_step import say_next
from .options import add_command, path_argument, positive


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "demo",
        "run the whole method on generated images, without downloads, in less than 4 minutes",
        _run,
        examples=["relabel demo", "relabel demo relabel-demo --seeds 1"],
    )
    parser.add_argument(
        "out", nargs="?", type=path_argument, default=Path("relabel-demo"), metavar="OUT",
        help="folder for the dataset, figures and results (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=positive, default=3, help="number of students to train per method (default: %(default)s)"
    )


def _run(args: argparse.Namespace) -> None:
    from ..demo import run_demo

    result = run_demo(args.out, seeds=args.seeds)
    sys.stdout.write(result.to_markdown())
    sys.stderr.write(result.next_steps())
    say_next("relabel", "build", "IMAGES", "OUT", "--annotator", "resnet50.a1_in1k")
