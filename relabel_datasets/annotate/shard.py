"""Annotate one shard, the unit of work of a build."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..data.skipped import Skipped
from ..data.sources import ImageSource
from ..errors import DatasetError
from ..labels import codec
from ..labels.encodings import encode_to_cpu, find_entry
from ..labels.statistics import Statistics, add_up, crop_fidelity, image_statistics
from ..shards.formats import check_refuses_truncated
from ..shards.tars import ShardInfo, ShardWriter
from ..words import counted
from .annotator import Annotator, annotate_scales
from .calibrate import measure_images
from .crop_shard import write_crops
from .prefetch import LoadedImage, load_images, stack_pixels

_FIDELITY_CROPS = 256  # random crops per shard whose labels are compared with dense labels; more would be slow
_MAX_PENDING = 2  # batches queued for encoding: keeps the device busy, and their logits fit in its memory


@dataclass(frozen=True)
class BuildConfig:
    """Settings of annotation and storage.

    Attributes:
        encoding: Encoding of the labels: `"heatmaps"` or `"topk"` for label maps, `"multiscale"` for the heatmaps of each member
            of an `Ensemble`, such as one model at several input sizes, `"crops"` for stored crops. Default: `"heatmaps"`.
        k: Number of classes to keep, per image for heatmaps, per image and member for multiscale and per location for topk, or of
            components that the labels of an image are made of for crops. Default: that of the encoding, 10, 10, 5 or 16.
        storage_dtype: Precision of the stored logits: `"uint4"`, `"uint8"` or `"float16"` for label maps, `"compact"` for crops.
            Default: that of the encoding.
        num_crops: Number of crops per image for the encoding crops, 1 to 65536. Each is one image for the annotator. Default: 100
            for crops. It cannot be set for label maps.
        images: Whether to copy the images into the shards. Default: True.
        batch_size: Number of images per batch of the annotator, or of crops for the encoding crops. The last bits of the logits
            depend on it, because libraries select kernels by the shape of a batch, so the manifest records it. Default: 32.
        num_threads: Number of threads that read and decode images. Default: 4.
    """

    encoding: str = "heatmaps"
    k: int | None = None
    storage_dtype: str | None = None
    num_crops: int | None = None
    images: bool = True
    batch_size: int = 32
    num_threads: int = 4


@dataclass
class Annotated:
    """Finished shard.

    Attributes:
        info: Content of the shard.
        skipped: Unreadable images that are not in the shard.
        map_sizes: (H, W) of the label maps of an image, one for each map. Empty if the shard is empty.
        crops: Measurements of the random crops that calibrate labels, see `calibrate.measure_images`.
    """

    info: ShardInfo
    skipped: list[Skipped] = field(default_factory=list)
    map_sizes: list[list[int]] = field(default_factory=list)
    crops: list[list[float]] = field(default_factory=list)


def annotate_shard(
    path: Path,
    source: ImageSource,
    indices: Sequence[int],
    annotator: Annotator,
    build_config: BuildConfig,
    on_progress: Callable[[int], object] = lambda _count: None,
    on_skipped: Callable[[Skipped], object] = lambda _skipped: None,
    *,
    num_calibrated: int = 0,
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
        num_calibrated: Number of images, the first of the shard, whose random crops are annotated to calibrate label maps.
            Default: 0.

    Returns:
        Content of the shard and the skipped images.

    Raises:
        DatasetError: None of the images is readable.
        ValueError: `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` is set.
    """
    check_refuses_truncated("building label maps")  # worker processes may import other libraries, which may set it
    annotated = Annotated(ShardInfo([], 0, ""))

    def on_skip(skipped: Skipped) -> None:
        annotated.skipped.append(skipped)
        on_skipped(skipped)

    with ShardWriter(path, source.extension if build_config.images else None) as writer:
        if build_config.num_crops is None:
            calibrated = indices[:num_calibrated]
            statistics = _write_maps(
                writer, source, indices, annotator, build_config, on_progress, on_skip, annotated, calibrated
            )
        else:
            statistics = write_crops(writer, source, indices, annotator, build_config, on_progress, on_skip)
        # One unreadable image in a last shard of one image is plausible; several without a readable one indicate a wrong path.
        if len(annotated.skipped) == len(indices) and (len(indices) > 1 or len(source.keys) == 1):
            raise DatasetError(
                f"no image of {path.name} can be used ({counted(len(indices), 'image')}), first {annotated.skipped[0].error}"
            )
        annotated.info = writer.close()._replace(statistics=statistics)
    return annotated


def _write_maps(
    writer: ShardWriter,
    source: ImageSource,
    indices: Sequence[int],
    annotator: Annotator,
    build_config: BuildConfig,
    on_progress: Callable[[int], object],
    on_skipped: Callable[[Skipped], object],
    annotated: Annotated,
    calibrated: Sequence[int],
) -> Statistics:
    """Annotate images and write their label maps, and set the size of the maps and the measured crops in `annotated`."""
    # All batches have the same shape; otherwise the last bits of a map would depend on its position in the shard.
    batch_size = min(build_config.batch_size, len(source.keys))
    annotate = annotate_scales if find_entry(build_config.encoding).has_scales else _annotate_once
    with _Encoder(writer, source, build_config, on_progress, calibrated) as encoder:
        for batch in _image_batches(source, indices, annotator, build_config):
            for item in batch:
                if isinstance(item, Skipped):
                    on_skipped(item)
            loaded = [item for item in batch if isinstance(item, LoadedImage)]
            pixels = stack_pixels([item.pixels for item in loaded], batch_size) if loaded else None
            dense = [] if pixels is None else annotate(annotator, pixels)
            if dense:
                annotated.map_sizes = [list(maps.shape[2:]) for maps in dense]
            encoder.put(loaded, dense, len(batch))
    annotated.crops = measure_images(source, encoder.kept, annotator, batch_size, build_config.num_threads)
    return encoder.statistics


def _annotate_once(annotator: Annotator, images: Tensor) -> list[Tensor]:
    return [annotator(images)]


class _Encoder:
    """Thread that encodes and writes batches in order while the annotator computes the next ones."""

    def __init__(
        self,
        writer: ShardWriter,
        source: ImageSource,
        build_config: BuildConfig,
        on_done: Callable[[int], object],
        keep: Sequence[int],
    ) -> None:
        self._writer, self._source, self._build_config, self._on_done = writer, source, build_config, on_done
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._pending: deque[tuple[int, Future[None]]] = deque()
        self._random = np.random.default_rng(0)  # the same crops in every run
        self._stream: torch.cuda.Stream | None = None
        self._keep = set(keep)
        self.statistics = Statistics()
        self.kept: dict[int, bytes] = {}  # stored maps of the images to keep, by position in the source

    def __enter__(self) -> _Encoder:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._pool:
            if exc is None:
                self._wait(0)

    def put(self, loaded: list[LoadedImage], dense: list[Tensor], count: int) -> None:
        """Queue the maps of a batch of `count` images, including unreadable ones. Raises errors of earlier batches."""
        ready = None
        if dense and dense[0].is_cuda:
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
    def _write(self, loaded: list[LoadedImage], dense: list[Tensor], ready: torch.cuda.Event | None) -> None:
        if not dense:
            return
        if ready is None:
            self._encode(loaded, dense)
            return
        # A separate stream, so that encoding does not wait for batches that the annotator has started in the meantime.
        if self._stream is None:
            self._stream = torch.cuda.Stream(dense[0].device, priority=-1)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            for maps in dense:
                maps.record_stream(self._stream)
            self._encode(loaded, dense)

    def _encode(self, loaded: list[LoadedImage], dense: list[Tensor]) -> None:
        source, build_config = self._source, self._build_config
        if dense[0].device.type not in ("cpu", "cuda"):  # others, such as MPS, lack operations of the encodings
            dense = [maps.cpu() for maps in dense]
        encoded = encode_to_cpu(dense, build_config.encoding, build_config.k).select(slice(len(loaded)))
        blobs = codec.encode(encoded, [item.size for item in loaded], build_config.storage_dtype)
        labels = [source.labels[item.position] for item in loaded]
        parts = [self.statistics, image_statistics(encoded, labels)]
        count = min(_FIDELITY_CROPS - self.statistics.crops, len(blobs))
        if count > 0:
            sizes = [item.size for item in loaded[:count]]
            parts.append(crop_fidelity([maps[:count] for maps in dense], blobs[:count], sizes, self._random))
        self.statistics = add_up(parts)
        for item, blob in zip(loaded, blobs, strict=True):
            self._writer.add(source.keys[item.position], source.labels[item.position], item.data, blob)
            if item.position in self._keep:
                self.kept[item.position] = blob


def _image_batches(
    source: ImageSource, indices: Sequence[int], annotator: Annotator, build_config: BuildConfig
) -> Iterator[list[LoadedImage | Skipped]]:
    """Yield the images in batches, with two batches prefetched by threads."""
    images = load_images(
        source,
        indices,
        lambda image, _key, _size: annotator.preprocess(image),
        target=_input_size_of(annotator),
        num_threads=build_config.num_threads,
        num_ahead=3 * build_config.batch_size,
    )
    with contextlib.closing(images):
        while batch := list(islice(images, build_config.batch_size)):
            yield batch


def _input_size_of(annotator: Annotator) -> tuple[int, int] | None:
    """Return the (height, width) that all images are squashed to, or None for an annotator with several sizes."""
    shape = annotator.preprocess(PIL.Image.new("RGB", (64, 64))).shape
    return (shape[1], shape[2]) if len(shape) == 3 else None
