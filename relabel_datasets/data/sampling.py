"""Sample order of each rank, as a pure function of (seed, epoch, rank), and the sampler that yields it.

An epoch takes the shards in a random order. Each rank gets an equal, contiguous part of that sequence, so that ranks share
few shards. It shuffles its part within a window: sample x of the rank's i-th shard gets the time i + window * u(x) with u
uniform in [0, 1), and samples are sorted by time. So a new shard is needed each time one is used up, a batch mixes samples
of `window` shards, and the first batch needs only the first shards.

The progress of an epoch is a list of *stages*, one for each world size at which it ran. What all ranks of a stage consumed
is removed from the sequence, and the rest is split among the ranks again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DistributedSampler

from ..keywords import checked_keywords
from . import frameworks
from .epochs import Epochs, Iteration, Progress, Stage

Rows = npt.NDArray[np.int64]
Remainder = Literal["drop", "repeat", "uneven"]
REMAINDERS = ("drop", "repeat", "uneven")
WINDOW = 8
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Order:
    """Order of an epoch's samples on every rank.

    Args:
        shard_lengths: Number of samples in each shard.
        seed: Seed of the shuffle order; None keeps the order of the shards.
        window: Number of shards that are mixed at a time; None mixes all.
        remainder: Treatment of the samples that remain when the ranks get equal shares. `"drop"` leaves them out of the
            epoch; which ones changes from epoch to epoch. `"repeat"` adds the first samples until the shares are equal.
            `"uneven"` gives the first ranks one sample more than the others.
    """

    shard_lengths: tuple[int, ...]
    seed: int | None
    window: int | None
    remainder: Remainder

    def rows(self, progress: Progress, world_size: int, rank: int) -> Rows:
        """Return the rows that a rank has not read yet, in order.

        Args:
            progress: Epoch and position in it.
            world_size: Number of ranks now.
            rank: Rank, from 0 to `world_size - 1`.

        Returns:
            Row numbers in the dataset, int64 `[N]`.
        """
        epoch, stages = progress
        sequence, shards = self._sequence(epoch)
        for number, stage in enumerate(stages):
            if number + 1 == len(stages) and stage.world_size == world_size:  # the same stage continues
                chosen = self._share(len(sequence), world_size, rank)
                return sequence[chosen][self._shuffle(shards[chosen], epoch, number, rank)][stage.consumed :]
            left = np.ones(len(sequence), bool)
            for other in range(stage.world_size):
                chosen = self._share(len(sequence), stage.world_size, other)
                left[chosen[self._shuffle(shards[chosen], epoch, number, other)[: stage.consumed]]] = False
            sequence, shards = sequence[left], shards[left]
        chosen = self._share(len(sequence), world_size, rank)
        return sequence[chosen][self._shuffle(shards[chosen], epoch, len(stages), rank)]

    def num_samples(self, world_size: int, rank: int, progress: Progress = Progress()) -> int:
        """Return the number of samples that a rank has not read yet; by default, of a whole epoch."""
        stages = progress.stages
        if not stages or (len(stages) == 1 and stages[0].world_size == world_size):
            consumed = stages[0].consumed if stages else 0
            return max(len(self._share(sum(self.shard_lengths), world_size, rank)) - consumed, 0)
        return len(self.rows(progress, world_size, rank))

    def _sequence(self, epoch: int) -> tuple[Rows, Rows]:
        """Return the rows of all shards in this epoch's order of shards, and for each row its shard's position in it."""
        lengths = np.array(self.shard_lengths, np.int64)
        order = np.arange(len(lengths))
        if self.seed is not None:
            order = np.random.default_rng((self.seed, epoch)).permutation(order)
        starts = (np.cumsum(lengths) - lengths)[order]
        shards = np.repeat(np.arange(len(lengths)), lengths[order])
        ends = np.cumsum(lengths[order])
        return np.arange(len(shards)) + (starts - (ends - lengths[order]))[shards], shards

    def _share(self, count: int, world_size: int, rank: int) -> Rows:
        """Return the positions in a sequence of `count` rows that belong to a rank."""
        if self.remainder == "uneven":
            length, num_longer = divmod(count, world_size)
            start = rank * length + min(rank, num_longer)
            return np.arange(start, start + length + (rank < num_longer))
        if self.remainder == "drop":
            return np.arange(rank * (count // world_size), (rank + 1) * (count // world_size))
        length = -(-count // world_size)
        return np.arange(rank * length, (rank + 1) * length) % max(count, 1)

    def _shuffle(self, shards: Rows, epoch: int, number: int, rank: int) -> Rows:
        """Return the order in which a rank reads its part of the sequence."""
        if self.seed is None:
            return np.arange(len(shards))
        rng = np.random.default_rng((self.seed, epoch, number, rank))
        if self.window is None:
            return rng.permutation(len(shards))
        # Position among the rank's own shards; a part that wraps around comes last.
        changes = np.cumsum(np.diff(shards, prepend=shards[:1]) != 0)
        return np.argsort(changes + self.window * rng.random(len(shards)), kind="stable")


class RelabelSampler(DistributedSampler[int]):
    """Sampler with a resumable state that shuffles a `RelabelDataset` and splits it among ranks.

    Use it with `RelabelLoader`, torch's DataLoader, or torchdata's StatefulDataLoader. All ranks get equally many samples,
    none is repeated, and none is missing except for the remainder. The order depends only on the seed, the epoch, the rank,
    and the number of ranks. Each new iteration reads the next epoch, unless `set_epoch` or `load_state_dict` chose one since
    the last iteration began; the first reads epoch 0.

    It is a DistributedSampler, so that frameworks keep it instead of splitting it again. accelerate splits every loader:
    there, the sampler yields the samples of all ranks.

    Args:
        shard_lengths: Number of samples in each shard: `dataset.shard_lengths`.
        shuffle: Whether to shuffle. Default: True.
        seed: Seed of the shuffle order. Default: 0.
        window: Number of shards that are mixed at a time, for data that is read over a network. Default: All shards.
        remainder: `"drop"`, `"repeat"` or `"uneven"`, see `Order`. Default: `"drop"`.
        rank: Rank of this process. Default: The rank of torch.distributed, else the environment variable RANK, else 0.
        world_size: Number of ranks. Default: The world size of torch.distributed, else the environment variable WORLD_SIZE, else 1.

    Raises:
        ValueError: Arguments are out of range.

    Example:
        >>> sampler = RelabelSampler(dataset.shard_lengths)
        >>> loader = RelabelLoader(dataset, batch_size=64, sampler=sampler, num_workers=4)
    """

    @checked_keywords()
    def __init__(  # no super().__init__: it needs a process group
        self,
        shard_lengths: Sequence[int],
        *,
        shuffle: bool = True,
        seed: int = 0,
        window: int | None = None,
        remainder: Remainder = "drop",
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if remainder not in REMAINDERS:
            raise ValueError(f"remainder must be one of {REMAINDERS}, got {remainder!r}")
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1 shard, got {window}")
        if (rank is None) != (world_size is None):
            raise ValueError(f"pass both rank= and world_size=, or neither, got {rank} and {world_size}")
        if rank is not None and world_size is not None and not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to world_size - 1, got {rank} of {world_size}")
        lengths = tuple(map(int, shard_lengths))
        self.shuffle, self.seed, self.drop_last = shuffle, seed, remainder == "drop"  # as in DistributedSampler
        self.order = Order(shard_lengths=lengths, seed=seed if shuffle else None, window=window, remainder=remainder)
        self.epochs = Epochs()
        self._given = None if rank is None or world_size is None else (rank, world_size)

    def __getstate__(self) -> dict[str, Any]:
        if not frameworks.starts_workers():
            return self.__dict__
        self.epochs.check_skip(self.epochs.upcoming)
        return {**self.__dict__, "_given": self.rank_and_size}  # a spawned worker has no process group

    @property
    def rank_and_size(self) -> tuple[int, int]:
        """The rank and the number of ranks.

        Raises:
            ValueError: `rank=` and `world_size=` were given, and accelerate splits the samples again.
        """
        if frameworks.splits_samples():
            if self._given is None or self._given == (0, 1):
                return 0, 1
            if frameworks.num_accelerate_processes() > 1:
                raise ValueError(
                    f"accelerate splits the samples among its processes, after they were split by rank={self._given[0]}, "
                    f"world_size={self._given[1]}: remove rank= and world_size="
                )
        if self._given is not None:
            return self._given
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        return _ranks_of_environment()

    @property
    def rank(self) -> int:  # type: ignore[override]
        """The rank of this process."""
        return self.rank_and_size[0]

    @property
    def num_replicas(self) -> int:  # type: ignore[override]
        """The number of ranks."""
        return self.rank_and_size[1]

    @property
    def epoch(self) -> int:  # type: ignore[override]
        """The epoch that is being read, or that was chosen since."""
        return self.progress.epoch

    @property
    def progress(self) -> Progress:
        """Where the current iteration began, or where the next one begins if it was chosen since."""
        return self.epochs.running.start

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration.

        It begins with the first sample, unless `load_state_dict` loaded a state of the same epoch since the last iteration
        began: then it resumes there.

        Raises:
            ValueError: `epoch` is out of range.
        """
        self.epochs.set_epoch(int(epoch))

    def rows(self) -> Rows:
        """Return the rows that this rank reads in the next iteration, in order, int64 `[N]`."""
        return self.rows_of(self.epochs.upcoming)

    def rows_of(self, iteration: Iteration) -> Rows:
        """Return the rows that this rank reads in an iteration, in order, int64 `[N]`."""
        rank, world_size = self.rank_and_size
        return self.order.rows(iteration.start, world_size, rank)

    def __len__(self) -> int:
        """Return the number of samples of this rank in the current iteration, or in the next one if none is running."""
        return self.num_samples_of(self.current)

    @property
    def current(self) -> Iteration:
        """The iteration that is running or was chosen, or the next one if all of its samples were taken.

        It is the next one as well if DataLoader workers read the current one, so that nothing is known of its end.
        """
        iteration = self.epochs.running
        _, world_size = self.rank_and_size
        is_unknown = self.epochs.begun_by_workers and not iteration.counted_by_loader
        return self.epochs.upcoming if is_unknown or self.is_finished(iteration, world_size) else iteration

    def num_samples_of(self, iteration: Iteration) -> int:
        """Return the number of samples of this rank in an iteration, also those that were taken already.

        The Lightning Trainer counts the batches of a resumed epoch from its beginning: for it, what was consumed before the
        resume is included.
        """
        rank, world_size = self.rank_and_size
        left = self.order.num_samples(world_size, rank, iteration.start)
        if iteration.start.stages and frameworks.counts_whole_epochs():
            before = sum(stage.consumed for stage in iteration.start.stages)
            return max(left + before, self.order.num_samples(world_size, rank))
        return left

    def __iter__(self) -> Iterator[int]:
        iteration = self.epochs.begin()
        for row in self.rows_of(iteration).tolist():
            if not iteration.counted_by_loader:
                self.epochs.take(iteration)
            yield row

    def is_finished(self, iteration: Iteration, world_size: int, unused: int = 0) -> bool:
        """Return whether all samples of an iteration were taken, on the rank that has most.

        Args:
            iteration: Iteration of this rank.
            world_size: Number of ranks.
            unused: Number of samples at the end that are not read, since they do not fill a batch.
        """
        return iteration.taken + unused >= self.order.num_samples(world_size, 0, iteration.start)

    def state_dict(self, num_samples: int | None = None) -> dict[str, Any]:
        """Return the resumable state, which is equal on all ranks that have taken equally many samples.

        The state of an epoch whose samples were all taken is the beginning of the next epoch.

        Args:
            num_samples: Number of samples that the training loop has taken since the current iteration began. Default: the
                number that the sampler has yielded, which is too large if DataLoader workers read ahead. `RelabelLoader` and
                torchdata's StatefulDataLoader pass the correct number.

        Returns:
            A small dict that can be stored as JSON.
        """
        iteration = self.epochs.running
        return self.state_of(iteration if num_samples is None else Iteration(iteration.start, taken=num_samples))

    def state_of(self, iteration: Iteration, unused: int = 0) -> dict[str, Any]:
        """Return the state of an iteration; for `unused`, see `is_finished`."""
        _, world_size = self.rank_and_size
        progress = iteration.start.after(iteration.taken, world_size)
        if iteration.taken and self.is_finished(iteration, world_size, unused):
            progress = Progress(progress.epoch + 1)
        return {
            "relabel_order": _VERSION,
            "epoch": progress.epoch,
            "stages": [list(stage) for stage in progress.stages],
            "order": self._fingerprint(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state, on any number of ranks; the next iteration begins there.

        Raises:
            ValueError: `state` is not a state of a sampler, or it belongs to another dataset, seed, window or remainder.
        """
        if state.get("relabel_order") != _VERSION:
            raise ValueError(f"not a state of this order, version {_VERSION}: it has the keys {sorted(state)}")
        here = self._fingerprint()
        differing = [name for name in here if state["order"].get(name) != here[name]]
        if differing:
            raise ValueError(
                "the state is of another order: "
                + ", ".join(f"{name} is {state['order'].get(name)!r} there, {here[name]!r} here" for name in differing)
            )
        self.epochs.load(Progress(state["epoch"], tuple(Stage(*stage) for stage in state["stages"])))

    def _fingerprint(self) -> dict[str, Any]:
        return {
            "seed": self.order.seed,
            "window": self.order.window,
            "remainder": self.order.remainder,
            "num_shards": len(self.order.shard_lengths),
            "num_samples": sum(self.order.shard_lengths),
        }


def _ranks_of_environment() -> tuple[int, int]:
    """Return the rank and the world size that torchrun set for this process; (0, 1) without torchrun.

    Raises:
        ValueError: One of the variables is missing, or they are not a rank and a world size: samples would be lost.
    """
    given = {name: os.environ.get(name) or None for name in ("RANK", "WORLD_SIZE")}
    if not any(given.values()):
        return 0, 1
    try:
        rank, world_size = (int(value or "") for value in given.values())
        if not 0 <= rank < world_size:
            raise ValueError
    except ValueError:
        raise ValueError(
            "the environment variables RANK and WORLD_SIZE must be a rank and the number of ranks, as torchrun sets them, got "
            f"RANK={given['RANK']} and WORLD_SIZE={given['WORLD_SIZE']}: unset both, or pass rank= and world_size="
        ) from None
    return rank, world_size
