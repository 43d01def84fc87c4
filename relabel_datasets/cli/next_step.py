"""The line at the end of a command that says what to do next."""

from __future__ import annotations

import shlex
import sys


def say_next(*words: object, note: str = "") -> None:
    """Write `Next:` and a command line to stderr, where it never mixes with results.

    Args:
        words: Words of the command line, which are quoted for a shell.
        note: Text after the command line. Default: none.
    """
    line = shlex.join(str(word) for word in words)
    sys.stderr.write(f"Next: {line}{' ' if line and note else ''}{note}\n")


def config_words(config: str | None) -> list[str]:
    """Return `--config CONFIG` if a config was given, to repeat it in the next command."""
    return [] if config is None else ["--config", config]
