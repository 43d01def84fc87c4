"""Margins of labels, and the order of suspects."""

import numpy as np
import pytest
import torch

from relabel_datasets.analysis import find_suspects, label_margins


def _p(*scales):
    return [torch.tensor([scale]) for scale in scales]


def test_the_margin_of_equal_probabilities_is_their_log_odds():
    for p in (0.01, 0.5, 0.9):
        assert float(label_margins(_p([p], [p] * 4, [p] * 25))) == pytest.approx(np.log(p / (1 - p)), abs=1e-5)


def test_scales_have_equal_weights():
    one, many = label_margins(_p([0.9], [0.1])), label_margins(_p([0.9], [0.1] * 25))
    torch.testing.assert_close(one, many)


def test_an_object_that_is_present_but_small_supports_its_label():
    background, wrong = [1e-6] * 4, [1e-6] * 25
    small = [0.99, 0.99, *[1e-6] * 23]
    assert label_margins(_p([1e-6], background, small)) > label_margins(_p([1e-6], background, wrong)) + 1


def test_margins_of_certain_and_impossible_labels_are_finite_and_in_order():
    margins = torch.cat([label_margins(_p([p], [p])) for p in (0.0, 1e-30, 1e-10, 0.5, 1 - 1e-6, 1.0)])
    assert torch.isfinite(margins).all()
    assert (margins.diff() > 0).all()
    assert margins.dtype == torch.float64


def test_suspects_are_sorted_by_increasing_margin():
    images = {
        "label": np.array([0, 1, 2, 0, 1]),
        "best": np.array([1, 1, 0, 2, 2]),
        "margin": np.array(
            [-0.5, -3.0, -9.0, -4.0, 0.2]
        ),  # the second agrees; the last is supported by a part of its image
    }
    assert find_suspects(images).tolist() == [2, 3, 0]
    assert find_suspects({name: column[1:2] for name, column in images.items()}).tolist() == []
