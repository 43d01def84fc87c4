"""How well orders shuffle that read shard after shard: `python tests/benchmarks/shuffling.py`.

Our window over `--shards` shards of `--samples` samples, `datasets`' and webdataset's buffers over the same shards in random
order, and a full shuffle, all as the libraries' own code gives them, on the numbers of the samples alone. Each figure is a
mean over `--epochs` seeds.

- shards in a batch: how many different shards a batch of 256 has samples of.
- class spread: how far class counts of a batch are from equal: their chi-square statistic over that of a full shuffle, so
  that 1.00 is as random as can be and 2.00 has twice the variance. Once where images were dealt to shards at random, as the
  builder does, and once for shards sorted by class, the worst case.
- reach: how far apart in an epoch two samples of a shard are, over the same of a full shuffle: 1.00 is anywhere.
- shards at a time: begun and not finished, at most: what must be on disk. Buffers hold their samples in memory besides.
- shards to begin: of which a sample is read before the first batch of 256 is there.
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
WINDOWS = (1, 2, 4, 8, 16, 32, None)  # None: all
BUFFERS = (1000, 10000)

Rows = npt.NDArray[np.int64]


class Epoch(NamedTuple):
    """An epoch's samples as they are yielded and as they are read, and how many are read before the first batch."""

    rows: Rows
    read: Rows
    read_first: int


class Figures(NamedTuple):
    shards_in_batch: float
    spread_dealt: float
    spread_sorted: float
    reach: float
    at_a_time: float
    to_begin: float


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


def most_at_a_time(shards: Rows) -> int:
    """Return how many shards are begun and not finished at a time, at most."""
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
    places = np.split(np.argsort(epoch.rows), ends[:-1])
    return Figures(
        shards_in_batch=statistics.mean(len(set(batch)) for batch in in_batches(shards).tolist()),
        spread_dealt=chi_square(rng.permutation(by_row)[epoch.rows]),
        spread_sorted=chi_square(by_row[epoch.rows]),
        reach=float(np.mean([np.abs(np.subtract(*rng.choice(each, (2, 2000)))).mean() for each in places])) / total,
        at_a_time=most_at_a_time(read),
        to_begin=len(set(read[: epoch.read_first].tolist())),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--samples", type=int, default=1000, help="in a shard")
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    lengths = [args.samples] * args.shards
    orders: dict[str, Callable[[int], Epoch]] = {"full shuffle": lambda seed: full_shuffle(lengths, seed)}
    for window in WINDOWS:
        name = f"window={window}" + (", the default of a stream" if window == WINDOW else "")
        orders[name] = lambda seed, window=window: window_shuffle(lengths, seed, window)
    for size in BUFFERS:
        orders[f"datasets, buffer of {size}"] = lambda seed, size=size: datasets_buffer(lengths, seed, size)
        orders[f"webdataset, buffer of {size}"] = lambda seed, size=size: webdataset_buffer(lengths, seed, size)
    print(f"{args.shards} shards of {args.samples} samples, {NUM_CLASSES} classes, batches of {BATCH}\n")
    print(
        "| order | shards in a batch | class spread | class spread, sorted shards | reach | shards at a time | shards to begin |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    full: Figures | None = None
    for name, order in orders.items():
        each = [measure(order(seed), lengths, np.random.default_rng(seed)) for seed in range(args.epochs)]
        mean = Figures(*map(statistics.mean, zip(*each, strict=True)))
        full = full or mean
        print(
            f"| {name} | {mean.shards_in_batch:.1f} | {mean.spread_dealt / full.spread_dealt:.2f} | "
            f"{mean.spread_sorted / full.spread_sorted:.2f} | {mean.reach / full.reach:.2f} | {mean.at_a_time:.0f} | "
            f"{mean.to_begin:.0f} |"
        )


if __name__ == "__main__":
    main()
