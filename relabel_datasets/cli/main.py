"""The parser of the `relabel` command, and its entry point."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from .._version import __version__
from ..errors import DatasetError
from ..naming import check_config, check_split
from . import (
    analyze,
    annotators,
    build,
    compare,
    demo,
    evaluate,
    import_maps,
    inspection,
    pictures,
    publish,
    report,
    train,
    verify,
)
from .runner import Parser, run_command

# In the order of the help text.
_COMMANDS = (
    demo,
    build,
    import_maps,
    annotators,
    verify,
    inspection,
    analyze,
    report,
    pictures,
    train,
    evaluate,
    compare,
    publish,
)
_RESUMABLE = frozenset(("build", "compare", "demo", "publish", "train"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments. Default: the arguments of this process.

    Returns:
        The exit code, see `run_command`.
    """
    return run_command(make_parser, argv, resumable=_RESUMABLE, check=_check_names)


def make_parser() -> argparse.ArgumentParser:
    """Create the parser of the command line."""
    parser = Parser(
        prog="relabel",
        description="Build, check, view and train with label maps: localized multi-label soft labels for image datasets.",
        epilog="`relabel COMMAND --help` explains a command. Start with `relabel demo`.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version of the package and exit")
    if find_spec("shtab") is not None:  # optional
        import shtab

        shtab.add_argument_to(parser, help="print a completion script for a shell")
    parser.set_defaults(run=lambda _: parser.print_help())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        sys.stdout.write(f"relabel-datasets {__version__}\n")
        parser.exit()


def _check_split(name: str, option: str) -> None:
    try:
        check_split(name, option)
    except DatasetError as error:
        raise DatasetError(
            f"{error}. A command works on one whole split; parts and sums of splits are torch.utils.data.Subset and ConcatDataset in Python"
        ) from None


def _check_names(args: argparse.Namespace) -> None:
    """Check the names of configs and splits before anything is read or written.

    Raises:
        DatasetError: A name is not valid.
    """
    checks = {"config": check_config, "configs": check_config, "split": _check_split, "validation": _check_split}
    if args.command == "evaluate":
        del checks["split"]  # may be a slice of a Hugging Face dataset, such as test[:100]
    for option, check in checks.items():
        value = getattr(args, option, None)
        for name in value if isinstance(value, list) else [value]:
            if name is not None:
                check(name, f"--{option}")
