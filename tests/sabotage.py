"""Things that are done to a folder at a moment that a test names: when Python is about to change or list it."""

import shutil
import sys
from contextlib import contextmanager


def at_once(root):
    if root.exists():
        root.rename(root.with_name("removed"))
        shutil.rmtree(root.with_name("removed"))


def files_first(root):
    """Remove the files only, as `rm -r` does before it removes their folder."""
    for path in root.rglob("*"):
        if path.is_file():
            path.unlink()


class _Hook:
    """An audit hook, of which Python cannot get rid again: this one looks away unless a test is in `sabotaged`."""

    EVENTS = ("open", "os.scandir", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")

    def __init__(self):
        self.root = None
        sys.addaudithook(self.look)

    def look(self, event, arguments):
        if self.root is None or event not in self.EVENTS or not str(arguments[0]).startswith(self.root):
            return
        if self.is_moment(event, str(arguments[0]).rpartition("/")[2]):
            self.root = None  # what is done now makes no moments
            self.do()


_HOOK = _Hook()


@contextmanager
def sabotaged(root, is_moment, do):
    """Do it to the root once, before the first event for which `is_moment(event, name of file)`; yield whether it came."""
    _HOOK.is_moment, _HOOK.do, _HOOK.root = is_moment, lambda: do(root), str(root)
    try:
        yield lambda: _HOOK.root is None
    finally:
        _HOOK.root = None


def nth(number):
    """Return the moment of the n-th event."""
    left = number

    def is_moment(event, name):
        nonlocal left
        left -= 1
        return left == 0

    return is_moment
