"""Options of the command line that choose an annotator: of timm, of transformers, or a user's own."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .runner import path_argument

if TYPE_CHECKING:
    from .annotate.annotator import Annotator

_TIMM_SOURCES = ("hf-hub:", "hf_hub:", "local-dir:", "modelscope:")  # what timm takes before a colon


def add_annotator_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add the options that choose an annotator; builder scripts use them, too."""
    group = parser.add_argument_group("annotator")
    group.add_argument(
        "--annotator",
        metavar="MODEL",
        required=default is None,
        default=default,
        help="any timm model, hf:NAME of transformers, or your own package.module:function or path/to/file.py:function",
    )
    group.add_argument("--checkpoint", type=path_argument, help="weights (default: timm's pretrained ones, downloaded)")
    group.add_argument("--input-size", type=int, nargs="+", metavar="PX", help="one side, or height and width")
    group.add_argument("--mean", type=float, nargs=3, help="(default: the model's own)")
    group.add_argument("--std", type=float, nargs=3, help="(default: the model's own)")
    group.add_argument("--interpolation", help="(default: the model's own)")
    group.add_argument(
        "--model-arg", action="append", default=[], metavar="KEY=VALUE", help="timm argument; repeatable"
    )
    group.add_argument("--classes-file", type=path_argument, metavar="FILE", help="names of its classes, one a line")
    group.add_argument(
        "--head",
        choices=["local", "linearised"],
        default="local",
        help="maps of heads that are not linear: the head at each location, or linearised, whose mean over the image "
        "is the model's own output (default: %(default)s)",
    )
    group.add_argument("--flip", action="store_true", help="mean over the image and its mirror image; twice the work")
    group.add_argument(
        "--scales", type=float, nargs="+", metavar="X", help="mean over input sizes, as factors of the one above"
    )
    group.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    group.add_argument("--device", help="such as cuda or cpu (default: cuda where there is one)")
    group.add_argument("--compile", action="store_true", help="through torch.compile: a minute to start, then faster")


def annotator_from(args: argparse.Namespace) -> Annotator:
    """Return the annotator that the options of `add_annotator_arguments` choose.

    Raises:
        ValueError: the options do not fit the annotator.
    """
    make = _factory(args)
    annotator = make(parse_size(args.input_size))
    annotators = [annotator]
    if args.scales:
        size = getattr(annotator, "input_size", None)
        grid = getattr(annotator, "map_size", None)
        if size is None or grid is None:
            raise ValueError(f"--scales needs a model that takes any input size: {args.annotator} has its own")
        sizes = [_scaled(size, grid, scale) for scale in args.scales]
        annotators = [annotator if other == size else make(other) for other in sizes]
    if args.flip or args.scales:
        from .annotate.combine import Ensemble, FlipAveraged

        members: Sequence[Annotator] = [FlipAveraged(one) for one in annotators] if args.flip else annotators
        return Ensemble(members) if args.scales else members[0]
    return annotator


def parse_size(values: Sequence[int] | None) -> tuple[int, int] | None:
    """Return (height, width) of the values of `--input-size`.

    Raises:
        ValueError: they are not one or two.
    """
    if values is None:
        return None
    if len(values) not in (1, 2):
        raise ValueError(f"--input-size takes one side, or height and width, got {list(values)}")
    return values[0], values[-1]


def _factory(args: argparse.Namespace) -> Callable[[tuple[int, int] | None], Annotator]:
    """Return what makes the annotator for an input size."""
    given = {
        "mean": args.mean,
        "std": args.std,
        "interpolation": args.interpolation,
        "dtype": None if args.dtype == "float32" else args.dtype,
        "device": args.device,
        "compile": args.compile or None,
        "classes": _read_classes(args.classes_file),
    }
    options = {key: value for key, value in given.items() if value is not None}
    name = args.annotator
    if name.startswith("hf:"):
        from .annotate.hf_annotator import HFAnnotator

        _refuse(args, name, "checkpoint", "model_arg")
        hf = partial(HFAnnotator, name.removeprefix("hf:"), head=args.head, **options)
        return lambda size: hf(input_size=size)
    if ":" in name and not name.startswith(_TIMM_SOURCES):
        from .annotate.custom import load_annotator

        _refuse(args, name, "checkpoint", "model_arg", *(["head"] if args.head != "local" else []))
        return lambda size: load_annotator(name, **options, **({} if size is None else {"input_size": size}))
    from .annotate.timm_annotator import TimmAnnotator  # timm takes seconds to import

    model_args = dict(map(_model_argument, args.model_arg))
    weights = {"pretrained": args.checkpoint is None, "checkpoint": args.checkpoint}
    return lambda size: TimmAnnotator(name, input_size=size, head=args.head, **weights, **options, **model_args)


def _refuse(args: argparse.Namespace, name: str, *options: str) -> None:
    wrong = [f"--{option.replace('_', '-')}" for option in options if getattr(args, option)]
    if wrong:
        raise ValueError(f"{' and '.join(wrong)} cannot be given for --annotator {name}, only for a timm model")


def _read_classes(path: Path | None) -> tuple[str, ...] | None:
    if path is None:
        return None
    return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def _scaled(size: tuple[int, int], grid: tuple[int, int], scale: float) -> tuple[int, int]:
    """Return an input size times a factor, rounded to whole locations."""
    if scale <= 0:
        raise ValueError(f"--scales takes positive factors, got {scale}")
    height, width = (_round(side * scale, side, cells) for side, cells in zip(size, grid, strict=True))
    return height, width


def _round(scaled: float, side: int, cells: int) -> int:
    stride = side // cells if side % cells == 0 else 32  # convolutions without padding give other numbers of cells
    return side if scaled == side else max(1, round(scaled / stride)) * stride


def _model_argument(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--model-arg takes KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value  # a word
