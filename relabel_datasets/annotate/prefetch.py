"""Read, decode and preprocess images ahead of the annotator, by workers that write into batches in shared memory.

Workers are threads. With a GPU they are processes, so that they do not compete for the interpreter with the thread that launches
kernels.

Rows: one image of the annotator, a whole image or a crop. The rows of a run are numbered; row r is kept in `ring[r % len(ring)]`.
"""

from __future__ import annotations

import logging
import math
import mmap
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
from torch import Tensor

from ..data.skipped import Skipped
from ..data.sources import ImageSource
from ..errors import ImageError
from ..shards.images import decode_reduced
from ..storage.open_maps import MACHINE_LIMITS, within_file_limit
from .annotator import Annotator
from .crop_shard import cut_crops

logger = logging.getLogger(__name__)

Owner = TypeVar("Owner")
_AHEAD = 3  # batches that are decoded ahead
_MAX_TASK = 8  # images that a worker loads at once, which saves messages between processes


class LoadedImage(NamedTuple):
    """Image whose rows are ready for the annotator."""

    position: int  # in the source
    data: bytes | None  # content of the file, or None if it is not stored
    size: tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class Stage(Generic[Owner]):
    """Images that are annotated in the same way. Its batches are its own, so they do not depend on the stages around it.

    Attributes:
        owner: Object that the images belong to.
        indices: Indices of the images in the source, in order.
        num_crops: Number of crops per image, each of which is a row. None for whole images.
    """

    owner: Owner
    indices: Sequence[int]
    num_crops: int | None

    @property
    def rows_per_image(self) -> int:
        """Number of rows of an image."""
        return 1 if self.num_crops is None else self.num_crops


@dataclass(frozen=True)
class Batch(Generic[Owner]):
    """Batch of a stage.

    Attributes:
        stage: Stage of the images.
        images: Images whose last row is in the batch, in order, including skipped ones.
        pixels: Rows `[batch_size, ...]`, valid until the batch is released. Rows of skipped images and rows after the end of the
            stage repeat another row. None if all rows belong to skipped images.
        size: Number of rows.
        is_last: Whether it is the last batch of its stage.
    """

    stage: Stage[Owner]
    images: list[LoadedImage | Skipped]
    pixels: Tensor | None
    size: int
    is_last: bool


@dataclass(frozen=True)
class _Task(Generic[Owner]):
    stage: Stage[Owner]
    indices: Sequence[int]
    row: int  # first row
    is_last: bool  # of the stage

    @property
    def end(self) -> int:
        return self.row + len(self.indices) * self.stage.rows_per_image


@dataclass
class _Worker:
    """What a worker needs to load images. Forked processes inherit it."""

    source: ImageSource
    annotator: Annotator
    ring: npt.NDArray[Any]
    target: tuple[int, int] | None  # (height, width) of whole images, or None to decode at full size
    keep_data: bool

    def load(self, indices: Sequence[int], num_crops: int | None, row: int) -> list[LoadedImage | Skipped]:
        """Load images into consecutive rows."""
        rows_per_image = num_crops or 1
        return [self._load(index, num_crops, row + i * rows_per_image) for i, index in enumerate(indices)]

    def _load(self, index: int, num_crops: int | None, row: int) -> LoadedImage | Skipped:
        source = self.source
        name, key = source.name(index), source.keys[index]
        try:
            data = within_file_limit(lambda: source.read(index))
            image, size = decode_reduced(data, self.target if num_crops is None else None, name)
        except (OSError, ImageError) as error:
            if getattr(error, "errno", None) in MACHINE_LIMITS:  # the machine is at fault, not the image
                raise
            return Skipped(key, name, str(error))
        crops = iter((image,)) if num_crops is None else cut_crops(image, key, size, num_crops)
        for number, crop in enumerate(crops, row):
            pixels = self.annotator.preprocess(crop).numpy()  # NumPy copies in this thread alone
            slot = self.ring[number % len(self.ring)]
            if pixels.shape != slot.shape:
                raise ValueError(
                    f"{name}: preprocess returned pixels of shape {list(pixels.shape)}, expected {list(slot.shape)} as for "
                    "other images"
                )
            np.copyto(slot, pixels)
        return LoadedImage(index, data if self.keep_data else None, size)


class Loader:
    """Workers that load the images of a run, for a `with` statement.

    Args:
        source: Source of the images.
        annotator: Annotator whose `preprocess` makes a row.
        batch_size: Number of rows per batch.
        num_workers: Number of threads, or of processes if a GPU is in use.
        max_crops: Largest number of rows per image.
        max_unreleased: Number of batches that may be in use at the same time.
        keep_data: Whether to return the content of image files.
    """

    def __init__(
        self,
        source: ImageSource,
        annotator: Annotator,
        *,
        batch_size: int,
        num_workers: int,
        max_crops: int,
        max_unreleased: int,
        keep_data: bool,
    ) -> None:
        self._batch_size = batch_size
        self._task_size = max(1, min(_MAX_TASK, batch_size // num_workers))
        # Each worker needs room for an image.
        ahead = max(_AHEAD, math.ceil(num_workers * max_crops / batch_size))
        sample = annotator.preprocess(PIL.Image.new("RGB", (64, 64)))
        num_rows = (ahead + 1 + max_unreleased) * batch_size
        self._ring = _shared_rows(num_rows, sample)
        target = (sample.shape[1], sample.shape[2]) if sample.ndim == 3 else None
        self._worker = _Worker(source, annotator, self._ring.numpy(), target, keep_data)
        self._released = 0  # rows
        self._uses_processes = uses_processes()
        self._pool = _start_processes(num_workers, self._worker) if self._uses_processes else _threads(num_workers)
        self._is_pinned = _pin(self._ring)  # drivers may withhold pinned memory from processes that are forked later

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self._ring.data_ptr())  # type: ignore[no-untyped-call]

    def release(self) -> None:
        """Release the oldest batch, whose pixels are then overwritten."""
        self._released += self._batch_size

    def batches(self, stages: Iterable[Stage[Owner]]) -> Generator[Batch[Owner], None, None]:
        """Yield the batches of all stages in order. Call `release` once for each, also in order.

        Args:
            stages: Stages. The next one is requested while the batches of the current one are loaded.
        """
        start = 0  # first row of the next batch
        waiting: deque[tuple[int, LoadedImage | Skipped]] = deque()  # (end of its rows, image) of the next batches
        for task, loaded in self._load(stages):
            size = task.stage.rows_per_image
            waiting.extend((task.row + (i + 1) * size, image) for i, image in enumerate(loaded))
            while task.end - start >= self._batch_size or (task.is_last and start < task.end):
                batch_end = start + self._batch_size
                pixels = self._fill(start, min(batch_end, task.end), size, waiting)
                images = []
                while waiting and waiting[0][0] <= batch_end:
                    images.append(waiting.popleft()[1])
                yield Batch(task.stage, images, pixels, self._batch_size, task.is_last and batch_end >= task.end)
                start = batch_end

    def _load(self, stages: Iterable[Stage[Owner]]) -> Iterator[tuple[_Task[Owner], list[LoadedImage | Skipped]]]:
        """Load images while there is room, and yield them in order."""
        tasks = self._tasks(stages)
        loading: deque[tuple[_Task[Owner], Future[list[LoadedImage | Skipped]]]] = deque()
        task = next(tasks, None)
        while task is not None or loading:
            while task is not None and task.end <= self._released + len(self._ring):
                loading.append((task, self._submit(task)))
                task = next(tasks, None)
            first, future = loading.popleft()
            try:
                yield first, future.result()
            except BrokenProcessPool as error:
                raise ChildProcessError(
                    "a process that decodes images has ended: it ran out of memory, or an image crashes a library. Rerun the "
                    "same command to resume"
                ) from error

    def _tasks(self, stages: Iterable[Stage[Owner]]) -> Iterator[_Task[Owner]]:
        row = 0
        for stage in stages:
            size = max(1, self._task_size // stage.rows_per_image)
            for first in range(0, len(stage.indices), size):
                indices = stage.indices[first : first + size]
                task = _Task(stage, indices, row, first + size >= len(stage.indices))
                yield task
                row = task.end
            row += -row % self._batch_size  # a batch has images of one stage

    def _submit(self, task: _Task[Owner]) -> Future[list[LoadedImage | Skipped]]:
        arguments = (task.indices, task.stage.num_crops, task.row)
        if self._uses_processes:
            return self._pool.submit(_load_in_process, *arguments)
        return self._pool.submit(self._worker.load, *arguments)

    def _fill(
        self, start: int, end: int, rows_per_image: int, waiting: Iterable[tuple[int, LoadedImage | Skipped]]
    ) -> Tensor | None:
        """Return the rows of a batch, of which those without an image repeat the last one that has one."""
        place = start % len(self._ring)
        pixels = self._ring[place : place + self._batch_size]
        has_image = np.zeros(self._batch_size, bool)
        for image_end, image in waiting:
            if not isinstance(image, Skipped):
                has_image[max(0, image_end - rows_per_image - start) : max(0, min(image_end, end) - start)] = True
        if not has_image.any():
            return None
        if not has_image.all():
            rows = pixels.numpy()
            rows[~has_image] = rows[np.flatnonzero(has_image)[-1]]
        return pixels


def uses_processes() -> bool:
    """Return whether images are decoded in processes."""
    # Fork, because annotators on a GPU cannot be pickled. Forking is not safe on macOS, and Windows has no fork.
    return torch.cuda.is_initialized() and sys.platform == "linux"  # type: ignore[no-untyped-call]


def _shared_rows(num_rows: int, sample: Tensor) -> Tensor:
    """Return memory for rows, which forked processes share. Its layout is that of the sample.

    Containers often limit named shared memory (/dev/shm) to 64 MiB, but not anonymous memory.
    """
    memory = mmap.mmap(-1, max(1, num_rows * sample.numel() * sample.element_size()))
    is_channels_last = sample.ndim == 3 and sample.stride(0) == 1
    shape = (*sample.shape[1:], sample.shape[0]) if is_channels_last else tuple(sample.shape)
    rows = torch.frombuffer(memory, dtype=sample.dtype).view(num_rows, *shape)
    return rows.permute(0, 3, 1, 2) if is_channels_last else rows


def _pin(rows: Tensor) -> bool:
    """Pin memory if a GPU is in use, and return whether it is pinned."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # pinning would create a CUDA context
        return False
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    num_bytes = rows.numel() * rows.element_size()
    if cudart.cudaHostRegister(rows.data_ptr(), num_bytes, 0) == cudart.cudaError.success:
        return True
    with suppress(RuntimeError):  # CUDA reports the error once more, at the launch of the next kernel
        torch.ones(1, device="cuda")
    logger.warning("%d bytes of memory cannot be pinned: copies to the GPU are slower", num_bytes)
    return False


def _threads(num_workers: int) -> Executor:
    return ThreadPoolExecutor(num_workers, thread_name_prefix="decode")


def _start_processes(num_workers: int, worker: _Worker) -> Executor:
    """Fork processes before this one starts other threads."""
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("fork"), _set_up_process, (worker, os.getpid()))
    pool.submit(int)  # starts all processes
    return pool


_process_worker: _Worker | None = None  # in a process of the pool


def _set_up_process(worker: _Worker, parent: int) -> None:
    global _process_worker
    _process_worker = worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    torch.set_num_threads(1)  # the threads of OpenMP are not forked: an operation that needs them would wait forever
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process after its parent, which may have been killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _load_in_process(indices: Sequence[int], num_crops: int | None, row: int) -> list[LoadedImage | Skipped]:
    assert _process_worker is not None
    return _process_worker.load(indices, num_crops, row)
