"""The numbers of a set of label maps against a slow reference on dense maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.ops import roi_align

from relabel_datasets.labels import codec
from relabel_datasets.labels.crops import random_resized_crops
from relabel_datasets.labels.encodings import encode_logits
from relabel_datasets.labels.label_map import LabelMap
from relabel_datasets.labels.statistics import (
    Statistics,
    add_up,
    crop_fidelity,
    image_statistics,
    stored_crop_statistics,
    total,
)
from relabel_datasets.labels.windows import measure_windows

from .samples import ENCODINGS

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


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_agreement_and_shown_classes_are_counted(dense, encoding):
    encoded = encode_logits(dense, encoding, 4)
    maps = torch.stack([dense_of(blob) for blob in codec.encode(encoded, SIZES, "float16")])
    whole = roi_align(maps, [torch.tensor([[0.0, 0, 5, 6]])] * len(maps), 1, aligned=True)[..., 0, 0]
    labels = [3 * i % 12 for i in range(len(SIZES))]
    num_shown = measure_windows(encoded, torch.tensor(labels)).shown.sum(1)
    assert {0, 1, 2} <= set(num_shown.tolist())
    agreeing = int((whole.argmax(1) == torch.tensor(labels)).sum())
    assert image_statistics(encoded, labels) == Statistics(
        agreeing=agreeing, several=int((num_shown > 1).sum()), shown=int(num_shown.sum())
    )


@pytest.mark.parametrize(
    ("classes", "several", "shown"),
    [([0] * 40, 0, 1), ([0] * 39 + [2], 0, 1), ([0] * 38 + [2] * 2, 1, 2), ([0] * 20 + [1, 3] * 10, 1, 3)],
)
def test_agreement_and_classes_of_stored_crops_are_counted(classes, several, shown):
    soft = torch.full((40, 5), 0.1)
    soft[range(40), classes] = 0.6
    assert stored_crop_statistics(soft, 0) == Statistics(agreeing=1, several=several, shown=shown)
    assert stored_crop_statistics(soft, 4) == Statistics(agreeing=0, several=several, shown=shown)
    assert stored_crop_statistics(soft * 0.8, 0) == Statistics(agreeing=1, several=0, shown=0)


@pytest.mark.parametrize(("encoding", "dtype"), [("heatmaps", "uint4"), ("topk", "float16")])
def test_fidelity_is_that_of_roi_align_on_dense_maps(dense, encoding, dtype):
    dense = 5 * dense  # else any encoding would be close
    blobs = codec.encode(encode_logits(dense, encoding, 3), SIZES, dtype)
    found = crop_fidelity([dense], blobs, SIZES, np.random.default_rng(5))
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
    parts = [crop_fidelity([dense[i : i + 3]], blobs[i : i + 3], SIZES[i : i + 3], random) for i in range(0, 20, 3)]
    whole = crop_fidelity([dense], blobs, SIZES, np.random.default_rng(5))
    assert add_up(parts)._replace(kl=0) == whole._replace(kl=0)
    assert add_up(parts).kl == pytest.approx(whole.kl, abs=1e-9)


def test_statistics_of_nothing_add_up_to_nothing():
    assert add_up([Statistics()]) == add_up([]) == total([]) == Statistics()
    assert total([[1, 2, 3, 0.5, 4, 5], [1, 1, 1, 0.25, 1, 9]]) == Statistics(2, 3, 4, 0.75, 5, 14)


@pytest.mark.parametrize("statistics", [Statistics(1, 2, 3, 0.5, 4, 5), Statistics(1, None, 3, 0.5, 4, None)])
def test_statistics_are_read_as_they_were_written(statistics):
    assert Statistics.from_list(statistics.to_list()) == statistics
    assert Statistics.from_list(list(statistics)) == statistics  # as JSON stores the record of a finished shard


def test_the_several_classes_of_early_versions_are_not_counted():
    old, new = [10, 9, 3, 0.5, 2], [10, 1, 3, 0.5, 2, 11]
    assert total([old]) == Statistics(10, None, 3, 0.5, 2, None)
    assert total([old, new]) == total([new, old]) == Statistics(20, None, 6, 1.0, 4, None)
