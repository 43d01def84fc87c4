import math

import pytest
import torch

import relabel_datasets as rd
from relabel_datasets.labels.encodings import encode_logits
from relabel_datasets.labels.encodings.heatmaps import crop_probabilities

from ..samples import HEIGHT, NUM_CLASSES, WIDTH, random_dense


def softmax(logits):
    powers = [math.exp(value - max(logits)) for value in logits]
    return [power / sum(powers) for power in powers]


def reference_crop_probabilities(dense):
    """Plain loops over the crops of one `[C, H, W]` map."""
    num_classes, height, width = dense.shape
    total = [0.0] * num_classes
    for share in (0.2, 0.33, 0.53, 0.73):
        crop_height, crop_width = max(1, round(height * share)), max(1, round(width * share))
        labels = [
            softmax(dense[:, top : top + crop_height, left : left + crop_width].mean((1, 2)).tolist())
            for top in range(0, height - crop_height + 1, max(1, height // 7))
            for left in range(0, width - crop_width + 1, max(1, width // 7))
        ]
        total = [t + sum(label[c] for label in labels) / len(labels) / 4 for c, t in enumerate(total)]
    return total


def reference_heatmaps(dense, k):
    """Return classes, heatmaps and base of one map by the words of the docstrings, in float64."""
    weight = torch.tensor(reference_crop_probabilities(dense), dtype=torch.float64)
    classes = weight.argsort(descending=True)[:k]
    base = dense.mean((1, 2))
    rest = weight.clone()
    rest[classes] = 0
    if rest.sum() > 0:
        rest /= rest.sum()
    common = sum(rest[c] * (dense[c] - base[c]) for c in range(len(dense)))
    return classes, torch.stack([dense[c] - common for c in classes]), base


@pytest.mark.parametrize("shape", [(NUM_CLASSES, HEIGHT, WIDTH), (6, 15, 14), (6, 1, 9), (4, 1, 1)])
def test_crop_probabilities_are_those_of_plain_loops(shape):
    dense = random_dense(2, *shape, dtype=torch.float64)
    for one, got in zip(dense, crop_probabilities(dense), strict=True):
        assert got.tolist() == pytest.approx(reference_crop_probabilities(one))
        assert got.sum() == pytest.approx(1)


@pytest.mark.parametrize("shape", [(NUM_CLASSES, HEIGHT, WIDTH), (6, 15, 14), (4, 1, 1), (2, 3, 5)])
@pytest.mark.parametrize("k", [1, 3])
def test_heatmaps_are_those_of_the_slow_reference(shape, k):
    dense = random_dense(*shape, dtype=torch.float64)
    encoded = encode_logits(dense[None], "heatmaps", k)
    classes, heatmaps, base = reference_heatmaps(dense, min(k, shape[0]))
    assert encoded.tensors["classes"][0, :, 0, 0].tolist() == classes.tolist()
    torch.testing.assert_close(encoded.logits[0].double(), heatmaps, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoded.tensors["base"][0].double(), base, rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [None, 1, 4, NUM_CLASSES, 99])
def test_the_mean_of_a_heatmaps_map_is_the_mean_of_the_dense_logits(k):
    dense = random_dense()
    label_map = rd.LabelMap.from_logits(dense, k=k)
    torch.testing.assert_close(label_map.dense().mean((1, 2)), dense.mean((1, 2)), rtol=0, atol=1e-5)


def test_heatmaps_keep_the_logits_up_to_a_constant_of_each_location():
    dense = random_dense()
    label_map = rd.LabelMap.from_logits(dense, k=4)
    common = dense[label_map.classes[:, 0, 0]] - label_map.logits
    torch.testing.assert_close(common, common[:1].expand_as(common), rtol=0, atol=1e-5)
    assert common[0].mean().abs() < 1e-5
