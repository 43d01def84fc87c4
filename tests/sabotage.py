"""Damage a folder at a moment chosen by a test: just before Python changes or lists it."""

import shutil
import sys
from contextlib import contextmanager


def at_once(root):
    """Remove a folder in one step."""
    if root.exists():
        root.rename(root.with_name("removed"))
        shutil.rmtree(root.with_name("removed"))


def files_first(root):
    """Remove only the files, as `rm -r` does before it removes their folder."""
    for path in root.rglob("*"):
        if path.is_file():
            path.unlink()


class _Hook:
    """Audit hook, which Python cannot remove. It is inactive outside of `sabotaged`."""

    EVENTS = ("open", "os.scandir", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")

    def __init__(self):
        self.root = None
        sys.addaudithook(self.look)

    def look(self, event, arguments):
        if self.root is None or event not in self.EVENTS or not str(arguments[0]).startswith(self.root):
            return
        if self.is_moment(event, str(arguments[0]).rpartition("/")[2]):
            self.root = None  # the events of the damage itself are ignored
            self.do()


_HOOK = _Hook()


@contextmanager
def sabotaged(root, is_moment, do):
    """Call `do(root)` once, before the first event for which `is_moment(event, file_name)` is True.

    Yields:
        Function that returns whether that event has occurred.
    """
    _HOOK.is_moment, _HOOK.do, _HOOK.root = is_moment, lambda: do(root), str(root)
    try:
        yield lambda: _HOOK.root is None
    finally:
        _HOOK.root = None


def nth(number):
    """Return a function that is True for the n-th event."""
    left = number

    def is_moment(event, name):
        nonlocal left
        left -= 1
        return left == 0

    return is_moment
