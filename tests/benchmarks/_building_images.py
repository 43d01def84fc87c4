"""JPEGs of realistic size for the benchmark of builds: 500x375 pixels, about 110 KB, in three chroma subsamplings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image

_DISTINCT = 60  # the other files are hard links to these
_SUBSAMPLINGS = (0, 0, 0, 1, 2)  # 4:4:4 for three of five, as most of ImageNet's files, then 4:2:2 and 4:2:0


def write_images(folder: Path, num_images: int, classes: Sequence[str]) -> None:
    """Write an ImageFolder of `num_images` files.

    Args:
        folder: Folder to create.
        num_images: Number of images.
        classes: Names of the class folders.
    """
    for number in range(num_images):
        path = folder / classes[number % len(classes)] / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number < _DISTINCT:
            _picture(number).save(path, quality=90, subsampling=_SUBSAMPLINGS[number % len(_SUBSAMPLINGS)])
        else:
            source = number % _DISTINCT
            os.link(folder / classes[source % len(classes)] / f"{source:06d}.jpg", path)


def _picture(seed: int) -> PIL.Image.Image:
    """Return noise at several scales, which compresses like a photograph."""
    random = np.random.default_rng(seed)
    total = np.zeros((375, 500, 3))
    for side, weight in ((4, 60.0), (16, 30.0), (64, 20.0), (160, 14.0), (375, 13.5)):
        noise = random.normal(0, weight, (side, side * 4 // 3, 3))
        noise = 0.7 * noise.mean(2, keepdims=True) * 3**0.5 + 0.3 * noise  # color varies less than brightness
        for channel in range(3):
            plane = PIL.Image.fromarray(noise[..., channel].astype(np.float32))
            total[..., channel] += np.asarray(plane.resize((500, 375), PIL.Image.Resampling.BICUBIC))
    return PIL.Image.fromarray((total + 120).clip(0, 255).astype(np.uint8))
