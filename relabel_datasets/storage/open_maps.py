"""Memory maps of files within the process's limit of open files.

Each memory map uses one open file. All tables of a process share one budget, which is a part of its limit (`ulimit -n`).
When the budget is used up, the least recently used maps of any table are closed.
"""

from __future__ import annotations

import errno
import importlib
import itertools
import mmap
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar

resource: Any
try:
    resource = importlib.import_module("resource")
except ImportError:  # Windows
    resource = None

_MAX_MAPS = 2048  # if the number of open files is unlimited or its limit is much higher
_UNKNOWN_LIMIT = 512  # open files, if the limit cannot be read
MACHINE_LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # too many open files or no memory: the file is not damaged

_lock = threading.Lock()
_clock = itertools.count()  # order of use
_tables: weakref.WeakSet[MapTable] = weakref.WeakSet()
T = TypeVar("T")


def open_file_limit() -> int | None:
    """Return the maximum number of open files of this process; None if there is no limit."""
    if resource is None:
        return _UNKNOWN_LIMIT
    soft: int = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def max_open_maps() -> int:
    """Return the maximum number of memory maps. Half of the file limit stays free for sockets, pipes and shared tensors."""
    limit = open_file_limit()
    return _MAX_MAPS if limit is None else max(1, min(_MAX_MAPS, limit // 2))


class MapTable:
    """Table of memory maps, keyed by file number. Maps beyond the budget are closed and reopened when needed."""

    def __init__(self) -> None:
        self._maps: dict[int, _Entry] = {}
        with _lock:
            _tables.add(self)

    def get(self, number: int) -> mmap.mmap | None:
        """Return an open map and mark it as the most recently used one.

        Args:
            number: Number of the file.

        Returns:
            The map; None if it is not open.
        """
        entry = self._maps.get(number)
        if entry is None:
            return None
        entry.last_used = next(_clock)
        return entry.mapped

    def open(self, number: int, open_file: Callable[[], BinaryIO]) -> mmap.mmap:
        """Map a file, and close the least recently used maps of the process beyond its budget.

        Args:
            number: Number of the file in this table.
            open_file: Function that opens the file for reading.

        Returns:
            The map.

        Raises:
            OSError: The process or the machine has too many files or maps open; the message names the limit to raise.
        """

        def map_file() -> mmap.mmap:
            with open_file() as file:
                try:
                    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                except OSError as error:
                    if error.errno != errno.ENODEV:
                        raise
                    advice = "its file system has no memory maps: copy the dataset, or move the cache, to another disk"
                    raise OSError(errno.ENODEV, advice, file.name) from None

        with _lock:
            _close_oldest(max_open_maps() - 1)
        mapped = within_file_limit(map_file)
        self._maps[number] = _Entry(mapped, next(_clock))
        return mapped

    def keep(self, is_current: Callable[[int], bool]) -> None:
        """Close the maps of files that are no longer current.

        Args:
            is_current: Function that returns whether to keep the map of a file number.
        """
        with _lock:
            for number in [number for number in self._maps if not is_current(number)]:
                self._maps.pop(number, None)

    def __len__(self) -> int:
        return len(self._maps)


class _Entry:
    __slots__ = ("last_used", "mapped")

    def __init__(self, mapped: mmap.mmap, last_used: int) -> None:
        self.mapped, self.last_used = mapped, last_used


def within_file_limit(open_something: Callable[[], T]) -> T:
    """Open a file. If the limit of open files is reached, close all memory maps of the process and retry once.

    Args:
        open_something: Function that opens the file.

    Returns:
        The result of `open_something`.

    Raises:
        OSError: The limit is still exceeded. The message names the limit to raise.
    """
    try:
        return open_something()
    except OSError as error:
        if error.errno not in MACHINE_LIMITS:
            raise
    with _lock:
        _close_oldest(0)
    try:
        return open_something()
    except OSError as error:
        if error.errno not in MACHINE_LIMITS:
            raise
        raise OSError(error.errno, f"{os.strerror(error.errno)}: {_advice(error.errno)}", error.filename) from None


def _advice(number: int) -> str:
    if number == errno.EMFILE:
        limit = open_file_limit()
        return (
            f"this process may open {limit} files, and other files than shards of label maps use them up. Raise the limit "
            f"before Python starts (`ulimit -n {max(4096, 4 * (limit or 0))}`), or close files"
        )
    if number == errno.ENFILE:
        return (
            "the machine has reached its limit of open files: raise it (`fs.file-max` on Linux), or stop other programs"
        )
    return (
        "no address space is left for a memory map: raise the limit of this process (`ulimit -v`), or `vm.max_map_count` "
        "on Linux"
    )


def _close_oldest(num_kept: int) -> None:
    """Close the least recently used maps of the process if there are more than `num_kept`. The caller must hold the lock.

    A map that another thread is reading stays open until that thread has finished.
    """
    if sum(map(len, _tables)) <= num_kept:
        return
    entries = [(entry.last_used, table, number) for table in _tables for number, entry in table._maps.copy().items()]
    entries.sort(key=lambda entry: entry[0])
    num_closed = len(entries) - num_kept * 7 // 8  # in batches: finding the oldest maps costs more than closing them
    for _, table, number in entries[:num_closed]:
        table._maps.pop(number, None)


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)  # another thread of the parent may hold it during the fork
