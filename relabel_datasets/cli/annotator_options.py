"""Options that choose an annotator: a timm model, a transformers model, or a user's own."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .options import add_model_kwargs, path_argument, positive

if TYPE_CHECKING:
    from ..annotate.annotator import Annotator

_TIMM_SOURCES = ("hf-hub:", "hf_hub:", "local-dir:", "modelscope:")  # what timm takes before a colon


def add_annotator_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add the options that choose an annotator. Builder scripts use them as well.

    Args:
        parser: Parser of the command.
        default: Annotator to use if none is given. None makes `--annotator` required.
    """
    group = parser.add_argument_group("annotator")
    group.add_argument(
        "--annotator", metavar="MODEL", required=default is None, default=default,
        help="timm model, hf:NAME of a transformers model, or your own package.module:function or path/to/file.py:function"
        + (f" (default: {default})" if default else ""),
    )  # fmt: skip
    group.add_argument(
        "--checkpoint", type=path_argument, metavar="FILE",
        help="file with the weights of a timm model (default: the pretrained ones, downloaded)",
    )  # fmt: skip
    group.add_argument(
        "--input-size", type=positive, nargs="+", metavar="PX",
        help="side, or height and width, that images are resized to, in pixels (default: that of the model)",
    )  # fmt: skip
    group.add_argument(
        "--mean",
        type=float,
        nargs=3,
        metavar=("R", "G", "B"),
        help="mean of normalized pixels (default: that of the model)",
    )
    group.add_argument(
        "--std", type=float, nargs=3, metavar=("R", "G", "B"),
        help="standard deviation of normalized pixels (default: that of the model)",
    )  # fmt: skip
    group.add_argument("--interpolation", help="interpolation of the resize (default: that of the model)")
    add_model_kwargs(group)
    group.add_argument(
        "--classes-file", type=path_argument, metavar="FILE",
        help="text file with the names of the annotator's classes, one per line (default: those of the model)",
    )  # fmt: skip
    group.add_argument(
        "--head", choices=["local", "linearised"], default="local",
        help="maps of nonlinear heads: apply the head at each location, or linearize it so that the mean over the image "
        "equals the output of the model (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--flip", action="store_true", help="average the maps of the image and its mirror image, at twice the cost"
    )
    group.add_argument(
        "--scales",
        type=float,
        nargs="+",
        metavar="X",
        help="average over input sizes, given as factors of --input-size",
    )
    group.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32",
        help="precision of the forward pass (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--device", help="device such as cuda or cpu (default: cuda if available)")
    group.add_argument("--compile", action="store_true", help="use torch.compile: a slower start, then faster")


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
        from ..annotate.combine import Ensemble, FlipAveraged

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
        from ..annotate.hf_annotator import HFAnnotator

        _refuse(args, name, "checkpoint", "model_kwargs")
        hf = partial(HFAnnotator, name.removeprefix("hf:"), head=args.head, **options)
        return lambda size: hf(input_size=size)
    if ":" in name and not name.startswith(_TIMM_SOURCES):
        from ..annotate.custom import load_annotator

        _refuse(args, name, "checkpoint", "model_kwargs", *(["head"] if args.head != "local" else []))
        return lambda size: load_annotator(name, **options, **({} if size is None else {"input_size": size}))
    from ..annotate.timm_annotator import TimmAnnotator  # timm takes seconds to import

    weights = {"pretrained": args.checkpoint is None, "checkpoint": args.checkpoint}
    return lambda size: TimmAnnotator(name, input_size=size, head=args.head, **weights, **options, **args.model_kwargs)


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
