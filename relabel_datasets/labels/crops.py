"""Boxes of random crops, vectorized over images."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_TRIES = 10  # attempts of RandomResizedCrop before it falls back to a center crop


def random_resized_crops(
    sizes: npt.ArrayLike,
    generator: np.random.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> npt.NDArray[np.float64]:
    """Draw one `RandomResizedCrop` box for each of N images.

    The boxes have torchvision's distribution and lie on whole pixels.

    Args:
        sizes: Image sizes `[N, 2]` (height, width) in pixels.
        generator: Source of the random numbers.
        scale: Smallest and largest share of the image area.
        ratio: Smallest and largest aspect ratio (width / height).

    Returns:
        Boxes `[N, 4]` xyxy in units of the whole image, 0 to 1.

    Reference: torchvision.transforms.v2.RandomResizedCrop, after Szegedy et al., "Going deeper with convolutions",
    2015, section 6.
    """
    height, width = np.asarray(sizes, float).reshape(-1, 2).T
    shape = len(height), _TRIES
    area = (height * width)[:, None] * generator.uniform(scale[0], scale[1], shape)
    aspect = np.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1]), shape))
    widths, heights = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (widths > 0) & (widths <= width[:, None]) & (heights > 0) & (heights <= height[:, None])
    first = fits.argmax(1)[:, None]  # 0 where none fits
    crop_width, crop_height = (np.take_along_axis(sides, first, 1)[:, 0] for sides in (widths, heights))
    left, top = (
        np.floor(generator.random(len(height)) * (side - crop + 1))
        for side, crop in ((width, crop_width), (height, crop_height))
    )

    none = ~fits.any(1)
    in_ratio = np.clip(width / height, ratio[0], ratio[1])
    middle_width = np.minimum(width, np.rint(height * in_ratio))
    middle_height = np.minimum(height, np.rint(width / in_ratio))
    crop_width, crop_height = np.where(none, middle_width, crop_width), np.where(none, middle_height, crop_height)
    left = np.where(none, (width - crop_width) // 2, left)
    top = np.where(none, (height - crop_height) // 2, top)
    return np.stack(
        [left / width, top / height, (left + crop_width) / width, (top + crop_height) / height], axis=1
    )  # fmt: skip
