"""Boxes of random crops, vectorized over images."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_TRIES = 10  # attempts of RandomResizedCrop before it falls back to a center crop
_SCALE, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
_DRAWS, _USED = 32, 23  # random numbers that a stored crop owns, and those that it uses


def random_resized_crops(
    sizes: npt.ArrayLike,
    generator: np.random.Generator,
    scale: tuple[float, float] = _SCALE,
    ratio: tuple[float, float] = _RATIO,
) -> Floats:
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
    sizes = np.asarray(sizes, float).reshape(-1, 2)
    shape = len(sizes), _TRIES
    areas = generator.uniform(scale[0], scale[1], shape)
    log_ratios = generator.uniform(math.log(ratio[0]), math.log(ratio[1]), shape)
    left, top = generator.random(len(sizes)), generator.random(len(sizes))
    tried, fits = _try_sides(sizes[:, None], areas, log_ratios)
    sides = np.take_along_axis(tried, fits.argmax(1)[:, None, None], 1)[:, 0]  # the first that fits
    is_misfit = np.logical_not(fits.any(1))
    return _place(sizes, sides, left, top, is_misfit, ratio)


def seeded_crops(seeds: npt.ArrayLike, sizes: npt.ArrayLike, num_crops: int) -> tuple[Floats, Bools]:
    """Compute the boxes and flips of the stored crops of M images, which are a function of seed, image size and crop.

    The crops have the distribution of torchvision's RandomResizedCrop with its default scale and ratio, on whole pixels, and of
    RandomHorizontalFlip. Draw d of crop i is `uniform(seed, 32 * i + d)`. Draws 0 to 9 choose the area of ten tries, 10 to 19
    their aspect ratios, 20 the left edge, 21 the top edge, and 22 the flip, which is mirrored below 1/2. `uniform(seed, n)` are
    the upper 53 bits of output n of SplitMix64, divided by 2^53.

    Args:
        seeds: Seeds `[M]`, 64-bit integers of at least 0.
        sizes: Image sizes `[M, 2]` (height, width) in pixels.
        num_crops: Number of crops N of each image.

    Returns:
        Boxes `[M, N, 4]` xyxy in units of the whole image, 0 to 1, and flips `[M, N]`: whether the crop is mirrored.

    Reference: Steele et al., "Fast Splittable Pseudorandom Number Generators", 2014; `random_resized_crops`.
    """
    all_sizes = np.repeat(np.asarray(sizes, float).reshape(-1, 2), num_crops, 0)
    all_seeds = np.repeat(np.asarray(seeds, np.uint64).reshape(-1), num_crops)
    first = np.tile(np.arange(num_crops, dtype=np.uint64) * np.uint64(32), len(all_seeds) // num_crops)
    left, top, flip = (uniform(all_seeds, first + np.uint64(draw)) for draw in (20, 21, 22))
    sides = np.zeros_like(all_sizes)
    (low, high), (narrow, wide) = _SCALE, map(math.log, _RATIO)
    waiting = np.arange(len(first))  # crops whose tries so far did not fit
    for attempt in range(_TRIES):
        seeds, numbers = all_seeds[waiting], first[waiting] + np.uint64(attempt)
        area = low + (high - low) * uniform(seeds, numbers)
        log_ratio = narrow + (wide - narrow) * uniform(seeds, numbers + np.uint64(_TRIES))
        tried, fits = _try_sides(all_sizes[waiting], area, log_ratio)
        sides[waiting[fits]] = tried[fits]
        waiting = waiting[~fits]
    is_misfit = np.zeros(len(first), bool)
    is_misfit[waiting] = True
    boxes = _place(all_sizes, sides, left, top, is_misfit, _RATIO)
    flips: Bools = flip.reshape(-1, num_crops) < 0.5
    return boxes.reshape(-1, num_crops, 4), flips


def to_pixels(boxes: npt.ArrayLike, size: tuple[int, int]) -> npt.NDArray[np.int64]:
    """Return boxes in whole pixels, inside the image and at least one pixel in size.

    Args:
        boxes: Boxes `[N, 4]` xyxy in units of the whole image.
        size: (height, width) of the image in pixels.

    Returns:
        Boxes `[N, 4]` (left, top, right, bottom).
    """
    sides = np.array([size[1], size[0]])
    edges = np.rint(np.asarray(boxes, float).reshape(-1, 2, 2) * sides).astype(np.int64)
    start = edges[:, 0].clip(0, sides - 1)
    return np.concatenate([start, edges[:, 1].clip(start + 1, sides)], axis=1)


def uniform(seeds: npt.ArrayLike, numbers: npt.ArrayLike) -> Floats:
    """Return random numbers in 0 .. 1, without 1, that are a function of seed and number: outputs of SplitMix64.

    Args:
        seeds: 64-bit seeds of at least 0.
        numbers: Positions in the sequence of random numbers, from 0. They are broadcast against the seeds.
    """
    seeds, numbers = np.asarray(seeds, np.uint64), np.asarray(numbers, np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        state = seeds + (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    bits = (state ^ state >> np.uint64(31)) >> np.uint64(11)
    numbers_in_unit: Floats = bits * 2.0**-53
    return numbers_in_unit


def _try_sides(sizes: Floats, areas: Floats, log_ratios: Floats) -> tuple[Floats, Bools]:
    """Return the sides `[..., 2]` (height, width) of crops of given areas and aspect ratios, and whether they fit the image."""
    height, width = sizes[..., 0], sizes[..., 1]
    area, aspect = height * width * areas, np.exp(log_ratios)
    sides = np.stack([np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))], axis=-1)
    return sides, np.asarray(((sides > 0) & (sides <= sizes)).all(-1), np.bool_)


def _place(
    sizes: Floats, sides: Floats, left: Floats, top: Floats, is_misfit: Bools, ratio: tuple[float, float]
) -> Floats:
    """Return the boxes `[N, 4]` of crops.

    Args:
        sizes: Image sizes `[N, 2]`.
        sides: Sides (height, width) of the crops `[N, 2]`. Those of misfits are ignored.
        left: Random numbers in 0 .. 1 `[N]` that choose the left edge.
        top: Random numbers in 0 .. 1 `[N]` that choose the top edge.
        is_misfit: `[N]`, whether no try fitted. These become center crops.
        ratio: Smallest and largest aspect ratio of center crops.
    """
    space = sizes - sides + 1
    corners = np.floor(np.stack([top, left], axis=1) * space)
    if is_misfit.any():
        height, width = sizes[is_misfit].T
        in_ratio = np.clip(width / height, ratio[0], ratio[1])
        middle = np.stack(
            [np.minimum(height, np.rint(width / in_ratio)), np.minimum(width, np.rint(height * in_ratio))], axis=1
        )
        sides = sides.copy()
        sides[is_misfit], corners[is_misfit] = middle, (sizes[is_misfit] - middle) // 2
    (y1, x1), (y2, x2) = (corners / sizes).T, ((corners + sides) / sizes).T
    return np.stack([x1, y1, x2, y2], axis=1)
