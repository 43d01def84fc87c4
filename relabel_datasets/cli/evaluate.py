"""`relabel evaluate`: compute the metrics of a classifier on images with classes."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ..cpus import num_cpus
from .image_options import add_columns
from .next_step import say_next
from .options import (
    add_boxes,
    add_command,
    add_config,
    add_json,
    add_model_kwargs,
    add_split,
    path_argument,
    positive,
)

_SHARES = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "real": "ReaL accuracy",
    "multi_label": "multi-label accuracy",
    "set_recall": "recall of all classes",
    "map": "mean average precision",
    "ece": "expected calibration error",
}


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "evaluate",
        "evaluate a student or any timm model on images with classes",
        _run,
        examples=[
            "relabel evaluate runs/student/model_best.pth.tar photos/validation",
            "relabel evaluate resnet50.a1_in1k photos/validation --pretrained --among",
        ],
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint of `relabel train`, or name of a timm model")
    parser.add_argument(
        "images",
        metavar="IMAGES",
        help="ImageFolder, WebDataset tars, Hugging Face dataset, or a dataset with label maps",
    )
    add_config(parser)
    add_split(parser, default="validation")
    add_columns(parser)
    add_boxes(parser)
    parser.add_argument(
        "--among",
        action="store_true",
        help="restrict predictions to the classes of the images (default: all classes of the model)",
    )
    parser.add_argument(
        "--image-size",
        type=positive,
        metavar="PX",
        help="side of the input in pixels (default: that of the checkpoint, or timm's test size)",
    )
    parser.add_argument(
        "--crop-pct", type=float, metavar="SHARE",
        help="share of each side that the center crop keeps, 0 to 1 (default: that of the checkpoint, or timm's)",
    )  # fmt: skip
    group = parser.add_argument_group("weights of a timm model")
    group.add_argument(
        "--pretrained", action="store_true", help="use timm's pretrained weights, downloaded if necessary"
    )
    group.add_argument(
        "--checkpoint", type=path_argument, metavar="FILE", help="file with the weights of the timm model"
    )
    add_model_kwargs(group)
    group = parser.add_argument_group("runtime")
    group.add_argument(
        "--batch-size", type=positive, default=64, metavar="N", help="images per batch (default: %(default)s)"
    )
    group.add_argument(
        "--num-workers",
        type=int,
        default=min(4, num_cpus()),
        metavar="N",
        help="worker processes that read images (default: %(default)s)",
    )
    group.add_argument("--device", help="device such as cuda, mps or cpu (default: cuda if available)")
    add_json(parser, "the metrics")


def _run(args: argparse.Namespace) -> None:
    from ..storage.local import write_atomically
    from ..train.classifier import load_classifier
    from ..train.evaluation import evaluate, open_images

    images = open_images(
        args.images, args.config, args.split, image_column=args.image_column, label_column=args.label_column
    )
    classifier = load_classifier(
        args.model,
        pretrained=args.pretrained,
        checkpoint=args.checkpoint,
        model_kwargs=args.model_kwargs or None,
        image_size=args.image_size,
        crop_pct=args.crop_pct,
        device=args.device,
    )
    metrics = evaluate(
        classifier,
        images,
        boxes=args.boxes,
        among=args.among,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
    )
    sys.stdout.write(to_markdown(metrics))
    if args.json is not None:
        write_atomically(args.json, (json.dumps(metrics, indent=1) + "\n").encode())
    say_next("relabel", "compare", "DATASET", "--labels", "single", "relabel", "--out", "runs")


def to_markdown(metrics: dict[str, Any]) -> str:
    """Format metrics as a table."""
    rows = [f"| {text} | {metrics[name]:.1%} |\n" for name, text in _SHARES.items() if name in metrics]
    return "| metric | value |\n| --- | ---: |\n" + "".join(rows)
