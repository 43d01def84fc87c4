"""`relabel analyze`: statistics of label maps, stored crops and objects."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..extras import install_command, is_installed
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
        "analyze",
        "measure label maps or stored crops, and objects, and list images whose label may be wrong",
        _run,
        examples=["relabel analyze OUT --out analysis", "relabel analyze OUT --split validation --boxes boxes.csv"],
        note="Give a dataset, --boxes, or both. Images are not read.",
    )
    add_path(parser, nargs="?")
    add_config(parser)
    add_split(parser)
    add_boxes(parser)
    add_num_crops(parser)
    add_num_samples(parser, "to measure, evenly spaced")
    parser.add_argument("--seed", type=int, default=0, help="seed of the crops (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=path_argument,
        metavar="FOLDER",
        help="folder for analysis.json, CSV tables and, with matplotlib, plots",
    )


def _run(args: argparse.Namespace) -> None:
    from ..analysis.analysis import analyze
    from ..report.plots import save_plots
    from ..storage.local import write_atomically

    has_plots = args.out is not None and is_installed("plots")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)  # fail before minutes of work
        if not has_plots:
            sys.stderr.write(f"writing tables without plots, which need matplotlib: {install_command('plots')}\n")
    analysis = analyze(
        args.path, args.config, args.split, boxes=args.boxes, num_crops=args.num_crops, num_samples=args.num_samples,
        seed=args.seed,
    )  # fmt: skip
    sys.stdout.write(f"{analysis}\n")
    if args.out is not None:
        for name, table in analysis.tables.items():
            write_atomically(args.out / f"{name}.csv", table.to_csv().encode())
        if has_plots:
            save_plots(analysis, args.out)
        write_atomically(args.out / "analysis.json", analysis.to_json().encode())
        sys.stdout.write(f"tables{' and plots' if has_plots else ''}: {args.out}\n")
    if args.path is None:
        say_next("relabel", "build", "IMAGES", "OUT", "--annotator", "MODEL")
    else:
        say_next("relabel", "report", args.path, *config_words(args.config), "--split", args.split)
