"""RelabelStream: the samples of a `RelabelDataset`, shard by shard, with the next shards on their way; RelabelLoader."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..keywords import checked_keywords
from ..shards.tars import ShardReader
from .datasets import RelabelDataset
from .sampling import WINDOW, RelabelSampler, Remainder, Rows

logger = logging.getLogger(__name__)

_AHEAD = 4  # shards on their way before they are needed
_FETCHERS = 2  # at a time, in each process
_TOGETHER = 64  # samples whose label maps are read and pooled at once, at most
_EPOCH, _LOADS, _BEGUN, _RESUMED = range(4)  # places in the memory that is shared with workers


class RelabelStream(IterableDataset[Any]):
    """A `RelabelDataset` read in an order that needs few shards at a time, with exactly equal ranks and exact resume.

    Under a DataLoader, the workers share the samples of this rank: each takes `batch_size` of them in turn, so that with
    the loader's own batch size the order is the same for any number of workers. `RelabelLoader` sets that, and counts.
    Call `set_epoch` before each epoch: else all have the same order.

    Args:
        dataset: what to read; its shards may be remote.
        shuffle: whether to shuffle at all.
        seed: of the shuffling.
        window: shards that are mixed at a time, and so on disk. None mixes all.
        remainder: `"drop"`, `"repeat"` or `"uneven"`, see `sampling.Order`.
        rank: see `RelabelSampler`.
        world_size: see `RelabelSampler`.
        batch_size: of the DataLoader.

    Attributes:
        sampler: the `RelabelSampler` that gives the order.

    Raises:
        ValueError: arguments out of range.

    Example:
        >>> stream = load_dataset("s3://bucket/imagenette", split="train", streaming=True, transforms=transforms)
        >>> loader = RelabelLoader(stream, batch_size=64, num_workers=4)
    """

    @checked_keywords()
    def __init__(
        self,
        dataset: RelabelDataset,
        *,
        shuffle: bool = True,
        seed: int = 0,
        window: int | None = WINDOW,
        remainder: Remainder = "drop",
        rank: int | None = None,
        world_size: int | None = None,
        batch_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        num_shards = len(dataset.shard_lengths)
        dataset.label_maps.shards.check_room(
            num_shards if window is None else min(window + _AHEAD, num_shards), "the window of the stream"
        )
        self.dataset = dataset
        self.batch_size = batch_size
        self.sampler = RelabelSampler(
            dataset.shard_lengths,
            shuffle=shuffle,
            seed=seed,
            window=window,
            remainder=remainder,
            rank=rank,
            world_size=world_size,
        )
        # Shared with workers, which have copies of all else and may live through several epochs.
        self._shared = torch.zeros(4, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._loads = 0  # of states, as this copy knows
        self._own_state: dict[str, int] | None = None  # that a worker was given
        self._yielded, self._exhausted = 0, False

    def __len__(self) -> int:
        """Return the number of samples of this rank in a whole epoch."""
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; its beginning, unless this very epoch was resumed by `load_state_dict`."""
        self.sampler.set_epoch(epoch)
        self._shared[_EPOCH], self._shared[_BEGUN] = epoch, 0

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        self._begin(None if info is None else worker)
        rows = self.sampler.rows()
        places = np.arange(len(rows)) // self.batch_size % num_workers == worker
        ends = np.cumsum(self.dataset.shard_lengths)
        with _Prefetch(
            self.dataset.label_maps.shards, np.searchsorted(ends, rows, "right"), worker, num_workers
        ) as shards:
            mine, together = np.flatnonzero(places), min(self.batch_size, _TOGETHER)
            for start in range(self._yielded, len(mine), together):
                some = mine[start : start + together]
                shards.advance(int(some[0]))
                for sample in self.dataset.__getitems__(rows[some].tolist()):
                    self._yielded += 1
                    yield sample
        self._exhausted = True

    def _begin(self, worker: int | None) -> None:
        """Find out where this iteration starts; `worker` is None in the main process."""
        self.sampler.set_epoch(int(self._shared[_EPOCH]))
        if self._exhausted and worker is None:
            self.sampler.progress = self.sampler.progress._replace(stages=())
        self._yielded, self._exhausted = 0 if self._own_state is None else self._own_state["yielded"], False
        if worker is None:
            return
        self._shared[_BEGUN] = 1
        if self._shared[_LOADS] != self._loads:
            raise RuntimeError(
                "a state was loaded after persistent workers had begun: load it before the first iteration"
            )
        if self._own_state is None and worker == 0 and self.sampler.progress.stages:
            if self._shared[_RESUMED]:
                raise RuntimeError("the rest of the epoch that was resumed is over: choose the next with set_epoch()")
            self._shared[_RESUMED] = 1
        self._own_state = None

    def state_dict(self, num_samples: int | None = None) -> dict[str, Any]:
        """Return how far this rank has come; it is the same on all ranks that have taken equally many samples.

        Args:
            num_samples: that the training loop has taken of this epoch, since its beginning or since it was resumed.
                Default: what the stream has yielded, which this process knows only without DataLoader workers;
                `RelabelLoader` and torchdata's StatefulDataLoader know by themselves.

        Raises:
            RuntimeError: DataLoader workers read the stream, and `num_samples` is not given.
        """
        info = get_worker_info()
        if info is not None:
            own = {"num_workers": info.num_workers, "worker": info.id, "yielded": self._yielded}
            return {**self.sampler.state_dict(0), "own": {**own, "batch_size": self.batch_size}}
        if num_samples is None and self._shared[_BEGUN]:
            raise RuntimeError(
                "DataLoader workers read ahead, so that the stream cannot tell what was taken: use RelabelLoader, or "
                "state_dict(num_samples=...) with the stream's batch_size= set to the DataLoader's"
            )
        return self.sampler.state_dict(self._yielded if num_samples is None else num_samples)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, on as many ranks and workers as there are now.

        Args:
            state: of a stream or a `RelabelLoader`; or of a StatefulDataLoader over a stream, to go on with another number
                of workers or ranks.

        Raises:
            ValueError: it is no such state, or the state of another dataset, seed, window or remainder.
        """
        states = list(_find_states(state))
        if not states:
            raise ValueError(f"not a state of a RelabelStream: it has the keys {sorted(state)}")
        self.sampler.load_state_dict(states[0])
        own, info = states[0].get("own"), get_worker_info()
        self._own_state, self._yielded, self._exhausted = None, 0, False
        if own is not None and info is not None:
            here = (info.num_workers, info.id, self.batch_size)
            if (own["num_workers"], own["worker"], own["batch_size"]) != here:
                raise ValueError(f"the state is of (workers, worker, batch_size) {tuple(own.values())}, this is {here}")
            self._own_state, self._yielded = own, own["yielded"]
        elif own is not None:
            if state.get("_steps_since_snapshot"):
                raise ValueError(
                    "the state is older than the last batch: give StatefulDataLoader snapshot_every_n_steps=1"
                )
            taken = _taken([each["own"] for each in states])
            self.sampler.load_state_dict(self.sampler.state_dict(taken))
        self._shared[_EPOCH] = self.sampler.progress.epoch
        if info is None:
            self._shared[_LOADS] += 1
            self._shared[_BEGUN] = self._shared[_RESUMED] = 0
            self._loads = int(self._shared[_LOADS])


def _find_states(state: object) -> Iterator[Mapping[str, Any]]:
    """Yield the states of streams within that of a StatefulDataLoader, one for each of its workers."""
    if isinstance(state, Mapping):
        if "relabel_order" in state:
            yield state
        else:
            for value in state.values():
                yield from _find_states(value)


def _taken(own: list[dict[str, int]]) -> int:
    """Return how many samples the loader took, from what each of its workers gave."""
    num_workers, batch_size, taken = own[0]["num_workers"], own[0]["batch_size"], sum(each["yielded"] for each in own)
    places = np.arange(taken) // batch_size % num_workers
    if len(own) != num_workers or any(np.sum(places == each["worker"]) != each["yielded"] for each in own):
        raise ValueError(
            "the state can only go on with the same number of workers, since their batches were not of the stream's "
            f"batch_size, {batch_size}: give RelabelStream the batch size of its loader"
        )
    return taken


class _Prefetch:
    """Threads that fetch the shards of coming samples; each worker those that are its share.

    Args:
        reader: of the shards.
        shards: `[N]` the shard of each sample to come.
        worker: of this process.
        num_workers: among which the shards are dealt.
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

    def __enter__(self) -> _Prefetch:
        if not self._stopped:
            for _ in range(_FETCHERS):
                threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._moved:
            self._stopped = True
            self._moved.notify_all()

    def advance(self, place: int) -> None:
        """Tell that the sample at this place is about to be read."""
        if self._reached + 1 < len(self._first) and self._first[self._reached + 1] <= place:
            with self._moved:
                self._reached = int(np.searchsorted(self._first, place, "right")) - 1
                self._moved.notify_all()

    def _run(self) -> None:
        while True:
            with self._moved:
                mine = self._next
                self._next += self._step
                while not self._stopped and mine > self._reached + _AHEAD * self._step:
                    self._moved.wait()
                if self._stopped or mine >= len(self._shards):
                    return
            try:
                self._reader.fetch(int(self._shards[mine]))
            except Exception as error:  # noqa: BLE001  whoever needs the shard will meet the same error, and raise it
                logger.debug("prefetch: %s", error)


class RelabelLoader(DataLoader[Any]):
    """torch's DataLoader with an exact state: of a `RelabelStream`, or of a `RelabelDataset` with a `RelabelSampler`.

    The order of the samples is the same for any number of workers, and a state may be loaded with another number of workers
    or of ranks. Call `set_epoch` before each epoch.

    Args:
        dataset: a `RelabelStream`, or a `RelabelDataset`.
        batch_size: samples a batch.
        sampler: a `RelabelSampler`, for a `RelabelDataset`.
        kwargs: of DataLoader.

    Raises:
        ValueError: a dataset without a sampler.

    Example:
        >>> for epoch in range(loader.epoch, 100):
        ...     loader.set_epoch(epoch)
        ...     for images, soft_labels in loader:
        ...         ...  # a checkpoint may hold loader.state_dict() at any step
    """

    def __init__(
        self,
        dataset: RelabelStream | RelabelDataset,
        batch_size: int = 1,
        *,
        sampler: RelabelSampler | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(dataset, RelabelStream):
            self._order: RelabelStream | RelabelSampler = dataset
            dataset.batch_size = batch_size
        elif sampler is None:
            raise ValueError("a RelabelDataset needs sampler=RelabelSampler(dataset.shard_lengths)")
        else:
            self._order = sampler
        self._taken, self._finished = 0, False
        super().__init__(dataset, batch_size, sampler=sampler, **kwargs)

    @property
    def _sampler(self) -> RelabelSampler:
        return self._order.sampler if isinstance(self._order, RelabelStream) else self._order

    @property
    def epoch(self) -> int:
        """The number of the epoch."""
        return self._sampler.progress.epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; its beginning, unless this very epoch was resumed by `load_state_dict`."""
        if epoch != self.epoch:
            self._order.set_epoch(epoch)
            self._taken, self._finished = 0, False

    def __iter__(self) -> Any:
        if self._finished and self._sampler.progress.stages:  # the rest of a resumed epoch is over: now a whole one
            self._sampler.progress = self._sampler.progress._replace(stages=())
            self._iterator = None  # persistent workers have copies of the stream
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        self._taken, self._finished = 0, False
        for batch in super().__iter__():
            assert self.batch_size is not None
            self._taken += self.batch_size  # the last may be smaller: more than all is all
            yield batch
        self._finished = True

    def state_dict(self) -> dict[str, Any]:
        """Return how far training has come, up to the last batch that was taken; see `RelabelSampler.state_dict`."""
        return self._sampler.state_dict(self._taken)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, see `RelabelStream.load_state_dict`; the next iteration begins there.

        Raises:
            ValueError: it is no such state, or the state of another dataset, seed, window or remainder.
        """
        self._order.load_state_dict(state)
        self._iterator = None  # persistent workers have copies of the stream, without the state
        self._taken, self._finished = 0, False
