"""`relabel train`, which also runs as `torchrun -m relabel_datasets.train`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from .next_step import config_words, say_next
from .options import add_command, add_config, path_argument
from .recipe_choice import AUTO, add_preset, recipe_from
from .runner import Parser, run_command
from .student_options import (
    add_data_options,
    add_recipe_options,
    add_runtime_options,
    load_splits,
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
            "relabel train OUT --out run",
            "relabel train OUT --out run --epochs 20 --labels single",
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
    add_preset(parser)
    add_recipe_options(parser)
    add_runtime_options(parser)


def _run(args: argparse.Namespace) -> None:
    from ..train.loop import train_student

    logging.getLogger("timm").setLevel(logging.WARNING)  # timm logs the list of checkpoints after each epoch
    if args.preset != AUTO:
        recipe_from(args, 0)  # errors in its values come before the dataset is opened
    runtime = runtime_from(args)
    dataset, validation = load_splits(args, args.config)
    recipe = recipe_from(args, len(dataset))
    annotator = remake(args, args.config) if recipe.label_config.distilled else None
    trained = train_student(dataset, args.out, recipe, validation=validation, annotator=annotator, runtime=runtime)
    if os.environ.get("RANK", "0") == "0":  # under torchrun, all ranks have the metrics
        metrics = "".join(f", {name} {value:.1%}" for name, value in trained.metrics.items())
        sys.stdout.write(f"{args.out}{metrics}\n")
        _say_next(args, validation is None)


def _say_next(args: argparse.Namespace, is_unvalidated: bool) -> None:
    from ..train.checkpoints import BEST, LAST

    checkpoint = args.out / (LAST if is_unvalidated else BEST)
    if args.validation_images is not None:
        say_next("relabel", "evaluate", checkpoint, args.validation_images)
    elif is_unvalidated or args.images is not None:
        say_next("relabel", "evaluate", checkpoint, "IMAGES", note="with images that the student has not seen")
    else:
        split = [] if args.validation is None else ["--split", args.validation]
        say_next("relabel", "evaluate", checkpoint, args.path, *config_words(args.config), *split)
