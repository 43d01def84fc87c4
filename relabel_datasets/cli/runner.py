"""Run a command of the command line: parse its arguments, print its error, and return its exit code."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, TextIO

from ..words import printable
from .console import OutputClosedError, safe_output
from .explain import explain, options_of

INTERRUPTED, CLOSED = 130, 141  # exit codes of shells: 128 plus the number of SIGINT or SIGPIPE

_INVALID_CHOICE = re.compile(r"invalid choice: '(.*)' \(choose from (.*)\)")  # in messages of argparse

Command = Callable[[argparse.Namespace], int | None]


def run_command(
    make_parser: Callable[[], argparse.ArgumentParser],
    argv: Sequence[str] | None = None,
    *,
    resumable: frozenset[str] | None = None,
    check: Callable[[argparse.Namespace], None] | None = None,
) -> int:
    """Parse a command line, run its command, and return the exit code.

    The command is the function `run` in the parsed arguments. An error is printed as one line, with `--debug` also its traceback.

    Args:
        make_parser: Function that returns the parser. It is called when the output is safe, because its errors quote arguments.
        argv: Arguments of the command line. Default: those of this process.
        resumable: Subcommands that resume when they are rerun. None means that the program has no subcommands and resumes.
        check: Function that raises an error if the parsed arguments are invalid. Default: none.

    Returns:
        The exit code of the command (0 by default), 1 after an error, 130 after Ctrl-C, or 141 if the reader of the output is
        gone. Wrong arguments exit with 2.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    _open_standard_streams()
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
        advice = ": rerun the same command to resume" if is_resumable else ""
        sys.stderr.write(f"\n{name}: stopped{advice}\n")
        return INTERRUPTED
    except OutputClosedError:
        raise
    except Exception as error:  # noqa: BLE001  from any library: users see one line, not a traceback
        if getattr(args, "debug", False):
            sys.stderr.write("".join(traceback.format_exception(error)))
        sys.stderr.write(f"{name}: {printable(explain(error, options_of(parser, command)))}\n")
        return 1
    return code


class Parser(argparse.ArgumentParser):
    """Argument parser with the option `--debug`, which is accepted before and after a subcommand."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})  # an abbreviation may be a typo of another option
        self.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        """Parse arguments. An unknown option is an error that suggests a similar one of the same command."""
        parsed: argparse.Namespace
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            command = getattr(parsed, "command", None)
            known = [option for action in options_of(self, command).values() for option in action.option_strings]
            option = next((word for word in unknown if word.startswith("--")), "").partition("=")[0]
            suggested = _suggestion(option, known)
            program = self.prog if command is None else f"{self.prog} {command}"
            self._fail(program, f"unrecognized arguments: {' '.join(unknown)}{suggested}")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Print the message on one line, with a suggestion for a misspelled choice, and exit with code 2."""
        choice = _INVALID_CHOICE.search(message)
        suggested = (
            "" if choice is None else _suggestion(choice[1], [name.strip("'") for name in choice[2].split(", ")])
        )
        self._fail(self.prog, message + suggested)

    def _fail(self, program: str, message: str) -> NoReturn:
        self.exit(2, f"{program}: error: {printable(message)}; see `{program} --help`\n")


def _suggestion(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f": did you mean {close[0]}?" if close else ""


def _open_standard_streams() -> None:
    """Open stdin, stdout and stderr on os.devnull if they are closed: a file of a dataset must not get their descriptors."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in the order of their descriptors
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115  stays open


def _flush(stream: TextIO) -> None:
    """Flush a stream. If that fails, redirect it to os.devnull, because Python flushes again at exit and prints an error."""
    try:
        stream.flush()
    except OSError:
        with open(os.devnull, "w") as devnull:  # noqa: PTH123  needs a descriptor, not a path
            os.dup2(devnull.fileno(), stream.fileno())
    except ValueError:  # closed
        pass
