"""Windows of label maps against a reference in plain loops on dense maps."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.ops import roi_align

from relabel_datasets.labels.encodings import encode_logits
from relabel_datasets.labels.windows import measure_stored_crops, measure_windows

from .samples import ENCODINGS


def _soft(dense, box):
    """Return the label of one box in 0..1, pooled by torchvision from `[C, H, W]`."""
    _, height, width = dense.shape
    scaled = torch.tensor([[0.0, box[0] * width, box[1] * height, box[2] * width, box[3] * height]])
    return roi_align(dense[None], scaled, 1, aligned=True)[0, :, 0, 0].softmax(0).tolist()


def _shown(dense):
    """Return the classes that an image shows."""
    leads = []
    for y in range(5):
        for x in range(5):
            soft = _soft(dense, (0.15 * x, 0.15 * y, 0.15 * x + 0.4, 0.15 * y + 0.4))
            second, first = sorted(soft)[-2:]
            leads.append((math.log(first) - math.log(second), first, soft.index(first)))
    largest = max(lead for lead, *_ in leads)
    return {index for lead, p, index in leads if p >= 0.5 and lead >= 0.15 * largest}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("size", [(7, 7), (5, 8), (2, 3), (1, 1)])
def test_measures_equal_a_reference_in_plain_loops(encoding, size):
    dense = 4 * torch.randn(12, 6, *size, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(12) % 6
    measures = measure_windows(encode_logits(dense, encoding, 6), labels)
    assert [set(mask.nonzero()[:, 0].tolist()) for mask in measures.shown] == [_shown(logits) for logits in dense]
    assert [tuple(p.shape) for p in measures.p_label] == [(12, 1), (12, 4), (12, 25)]
    for logits, label, whole, last in zip(dense, labels, measures.p_label[0], measures.p_label[2], strict=True):
        assert float(whole) == pytest.approx(_soft(logits, (0, 0, 1, 1))[label], abs=1e-5)
        assert float(last[5]) == pytest.approx(_soft(logits, (0, 0.15, 0.4, 0.55))[label], abs=1e-5)


def _scene(*objects, background=0.0):
    """Return logits `[1, 4, 8, 8]` with objects (class, first column, last column, logit) over a background of class 3."""
    dense = torch.zeros(1, 4, 8, 8)
    dense[0, 3] = background
    for index, first, last, logit in objects:
        dense[0, index, :, first : last + 1] = logit
        dense[0, 3, :, first : last + 1] = 0
    return dense


@pytest.mark.parametrize(
    ("dense", "expected"),
    [
        (_scene((0, 0, 7, 20)), {0}),
        (_scene((0, 0, 3, 20), (1, 4, 7, 20)), {0, 1}),
        (_scene((0, 0, 4, 20), background=2), {0}),  # the background is confident, with a small lead
        (_scene((0, 0, 4, 20), background=12), {0, 3}),
        (_scene((0, 0, 2, 8), (1, 3, 4, 8), (2, 5, 7, 8)), {0, 1, 2}),
        (_scene(), set()),
    ],
)
def test_an_image_shows_its_objects_and_not_its_background(dense, expected):
    for shift in (0, 100 * torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))):  # softmax ignores it
        shown = measure_windows(encode_logits(dense + shift, "heatmaps", 4), torch.zeros(1, dtype=torch.long)).shown
        assert set(shown[0].nonzero()[:, 0].tolist()) == expected


def test_saturated_probabilities_have_finite_leads():
    dense = _scene((0, 0, 3, 400), (1, 4, 7, 300))
    measures = measure_windows(encode_logits(dense, "heatmaps", 4), torch.tensor([2]))
    assert measures.shown[0].tolist() == [True, True, False, False]
    assert all(torch.isfinite(p).all() for p in measures.p_label)


@pytest.mark.parametrize(("num_crops", "needed"), [(1, 1), (19, 1), (20, 1), (21, 2), (40, 2), (100, 5)])
def test_one_stored_crop_in_twenty_shows_a_class(num_crops, needed):
    soft = torch.tensor([0.4, 0.35, 0.25]).repeat(2, num_crops, 1)  # uncertain crops show nothing
    soft[0, :needed] = torch.tensor([0.2, 0.5, 0.3])
    soft[1, : needed - 1] = torch.tensor([0.2, 0.5, 0.3])
    measures = measure_stored_crops(soft, torch.tensor([2, 0]))
    assert measures.shown.tolist() == [[False, True, False], [False, False, False]]
    torch.testing.assert_close(measures.whole, soft.mean(1))
    (p_label,) = measures.p_label
    torch.testing.assert_close(p_label, torch.stack([soft[0, :, 2].mean(), soft[1, :, 0].mean()])[:, None])
