"""The numbers of a set of label maps against a slow reference on dense maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.ops import roi_align

from relabel_datasets.labels import codec
from relabel_datasets.labels.crops import random_resized_crops
from relabel_datasets.labels.encoding import encode_logits
from relabel_datasets.labels.label_map import LabelMap
from relabel_datasets.labels.statistics import Statistics, add_up, confident_classes, crop_fidelity, image_statistics

SIZES = [(40, 60), (90, 30), (50, 50), (64, 48)] * 5


@pytest.fixture
def dense() -> torch.Tensor:
    """`[B, C, H, W]` with some classes far above the others, here and there."""
    logits = 0.3 * torch.randn(len(SIZES), 12, 6, 5)
    for i in range(len(SIZES)):
        for j in range(i % 4):
            logits[i, (3 * i + 2 * j) % 12, j : j + 3, j : j + 3] += 8
    return logits


def dense_of(blob: bytes) -> torch.Tensor:
    return LabelMap.from_safetensors(blob).dense()


@pytest.mark.parametrize("encoding", ["heatmaps", "topk"])
def test_confident_classes_are_those_of_the_dense_map(dense, encoding):
    encoded = encode_logits(dense, encoding, 4)
    blobs = codec.encode(encoded, SIZES, "float16")
    highest = torch.stack([dense_of(blob).softmax(0) for blob in blobs]).amax((2, 3))
    assert not ((highest - 0.5).abs() < 0.001).any()  # else float16 could decide
    expected = highest >= 0.5
    assert confident_classes(encoded).equal(expected)
    counts = expected.sum(1)
    assert {0, 1, 2} <= set(counts.tolist())
    labels = [int(row) for row in torch.randint(12, (len(SIZES),))]
    pooled = torch.stack([roi_align(dense_of(blob)[None], [torch.tensor([[0.0, 0, 5, 6]])], 1, aligned=True)[0, :, 0, 0]
                          for blob in blobs])  # fmt: skip
    found = image_statistics(encoded, labels)
    assert found == Statistics(int((pooled.argmax(1) == torch.tensor(labels)).sum()), int((counts > 1).sum()))


@pytest.mark.parametrize("encoding", ["heatmaps", "topk"])
@pytest.mark.parametrize("k", [2, 4])
def test_a_class_is_no_more_confident_where_another_is_far_below_its_mean(encoding, k):
    dense = torch.tensor([[0.0, 0.4, 0.1, -0.2], [60.0, 60.0, 60.0, -30.0]]).mT.reshape(1, 4, 1, 2)
    dense[0, 0, 0, 1] = 90
    encoded = encode_logits(dense, encoding, k)
    stored = torch.stack(
        [LabelMap.from_safetensors(blob).dense() for blob in codec.encode(encoded, [(1, 2)], "float16")]
    )
    expected = stored.softmax(1).amax((2, 3)) >= 0.5
    kept = torch.zeros_like(expected).scatter(1, encoded.classes.flatten(1), True)
    assert confident_classes(encoded).equal(expected & kept)


def test_the_threshold_of_confidence_counts():
    encoded = encode_logits(torch.tensor([1.0, 0.0, -50.0]).log_softmax(0)[None, :, None, None], "heatmaps", 3)
    assert confident_classes(encoded, 0.73).sum() == 1
    assert confident_classes(encoded, 0.74).sum() == 0
    assert confident_classes(encoded, 0.26).sum() == 2


@pytest.mark.parametrize(("encoding", "dtype"), [("heatmaps", "uint4"), ("topk", "float16")])
def test_fidelity_is_that_of_roi_align_on_dense_maps(dense, encoding, dtype):
    dense = 5 * dense  # else any encoding would be close
    blobs = codec.encode(encode_logits(dense, encoding, 3), SIZES, dtype)
    found = crop_fidelity(dense, blobs, SIZES, np.random.default_rng(5))
    random = np.random.default_rng(5)
    divergence, same = [], []
    for logits, blob, size in zip(dense, blobs, SIZES, strict=True):
        box = torch.from_numpy(random_resized_crops([size], random)).float() * torch.tensor([5, 6, 5, 6])
        both = torch.stack([logits, dense_of(blob)])
        true, stored = roi_align(both, [box, box], 1, aligned=True)[:, :, 0, 0].log_softmax(1)
        divergence.append(float((true.exp() * (true - stored)).sum()))
        same.append(bool(true.argmax() == stored.argmax()))
    assert found.crops == len(SIZES)
    assert found.kl == pytest.approx(sum(divergence), abs=0.01)
    assert found.kl > 0.1
    assert found.same_best == sum(same)


def test_fidelity_does_not_depend_on_batches(dense):
    blobs = codec.encode(encode_logits(dense), SIZES, "uint4")
    random = np.random.default_rng(5)
    parts = [crop_fidelity(dense[i : i + 3], blobs[i : i + 3], SIZES[i : i + 3], random) for i in range(0, 20, 3)]
    whole = crop_fidelity(dense, blobs, SIZES, np.random.default_rng(5))
    assert add_up(parts)._replace(kl=0) == whole._replace(kl=0)
    assert add_up(parts).kl == pytest.approx(whole.kl, abs=1e-9)


def test_statistics_of_nothing_add_up_to_nothing():
    assert add_up([Statistics()]) == Statistics()
    assert add_up([Statistics(1, 2, 3, 0.5, 4), [1, 1, 1, 0.25, 1]]) == Statistics(2, 3, 4, 0.75, 5)
