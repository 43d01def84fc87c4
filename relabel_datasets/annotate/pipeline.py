"""Annotate the shards of a run one after another, with one pool of decoding workers, one encoder and one writer for all of them.

Neither of them waits at the end of a shard: the next one is decoded and annotated while the last batches of a shard are encoded and
the shard is synced to the disk, renamed, uploaded and recorded. The batches of a shard are its own, and all have the same shape, so
that its bytes depend neither on the shards around it nor on where a build was resumed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.skipped import Skipped
from ..labels.encodings import find_entry
from ..shards.formats import check_refuses_truncated
from .annotator import Annotator, annotate_scales, classify
from .calibrate import CROPS_PER_IMAGE
from .prefetch import Batch, Loader, Stage
from .shard import Annotated, OpenShard

if TYPE_CHECKING:
    from .work import Work

_MAX_PENDING = 3  # batches queued for encoding: keeps the device busy, and their logits fit in its memory
_MAX_STORING = 1  # shards that are completed or uploaded while another is annotated: they take space on this disk


def annotate_shards(
    work: Work,
    numbers: Iterable[int],
    annotator: Annotator,
    on_progress: Callable[[int, int], object] = lambda _number, _count: None,
    on_skipped: Callable[[Skipped], object] = lambda _skipped: None,
) -> Generator[tuple[int, Annotated], None, None]:
    """Annotate, store and record shards. The annotator is called in the calling thread only.

    After an error, shards whose batches have all been annotated are still stored.

    Args:
        work: Build that the shards belong to.
        numbers: Numbers of the shards. The next one is requested while the current one is annotated.
        annotator: Annotator with the classes of the dataset, see `Work.restrict`.
        on_progress: Function called with the number of a shard and that of its images done since the last call, including
            skipped ones. Default: no-op.
        on_skipped: Function called with every unreadable image. Default: no-op.

    Yields:
        Number and result of each shard, in order.

    Raises:
        DatasetError: None of the images of a shard is readable.
        ValueError: `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` is set.
        OSError: The disk is full, or the folder was removed.
        ChildProcessError: A process that decodes images has ended.
    """
    check_refuses_truncated("building label maps")  # worker processes may import other libraries, which may set it
    with ExitStack() as stack:
        yield from _Pipeline(work, annotator, stack).run(numbers, on_progress, on_skipped)


class _Pipeline:
    def __init__(self, work: Work, annotator: Annotator, stack: ExitStack) -> None:
        self._work, self._annotator = work, annotator
        self._has_scales = find_entry(work.build_config.encoding).has_scales
        build_config = work.build_config
        loader = Loader(
            work.source,
            annotator,
            batch_size=build_config.rows_per_batch(len(work.source.keys)),
            num_workers=build_config.num_threads,
            max_crops=build_config.num_crops or CROPS_PER_IMAGE,
            max_unreleased=_MAX_PENDING + 1,
            keep_data=build_config.images,
        )
        self._loader = stack.enter_context(loader)  # first: its processes must be forked before threads start
        self._open: dict[int, OpenShard] = {}
        stack.callback(self._abort)
        self._store_pool = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="store"))
        self._encode_pool = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="encode"))
        self._encoding: deque[tuple[Batch[OpenShard], Future[Future[Annotated] | None]]] = deque()
        self._storing: deque[tuple[int, Future[Annotated]]] = deque()
        self._failed: set[int] = set()  # shards that lack a batch
        self._stream: torch.cuda.Stream | None = None

    def run(
        self,
        numbers: Iterable[int],
        on_progress: Callable[[int, int], object],
        on_skipped: Callable[[Skipped], object],
    ) -> Iterator[tuple[int, Annotated]]:
        self._on_progress = on_progress
        with closing(self._loader.batches(self._stages(numbers))) as batches:
            for batch in batches:
                for skipped in batch.stage.owner.skip(batch):
                    on_skipped(skipped)
                self._encode(batch, [] if batch.pixels is None else self._annotate(batch.stage, batch.pixels))
                self._wait_for_encoder(_MAX_PENDING)
                yield from self._stored(_MAX_STORING)
        self._wait_for_encoder(0)
        yield from self._stored(0)

    def _stages(self, numbers: Iterable[int]) -> Iterator[Stage[OpenShard]]:
        for number in numbers:
            shard = self._open[number] = self._work.open(number)
            yield from shard.stages

    def _annotate(self, stage: Stage[OpenShard], pixels: Tensor) -> list[Tensor]:
        if stage.num_crops is not None:
            return [classify(self._annotator, pixels)]
        return annotate_scales(self._annotator, pixels) if self._has_scales else [self._annotator(pixels)]

    def _encode(self, batch: Batch[OpenShard], logits: list[Tensor]) -> None:
        ready = None
        if logits and logits[0].is_cuda:
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(torch.cuda.current_stream(logits[0].device))  # which may not be the current device
        self._encoding.append((batch, self._encode_pool.submit(self._take, batch, logits, ready)))

    @torch.inference_mode()
    def _take(
        self, batch: Batch[OpenShard], logits: list[Tensor], ready: torch.cuda.Event | None
    ) -> Future[Annotated] | None:
        """Encode and write a batch, in the thread of the encoder, and start to store a shard after its last batch."""
        shard = batch.stage.owner
        try:
            if ready is None:
                shard.take(batch, logits)
            else:
                self._take_from_gpu(batch, logits, ready)
        except BaseException:
            self._failed.add(shard.number)
            raise
        # Here and not in the thread of the annotator, which may be busy for long.
        is_complete = shard.is_done(batch) and shard.number not in self._failed
        return self._store_pool.submit(self._store, shard) if is_complete else None

    def _take_from_gpu(self, batch: Batch[OpenShard], logits: list[Tensor], ready: torch.cuda.Event) -> None:
        # A separate stream, so that encoding does not wait for batches that the annotator has started in the meantime.
        if self._stream is None:
            self._stream = torch.cuda.Stream(logits[0].device, priority=-1)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            try:
                batch.stage.owner.take(batch, logits)
            finally:  # then others may overwrite the pixels and use the memory of the logits
                self._stream.synchronize()

    def _wait_for_encoder(self, max_pending: int) -> None:
        """Wait until few batches are pending. Raises errors of the encoder."""
        while self._encoding and (len(self._encoding) > max_pending or self._encoding[0][1].done()):
            batch, future = self._encoding.popleft()
            storing = future.result()
            self._loader.release()
            shard = batch.stage.owner
            self._on_progress(shard.number, shard.num_done(batch))
            if storing is not None:
                self._storing.append((shard.number, storing))

    def _store(self, shard: OpenShard) -> Annotated:
        """Complete and record a shard, in a thread of its own."""
        annotated = shard.close()
        self._work.store(shard.number, annotated)
        del self._open[shard.number]
        return annotated

    def _stored(self, max_storing: int) -> Iterator[tuple[int, Annotated]]:
        while self._storing and (len(self._storing) > max_storing or self._storing[0][1].done()):
            number, future = self._storing.popleft()
            yield number, future.result()

    def _abort(self) -> None:
        for shard in self._open.values():
            shard.abort()
