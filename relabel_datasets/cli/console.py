"""Safe output: escape control characters and hide secrets of URLs in everything that a command writes.

`safe_output` replaces stdout and stderr by a `SafeStream`, so that no text from a dataset, a path or another library reaches the
terminal unescaped. Newlines are kept, so text from a dataset must pass through `printable` before it becomes part of a line.
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

_MIN_SECRET = 8  # characters; a shorter secret may be an ordinary word
_TOKENS = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")  # environment variables
_CURSOR_MOVES = re.compile(r"(?:\n|\x1b\[A)+")  # written by nested progress bars
_COLOR = re.compile(r"\x1b\[[\d;]*m")  # in messages of other libraries


class OutputClosedError(Exception):
    """Error if the reader of stdout or stderr is gone, as in `relabel ... | head`."""


class SafeStream:
    """Text stream that escapes control characters and redacts URLs.

    Progress bars work, because a text may begin with a carriage return or consist of cursor movements. Colors are removed.

    Args:
        stream: Stream to write to. All other attributes are those of this stream.
        secrets: Strings to hide. Default: none.
    """

    def __init__(self, stream: TextIO, secrets: Iterable[str] = ()) -> None:
        self._stream, self._secrets = stream, tuple(secrets)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text, or raise OutputClosedError if the reader is gone."""
        if not _CURSOR_MOVES.fullmatch(text):
            start = "\r" if text.startswith("\r") else ""
            plain = redact(_COLOR.sub("", text[len(start) :]), self._secrets)
            text = start + printable(plain, keep="\n\t")
        try:
            return self._stream.write(text)
        except BrokenPipeError as error:
            raise OutputClosedError from error

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream, or raise OutputClosedError if the reader is gone."""
        try:
            self._stream.flush()
        except BrokenPipeError as error:
            raise OutputClosedError from error


class SafeFormatter(logging.Formatter):
    """Formatter that writes the message of each log record as one line. Tracebacks keep their lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  name of the base class
        """Return the message without newlines."""
        return printable(super().formatMessage(record))


@contextmanager
def safe_output(arguments: Iterable[str]) -> Iterator[None]:
    """Make stdout and stderr safe while a command runs, and write log records to stderr.

    Args:
        arguments: Arguments of the command line. Passwords and signatures of URLs among them are hidden in the output, and so are
            access tokens in the environment.
    """
    secrets = {token for token in (os.environ.get(name, "") for name in _TOKENS) if len(token) >= _MIN_SECRET}
    secrets.update(*(secrets_of(argument, min_length=_MIN_SECRET) for argument in arguments))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # the encoding of the terminal may lack characters of names
    out, err = (cast(TextIO, SafeStream(stream, secrets)) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        handler = logging.StreamHandler()
        handler.setFormatter(SafeFormatter("%(message)s"))
        logging.basicConfig(level=logging.INFO, handlers=[handler])
        for name in ("httpx", "httpx2"):  # used by huggingface_hub 1 and 2; they log each request
            logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger("huggingface_hub").propagate = False  # it has a handler, which writes to the safe stderr
        yield
