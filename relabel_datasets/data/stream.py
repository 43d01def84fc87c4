"""Iterable dataset that reads shards in order, with shard prefetching, and a DataLoader with an exact state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..keywords import checked_keywords
from ..labels.batch import collate
from . import frameworks
from .datasets import RelabelDataset
from .epochs import Iteration, SharedEpochs
from .loader_options import LoaderOptions
from .prefetch import PREFETCH_SHARDS, Prefetch
from .sampling import WINDOW, RelabelSampler, Remainder
from .workers import check_temp_folder, prepare_workers

if TYPE_CHECKING:
    from typing_extensions import Unpack

_DECODE_BATCH = 64  # largest number of samples whose label maps are read and pooled at once


class RelabelStream(IterableDataset[Any]):
    """Iterable dataset that reads a `RelabelDataset` shard by shard, with exactly equal ranks and exact resume.

    Under a DataLoader, the workers split the samples of this rank: each reads a batch in turn, so that the order is the same
    for any number of workers. `RelabelLoader` also keeps an exact state. Each new iteration reads the next epoch, unless
    `set_epoch` or `load_state_dict` chose one since the last iteration began; the first reads epoch 0.

    accelerate splits every loader among its processes: there, the stream yields the samples of all ranks.

    Args:
        dataset: Dataset to read; its shards may be remote.
        shuffle: Whether to shuffle. Default: True.
        seed: Seed of the shuffle order. Default: 0.
        window: Number of shards that are mixed at a time, and so the number that is on disk. None mixes all. Default: 8.
        remainder: `"drop"`, `"repeat"` or `"uneven"`, see `sampling.Order`. Default: `"drop"`.
        rank: Rank of this process, see `RelabelSampler`.
        world_size: Number of ranks, see `RelabelSampler`.
        batch_size: Number of samples that are decoded at a time, and that each worker of a DataLoader without batch size reads
            in turn. Default: 1; `RelabelLoader` sets its own.

    Attributes:
        sampler: The `RelabelSampler` that defines the order.

    Raises:
        ValueError: Arguments are out of range.

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
            num_shards if window is None else min(window + PREFETCH_SHARDS, num_shards), "the window of the stream"
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
        self._epochs = self.sampler.epochs = SharedEpochs()
        self._resumed = 0  # samples of this worker's share that were yielded before the resume
        self._yielded = 0  # and until now

    def __getstate__(self) -> dict[str, Any]:
        if not frameworks.starts_workers():
            return self.__dict__
        return {**self.__dict__, "batch_size": self._batch_size}  # a spawned worker does not see its loader

    def __repr__(self) -> str:
        _, _, lines = repr(self.dataset).partition("\n")
        return f"Dataset {type(self).__name__}\n{lines}"

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, by index."""
        return self.dataset.classes

    def __len__(self) -> int:
        """Return the number of samples of this rank in the current iteration, or in the next one if none is running."""
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration, see `RelabelSampler.set_epoch`."""
        self.sampler.set_epoch(epoch)

    @property
    def _batch_size(self) -> int:
        """Number of samples that a DataLoader worker reads in turn."""
        return frameworks.batch_size_of_workers() or self.batch_size

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        if info is None:
            return self._read(self._epochs.begin, 0, 1)  # begins with the first sample
        try:
            iteration = self._epochs.begin()  # at once: the main process may choose another epoch now
        except RuntimeError as error:  # raised with the first sample, because an error here would kill the worker
            return _raise_later(error)
        return self._read(lambda: iteration, info.id, info.num_workers)

    def _read(self, begin: Callable[[], Iteration], worker: int, num_workers: int) -> Iterator[Any]:
        """Yield a worker's share of the samples of an iteration."""
        iteration, batch_size = begin(), self._batch_size
        rows = self.sampler.rows_of(iteration)
        positions = np.flatnonzero(np.arange(len(rows)) // batch_size % num_workers == worker)
        shards = np.searchsorted(np.cumsum(self.dataset.shard_lengths), rows, "right")
        at_once = min(batch_size, _DECODE_BATCH)
        first, self._resumed = self._resumed, 0
        self._yielded = first
        with Prefetch(self.dataset.label_maps.shards, shards, worker, num_workers) as prefetching:
            for start in range(first, len(positions), at_once):
                batch = positions[start : start + at_once]
                prefetching.advance(int(batch[0]))
                with self.dataset.reading_epoch(iteration.start.epoch, self.sampler.seed):
                    samples = self.dataset.__getitems__(rows[batch].tolist())
                for sample in samples:
                    self._yielded += 1
                    if not iteration.counted_by_loader:
                        self._epochs.take(iteration)
                    yield sample

    def state_dict(self, num_samples: int | None = None) -> dict[str, Any]:
        """Return the resumable state, which is equal on all ranks that have taken equally many samples.

        The state of an epoch whose samples were all taken is the beginning of the next epoch.

        Args:
            num_samples: Number of samples that the training loop has taken since the current iteration began. Default: the
                number that the stream has yielded, which this process knows only without DataLoader workers. `RelabelLoader`
                and torchdata's StatefulDataLoader pass the correct number.

        Returns:
            A small dict that can be stored as JSON.

        Raises:
            RuntimeError: DataLoader workers read the stream and `num_samples` is missing, or accelerate dispatches the
                samples of a StatefulDataLoader.
        """
        if frameworks.splits_by_dispatching():
            raise RuntimeError(
                "accelerate's DataLoaderDispatcher saves states that are ahead of training, so that resuming loses samples: "
                "pass Accelerator a DataLoaderConfiguration(dispatch_batches=False, use_stateful_dataloader=True)"
            )
        info = get_worker_info()
        if info is not None:
            own = {"num_workers": info.num_workers, "worker": info.id, "yielded": self._yielded}
            start = Iteration(self._epochs.running.start)
            return {**self.sampler.state_of(start), "own": {**own, "batch_size": self._batch_size}}
        if num_samples is None and self._epochs.begun_by_workers:
            raise RuntimeError(
                "DataLoader workers read ahead, so that the stream cannot tell which samples were taken: use RelabelLoader, "
                "or state_dict(num_samples=...)"
            )
        return self.sampler.state_dict(num_samples)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state, on any number of ranks and workers; the next iteration begins there.

        Args:
            state: State of a stream or a `RelabelLoader`, or of a StatefulDataLoader over a stream. The latter can resume
                with another number of workers or ranks this way.

        Raises:
            ValueError: `state` is not such a state, or it belongs to another dataset, seed, window or remainder.
        """
        states = list(_find_states(state))
        if not states:
            raise ValueError(f"not a state of a RelabelStream: it has the keys {sorted(state)}")
        own, info = states[0].get("own"), get_worker_info()
        self._resumed = 0
        if own is not None and info is not None:
            here = (info.num_workers, info.id, self._batch_size)
            if (own["num_workers"], own["worker"], own["batch_size"]) != here:
                raise ValueError(f"the state is of (workers, worker, batch_size) {tuple(own.values())}, this is {here}")
            self._resumed = self._yielded = own["yielded"]  # also the state before the first sample
        self.sampler.load_state_dict(states[0])
        if own is not None and info is None:
            if state.get("_steps_since_snapshot"):
                raise ValueError(
                    "the state is older than the last batch: pass snapshot_every_n_steps=1 to StatefulDataLoader"
                )
            taken = _num_taken([worker_state["own"] for worker_state in states])
            self.sampler.load_state_dict(self.sampler.state_dict(taken))


def _raise_later(error: Exception) -> Iterator[Any]:
    """Raise an error when the first sample is requested."""
    yield from ()
    raise error


def _find_states(state: object) -> Iterator[Mapping[str, Any]]:
    """Yield the states of streams in the state of a StatefulDataLoader, one for each of its workers."""
    if isinstance(state, Mapping):
        if "relabel_order" in state:
            yield state
        else:
            for value in state.values():
                yield from _find_states(value)


def _num_taken(own: list[dict[str, int]]) -> int:
    """Return the number of samples that the loader has taken, from the numbers that its workers have yielded."""
    num_workers, batch_size = own[0]["num_workers"], own[0]["batch_size"]
    taken = sum(worker["yielded"] for worker in own)
    owners = np.arange(taken) // batch_size % num_workers
    if len(own) != num_workers or any(np.sum(owners == worker["worker"]) != worker["yielded"] for worker in own):
        raise ValueError(
            "the state can only be resumed with the same number of workers, since their batches were not of the stream's "
            f"batch_size, {batch_size}: pass batch_size= to the loader"
        )
    return taken


class RelabelLoader(DataLoader[Any]):
    """DataLoader with an exact state, over a `RelabelStream`, or over a `RelabelDataset` with a `RelabelSampler`.

    The order of the samples is the same for any number of workers, and a state may be loaded with another number of workers
    or ranks. Each new iteration reads the next epoch, unless `set_epoch` or `load_state_dict` chose one since the last
    iteration began; the first reads epoch 0. An iteration begins with its first batch.

    After an error in a sample of a `RelabelDataset`, `next()` returns the batch after it, as in torch. Then a state no longer
    includes the failed batch. After an error, a stream has no more batches. `RelabelPipeline` can skip bad samples.

    Args:
        dataset: `RelabelStream` or `RelabelDataset` to read.
        batch_size: Number of samples in a batch of this rank.
        sampler: `RelabelSampler`, for a `RelabelDataset`.
        kwargs: Other arguments of DataLoader, see `LoaderOptions`. Default of `collate_fn`: `collate`, which does not copy images that
            were converted together.

    Raises:
        ValueError: `sampler` is missing or is another sampler, batches are not made by `batch_size`, or the path of the temporary folder
            is too long for the sockets of workers.

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
        **kwargs: Unpack[LoaderOptions],
    ) -> None:
        if batch_size is None or kwargs.get("batch_sampler") is not None:
            raise ValueError(
                "RelabelLoader makes its own batches of batch_size: use torch's DataLoader for a batch_sampler, or for "
                "Lightning's predict()"
            )
        if isinstance(dataset, RelabelStream):
            self._order: RelabelStream | RelabelSampler = dataset
            dataset.batch_size = batch_size
        elif isinstance(sampler, RelabelSampler):
            self._order = sampler
        else:
            raise ValueError(
                "a RelabelDataset needs sampler=RelabelSampler(dataset.shard_lengths), "
                f"got {'no sampler' if sampler is None else type(sampler).__name__}"
            )
        if kwargs.get("collate_fn") is None:
            kwargs["collate_fn"] = collate
        super().__init__(dataset, batch_size, sampler=sampler, **kwargs)
        if isinstance(dataset, RelabelStream):  # Lightning and Fabric announce epochs to `loader.sampler`
            self.sampler.set_epoch = dataset.set_epoch  # type: ignore[attr-defined]
        if self.num_workers:
            check_temp_folder()
            prepare_workers(self.multiprocessing_context)

    @property
    def _relabel_sampler(self) -> RelabelSampler:
        return self._order.sampler if isinstance(self._order, RelabelStream) else self._order

    @property
    def epoch(self) -> int:
        """The epoch that is being read, or that was chosen since."""
        return self._relabel_sampler.epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration, see `RelabelSampler.set_epoch`."""
        self._order.set_epoch(epoch)

    def __len__(self) -> int:
        """Return the number of batches of the current iteration, or of the next one if none is running.

        After a state is loaded it is the number of batches that are left of the epoch. Only for the Lightning Trainer, which
        counts batches from the beginning of the epoch, it is the number of batches of the whole epoch.
        """
        sampler = self._relabel_sampler
        assert self.batch_size is not None
        num_samples = sampler.num_samples_of(self._current)
        return num_samples // self.batch_size if self.drop_last else -(-num_samples // self.batch_size)

    @property
    def _unused(self) -> int:
        """Number of samples at the end of an iteration that need not be taken for it to be finished."""
        assert self.batch_size is not None
        return self.batch_size - 1 if self.drop_last else 0

    @property
    def _current(self) -> Iteration:
        """The iteration that is running or was chosen, or the next one if all of its batches were taken."""
        epochs = self._relabel_sampler.epochs
        iteration = epochs.current
        _, world_size = self._relabel_sampler.rank_and_size
        is_finished = self._relabel_sampler.is_finished(iteration, world_size, self._unused)
        return epochs.upcoming if is_finished else iteration

    def __iter__(self) -> Any:
        return _Batches(self._results())

    def _results(self) -> Iterator[Any]:
        """Yield the batches of an iteration, and a `_Failure` for each batch that cannot be read."""
        epochs = self._relabel_sampler.epochs
        assert self.batch_size is not None
        iteration = epochs.upcoming
        iteration.counted_by_loader = True
        epochs.choose(iteration)  # the stream or sampler begins it, in this process or in workers
        if iteration.start.stages:
            self._iterator = None  # persistent workers cannot begin within an epoch
        batches = super().__iter__()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                if self._order is self.dataset:  # a stream, of which torch would lose other samples without an error
                    raise
                yield _Failure(error)
                epochs.take(iteration, self.batch_size)  # only now: a state before this repeats the batch
            else:
                epochs.take(iteration, self.batch_size)  # the last batch may be smaller, and a larger count is harmless
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the resumable state after the last batch that was taken; see `RelabelSampler.state_dict`."""
        return self._relabel_sampler.state_of(self._relabel_sampler.epochs.current, self._unused)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state, see `RelabelStream.load_state_dict`; the next iteration begins there.

        Raises:
            ValueError: `state` is not such a state, or it belongs to another dataset, seed, window or remainder.
        """
        self._order.load_state_dict(state)


class _Failure(NamedTuple):
    """Error of a batch."""

    error: Exception


class _Batches(Iterator[Any]):
    """Iterator that raises the failures among the results of a generator, which an exception would end."""

    def __init__(self, results: Iterator[Any]) -> None:
        self._results = results

    def __next__(self) -> Any:
        result = next(self._results)
        if isinstance(result, _Failure):
            raise result.error
        return result
