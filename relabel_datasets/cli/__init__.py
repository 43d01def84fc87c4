"""The `relabel` command: a thin layer over the package's functions. Results go to stdout, messages to stderr.

Nothing heavy is imported before a command runs, so that `--help` and errors in arguments appear at once.
"""

from .main import main, make_parser

__all__ = ["main", "make_parser"]
