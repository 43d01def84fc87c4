"""`relabel import`: convert published label maps to shards."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..labels.encodings import ENCODINGS
from .annotator_options import add_annotator_arguments, annotator_from, check_annotator_package
from .build import add_writing_options, describe_result
from .next_step import say_next
from .options import add_command, add_config, add_split, path_argument


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "import",
        "convert label maps published by ReLabel or TokenLabeling to shards",
        _run,
        examples=[
            "relabel import imagenet_efficientnet_l2_sz475_top5 OUT --format relabel --order wh --images ILSVRC/train"
        ],
    )
    parser.add_argument("source", metavar="SOURCE", help="folder or uncompressed tar of <class>/<name>.pt files")
    parser.add_argument(
        "out", type=path_argument, metavar="OUT", help="folder of the dataset; the config is written to OUT/CONFIG"
    )
    parser.add_argument(
        "--format", choices=["relabel", "tokenlabeling"], required=True, help="project that published the files"
    )
    parser.add_argument(
        "--order", choices=["hw", "wh", "auto"], required=True,
        help="order of the last two axes; auto detects it with an annotator (needs --images and --annotator)",
    )  # fmt: skip
    parser.add_argument(
        "--images", metavar="PATH", help="ImageFolder of the same images, from which their sizes are read"
    )
    parser.add_argument("--include-images", action="store_true", help="store the image files in the shards")
    parser.add_argument(
        "--classes", type=path_argument, metavar="FILE",
        help="text file with the class folders in order, one per line (default: sorted)",
    )  # fmt: skip
    add_config(parser, default="the name of the format")
    add_split(parser)
    storage_dtypes = ENCODINGS["topk"].storage_dtypes  # that of all releases
    add_writing_options(parser, storage_dtypes=list(storage_dtypes), default=storage_dtypes[0])
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="skip and list corrupt or unmatched files instead of stopping at the first",
    )
    add_annotator_arguments(parser, default="")  # only --order auto needs one


def _run(args: argparse.Namespace) -> None:
    from ..annotate.importers import import_label_maps
    from ..annotate.orientation import detect_order
    from ..annotate.published import PublishedMaps

    check_annotator_package(args)
    if args.order == "auto" and not (args.images and args.annotator):
        raise ValueError(
            "--order auto compares the label maps with those of an annotator: give --images and --annotator, or --order hw or wh"
        )
    classes = None if args.classes is None else args.classes.read_text(encoding="utf-8").splitlines()
    maps = PublishedMaps(args.source, args.format, classes)
    order = args.order
    if order == "auto":
        check = detect_order(maps, args.images, annotator_from(args), split=args.split)
        sys.stderr.write(f"order {check.order}: {check}\n")
        order = check.order
    manifest = import_label_maps(
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
    images = None if args.include_images else args.images or "path/to/images"
    sys.stdout.write(describe_result(manifest, args.out, args.split, images))
    say_next("relabel", "verify", args.out)
