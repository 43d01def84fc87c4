"""Run a command of the command line: its arguments, its exit code, and what is printed when it fails."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TextIO

from ..words import printable
from .console import OutputClosedError, safe_output
from .explain import explain

INTERRUPTED, CLOSED = 130, 141  # exit codes as shells have them: 128 and the number of SIGINT, SIGPIPE

Command = Callable[[argparse.Namespace], int | None]


def run_command(
    make_parser: Callable[[], argparse.ArgumentParser],
    argv: Sequence[str] | None = None,
    *,
    resumable: frozenset[str] | None = None,
    check: Callable[[argparse.Namespace], None] | None = None,
) -> int:
    """Parse a command line, run its command, and return the exit code.

    The command is the function `run` in the parsed arguments. Exit codes: 0, or what the command returns; 1 for an error, of
    which one line is printed, and with `--debug` the traceback; 2 for wrong arguments; 130 after Ctrl-C; 141 if the reader of
    the output is gone.

    Args:
        make_parser: Returns the parser; called when the output is safe, since its errors quote the arguments.
        argv: The arguments. Default: those of this process.
        resumable: Subcommands that continue when they are run again; None if the program has no subcommands.
        check: Raises an error if parsed arguments are not valid.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        with safe_output(argv):
            return _run(make_parser(), argv, resumable, check)
    except OutputClosedError:
        return CLOSED
    finally:
        for stream in (sys.stdout, sys.stderr):
            _flush(stream)


def _run(
    parser: argparse.ArgumentParser,
    argv: Sequence[str],
    resumable: frozenset[str] | None,
    check: Callable[[argparse.Namespace], None] | None,
) -> int:
    args = parser.parse_args(argv)
    command = getattr(args, "command", None)
    name = parser.prog if command is None else f"{parser.prog} {command}"
    run: Command = args.run
    try:
        if check is not None:
            check(args)
        code = run(args) or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        is_resumable = resumable is None or command in resumable
        what_next = "; the same command continues from here" if is_resumable else ""
        sys.stderr.write(f"\n{name}: stopped{what_next}\n")
        return INTERRUPTED
    except OutputClosedError:
        raise
    except Exception as error:  # noqa: BLE001  of any library: users see one line, not a traceback
        if getattr(args, "debug", False):
            sys.stderr.write("".join(traceback.format_exception(error)))
        sys.stderr.write(f"{name}: {printable(explain(error))}\n")
        return 1
    return code


class Parser(argparse.ArgumentParser):
    """A parser with the option `--debug`, which may be given before or after a subcommand."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})  # an abbreviation may be a typo of another option
        self.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )

    def error(self, message: str) -> NoReturn:
        """Print the usage and a message of one line, and exit with code 2."""
        super().error(printable(message))


def _flush(stream: TextIO) -> None:
    """Flush a stream; drop its text if that fails, else Python tries again as it ends, and complains."""
    try:
        stream.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123  a descriptor, not a path, is needed
            os.dup2(nowhere.fileno(), stream.fileno())
    except ValueError:  # closed
        pass
