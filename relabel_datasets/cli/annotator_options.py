"""Options that choose an annotator: a timm model, a transformers model, or a function of the user."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..extras import check_extra
from ..words import counted
from .options import Repeated, add_model_kwargs, path_argument, positive

if TYPE_CHECKING:
    from ..annotate.annotator import Annotator

REPEATABLE = ("checkpoint", "input_size", "mean", "std", "interpolation", "classes_file")
PRETRAINED = "pretrained"  # in place of a file of --checkpoint
_PER_ANNOTATOR = "; for an ensemble, once for all or once per --annotator (default: that of the model)"
_TIMM_SOURCES = ("hf-hub:", "hf_hub:", "local-dir:", "modelscope:")  # prefixes of timm.create_model


def add_annotator_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add the options that choose an annotator. Builder scripts use them as well.

    Args:
        parser: Parser of the command.
        default: Default of `--annotator`. None makes `--annotator` required.
    """
    group = parser.add_argument_group("annotator")
    group.add_argument(
        "--annotator", metavar="MODEL", required=default is None, default=[default] if default else [], action=Repeated,
        help="timm model, hf:NAME for a transformers model, or a function: package.module:function or path/to/file.py:function. "
        "Repeat it for an ensemble, whose logits are averaged" + (f" (default: {default})" if default else ""),
    )  # fmt: skip
    group.add_argument(
        "--checkpoint", type=path_argument, metavar="FILE", action=Repeated,
        help="file with the weights of a timm model; for an ensemble, once per --annotator in the same order, where "
        f"{PRETRAINED!r} stands for timm's weights (default: timm's pretrained weights, downloaded)",
    )  # fmt: skip
    group.add_argument(
        "--input-size", type=positive, nargs="+", metavar="PX", action=Repeated,
        help=f"size that images are resized to in pixels, one side or height and width{_PER_ANNOTATOR}",
    )  # fmt: skip
    group.add_argument(
        "--mean", type=float, nargs=3, metavar=("R", "G", "B"), action=Repeated,
        help=f"mean of normalized pixels{_PER_ANNOTATOR}",
    )  # fmt: skip
    group.add_argument(
        "--std", type=float, nargs=3, metavar=("R", "G", "B"), action=Repeated,
        help=f"standard deviation of normalized pixels{_PER_ANNOTATOR}",
    )  # fmt: skip
    group.add_argument("--interpolation", action=Repeated, help=f"interpolation of the resize{_PER_ANNOTATOR}")
    add_model_kwargs(group)
    group.add_argument(
        "--classes-file", type=path_argument, metavar="FILE", action=Repeated,
        help=f"text file with the names of the annotator's classes, one per line{_PER_ANNOTATOR}",
    )  # fmt: skip
    group.add_argument(
        "--head", choices=["local", "linearised"], default="local",
        help="label maps of nonlinear heads: apply the head at each location, or linearize it so that the mean over the image "
        "equals the output of the model (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--flip", action="store_true", help="average the maps of the image and its mirror image, at twice the cost"
    )  # fmt: skip
    group.add_argument(
        "--scales",
        type=float,
        nargs="+",
        metavar="X",
        help="input sizes, given as factors of --input-size, whose maps are averaged or, with --encoding multiscale, stored separately",
    )
    group.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32",
        help="precision of the forward pass (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--device", help="device such as cuda, mps or cpu (default: cuda if available)")
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compile the model with torch.compile, which takes about a minute (default: on a GPU, for at least 100,000 images or crops, "
        "if it can be compiled)",
    )


def check_annotator_package(args: argparse.Namespace) -> None:
    """Raise MissingExtraError if the package of an annotator is not installed, before anything else is done."""
    for name in args.annotator:
        if name.startswith("hf:"):
            check_extra("hf", f"--annotator {name}")


def annotator_from(args: argparse.Namespace, input_size: int | None = None) -> Annotator:
    """Create the annotator chosen by the options of `add_annotator_arguments`.

    Args:
        args: Parsed arguments.
        input_size: Side of the input in pixels, instead of `--input-size`. Default: that of the arguments.

    Returns:
        The annotator.

    Raises:
        ValueError: The options do not fit the annotator.
    """
    if input_size is not None:
        args = argparse.Namespace(**{**vars(args), "input_size": [[input_size]]})
    for name in REPEATABLE:
        _value_of(args, name, 0)  # before a model is loaded or downloaded
    members = [member for position in range(len(args.annotator)) for member in _members(args, position)]
    if len(args.annotator) == 1 and not args.scales:
        return members[0]
    from ..annotate.combine import Ensemble

    return Ensemble(members)


def _members(args: argparse.Namespace, position: int) -> list[Annotator]:
    """Create one annotator, or one for each of `--scales`, for the `--annotator` at a position."""
    create = _factory(args, position)
    annotator = create(parse_size(_value_of(args, "input_size", position)))
    members = [annotator]
    if args.scales:
        size = getattr(annotator, "input_size", None)
        grid = getattr(annotator, "map_size", None)
        if size is None or grid is None:
            raise ValueError(
                f"--scales needs a model with variable input size, but the input size of {args.annotator[position]} is fixed: "
                "leave out --scales"
            )
        sizes = [_scaled(size, grid, scale) for scale in args.scales]
        members = [annotator if scaled_size == size else create(scaled_size) for scaled_size in sizes]
    if args.flip:
        from ..annotate.combine import FlipAveraged

        return [FlipAveraged(member) for member in members]
    return members


def parse_size(values: Sequence[int] | None) -> tuple[int, int] | None:
    """Convert the values of `--input-size` to (height, width).

    Args:
        values: One side, or height and width, in pixels. None is returned unchanged.

    Returns:
        (height, width) in pixels, or None.

    Raises:
        ValueError: There are more than two values.
    """
    if values is None:
        return None
    if len(values) not in (1, 2):
        raise ValueError(f"--input-size must be one side, or height and width, got {list(values)}")
    return values[0], values[-1]


def _value_of(args: argparse.Namespace, name: str, position: int) -> Any:
    """Return the value of a repeatable option for the annotator at a position, or None if the option was not given.

    Raises:
        ValueError: The option was given neither once nor once per annotator. Weights are never shared.
    """
    values, expected = getattr(args, name), len(args.annotator)
    if not values:
        return None
    if len(values) == 1 and name != "checkpoint":
        return values[0]
    if len(values) != expected:
        option = f"--{name.replace('_', '-')}"
        pretrained = f", where {PRETRAINED!r} stands for timm's weights" if name == "checkpoint" else ""
        raise ValueError(
            f"{option} was given {counted(len(values), 'time')} for {counted(expected, 'annotator')}: give it once per "
            f"--annotator, in the same order{pretrained}"
        )
    return values[position]


def _factory(args: argparse.Namespace, position: int) -> Callable[[tuple[int, int] | None], Annotator]:
    """Return a function that creates the annotator at a position for an input size."""
    checkpoint = _value_of(args, "checkpoint", position)
    checkpoint = None if checkpoint == Path(PRETRAINED) else checkpoint
    values = {
        "mean": _value_of(args, "mean", position),
        "std": _value_of(args, "std", position),
        "interpolation": _value_of(args, "interpolation", position),
        "dtype": None if args.dtype == "float32" else args.dtype,
        "device": args.device,
        "compile": args.compile,
        "classes": _read_classes(_value_of(args, "classes_file", position)),
    }
    options = {key: value for key, value in values.items() if value is not None}
    name = args.annotator[position]
    given = {"--checkpoint": checkpoint, "--model-kwargs": args.model_kwargs}
    if name.startswith("hf:"):
        from ..annotate.hf_annotator import HFAnnotator

        _refuse(name, given)
        hf = partial(HFAnnotator, name.removeprefix("hf:"), head=args.head, **options)
        return lambda size: hf(input_size=size)
    if ":" in name and not name.startswith(_TIMM_SOURCES):
        from ..annotate.custom import load_annotator

        _refuse(name, {**given, "--head": args.head != "local"})
        return lambda size: load_annotator(name, **options, **({} if size is None else {"input_size": size}))
    from ..annotate.timm_annotator import TimmAnnotator  # timm takes seconds to import

    timm_annotator = partial(TimmAnnotator, name, pretrained=checkpoint is None, checkpoint=checkpoint, head=args.head)
    return lambda size: timm_annotator(input_size=size, **options, **args.model_kwargs)


def _refuse(name: str, given: Mapping[str, object]) -> None:
    wrong = [option for option, value in given.items() if value]
    if wrong:
        verb, them = ("applies", "it") if len(wrong) == 1 else ("apply", "them")
        raise ValueError(f"{' and '.join(wrong)} only {verb} to a timm model, got --annotator {name}: leave {them} out")


def _read_classes(path: Path | None) -> tuple[str, ...] | None:
    if path is None:
        return None
    return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def _scaled(size: tuple[int, int], grid: tuple[int, int], scale: float) -> tuple[int, int]:
    """Scale an input size, rounded to whole locations of the label map."""
    if scale <= 0:
        raise ValueError(f"--scales must be positive factors, got {scale}")
    height, width = (_round(side * scale, side, cells) for side, cells in zip(size, grid, strict=True))
    return height, width


def _round(scaled: float, side: int, cells: int) -> int:
    stride = side // cells if side % cells == 0 else 32  # convolutions without padding have other numbers of locations
    return side if scaled == side else max(1, round(scaled / stride)) * stride
