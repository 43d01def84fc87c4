"""Options of `relabel train` and `relabel compare`: datasets, recipe and runtime configuration."""

from __future__ import annotations

import argparse
import os
import sys
import types
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import DatasetError
from ..train.recipe import Recipe, RuntimeConfig
from ..words import counted
from .image_options import IMAGES_HELP, add_images, images_to_join
from .options import Repeated, add_model_kwargs, add_path, add_split, path_argument, positive

if TYPE_CHECKING:
    from ..annotate.annotator import Annotator
    from ..data.datasets import RelabelDataset
    from ..train.evaluation import LabeledImages

RECIPE_HELP = {
    "labels": "targets of the student: the class index (single, smoothed), the pooled label map (relabel), an ablation of it "
    "(global-multi, localized-single, global-single), the output of the annotator on each crop (distilled), or labels of crops "
    "and tokens (tokens)",
    "temperature": "divisor of the logits of label maps or of the annotator before the softmax; values above 1 soften the label. "
    "The student's logits are not divided, and the loss is not multiplied by the squared temperature",
    "label_weight": "weight W of the original class label, 0 to 1: the target is (1 - W) * soft label + W * one-hot label",
    "calibrated": "apply the gains of the dataset to labels pooled from label maps, which brings them closer to the annotator's answer "
    "to each crop",
    "num_crops": "different stored crops of each image in a batch, for datasets of the encoding crops; an image is decoded once for all of "
    "them, and an epoch has N times as many steps",
    "model": "name of a timm model",
    "model_kwargs": "additional arguments of timm.create_model, such as drop_rate=0.1",
    "image_size": "side of a training crop in pixels",
    "eval_size": "side of a validation image in pixels (default: as in training)",
    "crop_pct": "share of each side that the center crop of a validation image keeps, above 0 to 1",
    "min_area": "minimum share of the image area that a training crop shows, above 0 to 1",
    "color_jitter": "strength of color jitter; 0 turns it off",
    "auto_augment": "policy of timm's RandAugment and similar, such as rand-m9-mstd0.5-inc1",
    "random_erasing": "probability of random erasing, 0 to 1",
    "mixup": "alpha of mixup; 0 turns it off",
    "cutmix": "alpha of CutMix, or of MixToken for labels of tokens; 0 turns it off. With mixup, one of the two is drawn per batch",
    "mix_off_epochs": "number of final epochs without mixup and CutMix",
    "epochs": "number of passes over the training images",
    "batch_size": "crops per step over all ranks",
    "optimizer": "name of a timm optimizer",
    "learning_rate": "maximum learning rate, at this batch size",
    "momentum": "momentum of the optimizer, if it has one",
    "weight_decay": "weight decay of all weights except biases and norms",
    "warmup_epochs": "number of epochs in which the learning rate rises",
    "clip_grad": "maximum norm of the gradients (default: no clipping)",
    "ema_decay": "decay of the moving average of the weights, which is then validated and saved (default: no moving average)",
    "drop_path": "rate of stochastic depth",
    "dtype": "precision of the forward pass",
    "seed": "seed of the weights, the order, the crops and the mixing",
}
RUNTIME_HELP = {
    "device": "device such as cuda, mps or cpu (default: a GPU if available; under torchrun, one per rank)",
    "num_workers": "worker processes per rank that load crops",
    "channels_last": "use the memory format that convolutions prefer",
    "compile": "compile the student with torch.compile",
    "window": "number of shards that the shuffle mixes at a time",
    "save_every": "steps between checkpoints within an epoch; 0 saves only after each epoch",
    "validate_every": "epochs between validations; the last epoch is always validated",
    "log_every": "steps between rows of steps.csv",
    "tensorboard": "also log to TensorBoard",
    "progress": "show a progress bar",
}


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the training and validation datasets, and of the annotator of distilled labels."""
    add_path(parser)
    add_split(parser)
    parser.add_argument(
        "--validation",
        metavar="SPLIT",
        help="name of the validation split (default: validation, val or valid, if the dataset has one)",
    )
    add_images(parser, f"{IMAGES_HELP}; also the parent folder of both splits")
    parser.add_argument(
        "--validation-images", metavar="PATH",
        help="images to validate on: those to join with the validation split, or, if the dataset has none, an ImageFolder, tars or a "
        "Hugging Face dataset with the same classes, for which no label maps are needed (default: those of --images)",
    )  # fmt: skip
    group = parser.add_argument_group("annotator", "for distilled labels only: the annotator that made the label maps")
    group.add_argument(
        "--checkpoint",
        type=path_argument,
        action=Repeated,
        metavar="FILE",
        help="file with the weights of the annotator; for an ensemble, once per model in the order of the manifest (default: "
        "timm's pretrained weights, downloaded)",
    )
    group.add_argument(
        "--annotator-input-size", type=positive, metavar="PX",
        help="side of the input of the annotator in pixels (default: the input size of the label maps)",
    )  # fmt: skip


def add_recipe_options(parser: argparse.ArgumentParser, leave_out: tuple[str, ...] = ()) -> None:
    """Add an option for each value of a recipe, except for the names in `leave_out`."""
    group = parser.add_argument_group("recipe", "values that override those of the preset")
    _add_fields(group, Recipe, RECIPE_HELP, leave_out)


def add_runtime_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each value of the runtime configuration."""
    _add_fields(parser.add_argument_group("runtime"), RuntimeConfig, RUNTIME_HELP, (), show_defaults=True)


def recipe_values(args: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the recipe that are set by options."""
    return _values_set(args, Recipe)


def runtime_from(args: argparse.Namespace) -> RuntimeConfig:
    """Create the runtime configuration from the options."""
    return RuntimeConfig(**_values_set(args, RuntimeConfig))


def load_splits(args: argparse.Namespace, config: str | None) -> tuple[RelabelDataset, LabeledImages | None]:
    """Load the training dataset of a config and the validation images.

    Returns:
        The training dataset, and the validation images. None if there are none, which a note on stderr explains.

    Raises:
        DatasetError: (a ValueError) The dataset does not have the split of `--validation`.
    """
    from ..data.datasets import RelabelDataset
    from ..data.store import find_config
    from ..shards.configs import SPLIT_ALIASES
    from ..storage.resolve import open_folder
    from ..train.evaluation import open_images

    opened = find_config(open_folder(args.path), config)
    splits = opened.manifest.splits

    def load(split: str, images: str | None) -> RelabelDataset:
        return RelabelDataset(opened, split=split, images=images_to_join(images, split, args.image_column))

    dataset = load(args.split, args.images)
    name = args.validation or next(
        (name for name in ("validation", *SPLIT_ALIASES["validation"]) if name in splits), None
    )
    if name is not None:
        if splits.keys().isdisjoint((name, *SPLIT_ALIASES.get(name, ()))):
            raise DatasetError(f"the dataset has no split {name!r}, only {sorted(splits)}: choose another validation=")
        return dataset, load(name, args.validation_images or args.images)
    if args.validation_images is not None:
        return dataset, open_images(args.validation_images, image_column=args.image_column)
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(
            f"no validation: {args.path} has only {counted(len(splits), 'split')} ({', '.join(sorted(splits))}). To validate, give "
            "--validation SPLIT, or --validation-images FOLDER with a folder of images per class\n"
        )
    return dataset, None


def remake(args: argparse.Namespace, config: str | None) -> Annotator:
    """Recreate the annotator of a config."""
    from ..annotate.remake import remake_annotator

    size = args.annotator_input_size
    return remake_annotator(
        annotator_of(args.path, config), checkpoint=args.checkpoint, input_size=size, device=getattr(args, "device", None)
    )  # fmt: skip


def annotator_of(path: str, config: str | None) -> dict[str, Any]:
    """Return the description of the annotator of a config."""
    from ..shards.configs import open_config
    from ..storage.resolve import open_folder

    return open_config(open_folder(path), config)[1].annotator


def _add_fields(
    group: Any, cls: type, helps: Mapping[str, str], leave_out: tuple[str, ...], *, show_defaults: bool = False
) -> None:
    """Add an option for each field of a dataclass. Options without a value are absent from the namespace."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        if field.name in leave_out:
            continue
        flag, text, field_type = f"--{field.name.replace('_', '-')}", helps[field.name], hints[field.name]
        if show_defaults and "default:" not in text:
            text += f" (default: {field.default})"
        common: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        if field_type is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif get_origin(field_type) is Literal:
            group.add_argument(flag, choices=get_args(field_type), **common)
        elif get_origin(field_type) is Mapping:
            add_model_kwargs(group, default=argparse.SUPPRESS)
        else:
            plain_type = _without_none(field_type)
            metavar = {int: "N", float: "X"}.get(plain_type, field.name.rpartition("_")[2].upper())
            group.add_argument(flag, type=plain_type, metavar=metavar, **common)


def _values_set(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    return {field.name: getattr(args, field.name) for field in fields(cls) if hasattr(args, field.name)}


def _without_none(field_type: Any) -> Any:
    """Return the type of an optional value."""
    if get_origin(field_type) in (Union, types.UnionType):
        return next(option for option in get_args(field_type) if option is not type(None))
    return field_type
