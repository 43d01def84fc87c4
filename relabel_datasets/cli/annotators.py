"""`relabel annotators`: list the timm models that can annotate."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from .next_step import say_next
from .options import add_command, add_json, positive


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "annotators",
        "list the timm models that can annotate, and how exact their maps are",
        _run,
        examples=["relabel annotators", "relabel annotators 'convnext*' --input-size 384"],
    )
    parser.add_argument(
        "pattern", nargs="?", metavar="PATTERN",
        help="pattern of model names, such as 'convnext*' (default: one model per module of timm)",
    )  # fmt: skip
    parser.add_argument(
        "--input-size", type=positive, nargs="+", metavar="PX",
        help="side, or height and width, of the input in pixels (default: that of each model)",
    )  # fmt: skip
    add_json(parser, "the list")


def _run(args: argparse.Namespace) -> None:
    from ..annotate.catalogue import describe_annotators, format_annotators
    from ..storage.local import write_atomically
    from .annotator_options import parse_size

    entries = describe_annotators(args.pattern, input_size=parse_size(args.input_size))
    if args.json is not None:
        write_atomically(args.json, json.dumps([entry.to_json() for entry in entries], indent=1).encode())
    sys.stdout.write(format_annotators(entries))
    say_next("relabel", "build", "IMAGES", "OUT", "--annotator", entries[0].model if entries else "MODEL")
