"""Which samples a rank sees, and in which order: a pure function of (seed, epoch, rank), and how far it has come.

An epoch takes the shards in a random order. Each rank gets an equal, contiguous part of that sequence, so that it reads few
shards that others read, and shuffles it within a window: sample x of the rank's i-th shard gets the time i + window * u(x)
with u uniform in [0, 1), and samples go by their times. So a new shard is needed each time one is used up, a batch mixes
samples of `window` shards, and only the first shard is needed to begin.

How far an epoch has come is a list of *stages*, one for each number of ranks it was run on: what all ranks of a stage have
consumed is left out of the sequence, and the rest is dealt anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Sampler

from ..keywords import checked_keywords

Rows = npt.NDArray[np.int64]
Remainder = Literal["drop", "repeat", "uneven"]
REMAINDERS = ("drop", "repeat", "uneven")
WINDOW = 8
_VERSION = 1


class Stage(NamedTuple):
    """A part of an epoch that was run on so many ranks, each of which consumed so many samples of its order."""

    world_size: int
    consumed: int


class Progress(NamedTuple):
    """How far an epoch has come: nothing but its number and its stages, whatever the number of samples."""

    epoch: int = 0
    stages: tuple[Stage, ...] = ()

    def after(self, num_samples: int, world_size: int) -> Progress:
        """Return the progress when each of so many ranks has taken so many more samples."""
        stages = self.stages
        if stages and stages[-1].world_size == world_size:
            stages, num_samples = stages[:-1], stages[-1].consumed + num_samples
        return Progress(self.epoch, (*stages, Stage(world_size, num_samples)) if num_samples else stages)


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of an epoch's samples on every rank.

    Args:
        shard_lengths: samples of each shard.
        seed: of the shuffling; None keeps the order of the shards.
        window: shards that are mixed; None mixes all.
        remainder: what happens with the samples left over when they are dealt to the ranks: `"drop"` leaves them out of this
            epoch, which ones changes with the epoch; `"repeat"` fills up with the first ones; `"uneven"` gives the first
            ranks one more than the others.
    """

    shard_lengths: tuple[int, ...]
    seed: int | None
    window: int | None
    remainder: Remainder

    def rows(self, progress: Progress, world_size: int, rank: int) -> Rows:
        """Return the rows that a rank has still to see, in order.

        Args:
            progress: the epoch, and how far it has come.
            world_size: number of ranks now.
            rank: which of them.
        """
        epoch, stages = progress
        sequence, shards = self._sequence(epoch)
        for number, stage in enumerate(stages):
            if number + 1 == len(stages) and stage.world_size == world_size:  # goes on as if nothing had happened
                chosen = self._share(len(sequence), world_size, rank)
                return sequence[chosen][self._shuffle(shards[chosen], epoch, number, rank)][stage.consumed :]
            left = np.ones(len(sequence), bool)
            for each in range(stage.world_size):
                chosen = self._share(len(sequence), stage.world_size, each)
                left[chosen[self._shuffle(shards[chosen], epoch, number, each)[: stage.consumed]]] = False
            sequence, shards = sequence[left], shards[left]
        chosen = self._share(len(sequence), world_size, rank)
        return sequence[chosen][self._shuffle(shards[chosen], epoch, len(stages), rank)]

    def num_samples(self, world_size: int, rank: int) -> int:
        """Return how many samples a rank sees in a whole epoch."""
        return len(self._share(sum(self.shard_lengths), world_size, rank))

    def _sequence(self, epoch: int) -> tuple[Rows, Rows]:
        """Return the rows of all shards, shard after shard in this epoch's order, and the place of each one's shard."""
        lengths = np.array(self.shard_lengths, np.int64)
        order = np.arange(len(lengths))
        if self.seed is not None:
            order = np.random.default_rng((self.seed, epoch)).permutation(order)
        starts = (np.cumsum(lengths) - lengths)[order]
        shards = np.repeat(np.arange(len(lengths)), lengths[order])
        ends = np.cumsum(lengths[order])
        return np.arange(len(shards)) + (starts - (ends - lengths[order]))[shards], shards

    def _share(self, count: int, world_size: int, rank: int) -> Rows:
        """Return the places in a sequence that are a rank's."""
        if self.remainder == "uneven":
            each, more = divmod(count, world_size)
            start = rank * each + min(rank, more)
            return np.arange(start, start + each + (rank < more))
        if self.remainder == "drop":
            return np.arange(rank * (count // world_size), (rank + 1) * (count // world_size))
        each = -(-count // world_size)
        return np.arange(rank * each, (rank + 1) * each) % max(count, 1)

    def _shuffle(self, shards: Rows, epoch: int, number: int, rank: int) -> Rows:
        """Return the order in which a rank sees its part of the sequence."""
        if self.seed is None:
            return np.arange(len(shards))
        rng = np.random.default_rng((self.seed, epoch, number, rank))
        if self.window is None:
            return rng.permutation(len(shards))
        # Places among the rank's own shards, in the order in which they come; a part that wraps around comes last.
        changes = np.cumsum(np.diff(shards, prepend=shards[:1]) != 0)
        return np.argsort(changes + self.window * rng.random(len(shards)), kind="stable")


class RelabelSampler(Sampler[int]):
    """The rows that this rank sees in an epoch, shuffled, with a state: for a `RelabelDataset` under any DataLoader.

    All ranks get equally many, none twice and none missing but for the remainder. The order depends on nothing but seed,
    epoch, rank, and number of ranks. Call `set_epoch` before each epoch: else all have the same order.

    Args:
        shard_lengths: samples of each shard: `dataset.shard_lengths`.
        shuffle: whether to shuffle at all.
        seed: of the shuffling.
        window: shards that are mixed at a time, for data that comes over a network. Default: all.
        remainder: `"drop"`, `"repeat"` or `"uneven"`, see `Order`.
        rank: of this process. Default: that of torch.distributed, else the environment variable RANK, else 0.
        world_size: number of ranks. Default: likewise, of WORLD_SIZE, else 1.

    Attributes:
        progress: how far this rank has come when the next iteration begins.

    Raises:
        ValueError: arguments out of range.

    Example:
        >>> sampler = RelabelSampler(dataset.shard_lengths)
        >>> loader = RelabelLoader(dataset, batch_size=64, sampler=sampler, num_workers=4)
    """

    @checked_keywords()
    def __init__(
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
            raise ValueError(f"give rank and world_size both or neither, got {rank} and {world_size}")
        if rank is not None and world_size is not None and not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to world_size - 1, got {rank} of {world_size}")
        lengths = tuple(map(int, shard_lengths))
        self.order = Order(shard_lengths=lengths, seed=seed if shuffle else None, window=window, remainder=remainder)
        self.progress = Progress()
        self._given = None if rank is None or world_size is None else (rank, world_size)
        self._handed_out, self._exhausted = 0, False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_given": self.rank_and_size}  # a spawned process knows of no ranks

    @property
    def rank_and_size(self) -> tuple[int, int]:
        """The rank and the number of ranks."""
        if self._given is not None:
            return self._given
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; its beginning, unless this very epoch was resumed by `load_state_dict`."""
        if epoch != self.progress.epoch:
            self.progress = Progress(int(epoch))
            self._handed_out, self._exhausted = 0, False

    def rows(self) -> Rows:
        """Return the rows that this rank has still to see, in order."""
        rank, world_size = self.rank_and_size
        return self.order.rows(self.progress, world_size, rank)

    def __len__(self) -> int:
        """Return the number of samples of this rank in a whole epoch."""
        rank, world_size = self.rank_and_size
        return self.order.num_samples(world_size, rank)

    def __iter__(self) -> Iterator[int]:
        if self._exhausted:
            self.progress = Progress(self.progress.epoch)
        self._handed_out, self._exhausted = 0, False
        for row in self.rows().tolist():
            self._handed_out += 1
            yield row
        self._exhausted = True

    def state_dict(self, num_samples: int | None = None) -> dict[str, Any]:
        """Return how far this rank has come; it is the same on all ranks that have taken equally many samples.

        Args:
            num_samples: that the training loop has taken since `progress`. Default: what the sampler has handed out, which
                is more where DataLoader workers read ahead; `RelabelLoader` and torchdata's StatefulDataLoader know.
        """
        _, world_size = self.rank_and_size
        epoch, stages = self.progress.after(self._handed_out if num_samples is None else num_samples, world_size)
        return {
            "relabel_order": _VERSION,
            "epoch": epoch,
            "stages": [list(stage) for stage in stages],
            "order": self._fingerprint(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, on as many ranks as there are now.

        Raises:
            ValueError: it is no such state, or the state of another dataset, seed, window or remainder.
        """
        if state.get("relabel_order") != _VERSION:
            raise ValueError(f"not a state of this order, version {_VERSION}: it has the keys {sorted(state)}")
        here = self._fingerprint()
        other = [name for name in here if state["order"].get(name) != here[name]]
        if other:
            raise ValueError(
                "the state is of another order: "
                + ", ".join(f"{name} is {state['order'].get(name)!r} there, {here[name]!r} here" for name in other)
            )
        self.progress = Progress(state["epoch"], tuple(Stage(*stage) for stage in state["stages"]))
        self._handed_out, self._exhausted = 0, False

    def _fingerprint(self) -> dict[str, Any]:
        return {
            "seed": self.order.seed,
            "window": self.order.window,
            "remainder": self.order.remainder,
            "num_shards": len(self.order.shard_lengths),
            "num_samples": sum(self.order.shard_lengths),
        }
