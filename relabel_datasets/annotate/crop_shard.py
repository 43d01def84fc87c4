"""Annotate stored crops: the annotator's answer to each of N crops of every image.

Shapes: N crops of an image, C classes.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import PIL.Image
import torch
from torch import Tensor

from ..data.skipped import Skipped
from ..data.sources import ImageSource
from ..labels.crop_labels import CropLabels
from ..labels.crops import seeded_crops, to_pixels
from ..labels.encodings.crops import seed_of
from ..labels.statistics import Statistics, add_up, stored_crop_statistics
from ..shards.tars import ShardWriter
from .annotator import Annotator, classify
from .prefetch import LoadedImage, load_images, stack_pixels

if TYPE_CHECKING:
    from .shard import BuildConfig

_FIDELITY_CROPS = 256  # images of a shard, of which one crop each is compared with the annotator's answer
_MAX_PENDING = 4  # images that wait for their compression


class _Stored(NamedTuple):
    image: LoadedImage
    blob: bytes
    statistics: Statistics


def write_crops(
    writer: ShardWriter,
    source: ImageSource,
    indices: Sequence[int],
    annotator: Annotator,
    build_config: BuildConfig,
    on_progress: Callable[[int], object],
    on_skipped: Callable[[Skipped], object],
) -> Statistics:
    """Annotate the stored crops of images and write them to a shard.

    Args:
        writer: Writer of the shard.
        source: Source of the images.
        indices: Indices of the images in the source, in the order of the shard.
        annotator: Annotator with the classes of the dataset.
        build_config: Settings of annotation and storage, with `num_crops`.
        on_progress: Function called with the number of images done since its last call, including skipped ones.
        on_skipped: Function called with every unreadable image.

    Returns:
        Statistics of the shard.
    """
    num_crops = build_config.num_crops
    assert num_crops is not None
    images = load_images(
        source,
        indices,
        lambda image, key, size: preprocess_crops(annotator, image, key, size, num_crops),
        target=None,
        num_threads=build_config.num_threads,
        num_ahead=build_config.num_threads + -(-2 * build_config.batch_size // num_crops),
    )

    def compress(image: LoadedImage, logits: Tensor, number: int) -> _Stored:
        key, label = source.keys[image.position], source.labels[image.position]
        labels = CropLabels.from_logits(logits, canvas_size=image.size, key=key, label=label, k=build_config.k)
        compared = number % num_crops if number < _FIDELITY_CROPS else None
        return _Stored(image, labels.to_safetensors(), stored_crop_statistics(logits, labels, compared))

    statistics = Statistics()
    pending: deque[Future[_Stored]] = deque()
    with contextlib.closing(images), ThreadPoolExecutor(1, thread_name_prefix="compress") as pool:

        def write(max_pending: int) -> None:
            nonlocal statistics
            while len(pending) > max_pending:
                image, blob, of_image = pending.popleft().result()
                writer.add(source.keys[image.position], source.labels[image.position], image.data, blob)
                statistics = add_up([statistics, of_image])
                on_progress(1)

        number = 0
        for result in annotate_crops(images, annotator, build_config.batch_size):
            if isinstance(result, Skipped):
                on_skipped(result)
                on_progress(1)
            else:
                pending.append(pool.submit(compress, *result, number))
                number += 1
            write(_MAX_PENDING)
        write(0)
    return statistics


def preprocess_crops(
    annotator: Annotator, image: PIL.Image.Image, key: str, size: tuple[int, int], num_crops: int
) -> Tensor:
    """Return the annotator's input for each crop of an image, `[N, ...]`.

    Args:
        annotator: Annotator whose `preprocess` makes the input.
        image: Image, decoded at full size or reduced.
        key: Key of the image, which determines the crops.
        size: Full (height, width) of the image, which determines the crops.
        num_crops: Number of crops N.
    """
    boxes, flips = seeded_crops([seed_of(key)], [size], num_crops)
    crops = []
    pixels = to_pixels(boxes[0], (image.height, image.width)).tolist()
    for box, flip in zip(pixels, flips[0].tolist(), strict=True):
        crop = image.crop(box)
        crops.append(annotator.preprocess(crop.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop))
    return torch.stack(crops)


def annotate_crops(
    images: Iterator[LoadedImage | Skipped], annotator: Annotator, batch_size: int
) -> Iterator[tuple[LoadedImage, Tensor] | Skipped]:
    """Yield each image with the logits of its crops, `[N, C]` on the CPU. A batch may have crops of several images."""
    waiting: deque[LoadedImage] = deque()
    pixels: deque[Tensor] = deque()  # of crops that no batch has yet
    logits: deque[Tensor] = deque()  # of crops of the images that wait

    def annotate(count: int) -> None:
        # All batches have the same shape; otherwise the last bits of a label would depend on its position in the shard.
        batch = stack_pixels([pixels.popleft() for _ in range(count)], batch_size)
        logits.extend(classify(annotator, batch)[:count].float().cpu())

    def finished() -> Iterator[tuple[LoadedImage, Tensor]]:
        while waiting and len(logits) >= len(waiting[0].pixels):
            image = waiting.popleft()
            yield image, torch.stack([logits.popleft() for _ in range(len(image.pixels))])

    for image in images:
        if isinstance(image, Skipped):
            yield image
            continue
        waiting.append(image)
        pixels.extend(image.pixels)
        while len(pixels) >= batch_size:
            annotate(batch_size)
        yield from finished()
    if pixels:
        annotate(len(pixels))
    yield from finished()
