"""Pipeline of webdataset over the samples of a dataset: its shard lists, splitters, shuffles and handlers."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from threading import Thread
from typing import Any

import webdataset as wds
from torch.utils.data import get_worker_info

from ..errors import DatasetError, ImageError, LabelMapError
from ..keywords import checked_keywords
from . import frameworks
from .datasets import RelabelDataset
from .epochs import Iteration, SharedEpochs
from .prefetch import prefetch

_PREFETCH_SHARDS = 2  # shards that are downloaded before they are needed
_DECODE_BATCH = 16  # number of samples whose label maps are read and pooled at once
_BAD_DATA = (DatasetError, ImageError, LabelMapError, OSError)  # errors that a handler may skip

Handler = Callable[[Exception], bool]
_Shard = dict[str, str]  # as in webdataset: {"url": ...}


class RelabelPipeline(wds.DataPipeline, wds.FluidInterface):
    """webdataset pipeline that yields the samples of a dataset: `(image, label_map)`, or what its transforms return.

    All methods of webdataset's pipelines apply, such as `batched`, `map`, `select`, `with_epoch` and `with_length`. Shards are
    split by `webdataset.split_by_node` and `webdataset.split_by_worker`, and shards and samples are shuffled by
    `webdataset.shuffle`. Files are opened as by the dataset: verified against the manifest, from the cache if they are remote,
    and joined with `images=`. The shuffle buffer holds positions, not images, so a large one needs little memory.

    Without `resampled`, the workers of all nodes together read each sample once per epoch. They split whole shards, so nodes
    and workers differ in their numbers of samples, and workers beyond the number of shards are idle. Each new iteration reads
    the next epoch, in another order and with other shards for each worker, unless `set_epoch` chose one; the first reads
    epoch 0.

    Args:
        dataset: Dataset to read, from `load_dataset` with its `transforms`, `images`, credentials and cache.
        shuffle: Number of samples in the shuffle buffer of each worker. 0 reads shards and samples in order. Default: 1000.
        resampled: Whether each worker draws shards at random, with replacement and without end, as with
            `webdataset.ResampledShards`. Combine it with `with_epoch`. Default: False.
        seed: Seed of the shuffle order and of the drawn shards.
        handler: Handler of webdataset for samples and shards that are corrupt or cannot be read, such as
            `webdataset.warn_and_continue`. Errors in transforms are always raised. Default: `webdataset.reraise_exception`.

    Raises:
        TypeError: `dataset` is not a RelabelDataset.
        ValueError: `shuffle` is negative, or the shards that the shuffle buffer mixes exceed the limit of the cache.

    Example:
        >>> dataset = load_dataset("path/to/dataset", split="train", transforms=transforms)  # ending in LabelPooling()
        >>> pipeline = RelabelPipeline(dataset, shuffle=10_000).batched(64)
        >>> loader = webdataset.WebLoader(pipeline, batch_size=None, num_workers=4)
        >>> for images, soft_labels in loader:
        ...     ...
    """

    @checked_keywords(hints={"shardshuffle": "pass shuffle=, which also shuffles shards"})
    def __init__(
        self,
        dataset: RelabelDataset,
        *,
        shuffle: int = 1000,
        resampled: bool = False,
        seed: int = 0,
        handler: Handler = wds.reraise_exception,
    ) -> None:
        if not isinstance(dataset, RelabelDataset):
            raise TypeError(
                f"dataset must be a RelabelDataset, such as load_dataset(path, split='train'), got {type(dataset).__name__}"
            )
        if isinstance(shuffle, bool) or shuffle < 0:
            raise ValueError(f"shuffle must be a number of samples, and 0 to read in order, got {shuffle}")
        self._stages = stages = _Stages(dataset, shuffle, resampled, seed, handler)
        split = () if resampled else (wds.split_by_node, stages.check_node, wds.split_by_worker)
        super().__init__(stages.shards, *split, stages.positions, stages.shuffled, stages.samples)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration. With several nodes, call it before each epoch on all of them.

        Args:
            epoch: Number of the epoch, from 0.

        Raises:
            ValueError: `epoch` is out of range.
        """
        self._stages.epochs.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        if get_worker_info() is not None:
            self._stages.begin()  # at once: the main process may choose another epoch before the first sample
        return iter(super().__iter__())


class _Stages:
    """Stages of a pipeline, and the epoch that they read."""

    def __init__(self, dataset: RelabelDataset, shuffle: int, resampled: bool, seed: int, handler: Handler) -> None:
        self.epochs = SharedEpochs()
        self._begun: Iteration | None = None
        self._epoch = 0
        self._dataset, self._reader = dataset, dataset.label_maps.shards
        self._shuffle, self._resampled, self._seed, self._handler = shuffle, resampled, seed, handler
        lengths = dataset.shard_lengths
        ends = list(itertools.accumulate(lengths))
        self._rows = {
            url: (shard, range(end - length, end))
            for shard, (url, length, end) in enumerate(zip(self._reader.urls, lengths, ends, strict=True))
        }
        mixed = 1 + _PREFETCH_SHARDS + -(-shuffle // max(1, min(lengths)))
        self._reader.check_room(min(mixed, len(lengths)), "the shuffle buffer of the pipeline")

    def begin(self) -> None:
        """Begin an iteration, whose first stage runs later."""
        self._begun = self.epochs.begin()

    def shards(self) -> Iterator[_Shard]:
        """Return the shards of the next epoch, the same ones in the same order in all workers; for `resampled`, a worker's."""
        iteration, self._begun = self._begun or self.epochs.begin(), None
        if frameworks.splits_samples() and frameworks.num_accelerate_processes() > 1:
            raise RuntimeError(
                "accelerate splits the samples among its processes, after webdataset has split the shards: do not prepare the "
                "loader of a RelabelPipeline, or read a RelabelStream"
            )
        self._epoch, urls = iteration.start.epoch, list(self._rows)
        if self._resampled:
            drawn = wds.ResampledShards(
                urls, deterministic=True, seed=self._seed, worker_seed=lambda: self._rng(of_worker=True).getrandbits(30)
            )
            return iter(drawn)
        shards: Iterator[_Shard] = iter(wds.SimpleShardList(urls))
        return self._shuffled(shards, len(urls), self._rng()) if self._shuffle else shards

    def check_node(self, shards: Iterable[_Shard]) -> Iterator[_Shard]:
        """Yield the shards of this node, and raise an error if there are none, since training would wait for it forever."""
        is_empty = True
        for shard in shards:
            is_empty = False
            yield shard
        if is_empty:
            rank, world_size, _, _ = wds.utils.pytorch_worker_info()
            raise ValueError(
                f"rank {rank} of {world_size} has no shard, since webdataset splits whole shards and the split has "
                f"{len(self._rows)}: pass resampled=True, or read a RelabelStream, which splits samples"
            )

    def positions(self, shards: Iterable[_Shard]) -> Iterator[int]:
        """Yield the positions in the dataset of the samples of shards."""
        for url in self._fetched_ahead(shard["url"] for shard in shards):
            number, rows = self._rows[url]
            try:
                self._reader.fetch(number)
            except _BAD_DATA as error:
                if self._handler(error):
                    continue
                return
            yield from rows

    def shuffled(self, positions: Iterator[int]) -> Iterator[int]:
        """Return positions in the order of the shuffle buffer of this worker."""
        if not self._shuffle:
            return positions
        return self._shuffled(positions, self._shuffle, self._rng(of_worker=True))

    def samples(self, positions: Iterator[int]) -> Iterator[Any]:
        """Yield the samples at positions."""
        while batch := list(itertools.islice(positions, _DECODE_BATCH)):
            samples, is_stopped = self._read(batch)
            yield from samples
            if is_stopped:
                return

    def _read(self, batch: list[int]) -> tuple[list[Any], bool]:
        """Return the samples at positions, and whether the handler stops the pipeline."""
        # Resampled shards come several times in an epoch, so there each crop is drawn at random.
        with contextlib.nullcontext() if self._resampled else self._dataset.reading_epoch(self._epoch, self._seed):
            return self._read_skipping(batch)

    def _read_skipping(self, batch: list[int]) -> tuple[list[Any], bool]:
        try:
            return self._dataset.__getitems__(batch), False
        except _BAD_DATA:
            pass  # found below
        samples = []
        for position in batch:
            try:
                samples.append(self._dataset[position])
            except _BAD_DATA as error:
                if not self._handler(error):
                    return samples, True
        return samples, False

    def _fetched_ahead(self, urls: Iterable[str]) -> Iterator[str]:
        """Yield the URLs of shards while the next ones are downloaded."""
        ahead: deque[str] = deque()
        for url in urls:
            if self._reader.is_remote:
                Thread(target=prefetch, args=(self._reader, self._rows[url][0]), daemon=True).start()
            ahead.append(url)
            if len(ahead) > _PREFETCH_SHARDS:
                yield ahead.popleft()
        yield from ahead

    def _rng(self, *, of_worker: bool = False) -> random.Random:
        """Return a generator for this epoch, of this worker or of all workers of all nodes."""
        rank, _, worker, _ = wds.utils.pytorch_worker_info() if of_worker else (0,) * 4
        return random.Random(f"{self._seed} {self._epoch} {of_worker} {rank} {worker}")

    def _shuffled(self, data: Iterator[Any], size: int, rng: random.Random) -> Iterator[Any]:
        shuffled: Iterator[Any] = wds.shuffle(size, initial=size, rng=rng)(data)
        return shuffled
