"""Temporary folders that their process removes or, if it was killed, the next process that creates one for the same purpose."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..compatibility import HAS_FILE_LOCKS, lock_file, user_id
from .locks import acquire, is_held, release

_LOCK_NAME = ".lock"  # locked while the folder is in use


@contextmanager
def temporary_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """Create a temporary folder for a `with` statement, and remove those that killed processes have left.

    Only folders with the same prefix, of this user and this machine, are removed, and only if no process holds their lock. So
    processes in other containers may share the parent. Without file locks, nothing of other processes is removed.

    Args:
        prefix: First part of the name, which says what the folder is for.
        parent: Folder to create it in. Default: that of the environment variable `TMPDIR`.

    Yields:
        The folder, which only this user can read. It contains an empty lock file.

    Raises:
        OSError: The folder cannot be created.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    name = f"{prefix}{user_id()}-{platform.node()}-"
    if not HAS_FILE_LOCKS:  # Windows
        with tempfile.TemporaryDirectory(prefix=name, dir=parent) as path:
            yield Path(path)
        return
    _remove_abandoned(parent, name)
    folder = Path(tempfile.mkdtemp(prefix=name, dir=parent))
    lock = acquire(folder / _LOCK_NAME, _lock_if_possible)
    try:
        folder.chmod(0o700)  # `acquire` creates it again if another process took it for abandoned before it was locked
        yield folder
    finally:
        if is_held(lock):  # not in a forked process
            shutil.rmtree(folder, ignore_errors=True)
            release(lock)


def _remove_abandoned(parent: Path, name: str) -> None:
    pattern = re.compile(rf"{re.escape(name)}[a-z0-9_]{{8}}")  # as `tempfile.mkdtemp` names folders
    with os.scandir(parent) as entries:
        folders = [entry for entry in entries if pattern.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)]
    for folder in folders:
        with suppress(OSError):  # it is in use, has just been removed, or its file system has no locks
            if folder.stat(follow_symlinks=False).st_uid == user_id():
                lock = acquire(Path(folder) / _LOCK_NAME, lambda descriptor: lock_file(descriptor, wait=False))
                shutil.rmtree(folder, ignore_errors=True)
                release(lock)


def _lock_if_possible(descriptor: int) -> None:
    with suppress(OSError):  # the file system has no locks, so that no other process removes the folder
        lock_file(descriptor, wait=True)
