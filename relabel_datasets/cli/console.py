"""The terminal: what a command writes to stdout and stderr, without control characters and without secrets of URLs.

`safe_output` puts a `SafeStream` in the place of stdout and of stderr, so that no text of a dataset, of a path or of another
library reaches the terminal unescaped. Newlines pass it: text of a dataset within a line must have passed `printable`.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

from ..storage.redaction import redact, secrets_of
from ..words import printable

_MIN_SECRET = 8  # characters; a shorter one may be a word of our own messages
_TOKENS = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")  # in the environment
_CURSOR_MOVES = re.compile(r"(?:\n|\x1b\[A)+")  # which progress bars below one another write
_COLOR = re.compile(r"\x1b\[[\d;]*m")  # of other libraries' messages


class OutputClosedError(Exception):
    """The reader of stdout or stderr is gone, as in `relabel ... | head`."""


class SafeStream:
    """A text stream that escapes what could control a terminal, and redacts URLs.

    Progress bars work: a carriage return may begin a text, and a text may consist of cursor movements. Colors are removed.

    Args:
        stream: Where the text goes; all other attributes are those of this stream.
        secrets: Strings to hide.
    """

    def __init__(self, stream: TextIO, secrets: Iterable[str] = ()) -> None:
        self._stream, self._secrets = stream, tuple(secrets)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text; raise OutputClosedError if nobody reads it."""
        if not _CURSOR_MOVES.fullmatch(text):
            start = "\r" if text.startswith("\r") else ""
            plain = redact(_COLOR.sub("", text[len(start) :]), self._secrets)
            text = start + printable(plain, keep="\n\t")
        try:
            return self._stream.write(text)
        except BrokenPipeError as error:
            raise OutputClosedError from error

    def writelines(self, lines: Iterable[str]) -> None:
        """Write texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream; raise OutputClosedError if nobody reads it."""
        try:
            self._stream.flush()
        except BrokenPipeError as error:
            raise OutputClosedError from error


class SafeFormatter(logging.Formatter):
    """Formats the message of each log record as one line; tracebacks keep their lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  the name in the base class
        """Return the message without newlines."""
        return printable(super().formatMessage(record))


@contextmanager
def safe_output(arguments: Iterable[str]) -> Iterator[None]:
    """Make stdout and stderr safe while a command runs, and send log records there.

    Args:
        arguments: Of the command line. Passwords and signatures of the URLs among them are hidden in all that is written, as
            are the access tokens in the environment.
    """
    secrets = {token for token in (os.environ.get(name, "") for name in _TOKENS) if len(token) >= _MIN_SECRET}
    secrets.update(*(secrets_of(argument, min_length=_MIN_SECRET) for argument in arguments))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(
                errors="backslashreplace"
            )  # names may have characters that the terminal's encoding lacks
    out, err = (cast(TextIO, SafeStream(stream, secrets)) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        handler = logging.StreamHandler()
        handler.setFormatter(SafeFormatter("%(message)s"))
        logging.basicConfig(level=logging.INFO, handlers=[handler])
        for name in ("httpx", "httpx2"):  # of huggingface_hub 1 and 2, which log each request
            logging.getLogger(name).setLevel(logging.WARNING)
        yield
