"""Epochs of a sampler or stream: which one the next iteration reads, from which sample on, also across DataLoader workers.

The rule: each new iteration reads the next epoch, unless `set_epoch` or `load_state_dict` chose one since the last iteration
began. The first iteration reads epoch 0.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import get_worker_info

from . import frameworks

MAX_EPOCH = 2**22 - 1
_VERSIONS = 2**16 - 1  # versions are compared modulo 2**16
_NUM_RECORDS = 64


class Stage(NamedTuple):
    """Segment of an epoch at one world size: each rank consumed the first `consumed` samples of its order."""

    world_size: int
    consumed: int


class Progress(NamedTuple):
    """Resumable position in the data: the epoch and its stages, whatever the number of samples."""

    epoch: int = 0
    stages: tuple[Stage, ...] = ()

    def after(self, num_samples: int, world_size: int) -> Progress:
        """Return the progress after each of `world_size` ranks has taken `num_samples` more samples."""
        stages = self.stages
        if stages and stages[-1].world_size == world_size:
            stages, num_samples = stages[:-1], stages[-1].consumed + num_samples
        return Progress(self.epoch, (*stages, Stage(world_size, num_samples)) if num_samples else stages)


@dataclass(eq=False)
class Iteration:
    """One pass over an epoch, or over the rest of a resumed epoch.

    Attributes:
        start: Progress at which the iteration begins.
        by_caller: Whether the caller chose it by `set_epoch` or `load_state_dict`; otherwise it was counted.
        taken: Samples that this rank has taken.
        counted_by_loader: Whether a `RelabelLoader` counts `taken`, since workers and samplers run ahead of training.
    """

    start: Progress
    by_caller: bool = False
    taken: int = 0
    counted_by_loader: bool = False


class Epochs:
    """Chooses what each iteration reads, by the rule of this module.

    Attributes:
        current: The iteration that a state describes: the one that was chosen last or that yielded a sample last.
        version: Number of choices so far.
    """

    def __init__(self) -> None:
        first = Iteration(Progress())
        self._next: Iteration | None = first
        self._last = self.current = first
        self._announced: int | None = None  # epoch that a framework's counter announced last
        self._offset = 0  # epoch of the iteration minus the framework's count
        self.version = 1

    @property
    def begun_by_workers(self) -> bool:
        """Whether the current iteration was begun by DataLoader workers, whose progress this process does not know."""
        return False

    @property
    def _pending(self) -> Iteration | None:
        """The iteration that was chosen and has not begun."""
        return self._next

    @property
    def upcoming(self) -> Iteration:
        """The iteration that begins next."""
        return self._pending or Iteration(Progress(self._last.start.epoch + 1))

    @property
    def running(self) -> Iteration:
        """The iteration that a state describes."""
        return self.current

    def set_epoch(self, epoch: int) -> None:
        """Choose the next iteration's epoch; a state that was loaded for this epoch is kept.

        Raises:
            ValueError: `epoch` is out of range.
        """
        if not 0 <= epoch <= MAX_EPOCH:
            raise ValueError(f"epoch must be from 0 to {MAX_EPOCH}, got {epoch}")
        if frameworks.counts_epochs():
            self._follow_counter(epoch)
        else:
            self._announced, self._offset = None, 0
            self._choose_epoch(epoch, by_caller=True)

    def load(self, progress: Progress) -> None:
        """Choose to resume from a progress."""
        self._offset = 0 if self._announced is None else progress.epoch - self._announced
        self.choose(Iteration(progress, by_caller=True))

    def choose(self, iteration: Iteration) -> None:
        """Choose the iteration that begins next."""
        self._next = self.current = iteration
        self.version += 1

    def begin(self) -> Iteration:
        """Begin the next iteration and return it.

        Raises:
            RuntimeError: accelerate skips batches of an epoch that nobody chose, see `check_skip`.
        """
        return self._begin(self.upcoming)

    def _begin(self, iteration: Iteration) -> Iteration:
        epoch = self.check_skip(iteration)
        if epoch is not None and epoch != iteration.start.epoch:
            iteration = Iteration(Progress(epoch), by_caller=True)
        self._next, self._last, self.current = None, iteration, iteration
        return iteration

    def take(self, iteration: Iteration, num_samples: int = 1) -> None:
        """Count samples of an iteration."""
        iteration.taken += num_samples
        self.current = iteration

    def check_skip(self, iteration: Iteration) -> int | None:
        """Return the epoch that the Trainer of transformers resumes, and refuse to skip batches of an unknown epoch.

        Raises:
            RuntimeError: accelerate skips batches, to resume, of an epoch that only a counter chose.
        """
        if iteration.by_caller or not frameworks.skips_batches():
            return None
        epoch = frameworks.epoch_of_trainer()
        if epoch is None:
            raise RuntimeError(
                "accelerate skips batches of an epoch that it does not know: call set_epoch(epoch) on the prepared loader "
                "before skip_first_batches() or load_state_dict() (in a Trainer, return self.accelerator.prepare(loader) "
                "from get_train_dataloader())"
            )
        return epoch

    def _follow_counter(self, epoch: int) -> None:
        """Follow a framework that counts iterations from 0 in each process, also after a resume from a later epoch."""
        self._announced = epoch
        if self._pending is not None and self._pending.by_caller:
            self._offset = self._pending.start.epoch - epoch
        else:
            self._choose_epoch(max(epoch + self._offset, 0), by_caller=False)
        self.check_skip(self.upcoming)

    def _choose_epoch(self, epoch: int, by_caller: bool) -> None:
        pending = self._pending
        if pending is None or pending.start.epoch != epoch:
            self.choose(Iteration(Progress(epoch), by_caller))
        else:
            pending.by_caller |= by_caller
            self.current = pending


class _Record(NamedTuple):
    """What a pool of DataLoader workers began, as one integer."""

    pool: int  # 24 bits
    version: int  # of the choices in the pool's copy, 16 bits
    chosen: bool  # whether it is the choice in the pool's copy, and not the epoch after another pool's
    epoch: int  # 22 bits

    def pack(self) -> int:
        return self.pool << 39 | self.version << 23 | self.chosen << 22 | self.epoch

    @classmethod
    def unpack(cls, number: int) -> _Record:
        return cls(number >> 39, number >> 23 & _VERSIONS, bool(number >> 22 & 1), number & MAX_EPOCH)


class SharedEpochs(Epochs):
    """`Epochs` of a stream whose iterations may run in DataLoader workers.

    Each pool of workers starts with a copy of this object. Integers in shared memory tell what copies cannot know: which
    epochs other pools began, and, for persistent workers, which epoch was chosen last. Each integer is written in one store,
    and all workers of a pool write the same, so no lock is needed.
    """

    def __init__(self) -> None:
        super().__init__()
        # Pools' first iterations, which their workers may begin at different times, and their last ones.
        self._records = torch.zeros(2, _NUM_RECORDS, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._choice = torch.zeros(1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._publish(Progress())
        self._is_reused_worker = False
        self._has_own_state = False

    def __getstate__(self) -> dict[str, Any]:
        if frameworks.starts_workers():
            return self.__dict__
        copy = SharedEpochs()  # with its own shared memory, since a copy continues independently
        copy.choose(self.upcoming)
        return copy.__dict__

    @property
    def begun_by_workers(self) -> bool:
        """Whether the current iteration was begun by DataLoader workers, whose progress this process does not know."""
        return self._last_record() is not None

    @property
    def _pending(self) -> Iteration | None:
        return None if self.begun_by_workers else self._next

    @property
    def upcoming(self) -> Iteration:
        """The iteration that begins next."""
        record = self._last_record()
        return super().upcoming if record is None else Iteration(Progress(record.epoch + 1))

    @property
    def running(self) -> Iteration:
        """The iteration that a state describes, also if workers began it."""
        record = self._last_record()
        return self.current if record is None or record.chosen else Iteration(Progress(record.epoch))

    def choose(self, iteration: Iteration) -> None:
        """Choose the iteration that begins next, of all workers; in a worker, its own."""
        if get_worker_info() is None:
            super().choose(iteration)
            self._publish(iteration.start)
        else:  # StatefulDataLoader loads states in its workers
            self._next = self.current = iteration
            self._has_own_state = True

    def begin(self) -> Iteration:
        """Begin the next iteration and return it; all workers of a pool begin the same.

        Raises:
            RuntimeError: A state was loaded after persistent workers had begun.
        """
        info = get_worker_info()
        if info is not None:
            return self._begin_in_worker(info.id, info.num_workers)
        iteration = self.upcoming
        self.version += 1  # now the records of pools are of the past
        self._publish(Progress(iteration.start.epoch + 1))
        return self._begin(iteration)

    def _begin_in_worker(self, worker: int, num_workers: int) -> Iteration:
        pool = _pool_of(worker)
        slot = pool // num_workers % _NUM_RECORDS
        joined = _Record.unpack(int(self._records[0, slot]))
        is_chosen = True
        if self._is_reused_worker:
            is_chosen = self._adopt_choice()
        elif not self._has_own_state:
            record = joined if joined.pool == pool else self._last_record(before=pool)
            if record is not None and not (record is joined and record.chosen):
                is_chosen = False
                self._next = Iteration(Progress(record.epoch if record is joined else record.epoch + 1))
        iteration = self._begin(self._next or Iteration(Progress(self._last.start.epoch + 1)))
        record = _Record(pool, self.version & _VERSIONS, is_chosen, iteration.start.epoch)
        self._records[int(self._is_reused_worker), slot] = record.pack()
        self._is_reused_worker = True
        return iteration

    def _adopt_choice(self) -> bool:
        """Take over what the main process chose since the last iteration; return whether it did."""
        choice = int(self._choice)
        version, has_stages, epoch = choice >> 23, choice >> 22 & 1, choice & MAX_EPOCH
        if version == self.version & _VERSIONS:
            return False
        if has_stages:
            raise RuntimeError(
                "a state was loaded after persistent workers had begun: load it before the first iteration, or use "
                "RelabelLoader"
            )
        self.version, self._next = version, Iteration(Progress(epoch))
        return True

    def _publish(self, start: Progress) -> None:
        """Tell persistent workers what to read next."""
        epoch = min(start.epoch, MAX_EPOCH)
        self._choice[0] = (self.version & _VERSIONS) << 23 | bool(start.stages) << 22 | epoch

    def _last_record(self, before: int | None = None) -> _Record | None:
        """Return what a pool of workers began last, since the last choice of this copy."""
        found = None
        for number in self._records.flatten().tolist():
            record = _Record.unpack(number)
            if record.version == self.version & _VERSIONS and (before is None or record.pool < before):
                found = record if found is None or record.pool >= found.pool else found
        return found


def _pool_of(worker: int) -> int:
    """Return a number for all workers of a DataLoader's iterator, larger than those of earlier iterators."""
    name = multiprocessing.current_process().name  # ends with the number of this child of its parent
    try:
        return (int(name.replace(":", "-").rpartition("-")[2]) - worker) & 0xFFFFFF
    except ValueError:
        raise RuntimeError(
            f"a DataLoader worker has the process name {name!r}: keep the name that multiprocessing gives, or call "
            "set_epoch() before each epoch and use RelabelLoader"
        ) from None
