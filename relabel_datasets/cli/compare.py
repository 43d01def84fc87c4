"""`relabel compare`: compare the label maps of several annotators and the students trained on them."""

from __future__ import annotations

import argparse
import logging
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from ..train.recipe import PRESETS
from .options import add_command, path_argument, positive
from .student_options import (
    add_data_options,
    add_recipe_options,
    add_runtime_options,
    load_splits,
    recipe_values,
    remake,
    runtime_from,
)

if TYPE_CHECKING:
    from ..train.comparison import ComparisonEntry


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "compare",
        "compare the label maps of several annotators and the students trained on them",
        _run,
        examples=[
            "relabel compare OUT",
            "relabel compare OUT --presets single-label relabel --out runs --model resnet18 --epochs 20",
        ],
    )
    add_data_options(parser)
    parser.add_argument(
        "--configs", nargs="+", metavar="CONFIG", help="names of the configs to compare (default: all of the dataset)"
    )
    parser.add_argument(
        "--presets", nargs="+", choices=list(PRESETS), default=[],
        help="recipes to train students with, one per config if the recipe uses label maps (default: score label maps only)",
    )  # fmt: skip
    parser.add_argument(
        "--seeds",
        type=positive,
        default=3,
        help="number of students per row of the table, trained with seeds 0, 1, ... (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=path_argument, metavar="FOLDER", help="folder for the runs, table.md and results.json"
    )
    add_recipe_options(parser, leave_out=("labels", "seed"))
    add_runtime_options(parser)


def _run(args: argparse.Namespace) -> None:
    from ..data.store import LabelMaps
    from ..storage.local import write_atomically
    from ..train.comparison import compare, score_label_maps

    logging.getLogger("timm").setLevel(logging.WARNING)  # it logs its checkpoints after each epoch
    if args.presets and args.out is None:
        raise ValueError("--presets needs a folder for the runs of the students: give --out")
    configs = args.configs or _all_configs(args.path)
    sys.stdout.write("| label maps | top1 | ece |\n| --- | ---: | ---: |\n")
    for config in configs:
        scores = score_label_maps(LabelMaps(args.path, config, args.split))
        sys.stdout.write(f"| {config} | {100 * scores['top1']:.1f} | {scores['ece']:.3f} |\n")
    if args.presets:
        entries = [entry for preset in args.presets for entry in _entries(args, preset, configs)]
        comparison = compare(entries, args.out, seeds=args.seeds, runtime=runtime_from(args))
        sys.stdout.write(f"\n{comparison.to_markdown()}")
        write_atomically(args.out / "table.md", comparison.to_markdown().encode())
        write_atomically(args.out / "results.json", comparison.to_json().encode())


def _entries(args: argparse.Namespace, preset: str, configs: list[str]) -> list[ComparisonEntry]:
    """Return one entry per config if the preset uses label maps, else one in total."""
    from ..train.comparison import ComparisonEntry

    # A temperature or a label weight is meant for the rows with soft labels. The baselines next to them have none.
    values = {name: value for name, value in recipe_values(args).items() if PRESETS[preset].uses(name)}
    recipe = PRESETS[preset].changed(**values)
    entries = []
    for config in configs if recipe.label_config.pooled else configs[:1]:
        name = f"{preset}, {config}" if recipe.label_config.pooled else preset
        annotator = partial(remake, args, config) if recipe.label_config.distilled else None
        entries.append(ComparisonEntry(name, recipe, partial(load_splits, args, config), annotator))
    return entries


def _all_configs(path: str) -> list[str]:
    from ..shards.manifest import Manifest
    from ..storage.resolve import open_folder

    folder = open_folder(path)
    configs = folder.configs()
    return [Manifest.read(folder).config] if configs is None else configs
