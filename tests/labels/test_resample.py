"""Area-preserving resampling equals averages over a finer grid."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from relabel_datasets.labels.resample import resample_area


def reference(image: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Return the means over new cells of an image that is constant in its cells, by a common finer grid."""
    height, width = image.shape
    fine = image.repeat_interleave(grid[0], 0).repeat_interleave(grid[1], 1)
    return torch.nn.functional.avg_pool2d(fine[None], (height, width))[0]


@pytest.mark.parametrize("old", [(1, 1), (3, 5), (7, 7), (20, 14)])
@pytest.mark.parametrize("new", [(1, 1), (2, 3), (7, 7), (5, 9), (14, 20)])
def test_new_cells_are_means_over_their_area(old, new):
    maps = torch.randn(2, 3, *old, dtype=torch.float64)
    resampled = resample_area(maps, new)
    assert resampled.shape == (2, 3, *new)
    assert resampled.dtype == torch.float64
    torch.testing.assert_close(resampled[1, 2], reference(maps[1, 2], new))
    torch.testing.assert_close(resampled.mean((2, 3)), maps.mean((2, 3)))


def test_the_same_grid_changes_nothing():
    maps = torch.randn(2, 3, 5, 4)
    assert torch.equal(resample_area(maps, (5, 4)), maps)


def test_resampling_to_a_finer_grid_is_reversible():
    maps = torch.randn(3, 5, 4)
    torch.testing.assert_close(resample_area(resample_area(maps, (10, 12)), (5, 4)), maps)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_weights_are_copied_to_a_device_once_and_have_derivatives_after_inference():
    maps = torch.randn(2, 11, 13)
    with torch.inference_mode():
        first = resample_area(maps, (7, 5))
    maps.requires_grad_()
    with Operations() as operations:
        again = resample_area(maps, (7, 5))
    assert torch.equal(again, first)
    assert {"arange", "_to_copy", "copy_"}.isdisjoint(operations.names)
    again.sum().backward()
    torch.testing.assert_close(maps.grad.sum(), torch.tensor(2.0 * 7 * 5))


@pytest.mark.slow
def test_compiled_code_uses_the_same_weights():
    maps = torch.randn(2, 11, 13)
    with torch.inference_mode():
        function = torch.compile(resample_area, backend="eager", dynamic=False)
        assert torch.equal(function(maps, (7, 5)), resample_area(maps, (7, 5)))
