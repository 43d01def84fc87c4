"""`relabel import`: convert published soft labels to shards."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..labels.encodings import ENCODINGS
from .annotator_options import add_annotator_arguments, annotator_from, check_annotator_package
from .build import add_writing_options, describe_result
from .next_step import say_next
from .options import add_command, add_config, add_split, path_argument

if TYPE_CHECKING:
    from ..shards.manifest import Manifest

_MAP_FORMATS = ("relabel", "tokenlabeling")
_CROP_FORMATS = ("fkd", "imagenet-plus")


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "import",
        "convert soft labels published by ReLabel, TokenLabeling, FKD, FerKD or ImageNet+ to shards",
        _run,
        examples=[
            "relabel import imagenet_efficientnet_l2_sz475_top5 OUT --order wh --images ILSVRC/train",
            "relabel import FKD_soft_label_500_crops_marginal_smoothing_k_5 OUT --images ILSVRC/train",
        ],
        note="Imports of crop labels are resumable: rerun the same command after any interruption.",
    )
    parser.add_argument(
        "source", metavar="SOURCE",
        help="folder or uncompressed tar of a release: <class>/<name>.pt of ReLabel or TokenLabeling, <class>/<name>.tar of FKD or "
        "FerKD, or <index>.pth.tar of ImageNet+",
    )  # fmt: skip
    parser.add_argument(
        "out", type=path_argument, metavar="OUT", help="folder of the dataset; the config is written to OUT/CONFIG"
    )
    parser.add_argument(
        "--format", choices=[*_MAP_FORMATS, *_CROP_FORMATS],
        help="project that published the files; fkd also for FerKD (default: recognized by the files)",
    )  # fmt: skip
    parser.add_argument(
        "--images", metavar="PATH",
        help="ImageFolder of the same images, from which their sizes are read; required for crop labels",
    )  # fmt: skip
    parser.add_argument("--include-images", action="store_true", help="store the image files in the shards")
    parser.add_argument(
        "--classes", type=path_argument, metavar="FILE",
        help="text file with the class folders in order, one per line (default: sorted)",
    )  # fmt: skip
    add_config(parser, default="the name of the format")
    add_split(parser)
    storage_dtypes = ENCODINGS["topk"].storage_dtypes  # that of all releases of label maps
    add_writing_options(parser, storage_dtypes=list(storage_dtypes), default=f"{storage_dtypes[0]}; only label maps")
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="skip and list corrupt or unmatched files instead of stopping at the first",
    )
    add_release_options(parser)
    add_annotator_arguments(parser, default="")  # only --order auto needs one


def add_release_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of what releases leave open."""
    parser.add_argument(
        "--order", choices=["hw", "wh", "auto"],
        help="order of the last two axes of label maps, which need it; auto detects it with an annotator (needs --images and "
        "--annotator)",
    )  # fmt: skip
    parser.add_argument(
        "--label-type", metavar="TYPE",
        help="type of FKD's labels: hard, smoothing, marginal_smoothing_k5, marginal_smoothing_k10 or marginal_renorm "
        "(default: by their shape, with marginal smoothing for the last three)",
    )  # fmt: skip


def _run(args: argparse.Namespace) -> None:
    from ..annotate.release_formats import find_format

    check_annotator_package(args)
    args.format = args.format or find_format(args.source)
    classes = None if args.classes is None else args.classes.read_text(encoding="utf-8").splitlines()
    manifest = _import_crops(args, classes) if args.format in _CROP_FORMATS else _import_maps(args, classes)
    images = None if args.include_images else args.images or "path/to/images"
    sys.stdout.write(describe_result(manifest, args.out, args.split, images))
    say_next("relabel", "verify", args.out)


def _import_crops(args: argparse.Namespace, classes: Sequence[str] | None) -> Manifest:
    from ..annotate.crop_importers import import_crops
    from ..annotate.published_crops import PublishedCrops

    for option, value in (("--order", args.order), ("--storage-dtype", args.storage_dtype)):
        if value is not None:
            raise ValueError(f"{option} is for label maps, but {args.source} has crop labels ({args.format})")
    if not args.images:
        raise ValueError(
            f"{args.source} has crop labels ({args.format}), whose boxes belong to images: give --images, the ImageFolder of the images"
        )
    crops = PublishedCrops(
        args.source, args.format, args.images, split=args.split, label_type=args.label_type, classes=classes
    )
    return import_crops(
        crops,
        args.out,
        include_images=args.include_images,
        config=args.config,
        shard_size=args.shard_size,
        skip_bad=args.skip_bad,
        num_threads=args.num_threads,
        card=args.card,
    )


def _import_maps(args: argparse.Namespace, classes: Sequence[str] | None) -> Manifest:
    from ..annotate.importers import import_label_maps
    from ..annotate.orientation import detect_order
    from ..annotate.published import PublishedMaps

    if args.label_type is not None:
        raise ValueError(f"--label-type is for files of FKD, but {args.source} has label maps ({args.format})")
    if args.order is None:
        raise ValueError(
            f"{args.source} has label maps ({args.format}), which do not say which axis is the height: give --order hw, wh or auto"
        )
    if args.order == "auto" and not (args.images and args.annotator):
        raise ValueError(
            "--order auto compares the label maps with those of an annotator: give --images and --annotator, or --order hw or wh"
        )
    maps = PublishedMaps(args.source, args.format, classes)
    order = args.order
    if order == "auto":
        check = detect_order(maps, args.images, annotator_from(args), split=args.split)
        sys.stderr.write(f"order {check.order}: {check}\n")
        order = check.order
    return import_label_maps(
        maps,
        args.out,
        order=order,
        images=args.images,
        include_images=args.include_images,
        config=args.config,
        split=args.split,
        storage_dtype=args.storage_dtype,
        shard_size=args.shard_size,
        skip_bad=args.skip_bad,
        num_threads=args.num_threads,
        card=args.card,
    )
