"""Random crops as boxes against torchvision's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from relabel_datasets.labels.crops import random_resized_crops

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
