"""What the programs share: the loaders of the stack table, and the report."""

import json
import os
import sys
from pathlib import Path

from torch.utils.data import DataLoader

import relabel_datasets as rd

FOLDER, OUT = Path(sys.argv[1]), Path(sys.argv[2])
BATCH = 2 * int(os.environ["WORLD_SIZE"])  # accelerate splits batches evenly


def number_of(image, label_map):
    """Return the number of a sample."""
    return int(label_map.key[-2:])


def dataset():
    return rd.load_dataset(FOLDER, split="train", transforms=number_of)


def stream(**arguments):
    return rd.load_dataset(FOLDER, split="train", streaming=True, transforms=number_of, **arguments)


def sampler(**arguments):
    return rd.RelabelSampler(dataset().shard_lengths, **arguments)


LOADERS = {
    "DataLoader(dataset)": lambda **options: DataLoader(dataset(), BATCH, shuffle=True, **options),
    "DataLoader(dataset, sampler)": lambda **options: DataLoader(dataset(), BATCH, sampler=sampler(), **options),
    "RelabelLoader(dataset, sampler)": lambda **options: rd.RelabelLoader(
        dataset(), BATCH, sampler=sampler(), **options
    ),
    "DataLoader(stream)": lambda **options: DataLoader(stream(), BATCH, **options),
    "RelabelLoader(stream)": lambda **options: rd.RelabelLoader(stream(), BATCH, **options),
}
OPTIONS = {
    "": {},
    "2 workers": {"num_workers": 2},
    "2 persistent": {"num_workers": 2, "persistent_workers": True},
}
SPAWNED = {"num_workers": 1, "multiprocessing_context": "spawn"}  # slow: each worker imports the program
REPORT = {}


def read(loader, num_epochs=2):
    """Return the batches of some epochs."""
    return [[batch.tolist() for batch in loader] for _ in range(num_epochs)]


def record(cell, run, *arguments, **options):
    """Run a cell and keep what it returns, or its error."""
    try:
        REPORT[cell] = run(*arguments, **options)
    except (ValueError, RuntimeError, TypeError) as error:
        REPORT[cell] = f"{type(error).__name__}: {error}"


def write():
    """Write the report of this rank."""
    (OUT / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(REPORT))
