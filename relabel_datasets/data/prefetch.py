"""Download remote shards in the background before they are needed."""

from __future__ import annotations

import logging
import threading
from types import TracebackType

import numpy as np

from ..shards.tars import ShardReader
from .sampling import Rows

logger = logging.getLogger(__name__)

PREFETCH_SHARDS = 4  # shards that are downloaded before they are needed
_NUM_FETCHERS = 2  # download threads per process


def prefetch(reader: ShardReader, shard: int) -> None:
    """Download a remote shard to the cache. An error is only logged, since reading the shard raises it again."""
    try:
        reader.fetch(shard)
    except Exception as error:  # noqa: BLE001  see above
        logger.debug("prefetch: %s", error)


class Prefetch:
    """Threads that download the shards of coming samples; each worker downloads its share of the shards.

    Args:
        reader: Reader of the shards.
        shards: Shard of each coming sample, int64 `[N]`.
        worker: Number of this worker.
        num_workers: Number of workers that share the downloads.
    """

    def __init__(self, reader: ShardReader, shards: Rows, worker: int, num_workers: int) -> None:
        self._reader = reader
        wanted, first = np.unique(shards, return_index=True)
        order = np.argsort(first)
        self._shards, self._first = wanted[order], first[order]  # in the order in which they are needed
        self._reached = 0
        self._next, self._step = worker, num_workers
        self._moved = threading.Condition()
        self._stopped = not reader.is_remote

    def __enter__(self) -> Prefetch:
        if not self._stopped:
            for _ in range(_NUM_FETCHERS):
                threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._moved:
            self._stopped = True
            self._moved.notify_all()

    def advance(self, position: int) -> None:
        """Allow prefetching up to `PREFETCH_SHARDS` shards after the sample at this position."""
        if self._reached + 1 < len(self._first) and self._first[self._reached + 1] <= position:
            with self._moved:
                self._reached = int(np.searchsorted(self._first, position, "right")) - 1
                self._moved.notify_all()

    def _run(self) -> None:
        while True:
            with self._moved:
                mine = self._next
                self._next += self._step
                while not self._stopped and mine > self._reached + PREFETCH_SHARDS * self._step:
                    self._moved.wait()
                if self._stopped or mine >= len(self._shards):
                    return
            prefetch(self._reader, int(self._shards[mine]))
