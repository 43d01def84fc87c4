"""Random crops as boxes against torchvision's own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from relabel_datasets.labels.crops import random_resized_crops, seeded_crops, to_pixels

NUM = 20_000


def torchvision_crops(size, scale, ratio):
    image = torch.empty(1, 1, 1).expand(1, *size)
    crops = [v2.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(NUM // 4)]
    height, width = size
    return np.array([[left / width, top / height, (left + w) / width, (top + h) / height] for top, left, h, w in crops])


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (100, 600), (7, 5)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 0.6)])
def test_crops_are_distributed_as_torchvisions(size, scale):
    ours = random_resized_crops([size] * NUM, np.random.default_rng(0), scale)
    theirs = torchvision_crops(size, scale, (3 / 4, 4 / 3))
    for axis in range(4):  # Kolmogorov and Smirnov's distance of the distributions of each side, at one in a million
        grid = np.linspace(0, 1, 101)
        distance = max(abs((ours[:, axis] <= at).mean() - (theirs[:, axis] <= at).mean()) for at in grid)
        assert distance < 2.7 * (1 / NUM + 4 / NUM) ** 0.5
    areas = [(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) for boxes in (ours, theirs)]
    assert abs(areas[0].mean() - areas[1].mean()) < 6 * areas[1].std() * (5 / NUM) ** 0.5 + 1e-12


def test_crops_are_of_whole_pixels_inside_the_image():
    sizes = np.random.default_rng(1).integers(1, 60, (1000, 2))
    boxes = random_resized_crops(sizes, np.random.default_rng(0))
    pixels = boxes * sizes[:, [1, 0, 1, 0]]
    assert np.allclose(pixels, pixels.round())
    assert (boxes >= 0).all()
    assert (boxes <= 1).all()
    assert (pixels[:, 2:] - pixels[:, :2] > 0.5).all()


def test_a_crop_that_never_fits_is_the_middle_of_the_image_as_torchvision_has_it():
    for size in ((1000, 10), (10, 1000)):
        (ours,) = random_resized_crops([size], np.random.default_rng(0), (0.9, 1.0))
        top, left, h, w = v2.RandomResizedCrop.get_params(torch.empty(1, *size), (0.9, 1.0), (3 / 4, 4 / 3))
        height, width = size
        assert ours.tolist() == [left / width, top / height, (left + w) / width, (top + h) / height]


def test_no_images_have_no_crops():
    assert random_resized_crops(np.zeros((0, 2)), np.random.default_rng(0)).shape == (0, 4)


def uniform(seed: int, number: int) -> float:
    """Return an output of SplitMix64 in plain integers, as in the reference implementation."""
    state = (seed + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return ((state ^ (state >> 31)) >> 11) / 2**53


def test_the_random_numbers_are_those_of_splitmix64():
    assert int(uniform(1234567, 0) * 2**53) == 6457827717110365317 >> 11  # of the reference implementation
    assert int(uniform(1234567, 2) * 2**53) == 9817491932198370423 >> 11


def crop_by_formula(seed, size, crop):
    """Return the box in pixels and the flip of a stored crop by the documented formula, in plain loops."""
    (height, width), draw = size, [uniform(seed, 32 * crop + d) for d in range(23)]
    for attempt in range(10):
        area = height * width * (0.08 + 0.92 * draw[attempt])
        log_ratio = math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * draw[10 + attempt]
        w, h = round(math.sqrt(area * math.exp(log_ratio))), round(math.sqrt(area / math.exp(log_ratio)))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draw[20] * (width - w + 1)), int(draw[21] * (height - h + 1))
            return [left, top, left + w, top + h], draw[22] < 0.5
    ratio = min(max(width / height, 3 / 4), 4 / 3)
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, top = (width - w) // 2, (height - h) // 2
    return [left, top, left + w, top + h], draw[22] < 0.5


def test_stored_crops_follow_the_documented_formula():
    seeds = np.array([0, 7, 2**64 - 1, 2**63, 12345], np.uint64)
    sizes = [(375, 500), (500, 375), (1, 1), (1000, 10), (33, 34)]
    boxes, flips = seeded_crops(seeds, sizes, 40)
    for i, size in enumerate(sizes):
        pixels = to_pixels(boxes[i], size).tolist()
        for crop in range(40):
            assert (pixels[crop], bool(flips[i, crop])) == crop_by_formula(int(seeds[i]), size, crop)


def test_the_first_crops_do_not_depend_on_their_number_and_no_two_seeds_share_them():
    few, some_flips = seeded_crops([5], [(40, 60)], 3)
    more, _ = seeded_crops([5, 6], [(40, 60)] * 2, 50)
    assert np.array_equal(few[0], more[0, :3])
    assert len(np.unique(more.reshape(-1, 4), axis=0)) > 90
    assert some_flips.shape == (1, 3)


def test_stored_crops_are_distributed_as_torchvisions():
    boxes, flips = seeded_crops(np.arange(NUM // 100), [(375, 500)] * (NUM // 100), 100)
    theirs = torchvision_crops((375, 500), (0.08, 1.0), (3 / 4, 4 / 3))
    for axis in range(4):
        grid = np.linspace(0, 1, 101)
        ours = boxes.reshape(-1, 4)[:, axis]
        distance = max(abs((ours <= at).mean() - (theirs[:, axis] <= at).mean()) for at in grid)
        assert distance < 2.7 * (1 / NUM + 4 / NUM) ** 0.5
    assert abs(flips.mean() - 0.5) < 3 / NUM**0.5
