"""`relabel train`, which also runs as `torchrun -m relabel_datasets.train`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from ..train.recipe import PRESETS
from .options import add_command, add_config, path_argument
from .runner import Parser, run_command
from .student_options import (
    add_data_options,
    add_recipe_options,
    add_runtime_options,
    load_splits,
    recipe_values,
    remake,
    runtime_from,
)


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "train",
        "train a student on a dataset with label maps",
        _run,
        examples=[
            "relabel train scenes-relabel --out runs/relabel --model resnet18 --epochs 20",
            "torchrun --nproc-per-node 8 -m relabel_datasets.train OUT --out runs/relabel --preset relabel-cutmix",
        ],
        note="Runs are resumable: rerun the same command after an interruption.",
    )
    _add_arguments(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Train as `python -m relabel_datasets.train` or under torchrun.

    Args:
        argv: Arguments of the command line. Default: those of this process.

    Returns:
        The exit code, see `run_command`.
    """
    return run_command(_make_parser, argv)


def _make_parser() -> Parser:
    parser = Parser(prog="relabel_datasets.train")
    _add_arguments(parser)
    parser.set_defaults(run=_run)
    return parser


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_options(parser)
    parser.add_argument(
        "--out",
        type=path_argument,
        required=True,
        metavar="FOLDER",
        help="folder of the run; an existing run is resumed",
    )
    add_config(parser)
    parser.add_argument(
        "--preset", choices=list(PRESETS), default="relabel", help="recipe to start from (default: %(default)s)"
    )
    add_recipe_options(parser)
    add_runtime_options(parser)


def _run(args: argparse.Namespace) -> None:
    from ..train.loop import train_student

    logging.getLogger("timm").setLevel(logging.WARNING)  # timm logs the list of checkpoints after each epoch
    recipe = PRESETS[args.preset].changed(**recipe_values(args))
    dataset, validation = load_splits(args, args.config)
    annotator = remake(args, args.config) if recipe.label_config.distilled else None
    trained = train_student(
        dataset, args.out, recipe, validation=validation, annotator=annotator, runtime=runtime_from(args)
    )
    if os.environ.get("RANK", "0") == "0":  # under torchrun, all ranks have the metrics
        formats = {"ece": ".4f"}  # the others are shares
        metrics = "".join(f", {name} {value:{formats.get(name, '.1%')}}" for name, value in trained.metrics.items())
        sys.stdout.write(f"{args.out}{metrics}\n")
