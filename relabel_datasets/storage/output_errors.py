"""Errors of the operating system while a dataset is written, with what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .folders import is_url
from .local import is_explained


@contextmanager
def explaining_errors(folder: object) -> Iterator[None]:
    """Replace errors of the operating system by errors that name the folder and say what to do.

    Args:
        folder: Folder that is written to.

    Raises:
        OSError: The disk is full, the folder is not writable, or the folder was removed.
    """
    try:
        yield
    except OSError as error:
        if is_explained(error):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = f"the disk of {folder} is full: free some space and rerun the same command to resume"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            text = f"{folder} is no longer writable"
        elif isinstance(error, FileNotFoundError) and (removed := _removed(error, str(folder))):
            text = f"{removed} was removed during the build: rerun the same command to build it again"
        else:
            raise
        raise with_reason(error, text) from error


def _removed(error: FileNotFoundError, folder: str) -> str | None:
    """Return what was removed if it is the folder or a file in it (`rm -r` removes the files first), else None."""
    if is_url(folder):
        return None
    if not Path(folder).is_dir():
        return f"the folder {folder}"
    path = str(error.filename2 or error.filename)  # filename2: target of a rename
    return path if path.startswith(f"{folder}/") else None


def with_reason(error: OSError, text: str) -> OSError:
    """Return an error of the same type with another text and the reason that the operating system gave."""
    return type(error)(error.errno, f"{text} ({error.strerror})")
