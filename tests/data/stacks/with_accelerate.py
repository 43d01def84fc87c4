"""accelerate: `Accelerator.prepare` with each way of reading, `skip_first_batches`, and states of StatefulDataLoader."""

import warnings

from accelerate import Accelerator, DataLoaderConfiguration

from tests.data.stacks.common import LOADERS, OPTIONS, read, record, sampler, stream, write

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
    assert len(loader) == len(epochs[0]), (len(loader), len(epochs[0]))
    return epochs


def main():
    warnings.filterwarnings("error", message="Length of IterableDataset")
    import sys, time
    for name, make in LOADERS.items():
        for reader in READERS:
            for label, options in OPTIONS.items():
                if label and reader not in ("", "dispatch_batches=False"):
                    continue
                if label == "2 spawned": continue
                t=time.time()
                record(f"{name} | {reader} | {label}", lambda: whole(make, reader, **options))
                print(f"{name} | {reader} | {label}", time.time()-t, flush=True)
    write()


if __name__ == "__main__":
    main()
