"""`relabel demo`: run the whole method on drawn scenes."""

from __future__ import annotations

import argparse
import logging
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
        "run the whole method on drawn scenes, without downloads, in less than 3 minutes",
        _run,
        examples=["relabel demo", "relabel demo relabel-demo --quick"],
    )
    parser.add_argument(
        "out", nargs="?", type=path_argument, default=Path("relabel-demo"), metavar="OUT",
        help="folder for the scenes, figures and results (default: %(default)s)",
    )  # fmt: skip
    number = parser.add_mutually_exclusive_group()
    number.add_argument(
        "--seeds", type=positive, default=3, help="number of students to train per kind of label (default: %(default)s)"
    )
    number.add_argument(
        "--quick", dest="seeds", action="store_const", const=1,
        help="train one student per kind of label, in less than a minute; a later run without this option keeps them",
    )  # fmt: skip


def _run(args: argparse.Namespace) -> None:
    from ..demo import run_demo

    for name in ("timm", "relabel_datasets.train", "relabel_datasets.annotate"):
        logging.getLogger(name).setLevel(logging.WARNING)  # the demo explains its steps itself
    result = run_demo(args.out, seeds=args.seeds, echo=lambda text: sys.stderr.write(f"{text}\n"))
    sys.stdout.write(result.to_markdown())
    sys.stdout.flush()
    sys.stderr.write("\n")
    say_next(
        "relabel", "build", "IMAGES", "OUT", "--annotator", "resnet50.a1_in1k",
        note=f"makes label maps of your own images; open {result.report} in a browser to see those of the scenes",
    )  # fmt: skip
