"""Measure how well orders that read shard after shard shuffle: `python tests/benchmarks/shuffling.py`.

The orders are our window over `--num-shards` shards of `--num-samples` samples, the buffers of `datasets` and webdataset over the same
shards in random order, and a full shuffle. All are computed by the code of the libraries, on row numbers only. Each figure is a mean
over `--epochs` seeds.

- shards in a batch: number of different shards in a batch of 256.
- class spread: chi-square statistic of the class counts of a batch, relative to that of a full shuffle. 1.00 is random, 2.00 has twice
  the variance. It is measured for images that are distributed over shards at random, as the builder does, and for shards sorted by
  class, the worst case.
- reach: distance in an epoch between two samples of a shard, relative to that of a full shuffle. 1.00 is anywhere.
- shards on disk: maximum number of shards that are partially read. Buffers also hold their samples in memory.
- shards before the first batch: number of shards from which a sample is read before the first batch of 256 is complete.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from datasets import IterableDataset
from datasets.iterable_dataset import ExamplesIterable
from webdataset.filters import _shuffle as webdataset_shuffle

from relabel_datasets.data.sampling import WINDOW, RelabelSampler

BATCH, NUM_CLASSES = 256, 100
WINDOWS = (1, 2, 4, 8, 16, 32, None)  # None mixes all shards
BUFFERS = (1000, 10000)

Rows = npt.NDArray[np.int64]


class Epoch(NamedTuple):
    """Rows of an epoch in the order in which they are yielded and read, and the number read before the first batch."""

    rows: Rows
    read: Rows
    read_first: int


class Figures(NamedTuple):
    """Values of a row of the table."""

    shards_in_batch: float
    spread_random: float
    spread_sorted: float
    reach: float
    on_disk: float
    before_first: float


def full_shuffle(lengths: list[int], seed: int) -> Epoch:
    rows = np.random.default_rng(seed).permutation(sum(lengths))
    return Epoch(rows, rows, BATCH)


def window_shuffle(lengths: list[int], seed: int, window: int | None) -> Epoch:
    rows = RelabelSampler(lengths, seed=seed, window=window, rank=0, world_size=1).rows()
    return Epoch(rows, rows, BATCH)


def webdataset_buffer(lengths: list[int], seed: int, size: int) -> Epoch:
    ends = np.cumsum(lengths)
    order = np.random.default_rng(seed).permutation(len(lengths))
    rows = np.concatenate([np.arange(ends[i] - lengths[i], ends[i]) for i in order])
    read: list[int] = []
    shuffled = webdataset_shuffle(recorded(rows, read), size, 100, random.Random(seed))
    return drain(shuffled, read)


def datasets_buffer(lengths: list[int], seed: int, size: int) -> Epoch:
    ends = np.cumsum(lengths)
    read: list[int] = []

    def examples(shards: list[int]) -> Iterator[tuple[int, dict[str, int]]]:
        for shard in shards:
            for row in recorded(np.arange(ends[shard] - lengths[shard], ends[shard]), read):
                yield row, {"row": row}

    source = ExamplesIterable(examples, {"shards": list(range(len(lengths)))})
    shuffled = IterableDataset(source).shuffle(seed=seed, buffer_size=size)
    return drain((example["row"] for example in shuffled), read)


def recorded(rows: Rows, read: list[int]) -> Iterator[int]:
    for row in rows.tolist():
        read.append(row)
        yield row


def drain(shuffled: Iterator[int], read: list[int]) -> Epoch:
    first = list(islice(shuffled, BATCH))
    read_first = len(read)
    return Epoch(np.array([*first, *shuffled]), np.array(read), read_first)


def max_open(shards: Rows) -> int:
    """Return the maximum number of shards that are partially read."""
    _, begins = np.unique(shards, return_index=True)
    _, ends = np.unique(shards[::-1], return_index=True)
    changes = np.bincount(begins, minlength=len(shards) + 1) - np.bincount(
        len(shards) - ends, minlength=len(shards) + 1
    )
    return int(changes.cumsum().max())


def in_batches(values: Rows) -> Rows:
    return values[: len(values) // BATCH * BATCH].reshape(-1, BATCH)


def chi_square(classes: Rows) -> float:
    """Return the mean over batches of the chi-square statistic per degree of freedom of their class counts."""
    counts = np.stack([np.bincount(batch, minlength=NUM_CLASSES) for batch in in_batches(classes)])
    expected = BATCH * np.bincount(classes, minlength=NUM_CLASSES) / len(classes)
    return float((((counts - expected) ** 2 / expected).sum(1) / (NUM_CLASSES - 1)).mean())


def measure(epoch: Epoch, lengths: list[int], rng: np.random.Generator) -> Figures:
    """Return the figures of an epoch, not yet relative to a full shuffle."""
    total, ends = sum(lengths), np.cumsum(lengths)
    assert np.array_equal(np.sort(epoch.rows), np.arange(total)), "each sample once"
    shards, read = (np.searchsorted(ends, rows, "right") for rows in (epoch.rows, epoch.read))
    by_row = np.arange(total) * NUM_CLASSES // total
    positions = np.split(np.argsort(epoch.rows), ends[:-1])
    return Figures(
        shards_in_batch=statistics.mean(len(set(batch)) for batch in in_batches(shards).tolist()),
        spread_random=chi_square(rng.permutation(by_row)[epoch.rows]),
        spread_sorted=chi_square(by_row[epoch.rows]),
        reach=float(
            np.mean(
                [np.abs(np.subtract(*rng.choice(shard_positions, (2, 2000)))).mean() for shard_positions in positions]
            )
        )
        / total,
        on_disk=max_open(read),
        before_first=len(set(read[: epoch.read_first].tolist())),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-shards", type=int, default=64, help="number of shards (default: %(default)s)")
    parser.add_argument("--num-samples", type=int, default=1000, help="samples per shard (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="number of epochs and seeds (default: %(default)s)")
    args = parser.parse_args()
    lengths = [args.num_samples] * args.num_shards
    orders: dict[str, Callable[[int], Epoch]] = {"full shuffle": lambda seed: full_shuffle(lengths, seed)}
    for window in WINDOWS:
        name = f"window={window}" + (", the default of a stream" if window == WINDOW else "")
        orders[name] = lambda seed, window=window: window_shuffle(lengths, seed, window)
    for size in BUFFERS:
        orders[f"datasets, buffer of {size}"] = lambda seed, size=size: datasets_buffer(lengths, seed, size)
        orders[f"webdataset, buffer of {size}"] = lambda seed, size=size: webdataset_buffer(lengths, seed, size)
    print(f"{args.num_shards} shards of {args.num_samples} samples, {NUM_CLASSES} classes, batches of {BATCH}\n")
    print(
        "| order | shards in a batch | class spread | class spread, sorted shards | reach | shards on disk | shards before the first batch |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    full: Figures | None = None
    for name, order in orders.items():
        figures = [measure(order(seed), lengths, np.random.default_rng(seed)) for seed in range(args.epochs)]
        mean = Figures(*map(statistics.mean, zip(*figures, strict=True)))
        full = full or mean
        print(
            f"| {name} | {mean.shards_in_batch:.1f} | {mean.spread_random / full.spread_random:.2f} | "
            f"{mean.spread_sorted / full.spread_sorted:.2f} | {mean.reach / full.reach:.2f} | {mean.on_disk:.0f} | "
            f"{mean.before_first:.0f} |"
        )


if __name__ == "__main__":
    main()
