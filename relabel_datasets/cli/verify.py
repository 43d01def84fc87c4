"""`relabel verify`: check a dataset."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .next_step import say_next
from .options import add_command, add_config, add_path, output_argument


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "verify",
        "check all bytes and all samples of a local or remote dataset",
        _run,
        examples=["relabel verify OUT", "relabel verify org/name --revision v1 --json report.json"],
        note="The exit code is 1 if there are problems.",
    )
    add_path(parser)
    add_config(parser, default="all configs")
    parser.add_argument(
        "--revision", help="branch, tag or commit of a dataset on the Hub (default: the default branch)"
    )
    parser.add_argument(
        "--json",
        type=_json_argument,
        metavar="FILE",
        help="also write the whole report to this JSON file; - is stdout",
    )
    parser.add_argument(
        "--num-workers", type=int, metavar="N", help="worker processes; 0 checks in this process (default: one per CPU)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="check only sizes and SHA-256, and the samples of shards that differ"
    )


def _json_argument(text: str) -> Path:
    return Path(text) if text == "-" else output_argument(text)  # stdout needs no writable folder


def _run(args: argparse.Namespace) -> int:
    from ..shards.verification import verify
    from ..storage.local import write_atomically

    report = verify(args.path, args.config, revision=args.revision, num_workers=args.num_workers, quick=args.quick)
    if args.json == Path("-"):
        sys.stdout.write(f"{report.to_json()}\n")
        sys.stderr.write(f"{report}\n")
    else:
        sys.stdout.write(f"{report}\n")
        if args.json is not None:
            write_atomically(args.json, f"{report.to_json()}\n".encode())
    if report.ok:
        say_next("relabel", "inspect", args.path)
    else:
        say_next(note="repair the files above: run the same `relabel build` again, or download them again")
    return 0 if report.ok else 1
