import struct
import tracemalloc
import zlib

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
from relabel_datasets.labels.encodings.crop_fit import BASE, STEP, fit_crops


def header(arrays):
    return {name: StoredTensor(array.shape, array.dtype) for name, array in arrays.items()}


def random_logits(num_views, num_classes, seed=0):
    """Return logits that resemble those of crops of one image: a mean, a few directions, and noise."""
    rng = np.random.default_rng(seed)
    mean = rng.standard_normal(num_classes) * 2
    mean[rng.permutation(num_classes)[:5]] += 8
    directions = rng.standard_normal((4, num_classes))
    logits = (
        mean + rng.standard_normal((num_views, 4)) @ directions + rng.standard_normal((num_views, num_classes)) * 0.3
    )
    return torch.from_numpy(logits).float()


def assert_best_classes_are_kept(logits, labels):
    """Check that the best class of a stored label is that of the logits, or one with nearly the same logit."""
    stored = torch.from_numpy(labels).argmax(1, keepdim=True)
    assert (logits.amax(1) - logits.gather(1, stored)[:, 0] < 0.051).all()


def mean_divergence(logits, labels):
    log_probs = logits.double().log_softmax(1)
    stored = torch.from_numpy(labels).double().clamp_min(1e-30).log()
    return (log_probs.exp() * (log_probs - stored)).sum(1).mean().item()


@pytest.mark.parametrize("k", [1, 16, 40])
@pytest.mark.parametrize(("num_views", "num_classes"), [(1, 2), (3, 5), (100, 10), (24, 1000), (500, 300), (2, 21843)])
def test_views_of_any_number_and_classes_survive_a_round_trip(num_views, num_classes, k):
    logits = random_logits(num_views, num_classes)
    arrays = compress_crops(logits, k)
    assert check_crops_header(header(arrays), num_classes) == num_views
    check_crops(arrays, num_classes)
    labels = decompress_labels(arrays, num_classes, range(num_views))
    assert labels.shape == (num_views, num_classes)
    assert labels.dtype == np.float32
    assert mean_divergence(logits, labels) < (0.15 if k >= min(num_views, 16) else 0.5)
    assert_best_classes_are_kept(logits, labels)


def test_labels_of_100_views_are_close_in_few_bytes():
    logits = random_logits(100, 1000)
    arrays = compress_crops(logits)
    labels = decompress_labels(arrays, 1000, range(100))
    assert sum(array.nbytes for array in arrays.values()) < 3200
    assert mean_divergence(logits, labels) < 0.06


def test_decoding_returns_the_logits_of_the_fitted_symbols():
    logits = random_logits(30, 200).numpy()
    symbols = fit_crops(logits, 16)
    assert len(symbols.corrections) > 0
    expected = np.zeros(logits.shape)
    for view in range(30):
        for c in range(200):
            step = float(STEP[symbols.base[c]])
            products = symbols.coefs[view] * symbols.components[c] * step
            expected[view, c] = BASE[symbols.base[c]] + products.sum()
    for view, c, correction in zip(symbols.views, symbols.classes, symbols.corrections, strict=True):
        expected[view, c] += 0.5 * correction
    arrays = compress_crops(torch.from_numpy(logits))
    np.testing.assert_allclose(decompress_crops(arrays, 200, range(30)), expected, atol=1e-4)


@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(5, 10),
        torch.full((5, 10), 1e30),
        torch.eye(10) * 3e38,
        -torch.eye(10) * 3e38,
        torch.arange(10.0).repeat(4, 1) * 1e4,
        torch.linspace(-1e-6, 1e-6, 30).reshape(3, 10),
    ],
    ids=["constant", "large", "one best class", "one worst class", "equal views", "nearly constant"],
)
def test_extreme_logits_keep_their_labels(logits):
    arrays = compress_crops(logits)
    check_crops(arrays, 10)
    labels = decompress_labels(arrays, 10, range(len(logits)))
    np.testing.assert_allclose(labels, logits.softmax(1), atol=0.05)


def test_bytes_do_not_depend_on_the_number_of_threads():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    logits = 4 * torch.randn(100, 600, generator=torch.Generator().manual_seed(0))
    stored = []
    for num_threads in (1, 2):
        with threadpoolctl.threadpool_limits(num_threads, user_api="blas"):
            stored.append(compress_crops(logits)["crop_stream"])
    np.testing.assert_array_equal(stored[0], stored[1])


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


def stream(symbols, *, counts=(1, 2, 1), tail=b"", cut=None):
    """Return a stored stream of 3 views and 4 classes."""
    compressor = zlib.compressobj(wbits=-15)
    data = compressor.compress(struct.pack("<3I", *counts) + bytes(symbols)) + compressor.flush()
    data = data[:cut] + tail
    stored = np.zeros((3, -(-len(data) // 3)), np.uint8)
    stored.reshape(-1)[: len(data)] = np.frombuffer(data, np.uint8)
    return {"crop_stream": stored}


SYMBOLS = [3, 0, 2, 1, 1, 2, 255, 5, 6, 0, 1, 0, 4, 0, 3]  # base, u, v, views, corrections, high, low ranks


def test_a_stream_made_by_hand_is_decoded_as_documented():
    arrays = stream(SYMBOLS)
    check_crops(arrays, 4)
    expected = np.tile(BASE[[3, 0, 2, 1]], (3, 1))
    expected[:, 1] += [1 * 5 * STEP[0], 2 * 5 * STEP[0], -1 * 5 * STEP[0]]  # rank 0 is class 1
    expected[:, 3] += [1 * 6 * STEP[1], 2 * 6 * STEP[1], -1 * 6 * STEP[1]]  # rank 1 is class 3
    expected[1, 0] += 4 * 0.5  # rank 3 is class 0
    np.testing.assert_allclose(decompress_crops(arrays, 4, [0, 1, 2]), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (stream([*SYMBOLS[:-1], 4]), "corrects rank 4"),
        (stream([*SYMBOLS[:-2], 1, 0]), "corrects rank 256"),
        (stream([*SYMBOLS[:9], 0, 2, 0, *SYMBOLS[12:]]), "another number"),
        (stream([*SYMBOLS[:9], 0, 0, 0, *SYMBOLS[12:]]), "another number"),
        (stream(SYMBOLS[:-1]), "must have 27 bytes"),
        (stream([*SYMBOLS, 0]), "must have 27 bytes"),
        (stream(SYMBOLS, tail=b"\0\1"), "then zeros only"),
        (stream(SYMBOLS, cut=-3), "must have 27 bytes|damaged"),
        (stream(SYMBOLS, cut=4), "ends after|damaged"),
        (stream(b""), "must have 27 bytes"),
        (stream(SYMBOLS, counts=(1, 5, 1)), "too many"),
        (stream(SYMBOLS, counts=(1, 2, 3 * 4 + 1)), "too many"),
        (stream(SYMBOLS, counts=(2**32 - 1, 2, 1)), "too many"),
        (stream(bytes(1 << 24), counts=(1 << 22, 4, 0)), "must have"),
        ({"crop_stream": np.full((3, 20), 255, np.uint8)}, "damaged"),
        ({"crop_stream": np.zeros((3, 20), np.uint8)}, "damaged|ends after"),
    ],
)
def test_a_damaged_stream_is_refused(arrays, message):
    assert check_crops_header(header(arrays), 4) == 3
    with pytest.raises(LabelMapError, match=message):
        check_crops(arrays, 4)


def tensor(shape, dtype=np.uint8):
    return StoredTensor(shape, np.dtype(dtype))


@pytest.mark.parametrize(
    "tensors",
    [
        {"crop_stream": tensor((3,))},
        {"crop_stream": tensor((0, 5))},
        {"crop_stream": tensor((1 << 17, 5))},
        {"crop_stream": tensor((3, 0))},
        {"crop_stream": tensor((3, 5), np.float16)},
        {"crop_classes": tensor((3, 2)), "crop_probs": tensor((3, 3), np.float16), "crop_rest": tensor(())},
        {"crop_classes": tensor((3, 2)), "crop_probs": tensor((3, 2)), "crop_rest": tensor(())},
        {"crop_classes": tensor((3, 2), np.uint16), "crop_probs": tensor((3, 2), np.float16), "crop_rest": tensor(())},
        {"crop_classes": tensor((3, 5)), "crop_probs": tensor((3, 5), np.float16), "crop_rest": tensor(())},
        {"crop_classes": tensor((3, 2)), "crop_probs": tensor((3, 2), np.float16), "crop_rest": tensor((1,))},
    ],
)
def test_headers_that_do_not_fit_are_refused(tensors):
    with pytest.raises(LabelMapError, match="must be"):
        check_crops_header(tensors, 4)


@pytest.mark.parametrize(
    ("tensors", "num_classes"),
    [
        ({"crop_stream": tensor((33, 100))}, 1 << 20),
        ({"crop_stream": tensor((1 << 16, 1))}, 513),
        ({"crop_classes": tensor((1 << 16, 1), np.uint16), "crop_probs": tensor((1 << 16, 1), np.float16), "crop_rest": tensor(())}, 513),
    ],
)  # fmt: skip
def test_crops_whose_dense_labels_are_too_large_are_refused_in_both_forms(tensors, num_classes):
    with pytest.raises(LabelMapError, match=f"crops of {num_classes} classes exceed 33554432 crops x classes"):
        check_crops_header(tensors, num_classes)
    assert check_crops_header(tensors, 300) == next(iter(tensors.values())).shape[0]


def test_the_check_of_a_stream_takes_little_more_memory_than_its_symbols():
    num_views, per_view = 4096, 255
    num_symbols = 300 + num_views * (1 + 3 * per_view)
    symbols = bytes(300) + bytes([per_view]) * num_views + bytes(3 * num_views * per_view)
    packed = stream(symbols, counts=(0, 0, num_views * per_view))["crop_stream"].reshape(-1)
    arrays = {"crop_stream": np.zeros((num_views, 3), np.uint8)}
    arrays["crop_stream"].reshape(-1)[: len(packed)] = packed
    tracemalloc.start()
    try:
        check_crops(arrays, 300)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert num_symbols < peak < 4 * num_symbols


def test_more_classes_than_two_bytes_number_are_refused():
    logits = torch.zeros(1, (1 << 16) + 1)
    with pytest.raises(ValueError, match="at most 65536 classes, got 65537: store label maps instead"):
        compress_crops(logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_classes": np.array([[0, 4]], np.uint8)}, "class index 4"),
        ({"crop_classes": np.array([[1, 1]], np.uint8)}, "must differ"),
        ({"crop_probs": np.array([[0.5, np.nan]], np.float16)}, "0 to 1"),
        ({"crop_probs": np.array([[1.5, 0]], np.float16)}, "0 to 1"),
        ({"crop_probs": np.array([[-0.5, 0]], np.float16)}, "0 to 1"),
        ({"crop_rest": np.array(2, np.uint8)}, "crop_rest must be 0 or 1"),
    ],
)
def test_damaged_probabilities_are_refused(changes, message):
    arrays = sparse_crops(np.array([[0, 1]]), np.array([[0.5, 0.25]], np.float16), 4, spread_rest=True)
    with pytest.raises(LabelMapError, match=message):
        check_crops({**arrays, **changes}, 4)


@pytest.mark.parametrize(
    ("classes", "probs", "message"),
    [
        ([[0, 4]], np.zeros((1, 2), np.float32), "0 .. 3"),
        ([[0, 0.5]], np.zeros((1, 2), np.float32), "0 .. 3"),
        ([[0, np.nan]], np.zeros((1, 2), np.float32), "0 .. 3"),
        ([[1, 1]], np.zeros((1, 2), np.float32), "must differ"),
        ([[0, 1]], np.zeros((1, 2)), "float16 or float32"),
        ([[0, 1]], np.zeros((2, 1), np.float32), r"\[N, k\]"),
        ([[0, 1]], np.full((1, 2), 2, np.float32), "0 to 1"),
        ([[0, 1, 2, 3, 0]], np.zeros((1, 5), np.float32), "k of 1 to 4"),
    ],
)
def test_probabilities_that_do_not_fit_are_an_error(classes, probs, message):
    with pytest.raises(ValueError, match=message):
        sparse_crops(np.array(classes), probs, 4, spread_rest=True)


def test_unknown_arrays_are_an_error():
    with pytest.raises(LabelMapError, match="stored crops have the tensors"):
        check_crops_header({"logits": StoredTensor((3,), np.dtype(np.uint8))}, 10)
