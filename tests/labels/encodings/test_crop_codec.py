import numpy as np
import pytest
import torch

from relabel_datasets.errors import LabelMapError
from relabel_datasets.labels.encodings.base import StoredTensor
from relabel_datasets.labels.encodings.crop_codec import (
    check_crops,
    check_crops_header,
    compress_crops,
    decompress_crops,
    decompress_labels,
    sparse_crops,
)


def header(arrays):
    return {name: StoredTensor(array.shape, array.dtype) for name, array in arrays.items()}


def random_logits(num_views, num_classes, seed=0):
    """Return logits that resemble those of crops of one image: a mean, a few directions, and noise."""
    rng = np.random.default_rng(seed)
    mean = rng.standard_normal(num_classes) * 2
    mean[rng.permutation(num_classes)[:5]] += 8
    directions = rng.standard_normal((4, num_classes))
    logits = (
        mean + rng.standard_normal((num_views, 4)) @ directions + rng.standard_normal((num_views, num_classes)) * 0.5
    )
    return torch.from_numpy(logits).float()


def mean_divergence(logits, labels):
    log_probs = logits.double().log_softmax(1)
    stored = torch.from_numpy(labels).double().clamp_min(1e-30).log()
    return (log_probs.exp() * (log_probs - stored)).sum(1).mean().item()


@pytest.mark.parametrize(("num_views", "num_classes"), [(1, 2), (3, 5), (100, 10), (24, 1000), (500, 300), (2, 21843)])
def test_views_of_any_number_and_classes_survive_a_round_trip(num_views, num_classes):
    logits = random_logits(num_views, num_classes)
    arrays = compress_crops(logits)
    assert check_crops_header(header(arrays), num_classes) == num_views
    check_crops(arrays, num_classes)
    labels = decompress_labels(arrays, num_classes, range(num_views))
    assert labels.shape == (num_views, num_classes)
    assert labels.dtype == np.float32
    assert mean_divergence(logits, labels) < 0.5


def test_rows_are_decoded_as_in_the_whole_in_any_order_and_with_repetition():
    arrays = compress_crops(random_logits(20, 50))
    whole = decompress_crops(arrays, 50, range(20))
    rows = [7, 0, 7, 19]
    np.testing.assert_array_equal(decompress_crops(arrays, 50, rows), whole[rows])


def test_equal_logits_give_equal_bytes():
    logits = random_logits(20, 50)
    first, second = compress_crops(logits), compress_crops(logits.clone())
    assert {name: array.tobytes() for name, array in first.items()} == {
        name: array.tobytes() for name, array in second.items()
    }


@pytest.mark.parametrize(
    "logits", [torch.zeros(3, 0), torch.zeros(0, 3), torch.zeros(3), torch.full((2, 3), torch.nan)]
)
def test_logits_that_are_not_finite_or_of_another_shape_are_an_error(logits):
    with pytest.raises(ValueError, match="logits must be"):
        compress_crops(logits)


def published_labels(classes, probs, num_classes, *, spread_rest):
    """Return labels as the reader of FKD makes them, one view at a time."""
    labels = torch.zeros(len(classes), num_classes)
    for label, indices, values in zip(labels, classes, probs, strict=True):
        values = torch.from_numpy(values).float()
        if spread_rest:
            label.fill_((1 - values.sum()).item() / (num_classes - len(indices)))
        label[torch.from_numpy(indices.astype(np.int64))] = values
    return labels.numpy()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("spread_rest", [True, False])
@pytest.mark.parametrize(("k", "num_classes"), [(1, 1000), (5, 1000), (10, 300), (3, 4)])
def test_published_probabilities_are_stored_exactly(k, num_classes, spread_rest, dtype):
    probs, classes = random_logits(30, num_classes).softmax(1).topk(k)
    probs, classes = probs.numpy().astype(dtype) * dtype(0.99), classes.numpy().astype(dtype)
    arrays = sparse_crops(classes, probs, num_classes, spread_rest=spread_rest)
    assert check_crops_header(header(arrays), num_classes) == 30
    check_crops(arrays, num_classes)
    expected = published_labels(classes, probs, num_classes, spread_rest=spread_rest)
    labels = decompress_labels(arrays, num_classes, range(30))
    rows = np.arange(30)[:, None]
    np.testing.assert_array_equal(labels[rows, classes.astype(int)], probs)
    np.testing.assert_allclose(labels, expected, rtol=1e-5)  # sums differ in their order
    if spread_rest:
        logits = torch.from_numpy(decompress_crops(arrays, num_classes, range(30)))
        np.testing.assert_allclose(logits.softmax(1), expected, atol=1e-5)


def test_a_temperature_divides_the_logits():
    arrays = compress_crops(random_logits(4, 20))
    logits = torch.from_numpy(decompress_crops(arrays, 20, [1, 2]))
    labels = decompress_labels(arrays, 20, [1, 2], temperature=2.0)
    np.testing.assert_allclose(labels, (logits / 2).softmax(1), atol=1e-6)


def test_unknown_arrays_are_an_error():
    with pytest.raises(LabelMapError, match="stored crops have the tensors"):
        check_crops_header({"logits": StoredTensor((3,), np.dtype(np.uint8))}, 10)
