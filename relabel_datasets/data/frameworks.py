"""What training frameworks do with a loader, found on the call stack.

accelerate splits whatever it reads, the Lightning Trainer counts a resumed epoch's batches from the epoch's beginning, and
accelerate and Fabric announce epochs that they count from 0 in each process. None of them says so to a dataset or sampler,
but each of them is a caller, also in a forked DataLoader worker, whose stack still holds the frames of its parent.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

from ..compatibility import qualified_name

_ACCELERATE = "accelerate.data_loader"
_FABRIC = ("lightning.fabric.wrappers", "lightning_fabric.wrappers")
_DATA_LOADERS = ("torch.utils.data.dataloader", "torchdata.stateful_dataloader.stateful_dataloader")
_LIGHTNING = ("lightning.pytorch.", "pytorch_lightning.")


def splits_samples() -> bool:
    """Return whether accelerate reads samples or lengths, which it splits among its processes."""
    return any(not qualified_name(frame).startswith("Skip") for frame in _frames_of(_ACCELERATE))


def splits_by_dispatching() -> bool:
    """Return whether accelerate's `DataLoaderDispatcher` reads on one process for several."""
    names = [qualified_name(frame) for frame in _frames_of(_ACCELERATE)]
    return any(name.startswith("DataLoaderDispatcher.") for name in names) and num_accelerate_processes() > 1


def num_accelerate_processes() -> int:
    """Return accelerate's number of processes; call it only where accelerate is a caller."""
    from accelerate import PartialState  # type: ignore[import-untyped]

    return int(PartialState().num_processes)


def starts_workers() -> bool:
    """Return whether a DataLoader pickles a dataset for its workers."""
    return any(True for _ in _frames_of(*_DATA_LOADERS))


def batch_size_of_workers() -> int | None:
    """Return the number of samples that a DataLoader worker should read at a time; None if no DataLoader tells it.

    It is the batch size of the DataLoader. Where accelerate's `IterableDatasetShard` makes the batches of all processes from
    what a worker reads, it is the size of these batches together: otherwise each worker fills up its last ones.
    """
    for frame in _frames():
        module = frame.f_globals.get("__name__")
        owner: Any = frame.f_locals.get("self")
        if module == _ACCELERATE and qualified_name(frame) == "IterableDatasetShard.__iter__":
            return int(owner.batch_size * (1 if owner.split_batches else owner.num_processes))
        if module in _DATA_LOADERS and isinstance(owner, DataLoader):
            return owner.batch_size
    return None


def counts_epochs() -> bool:
    """Return whether the epoch comes from a counter of iterations, of accelerate or Fabric, and not from a caller."""
    return any(frame.f_code.co_name == "__iter__" for frame in _frames_of(_ACCELERATE, *_FABRIC))


def counts_whole_epochs() -> bool:
    """Return whether the Lightning Trainer asks for a length, of which it subtracts the batches before a resume."""
    return any(str(frame.f_globals.get("__name__")).startswith(_LIGHTNING) for frame in _frames())


def skips_batches() -> bool:
    """Return whether accelerate reads samples to skip them: in `skip_first_batches`, or to resume a StatefulDataLoader."""
    for frame in _frames_of(_ACCELERATE):
        owner: Any = frame.f_locals.get("self")
        state = getattr(getattr(owner, "base_dataloader", None), "next_iter_state", None)
        if qualified_name(frame).startswith("Skip") or getattr(owner, "skip_batches", False) or state is not None:
            return True
    return False


def epoch_of_trainer() -> int | None:
    """Return the epoch of the Trainer of transformers; accelerate does not forward it to a sampler that it skips batches of."""
    if any(True for _ in _frames_of("transformers.trainer")):
        for frame in _frames_of(_ACCELERATE):
            if qualified_name(frame) in ("DataLoaderShard.__iter__", "DataLoaderDispatcher.__iter__"):
                return int(frame.f_locals["self"].iteration)
    return None


def _frames_of(*modules: str) -> Iterator[FrameType]:
    return (frame for frame in _frames() if frame.f_globals.get("__name__") in modules)


def _frames() -> Iterator[FrameType]:
    """Yield the frames of the callers, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
