"""`relabel train` and `relabel compare`; the first also as `torchrun -m relabel_datasets.train`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from functools import partial
from typing import TYPE_CHECKING

from ..image_options import add_image_column, images_to_join
from ..runner import Parser, path_argument, run_command
from ..shards.manifest import Manifest
from .options import add_options, given_options
from .recipe import PRESETS, Machine, Recipe

if TYPE_CHECKING:
    from ..annotate.annotator import Annotator
    from ..data.datasets import RelabelDataset
    from .compare import Student

_IMAGES = (
    "where a label-only dataset finds its images: an ImageFolder, WebDataset tars, or the folder above both splits"
)


def add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of `relabel`."""
    train = commands.add_parser(
        "train", help="train a student", epilog="On several GPUs: torchrun --nproc-per-node N -m relabel_datasets.train ..."
    )  # fmt: skip
    _add_train_arguments(train)
    train.set_defaults(run=_train)


def add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of `relabel`."""
    compare = commands.add_parser(
        "compare", help="score several annotators' label maps, and train students on them, in one table"
    )
    _add_data_arguments(compare)
    compare.add_argument("--configs", nargs="+", metavar="CONFIG", help="(default: all of the dataset)")
    compare.add_argument(
        "--presets", nargs="+", choices=list(PRESETS), default=[],
        help="train a student of each, and of each config where it learns from label maps (default: only score these)",
    )  # fmt: skip
    compare.add_argument("--seeds", type=int, default=3, help="students of each (default: %(default)s)")
    compare.add_argument(
        "--out", type=path_argument, metavar="FOLDER", help="of the runs, and of table.md and results.json"
    )
    add_options(compare, Recipe, "recipe, of all students; what is not given is the preset's", ("labels", "seed"))
    add_options(compare, Machine, "machine")
    compare.set_defaults(run=_compare)


def main() -> int:
    """Train as `python -m relabel_datasets.train` or under torchrun; return the exit code, see `run_command`."""
    return run_command(_train_parser)


def _train_parser() -> Parser:
    parser = Parser(prog="relabel_datasets.train")
    _add_train_arguments(parser)
    parser.set_defaults(run=_train)
    return parser


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    _add_data_arguments(parser)
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="FOLDER", help="of the run; if it is there, it goes on"
    )
    parser.add_argument("--config", help="may be left out where there is only one")
    parser.add_argument("--preset", choices=list(PRESETS), default="relabel", help="(default: %(default)s)")
    add_options(parser, Recipe, "recipe; what is not given is the preset's")
    add_options(parser, Machine, "machine")


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", help="folder, URL, org/name on the Hub, or short name")
    parser.add_argument("--images", metavar="PATH", help=_IMAGES)
    add_image_column(parser)
    parser.add_argument("--split", default="train", help="to learn from (default: %(default)s)")
    parser.add_argument("--validation", default="validation", metavar="SPLIT", help="(default: %(default)s)")
    parser.add_argument("--validation-images", metavar="PATH", help="where it finds its images (default: --images)")
    group = parser.add_argument_group("annotator, where labels are distilled: the one that made the label maps")
    group.add_argument(
        "--checkpoint", type=path_argument, help="its weights (default: the pretrained ones, downloaded)"
    )
    group.add_argument("--annotator-size", type=int, metavar="PX", help="that it sees crops at (default: of the maps)")


def _train(args: argparse.Namespace) -> None:
    from .loop import train_student  # timm takes seconds to import

    logging.getLogger("timm").setLevel(logging.WARNING)  # it lists its checkpoints after each epoch
    recipe = PRESETS[args.preset].changed(**given_options(args, Recipe))
    dataset, validation = _load(args, args.config)
    annotator = _annotator(args, args.config) if recipe.told.distilled else None
    machine = Machine(**given_options(args, Machine))
    trained = train_student(dataset, args.out, recipe, validation=validation, annotator=annotator, machine=machine)
    if os.environ.get("RANK", "0") == "0":  # under torchrun all ranks know
        shares = "".join(f", {name} {value:.4f}" for name, value in trained.metrics.items())
        sys.stdout.write(f"{args.out}{shares}\n")


def _compare(args: argparse.Namespace) -> None:
    from ..data.store import LabelMaps
    from ..storage.local import write_atomically
    from .compare import compare, score_label_maps

    logging.getLogger("timm").setLevel(logging.WARNING)  # see _train
    if args.presets and args.out is None:
        raise ValueError("students need a folder for their runs: give --out")
    configs = args.configs or _all_configs(args.dataset)
    sys.stdout.write("| label maps | top1 | ece |\n| --- | ---: | ---: |\n")
    for config in configs:
        scores = score_label_maps(LabelMaps(args.dataset, config, args.split))
        sys.stdout.write(f"| {config} | {100 * scores['top1']:.1f} | {scores['ece']:.3f} |\n")
    if args.presets:
        students = [student for preset in args.presets for student in _students(args, preset, configs)]
        found = compare(students, args.out, seeds=args.seeds, machine=Machine(**given_options(args, Machine)))
        sys.stdout.write(f"\n{found.to_markdown()}")
        write_atomically(args.out / "table.md", found.to_markdown().encode())
        write_atomically(args.out / "results.json", found.to_json().encode())


def _students(args: argparse.Namespace, preset: str, configs: list[str]) -> list[Student]:
    """Return a student of each config where the preset learns from label maps, else one."""
    from .compare import Student

    recipe = PRESETS[preset].changed(**given_options(args, Recipe))
    students = []
    for config in configs if recipe.told.pooled else configs[:1]:
        name = f"{preset}, {config}" if recipe.told.pooled else preset
        annotator = partial(_annotator, args, config) if recipe.told.distilled else None
        students.append(Student(name, recipe, partial(_load, args, config), annotator))
    return students


def _load(args: argparse.Namespace, config: str | None) -> tuple[RelabelDataset, RelabelDataset]:
    """Return the images to learn from, and those to validate on."""
    return (
        _load_split(args, config, args.split, args.images),
        _load_split(args, config, args.validation, args.validation_images or args.images),
    )


def _load_split(args: argparse.Namespace, config: str | None, split: str, images: str | None) -> RelabelDataset:
    from ..data.loading import load_dataset

    return load_dataset(args.dataset, config, split, images=images_to_join(images, split, args.image_column))


def _annotator(args: argparse.Namespace, config: str | None) -> Annotator:
    from ..annotate.remake import remake_annotator
    from ..shards.configs import open_config
    from ..storage.resolve import open_folder

    description = open_config(open_folder(args.dataset), config)[1].annotator
    device = getattr(args, "device", None)
    return remake_annotator(description, checkpoint=args.checkpoint, input_size=args.annotator_size, device=device)


def _all_configs(path: str) -> list[str]:
    from ..storage.resolve import open_folder

    folder = open_folder(path)
    configs = folder.configs()
    return [Manifest.read(folder).config] if configs is None else configs
