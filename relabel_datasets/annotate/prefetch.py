"""Read, decode and preprocess images in threads, ahead of the annotator."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import PIL.Image
import torch
from torch import Tensor

from ..data.skipped import Skipped
from ..data.sources import ImageSource
from ..errors import ImageError
from ..shards.images import decode_reduced
from ..storage.open_maps import MACHINE_LIMITS, within_file_limit

Preprocess = Callable[[PIL.Image.Image, str, tuple[int, int]], Tensor]


class LoadedImage(NamedTuple):
    """Image that is ready for the annotator."""

    position: int  # in the source
    data: bytes
    size: tuple[int, int]  # (height, width)
    pixels: Tensor  # result of the preprocessing


def load_images(
    source: ImageSource,
    indices: Sequence[int],
    preprocess: Preprocess,
    *,
    target: tuple[int, int] | None,
    num_threads: int,
    num_ahead: int,
) -> Generator[LoadedImage | Skipped, None, None]:
    """Yield images in order, loaded by threads.

    Args:
        source: Source of the images.
        indices: Indices of the images in the source.
        preprocess: Function of an RGB image, its key, and its (height, width) before any reduction, that returns pixels. It must be
            thread-safe.
        target: (height, width) that images are resized to. Large JPEGs may be decoded at a reduced size. None decodes at full size.
        num_threads: Number of threads.
        num_ahead: Number of images that are loaded ahead.
    """

    def load(index: int) -> LoadedImage | Skipped:
        name = source.name(index)
        try:
            data = within_file_limit(lambda: source.read(index))
            image, size = decode_reduced(data, target, name)
        except (OSError, ImageError) as error:
            if getattr(error, "errno", None) in MACHINE_LIMITS:  # the machine is at fault, not the image
                raise
            return Skipped(source.keys[index], name, str(error))
        return LoadedImage(index, data, size, preprocess(image, source.keys[index], size))

    with ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as pool:
        remaining = iter(indices)
        futures: deque[Future[LoadedImage | Skipped]] = deque()
        try:
            while True:
                futures += [pool.submit(load, index) for index in islice(remaining, num_ahead - len(futures))]
                if not futures:
                    return
                yield futures.popleft().result()
        finally:
            for future in futures:  # not needed if the consumer stopped early
                future.cancel()


def stack_pixels(pixels: Sequence[Tensor], batch_size: int) -> Tensor:
    """Stack images to `[batch_size, 3, h, w]`, padded with the last image, in pinned memory if a GPU is in use."""
    # Without a GPU in use, pinning would only allocate a CUDA context.
    pin: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    batch = torch.empty(batch_size, *pixels[0].shape, dtype=pixels[0].dtype, pin_memory=pin, device="cpu")
    torch.stack(list(pixels), out=batch[: len(pixels)])
    batch[len(pixels) :] = pixels[-1]
    return batch
