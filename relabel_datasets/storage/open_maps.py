"""Memory maps of files, all within the process's limit of open files.

A memory map holds one open file. The maps of all tables of a process share one budget, a part of its limit
(`ulimit -n`); beyond it, the least recently used map of any table is closed.
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

_WITHOUT_LIMIT = 2048  # maps, where the number of open files is not limited or the limit is far higher
_UNKNOWN_LIMIT = 512  # open files, where the limit cannot be read
MACHINE_LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of open files or memory: no fault of a file

_lock = threading.Lock()
_clock = itertools.count()  # order of use
_tables: weakref.WeakSet[MapTable] = weakref.WeakSet()
T = TypeVar("T")


def open_file_limit() -> int | None:
    """Return how many files this process may have open at a time, or None if there is no limit."""
    if resource is None:
        return _UNKNOWN_LIMIT
    soft: int = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def max_open_maps() -> int:
    """Return how many memory maps may be open: half of the limit, the rest is for sockets, pipes and tensors in transit."""
    limit = open_file_limit()
    return _WITHOUT_LIMIT if limit is None else max(1, min(_WITHOUT_LIMIT, limit // 2))


class MapTable:
    """Memory maps of files by number. Maps that were closed to stay within the budget are opened again when needed."""

    def __init__(self) -> None:
        self._maps: dict[int, _Entry] = {}
        with _lock:
            _tables.add(self)

    def get(self, number: int) -> mmap.mmap | None:
        """Return the map of a file that is open, as the most recently used one."""
        entry = self._maps.get(number)
        if entry is None:
            return None
        entry.last_used = next(_clock)
        return entry.mapped

    def open(self, number: int, open_file: Callable[[], BinaryIO]) -> mmap.mmap:
        """Return a new map of a file, closing the least recently used maps of the process beyond its budget.

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
        """Close the maps of all numbers that are not current."""
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
    """Return `open_something()`; if no more files can be opened, close all memory maps of the process and retry once.

    Raises:
        OSError: It failed again; the message names the limit to raise.
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
            f"this process may open {limit} files, and others than shards of label maps use them up. Raise the limit "
            f"before Python starts (`ulimit -n {max(4096, 4 * (limit or 0))}`), or close files"
        )
    if number == errno.ENFILE:
        return (
            "the machine has reached its limit of open files: raise it (on Linux `fs.file-max`), or stop other programs"
        )
    return (
        "no address space is left for a memory map: raise the limit of this process (`ulimit -v`), or `vm.max_map_count` "
        "on Linux"
    )


def _close_oldest(num_kept: int) -> None:
    """Close the least recently used maps of the process if there are more than `num_kept`. The caller holds the lock.

    A map that another thread reads from stays open until it has been read.
    """
    if sum(map(len, _tables)) <= num_kept:
        return
    entries = [(entry.last_used, table, number) for table in _tables for number, entry in table._maps.copy().items()]
    entries.sort(key=lambda entry: entry[0])
    num_closed = len(entries) - num_kept * 7 // 8  # several at once, since finding them costs more than closing them
    for _, table, number in entries[:num_closed]:
        table._maps.pop(number, None)


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)  # another thread of the parent may have held it
