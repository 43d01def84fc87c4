"""`relabel evaluate`: a classifier's metrics on any images with classes."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ..image_options import add_column_arguments
from ..runner import output_argument, path_argument
from .options import json_object

_SHARES = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "real": "ReaL accuracy",
    "multi_label": "multi-label accuracy",
    "set_recall": "recall of all classes",
    "map": "mean average precision",
}


def add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of `relabel`."""
    parser = commands.add_parser("evaluate", help="measure a student, or any timm model, on images with classes")
    parser.add_argument("model", help="checkpoint of `relabel train`, or name of a timm model")
    parser.add_argument("images", help="ImageFolder, WebDataset tars, HF dataset, or a dataset with label maps")
    parser.add_argument("--config", help="of a dataset with label maps; may be left out where there is only one")
    parser.add_argument("--split", default="validation", help="of a dataset (default: %(default)s)")
    add_column_arguments(parser)
    parser.add_argument(
        "--boxes",
        type=path_argument,
        metavar="PATH",
        help="objects: COCO JSON, CSV, PASCAL VOC XML, or a folder of XML",
    )
    parser.add_argument("--among", action="store_true", help="only the images' classes compete, not all of the model's")
    parser.add_argument("--image-size", type=int, metavar="PX", help="(default: of the checkpoint, or timm's)")
    parser.add_argument("--crop-pct", type=float, metavar="SHARE", help="(default: of the checkpoint, or timm's)")
    group = parser.add_argument_group("weights of a timm model by name")
    group.add_argument("--pretrained", action="store_true", help="those that timm knows for the name")
    group.add_argument("--weights", type=path_argument, metavar="FILE", help="those of a file")
    group.add_argument("--model-args", type=json_object, metavar="JSON", help="more arguments of timm.create_model")
    group = parser.add_argument_group("machine")
    group.add_argument("--batch-size", type=int, default=64, help="(default: %(default)s)")
    group.add_argument("--num-workers", type=int, default=4, help="processes that read images (default: %(default)s)")
    group.add_argument("--device", help="such as cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--json", type=output_argument, metavar="FILE", help="where to write the metrics as JSON, too")
    parser.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> None:
    from ..storage.local import write_atomically
    from .classifier import load_classifier  # timm takes seconds to import
    from .evaluate import evaluate, open_images

    images = open_images(
        args.images, args.config, args.split, image_column=args.image_column, label_column=args.label_column
    )
    classifier = load_classifier(
        args.model,
        pretrained=args.pretrained,
        weights=args.weights,
        model_args=args.model_args,
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


def to_markdown(metrics: dict[str, Any]) -> str:
    """Return a table of metrics."""
    rows = [f"| {text} | {metrics[name]:.2%} |\n" for name, text in _SHARES.items() if name in metrics]
    if "ece" in metrics:
        rows.append(f"| expected calibration error | {metrics['ece']:.4f} |\n")
    return "| metric | value |\n| --- | ---: |\n" + "".join(rows)
