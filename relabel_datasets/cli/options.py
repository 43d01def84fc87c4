"""Options that several subcommands share, and the function that adds a subcommand."""

from __future__ import annotations

import argparse
import ast
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PATH_HELP = "dataset: a folder, a URL, org/name on the Hub, or a short name such as scenes-relabel"
BOXES_HELP = "boxes of objects: COCO JSON, CSV, PASCAL VOC XML, or a folder of XML files"


def add_command(
    commands: Any,
    name: str,
    help_text: str,
    run: Callable[[argparse.Namespace], int | None],
    *,
    examples: Sequence[str],
    note: str | None = None,
) -> argparse.ArgumentParser:
    """Add a subcommand.

    Args:
        commands: Subcommands of the parser, the result of `add_subparsers`.
        name: Name of the subcommand.
        help_text: Description of the subcommand, one sentence without a period.
        run: Function that runs the subcommand and returns its exit code. None means 0.
        examples: Command lines to show at the end of the help text.
        note: Sentences to show before the examples. Default: none.

    Returns:
        The parser of the subcommand.
    """
    lines = ["examples:" if len(examples) > 1 else "example:", *(f"  {example}" for example in examples)]
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help_text,
        description=f"{help_text[0].upper()}{help_text[1:]}.",
        epilog="\n".join([*([note, ""] if note else []), *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_path(parser: argparse.ArgumentParser, **kwargs: Any) -> None:
    """Add the argument PATH, the location of a dataset."""
    parser.add_argument("path", metavar="PATH", help=PATH_HELP, **kwargs)


def add_config(parser: argparse.ArgumentParser, default: str = "the only config of the dataset") -> None:
    """Add `--config`."""
    parser.add_argument(
        "--config", metavar="CONFIG", help=f"name of the config, one annotator's label maps (default: {default})"
    )


def add_split(parser: argparse.ArgumentParser, default: str = "train") -> None:
    """Add `--split`."""
    parser.add_argument("--split", default=default, help="name of the split (default: %(default)s)")


def add_boxes(parser: argparse.ArgumentParser) -> None:
    """Add `--boxes`."""
    parser.add_argument("--boxes", type=path_argument, metavar="PATH", help=BOXES_HELP)


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """Add `--json`."""
    parser.add_argument("--json", type=output_argument, metavar="FILE", help=f"also write {what} to this JSON file")


def add_num_samples(parser: argparse.ArgumentParser, what: str, default: int | None = None) -> None:
    """Add `--num-samples`."""
    shown = "all" if default is None else "%(default)s"
    parser.add_argument(
        "--num-samples",
        type=positive,
        default=default,
        metavar="N",
        help=f"number of samples {what} (default: {shown})",
    )


def add_num_crops(parser: argparse.ArgumentParser) -> None:
    """Add `--num-crops`."""
    parser.add_argument(
        "--num-crops", type=positive, default=100_000, metavar="N",
        help="number of random crops to measure, for all images together (default: %(default)s)",
    )  # fmt: skip


def add_model_kwargs(parser: Any, **kwargs: Any) -> None:
    """Add `--model-kwargs`."""
    parser.add_argument(
        "--model-kwargs", nargs="+", type=_key_value, action=_KeyValues, metavar="KEY=VALUE",
        help="additional arguments of timm.create_model, such as pad_type=same drop_path_rate=0.1", **{"default": {}, **kwargs},
    )  # fmt: skip


def positive(text: str) -> int:
    """Convert a text to an integer of at least 1, for `type=` of an argument.

    Raises:
        argparse.ArgumentTypeError: The text is not an integer of at least 1.
    """
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return value


def path_argument(text: str) -> Path:
    """Convert a text to a local path, for `type=` of an argument.

    Raises:
        argparse.ArgumentTypeError: The text is a URL.
    """
    from ..storage.folders import local_path

    try:
        return local_path(text, "the path")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def output_argument(text: str) -> Path:
    """Convert a text to the path of a file that is written at the end of a command, for `type=` of an argument.

    Raises:
        argparse.ArgumentTypeError: The path is a URL, or its folder does not exist or cannot be written to.
    """
    path = path_argument(text)
    folder = path.absolute().parent
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {folder} does not exist: create it first")
    if not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"the folder {folder} cannot be written to: choose another one")
    return path


def _key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, such as pad_type=same, got {text!r}")
    for parse in (json.loads, ast.literal_eval):
        try:
            return key, parse(value)
        except (ValueError, SyntaxError):
            continue
    return key, value  # a plain word


class Repeated(argparse.Action):
    """Action that collects the values of an option that may be given several times. They replace the default."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        given = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*([] if given is self.default else given), values])


class _KeyValues(argparse.Action):
    """Action that collects the pairs of `--model-kwargs`, which may be given several times."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, {**getattr(namespace, self.dest, {}), **dict(values)})
