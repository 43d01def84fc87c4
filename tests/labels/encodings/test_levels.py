import numpy as np
import pytest
import torch

from relabel_datasets.labels.encodings.levels import quantize_heatmaps

from ..samples import HEIGHT, WIDTH, random_dense


def reference_dither(heatmap, low, high, levels):
    """Floyd and Steinberg's error diffusion of one `[H, W]` heatmap, in reading order."""
    height, width = heatmap.shape
    target = ((heatmap - low) / ((high - low) / (levels - 1))).tolist()
    out = torch.zeros(height, width, dtype=torch.uint8)
    for y in range(height):
        for x in range(width):
            level = min(max(round(target[y][x]), 0), levels - 1)
            error = target[y][x] - level
            out[y, x] = level
            for dy, dx, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                if y + dy < height and 0 <= x + dx < width:
                    target[y + dy][x + dx] += error * share / 16
    return out


@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (5, 9), (1, 8), (8, 1), (1, 1)])
@pytest.mark.parametrize("levels", [16, 256])
def test_quantisation_passes_errors_on_like_floyd_and_steinberg(size, levels):
    heatmaps = random_dense(2, 3, *size, dtype=torch.float64)
    low, high = heatmaps.amin((2, 3)) - 0.1, heatmaps.amax((2, 3)) + 0.1
    got = quantize_heatmaps(heatmaps.numpy(), low.numpy(), high.numpy(), levels)
    assert got.dtype == np.uint8
    for b in range(2):
        for k in range(3):
            want = reference_dither(heatmaps[b, k], low[b, k], high[b, k], levels)
            assert got[b, k].tolist() == want.tolist()


def test_a_constant_heatmap_is_all_lowest_level():
    constant = np.full((1, 1, HEIGHT, WIDTH), 2.5, np.float32)
    assert quantize_heatmaps(constant, constant[:, :, 0, 0], constant[:, :, 0, 0], 16).max() == 0
