"""`relabel analyze`: count, print, and write tables and plots."""

from __future__ import annotations

import argparse
import sys

from ..runner import path_argument


def add_analyze(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of `relabel`."""
    parser = commands.add_parser(
        "analyze", help="count what crops, label maps and objects have to do with each other",
        epilog="Give a dataset, --boxes, or both; images are not read.",
    )  # fmt: skip
    parser.add_argument("dataset", nargs="?", help="folder, URL, org/name on the Hub, or short name")
    parser.add_argument("--config", help="may be left out where there is only one")
    parser.add_argument("--split", default="train", help="(default: %(default)s)")
    parser.add_argument(
        "--boxes",
        type=path_argument,
        metavar="PATH",
        help="objects: COCO JSON, CSV, PASCAL VOC XML, or a folder of XML",
    )
    parser.add_argument(
        "--crops", type=int, default=100_000, metavar="N", help="over all images (default: %(default)s)"
    )
    parser.add_argument("--samples", type=int, metavar="N", help="look at this many images only, spread evenly")
    parser.add_argument("--seed", type=int, default=0, help="decides the crops (default: %(default)s)")
    parser.add_argument("--out", type=path_argument, metavar="FOLDER", help="for analysis.json, tables in CSV, plots")
    parser.set_defaults(run=_analyze)


def _analyze(args: argparse.Namespace) -> None:
    from ..analysis.analyze import analyze
    from ..storage.local import write_atomically
    from .plots import save_plots

    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)  # if it cannot be made, better now than after minutes
    analysis = analyze(
        args.dataset, args.config, args.split, boxes=args.boxes, num_crops=args.crops, num_samples=args.samples,
        seed=args.seed,
    )  # fmt: skip
    sys.stdout.write(f"{analysis}\n")
    if args.out is not None:
        for name, table in analysis.tables.items():
            write_atomically(args.out / f"{name}.csv", table.to_csv().encode())
        save_plots(analysis, args.out)
        write_atomically(args.out / "analysis.json", analysis.to_json().encode())
        sys.stdout.write(f"tables and plots: {args.out}\n")
