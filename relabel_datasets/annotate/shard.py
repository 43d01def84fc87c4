"""Annotate one shard, the unit of work of a build."""

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
from ..labels.encodings import encode_logits
from ..labels.statistics import Statistics, add_up, crop_fidelity, image_statistics
from ..shards.images import check_refuses_truncated, decode_reduced
from ..shards.tars import ShardInfo, ShardWriter
from ..storage.open_maps import MACHINE_LIMITS, within_file_limit
from ..words import counted
from .annotator import Annotator

_FIDELITY_CROPS = 256  # random crops per shard whose labels are compared with dense labels; more would be slow
_MAX_PENDING = 2  # batches queued for encoding: keeps the device busy, and their logits fit in its memory


@dataclass(frozen=True)
class BuildConfig:
    """Settings of annotation and storage.

    Attributes:
        encoding: Encoding of the label maps: `"heatmaps"` or `"topk"`. Default: `"heatmaps"`.
        k: Number of classes to keep, per image for heatmaps and per location for topk. Default: that of the encoding, 10 or 5.
        storage_dtype: Precision of the stored logits: `"uint4"`, `"uint8"` or `"float16"`. Default: that of the encoding.
        images: Whether to copy the images into the shards. Default: True.
        batch_size: Number of images per batch. The last bits of the logits depend on it, because libraries select kernels by
            the shape of a batch, so the manifest records it. Default: 32.
        num_threads: Number of threads that read and decode images. Default: 4.
    """

    encoding: str = "heatmaps"
    k: int | None = None
    storage_dtype: str | None = None
    images: bool = True
    batch_size: int = 32
    num_threads: int = 4


@dataclass
class Annotated:
    """Finished shard.

    Attributes:
        info: Content of the shard.
        skipped: Unreadable images that are not in the shard.
        map_size: (H, W) of the label maps, or None if the shard is empty.
    """

    info: ShardInfo
    skipped: list[Skipped] = field(default_factory=list)
    map_size: tuple[int, int] | None = None


class _LoadedImage(NamedTuple):
    position: int  # in the source
    data: bytes
    size: tuple[int, int]  # (height, width)
    pixels: Tensor  # result of Annotator.preprocess


def annotate_shard(
    path: Path,
    source: ImageSource,
    indices: Sequence[int],
    annotator: Annotator,
    build_config: BuildConfig,
    on_progress: Callable[[int], object] = lambda _count: None,
    on_skipped: Callable[[Skipped], object] = lambda _skipped: None,
) -> Annotated:
    """Annotate images and write them as one shard. The file is written completely or not at all.

    Args:
        path: Path of the shard.
        source: Source of the images.
        indices: Indices of the images in the source, in the order of the shard.
        annotator: Annotator with the classes of the dataset.
        build_config: Settings of annotation and storage.
        on_progress: Function called with the number of images done since its last call, including skipped ones.
        on_skipped: Function called with every unreadable image.

    Returns:
        Content of the shard and the skipped images.

    Raises:
        DatasetError: None of the images is readable.
        ValueError: `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` is set.
    """
    check_refuses_truncated("building label maps")  # worker processes may import other libraries, which may set it
    annotated = Annotated(ShardInfo([], 0, ""))
    with ShardWriter(path, source.extension if build_config.images else None) as writer:
        # All batches have the same shape; otherwise the last bits of a map would depend on its position in the shard.
        batch_size = min(build_config.batch_size, len(source.keys))
        with _Encoder(writer, source, build_config, on_progress) as encoder:
            for batch in _image_batches(source, indices, annotator, build_config):
                for item in batch:
                    if isinstance(item, Skipped):
                        annotated.skipped.append(item)
                        on_skipped(item)
                loaded = [item for item in batch if isinstance(item, _LoadedImage)]
                dense = annotator(_stack([item.pixels for item in loaded], batch_size)) if loaded else None
                if dense is not None:
                    annotated.map_size = (dense.shape[2], dense.shape[3])
                encoder.put(loaded, dense, len(batch))
        # One unreadable image in a last shard of one image is plausible; several without a readable one indicate a wrong path.
        if len(annotated.skipped) == len(indices) and (len(indices) > 1 or len(source.keys) == 1):
            raise DatasetError(
                f"no image of {path.name} can be used ({counted(len(indices), 'image')}), first {annotated.skipped[0].error}"
            )
        annotated.info = writer.close()._replace(statistics=encoder.statistics)
    return annotated


class _Encoder:
    """Thread that encodes and writes batches in order while the annotator computes the next ones."""

    def __init__(
        self, writer: ShardWriter, source: ImageSource, build_config: BuildConfig, on_done: Callable[[int], object]
    ) -> None:
        self._writer, self._source, self._build_config, self._on_done = writer, source, build_config, on_done
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._pending: deque[tuple[int, Future[None]]] = deque()
        self._random = np.random.default_rng(0)  # the same crops in every run
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

    def put(self, loaded: list[_LoadedImage], dense: Tensor | None, count: int) -> None:
        """Queue a batch of `count` images, including unreadable ones. Raises errors of earlier batches."""
        ready = None
        if dense is not None and dense.is_cuda:
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        self._pending.append((count, self._pool.submit(self._write, loaded, dense, ready)))
        self._wait(_MAX_PENDING)

    def _wait(self, max_pending: int) -> None:
        while len(self._pending) > max_pending:
            count, future = self._pending.popleft()
            future.result()
            self._on_done(count)

    @torch.inference_mode()
    def _write(self, loaded: list[_LoadedImage], dense: Tensor | None, ready: torch.cuda.Event | None) -> None:
        if dense is None:
            return
        if ready is None:
            self._encode(loaded, dense)
            return
        # A separate stream, so that encoding does not wait for batches that the annotator has started in the meantime.
        if self._stream is None:
            self._stream = torch.cuda.Stream(dense.device, priority=-1)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            dense.record_stream(self._stream)
            self._encode(loaded, dense)

    def _encode(self, loaded: list[_LoadedImage], dense: Tensor) -> None:
        source, build_config = self._source, self._build_config
        if dense.device.type not in ("cpu", "cuda"):  # others, such as MPS, lack operations of the encodings
            dense = dense.cpu()
        encoded = encode_logits(dense, build_config.encoding, build_config.k).select(slice(len(loaded)))
        blobs = codec.encode(encoded, [item.size for item in loaded], build_config.storage_dtype)
        labels = [source.labels[item.position] for item in loaded]
        parts = [self.statistics, image_statistics(encoded, labels)]
        count = min(_FIDELITY_CROPS - self.statistics.crops, len(blobs))
        if count > 0:
            sizes = [item.size for item in loaded[:count]]
            parts.append(crop_fidelity(dense[:count], blobs[:count], sizes, self._random))
        self.statistics = add_up(parts)
        for item, blob in zip(loaded, blobs, strict=True):
            self._writer.add(source.keys[item.position], source.labels[item.position], item.data, blob)


def _stack(pixels: list[Tensor], batch_size: int) -> Tensor:
    """Stack images to `[batch_size, 3, h, w]`, padded with the last image, in pinned memory if a GPU is in use."""
    # Without a GPU in use, pinning would only allocate a CUDA context.
    pin: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    batch = torch.empty(batch_size, *pixels[0].shape, dtype=pixels[0].dtype, pin_memory=pin, device="cpu")
    torch.stack(pixels, out=batch[: len(pixels)])
    batch[len(pixels) :] = pixels[-1]
    return batch


def _image_batches(
    source: ImageSource, indices: Sequence[int], annotator: Annotator, build_config: BuildConfig
) -> Iterator[list[_LoadedImage | Skipped]]:
    """Yield the images in batches, with two batches prefetched by threads."""

    def load(index: int) -> _LoadedImage | Skipped:
        name = source.name(index)
        try:
            data = within_file_limit(lambda: source.read(index))
            image, size = decode_reduced(data, target, name)
        except (OSError, ImageError) as error:
            if getattr(error, "errno", None) in MACHINE_LIMITS:  # the machine is at fault, not the image
                raise
            return Skipped(source.keys[index], name, str(error))
        return _LoadedImage(index, data, size, annotator.preprocess(image))

    target = _input_size_of(annotator)
    with ThreadPoolExecutor(build_config.num_threads, thread_name_prefix="decode") as pool:
        remaining = iter(indices)
        futures: list[Future[_LoadedImage | Skipped]] = []
        try:
            while True:
                futures += [pool.submit(load, i) for i in islice(remaining, 3 * build_config.batch_size - len(futures))]
                if not futures:
                    return
                batch, futures = futures[: build_config.batch_size], futures[build_config.batch_size :]
                yield [future.result() for future in batch]
        finally:
            for future in futures:  # not needed if the consumer stopped early
                future.cancel()


def _input_size_of(annotator: Annotator) -> tuple[int, int] | None:
    """Return the (height, width) that all images are squashed to, or None for an annotator with several sizes."""
    shape = annotator.preprocess(PIL.Image.new("RGB", (64, 64))).shape
    return (shape[1], shape[2]) if len(shape) == 3 else None
