"""Annotate one shard: the unit of work, the same on one machine as on many."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..data.skipped import Skipped
from ..data.sources import ImageSource
from ..errors import DatasetError, ImageError
from ..labels import codec
from ..labels.encoding import encode_logits
from ..labels.statistics import Statistics, add_up, crop_fidelity, image_statistics
from ..shards.images import check_refuses_truncated, decode_reduced
from ..shards.tars import ShardInfo, ShardWriter
from ..storage.open_maps import MACHINE_LIMITS, within_file_limit
from ..words import counted
from .annotator import Annotator

_FIDELITY_CROPS = 256  # random crops a shard whose labels are compared with dense ones; more would cost time
_MAX_PENDING = 2  # batches that wait to be encoded: a device has the next to do, and their logits fit in its memory


@dataclass(frozen=True)
class BuildConfig:
    """How label maps are made.

    Attributes:
        encoding: `"heatmaps"` or `"topk"`.
        k: classes kept; None takes the encoding's default.
        storage_dtype: `"uint4"`, `"uint8"`, `"float16"`; None takes the encoding's default.
        images: whether the images' bytes go into the shards.
        batch_size: Images annotated at a time. The last bits of logits depend on it, because libraries choose their
            kernels by the shape of a batch; the manifest records it.
        num_threads: threads that read and decode images.
    """

    encoding: str = "heatmaps"
    k: int | None = None
    storage_dtype: str | None = None
    images: bool = True
    batch_size: int = 32
    num_threads: int = 4


@dataclass
class Annotated:
    """A finished shard and what was left out of it."""

    info: ShardInfo
    skipped: list[Skipped] = field(default_factory=list)
    map_size: tuple[int, int] | None = None  # (H, W) of its label maps


class _Loaded(NamedTuple):
    position: int  # in the source
    data: bytes
    size: tuple[int, int]  # (height, width)
    pixels: Tensor  # what Annotator.preprocess returned


def annotate_shard(
    path: Path,
    source: ImageSource,
    indices: Sequence[int],
    annotator: Annotator,
    build_config: BuildConfig,
    on_progress: Callable[[int], object] = lambda _count: None,
    on_skipped: Callable[[Skipped], object] = lambda _skipped: None,
) -> Annotated:
    """Write one shard of label maps; it is there when this returns, and not at all if it raises.

    Args:
        path: of the shard.
        source: where the images are.
        indices: which of them, in the order they are to stand in the shard.
        annotator: gives dense logits in the dataset's classes.
        build_config: how maps are stored.
        on_progress: called with the number of images done since the last call, skipped ones included.
        on_skipped: called with every image that cannot be read.

    Raises:
        DatasetError: none of the images can be read: they are not where they were, or are not images.
        ValueError: `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` is set.
    """
    check_refuses_truncated("building label maps")  # here, since a worker process may have imported what sets it
    annotated = Annotated(ShardInfo([], 0, ""))
    with ShardWriter(path, source.extension if build_config.images else None) as writer:
        # Every batch has the same shape, or the last bits of a map would depend on where its shard ends.
        batch_size = min(build_config.batch_size, len(source.keys))
        with _Encoder(writer, source, build_config, on_progress) as encoder:
            for batch in _batches(source, indices, annotator, build_config):
                for item in batch:
                    if isinstance(item, Skipped):
                        annotated.skipped.append(item)
                        on_skipped(item)
                loaded = [item for item in batch if isinstance(item, _Loaded)]
                dense = annotator(_stack([item.pixels for item in loaded], batch_size)) if loaded else None
                if dense is not None:
                    annotated.map_size = (dense.shape[2], dense.shape[3])
                encoder.put(loaded, dense, len(batch))
        # A last shard of one image may well be of a bad one; where none of several can be read, something else is wrong.
        if len(annotated.skipped) == len(indices) and (len(indices) > 1 or len(source.keys) == 1):
            raise DatasetError(
                f"no image of {path.name} can be used ({counted(len(indices), 'image')}), first {annotated.skipped[0].error}"
            )
        annotated.info = writer.close()._replace(statistics=encoder.statistics)
    return annotated


class _Encoder:
    """One thread that encodes and writes batches, in order, while the annotator is at the next."""

    def __init__(
        self, writer: ShardWriter, source: ImageSource, build_config: BuildConfig, on_done: Callable[[int], object]
    ) -> None:
        self._writer, self._source, self._settings, self._on_done = writer, source, build_config, on_done
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._pending: deque[tuple[int, Future[None]]] = deque()
        self._random = np.random.default_rng(0)  # the same crops on every run
        self._stream: torch.cuda.Stream | None = None
        self.statistics = Statistics()

    def __enter__(self) -> _Encoder:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._pool:
            if exc is None:
                self._wait(0)

    def put(self, loaded: list[_Loaded], dense: Tensor | None, count: int) -> None:
        """Take over a batch, `count` images with those that cannot be read; raise what happened to an earlier one."""
        ready = None
        if dense is not None and dense.is_cuda:
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        self._pending.append((count, self._pool.submit(self._write, loaded, dense, ready)))
        self._wait(_MAX_PENDING)

    def _wait(self, most: int) -> None:
        while len(self._pending) > most:
            count, future = self._pending.popleft()
            future.result()
            self._on_done(count)

    @torch.inference_mode()
    def _write(self, loaded: list[_Loaded], dense: Tensor | None, ready: torch.cuda.Event | None) -> None:
        if dense is None:
            return
        if ready is None:
            self._encode(loaded, dense)
            return
        # On a stream of its own, or each result would come only after the batches that the annotator has begun meanwhile.
        if self._stream is None:
            self._stream = torch.cuda.Stream(dense.device, priority=-1)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            dense.record_stream(self._stream)
            self._encode(loaded, dense)

    def _encode(self, loaded: list[_Loaded], dense: Tensor) -> None:
        source, build_config = self._source, self._settings
        encoded = encode_logits(dense, build_config.encoding, build_config.k).first(len(loaded))
        blobs = codec.encode(encoded, [item.size for item in loaded], build_config.storage_dtype)
        labels = [source.labels[item.position] for item in loaded]
        parts = [self.statistics, image_statistics(encoded, labels)]
        rest = min(_FIDELITY_CROPS - self.statistics.crops, len(blobs))
        if rest > 0:
            parts.append(crop_fidelity(dense[:rest], blobs[:rest], [item.size for item in loaded[:rest]], self._random))
        self.statistics = add_up(parts)
        for item, blob in zip(loaded, blobs, strict=True):
            self._writer.add(source.keys[item.position], source.labels[item.position], item.data, blob)


def _stack(pixels: list[Tensor], batch_size: int) -> Tensor:
    """Return `[batch_size, 3, h, w]`, filled up with the last image, in memory that a GPU copies asynchronously."""
    # Where nobody uses a GPU, pinning would take the memory of a CUDA context for nothing.
    pin: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    batch = torch.empty(batch_size, *pixels[0].shape, dtype=pixels[0].dtype, pin_memory=pin, device="cpu")
    torch.stack(pixels, out=batch[: len(pixels)])
    batch[len(pixels) :] = pixels[-1]
    return batch


def _batches(
    source: ImageSource, indices: Sequence[int], annotator: Annotator, build_config: BuildConfig
) -> Iterator[list[_Loaded | Skipped]]:
    """Yield the images in batches; the next two are read and decoded by threads while one is annotated."""

    def load(index: int) -> _Loaded | Skipped:
        name = source.name(index)
        try:
            data = within_file_limit(lambda: source.read(index))
            image, size = decode_reduced(data, target, name)
        except (OSError, ImageError) as error:
            if getattr(error, "errno", None) in MACHINE_LIMITS:  # says nothing about the image
                raise
            return Skipped(source.keys[index], name, str(error))
        return _Loaded(index, data, size, annotator.preprocess(image))

    target = _resized_to(annotator)
    with ThreadPoolExecutor(build_config.num_threads, thread_name_prefix="decode") as pool:
        waiting = iter(indices)
        futures: list[Future[_Loaded | Skipped]] = []
        try:
            while True:
                futures += [pool.submit(load, i) for i in islice(waiting, 3 * build_config.batch_size - len(futures))]
                if not futures:
                    return
                batch, futures = futures[: build_config.batch_size], futures[build_config.batch_size :]
                yield [future.result() for future in batch]
        finally:
            for future in futures:  # the consumer stopped early: do not decode what nobody will take
                future.cancel()


def _resized_to(annotator: Annotator) -> tuple[int, int] | None:
    """Return the (height, width) that all images are squashed to; None for an annotator that takes several sizes."""
    shape = annotator.preprocess(PIL.Image.new("RGB", (64, 64))).shape
    return (shape[1], shape[2]) if len(shape) == 3 else None
