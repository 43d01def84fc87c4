"""accelerate: `Accelerator.prepare` with each way of reading, `skip_first_batches`, and states of StatefulDataLoader."""

import os
import warnings

from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from torch.utils.data import DataLoader

from tests.data.stacks.common import (
    BATCH,
    LOADERS,
    OPTIONS,
    SPAWNED,
    dataset,
    read,
    record,
    sampler,
    stream,
    write,
)

READERS = {
    "": {},
    "dispatch_batches=False": {"dispatch_batches": False},
    "dispatch_batches=True": {"dispatch_batches": True},
    "split_batches=True": {"split_batches": True},
    "split_batches=True, dispatch_batches=False": {"split_batches": True, "dispatch_batches": False},
    "even_batches=False": {"even_batches": False},
    "use_stateful_dataloader=True": {"use_stateful_dataloader": True},
    "use_stateful_dataloader=True, dispatch_batches=False": {
        "use_stateful_dataloader": True,
        "dispatch_batches": False,
    },
}


def prepared(make, reader="", **options):
    configuration = DataLoaderConfiguration(**READERS[reader])
    return Accelerator(cpu=True, dataloader_config=configuration).prepare(make(**options))


def whole(make, reader, **options):
    loader = prepared(make, reader, **options)
    epochs = read(loader)
    # A Trainer stops after this number of batches. With split_batches=True, accelerate may say too many for a stream.
    assert len(loader) >= len(epochs[0]) if "split" in reader else len(loader) == len(epochs[0])
    return epochs


def skipped(make, reader):
    """Read epoch 3 whole, and then again without its first batch, as a new process does that resumes."""
    first, second = prepared(make, reader), prepared(make, reader)
    first.set_epoch(3)
    epochs = read(first)
    second.set_epoch(3)
    rest = read(skip_first_batches(second, 1), 1)
    second.set_epoch(4)
    return [epochs, [*rest, *read(second, 1)]]


def skipped_without_epoch(make, reader):
    return read(skip_first_batches(prepared(make, reader), 1))


def stateful(make, chooses_epoch=True):
    """Resume from a state of StatefulDataLoader within epoch 3."""
    reader = "use_stateful_dataloader=True, dispatch_batches=False"
    first, second = prepared(make, reader), prepared(make, reader)
    first.set_epoch(3)
    batches = iter(first)
    next(batches)
    state = first.state_dict()
    if chooses_epoch:
        second.set_epoch(3)
    second.load_state_dict(state)
    return [[[batch.tolist() for batch in batches], *read(first, 1)], read(second)]


def with_rank(split):
    """Read an order that was split already."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return read(prepared(lambda: split(rank=rank, world_size=world_size), "dispatch_batches=False"))


def main():
    warnings.filterwarnings("error", message="Length of IterableDataset")
    for name, make in LOADERS.items():
        for reader in READERS:
            for label, options in OPTIONS.items():
                if not label or reader in ("", "dispatch_batches=False"):
                    record(f"prepare | {name} | {reader} | {label}", whole, make, reader, **options)
        for reader in ("", "dispatch_batches=False"):
            record(f"skipped | {name} | {reader}", skipped, make, reader)
            if name != "DataLoader(dataset)":
                record(f"skipped without epoch | {name} | {reader}", skipped_without_epoch, make, reader)
        record(f"stateful | {name}", stateful, make)
        if name != "DataLoader(dataset)":
            record(f"stateful without epoch | {name}", stateful, make, False)
    for reader in ("", "dispatch_batches=False"):
        record(
            f"prepare | DataLoader(stream) | {reader} | spawned",
            whole,
            LOADERS["DataLoader(stream)"],
            reader,
            **SPAWNED,
        )
    record("rank given to a stream", with_rank, lambda **rank: DataLoader(stream(**rank), BATCH))
    record("rank given to a sampler", with_rank, lambda **rank: DataLoader(dataset(), BATCH, sampler=sampler(**rank)))
    write()


if __name__ == "__main__":
    main()
