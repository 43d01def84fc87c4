"""Annotate one shard: the unit of work, the same on one machine as on many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.images import ImageError, decode_image
from ..data.manifest import DatasetError
from ..data.shards import ShardInfo, ShardWriter
from ..labels import codec
from ..labels.encoding import encode_logits
from .annotator import Annotator
from .sources import ImageSource


@dataclass(frozen=True)
class Settings:
    """How label maps are made; equal settings give equal bytes.

    Attributes:
        encoding: `"heatmaps"` or `"topk"`.
        k: classes kept; None takes the encoding's default.
        dtype: `"uint4"`, `"uint8"`, `"float16"`; None takes the encoding's default.
        images: whether the images' bytes go into the shards.
        batch_size: images annotated at a time.
        num_threads: threads that read and decode images.
    """

    encoding: str = "heatmaps"
    k: int | None = None
    dtype: str | None = None
    images: bool = True
    batch_size: int = 32
    num_threads: int = 4


class Skipped(NamedTuple):
    """An image that could not be read."""

    key: str
    name: str
    error: str


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
    settings: Settings,
    on_progress: Callable[[int], object] = lambda _count: None,
    on_skipped: Callable[[Skipped], object] = lambda _skipped: None,
) -> Annotated:
    """Write one shard of label maps; it is there when this returns, and not at all if it raises.

    Args:
        path: of the shard.
        source: where the images are.
        indices: which of them, in the order they are to stand in the shard.
        annotator: gives dense logits in the dataset's classes.
        settings: how maps are stored.
        on_progress: called with the number of images done since the last call, skipped ones included.
        on_skipped: called with every image that cannot be read.

    Raises:
        DatasetError: none of the images can be read: they are not where they were, or are not images.
    """
    skipped: list[Skipped] = []
    map_size: tuple[int, int] | None = None
    with ShardWriter(path, source.extension if settings.images else None) as writer:
        for batch in _batches(source, indices, annotator, settings):
            loaded = [item for item in batch if isinstance(item, _Loaded)]
            for item in batch:
                if isinstance(item, Skipped):
                    skipped.append(item)
                    on_skipped(item)
            if loaded:
                dense = annotator(torch.stack([item.pixels for item in loaded]))
                map_size = (dense.shape[2], dense.shape[3])
                encoded = encode_logits(dense, settings.encoding, settings.k)
                blobs = codec.encode(encoded, [item.size for item in loaded], settings.dtype)
                for item, blob in zip(loaded, blobs, strict=True):
                    writer.add(source.keys[item.position], source.labels[item.position], item.data, blob)
            on_progress(len(batch))
        if indices and len(skipped) == len(indices):
            raise DatasetError(
                f"none of the {len(skipped)} images of {path.name} can be read, first {skipped[0].error}"
            )
        return Annotated(writer.close(), skipped, map_size)


def _batches(
    source: ImageSource, indices: Sequence[int], annotator: Annotator, settings: Settings
) -> Iterator[list[_Loaded | Skipped]]:
    """Yield the images in batches; the next two are read and decoded by threads while one is annotated."""

    def load(index: int) -> _Loaded | Skipped:
        name = source.name(index)
        try:
            data = source.read(index)
            image = decode_image(data, name)
        except (OSError, ImageError) as error:
            return Skipped(source.keys[index], name, str(error))
        return _Loaded(index, data, (image.height, image.width), annotator.preprocess(image))

    with ThreadPoolExecutor(settings.num_threads, thread_name_prefix="decode") as pool:
        waiting = iter(indices)
        futures: list[Future[_Loaded | Skipped]] = []
        try:
            while True:
                futures += [pool.submit(load, i) for i in islice(waiting, 3 * settings.batch_size - len(futures))]
                if not futures:
                    return
                batch, futures = futures[: settings.batch_size], futures[settings.batch_size :]
                yield [future.result() for future in batch]
        finally:
            for future in futures:  # the consumer stopped early: do not decode what nobody will take
                future.cancel()
