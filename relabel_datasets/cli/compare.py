"""`relabel compare`: compare the label maps of several annotators and the students trained on them."""

from __future__ import annotations

import argparse
import logging
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from ..train.recipe import LABELS, PRESETS, Recipe
from .next_step import say_next
from .options import add_command, path_argument, positive
from .recipe_choice import derived_recipe
from .student_options import (
    add_data_options,
    add_recipe_options,
    add_runtime_options,
    annotator_of,
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
            "relabel compare OUT --labels single relabel --out runs",
            "relabel compare OUT --presets single-label relabel --out runs --batch-size 512",
        ],
    )
    add_data_options(parser)
    parser.add_argument(
        "--configs", nargs="+", metavar="CONFIG", help="names of the configs to compare (default: all of the dataset)"
    )
    students = parser.add_mutually_exclusive_group()
    students.add_argument(
        "--labels", nargs="+", choices=list(LABELS), default=[], dest="kinds",
        help="targets to train students with, by a recipe that fits the number of training images as in `relabel train` (default: "
        "score label maps only)",
    )  # fmt: skip
    students.add_argument(
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
    from ..annotate.remake import check_package
    from ..data.store import LabelMaps
    from ..shards.configs import open_config
    from ..storage.local import write_atomically
    from ..storage.resolve import open_folder
    from ..train.comparison import check_validation, compare, score_label_maps
    from ..train.loaders import check_labels

    logging.getLogger("timm").setLevel(logging.WARNING)  # it logs its checkpoints after each epoch
    if (args.presets or args.kinds) and args.out is None:
        option = "--presets" if args.presets else "--labels"
        raise ValueError(f"{option} needs a folder for the runs of the students: give --out")
    runtime = runtime_from(args)
    configs = args.configs or _all_configs(args.path)
    entries = []
    if args.presets or args.kinds:
        folder = open_folder(args.path)
        dataset, validation = load_splits(args, configs[0])
        check_validation(validation)  # fail before minutes of work
        recipes = _recipes(args, len(dataset))
        for config in configs:
            manifest = open_config(folder, config)[1]
            for recipe in recipes.values():
                check_labels(recipe, manifest)
        entries = [entry for name, recipe in recipes.items() for entry in _entries(args, name, recipe, configs)]
    if any(entry.recipe.label_config.distilled for entry in entries):
        for config in configs:
            check_package(annotator_of(args.path, config))
    sys.stdout.write("| label maps | top1, % | ece, % |\n| --- | ---: | ---: |\n")
    for config in configs:
        scores = score_label_maps(LabelMaps(args.path, config, args.split))
        sys.stdout.write(f"| {config} | {100 * scores['top1']:.1f} | {100 * scores['ece']:.1f} |\n")
    if entries:
        comparison = compare(entries, args.out, seeds=args.seeds, runtime=runtime)
        sys.stdout.write(f"\n{comparison.to_markdown()}")
        write_atomically(args.out / "table.md", comparison.to_markdown().encode())
        write_atomically(args.out / "results.json", comparison.to_json().encode())
        best = args.out / entries[0].name / "seed-0" / "model_best.pth.tar"
        say_next("relabel", "evaluate", best, "IMAGES", note="with images that the students have not seen")
    else:
        say_next("relabel", "compare", args.path, "--labels", "single", "relabel", "--out", "runs")


def _recipes(args: argparse.Namespace, num_images: int) -> dict[str, Recipe]:
    """Return the recipe of each preset, or of each kind of labels."""
    values = recipe_values(args)
    if args.presets:
        return {preset: PRESETS[preset].changed(**_used(PRESETS[preset], values)) for preset in args.presets}
    common = derived_recipe(args.out, num_images, _used(Recipe(labels="single"), values))
    recipes = {labels: common.changed(labels=labels) for labels in args.kinds}
    return {labels: recipe.changed(**_used(recipe, values)) for labels, recipe in recipes.items()}


def _used(recipe: Recipe, values: dict[str, Any]) -> dict[str, Any]:
    """Leave out a temperature or a label weight for the baselines, which have no soft labels."""
    return {name: value for name, value in values.items() if recipe.uses(name)}


def _entries(args: argparse.Namespace, preset: str, recipe: Recipe, configs: list[str]) -> list[ComparisonEntry]:
    """Return one entry per config if the recipe uses label maps, else one in total."""
    from ..train.comparison import ComparisonEntry

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
