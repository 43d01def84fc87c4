"""Labels that the C extension pools from stored bytes are those of the decoded tensors, and it accepts what decoding accepts."""

import contextlib
import itertools
import random
import threading

import numpy as np
import pytest
import torch

from relabel_datasets.errors import LabelMapError
from relabel_datasets.labels import codec, stored
from relabel_datasets.labels.encodings.base import Encoded
from relabel_datasets.labels.label_map import LabelMap
from relabel_datasets.labels.stored import StoredTensors, pooling_extension
from relabel_datasets.labels.view import View, to_rows

if pooling_extension() is None:
    pytest.skip("the C extension was not built", allow_module_level=True)

# Encoding, storage dtype, classes, K, height, width.
FORMS = [
    ("heatmaps", "uint4", 1000, 10, 15, 15), ("heatmaps", "uint4", 9, 3, 4, 7), ("heatmaps", "uint4", 300, 1, 1, 1),
    ("heatmaps", "uint4", 2, 2, 3, 1), ("heatmaps", "uint8", 70_000, 7, 5, 3), ("heatmaps", "uint8", 11, 11, 2, 6),
    ("heatmaps", "float16", 257, 10, 9, 9), ("heatmaps", "float16", 5, 2, 1, 4), ("topk", "float16", 1000, 5, 15, 15),
    ("topk", "float16", 7, 7, 2, 3), ("topk", "uint8", 70_000, 3, 4, 5), ("topk", "uint8", 3, 2, 1, 1),
]  # fmt: skip
VIEWS = {
    "the whole image": View(),
    "a crop": View(0.31, 0.0, 0.42, 0.0, 0.57, 0.13),
    "a mirrored crop": View(-0.31, 0.0, 0.73, 0.0, -0.57, 0.7),
    "a tiny crop": View(1e-4, 0.0, 0.5, 0.0, 1e-4, 0.5),
    "a point": View(0.0, 0.0, 0.4, 0.0, 0.0, 0.7),
    "a line": View(0.5, 0.0, 0.25, 0.0, 0.0, 1.0),
    "a padded image": View(1.6, 0.0, -0.3, 0.0, 2.0, -0.5),
    "a crop after a translation": View(0.6, 0.0, 0.3, 0.0, 0.6, 0.1, (0.4, 0.2, 0.8, 0.6)),
    "nothing of the image": View(0.5, 0.0, 1.2, 0.0, 0.5, 0.2),
    "nothing that is visible": View(0.5, 0.0, 0.0, 0.0, 0.5, 0.0, (0.6, 0.6, 0.9, 0.9)),
}


BATCH = len(VIEWS)


def blobs_of(form, seed=0):
    encoding, dtype, num_classes, k, height, width = form
    torch.manual_seed(seed)
    dense = 4 * torch.randn(BATCH, num_classes, height, width)
    maps = [LabelMap.from_logits(logits, encoding, k=k, canvas_size=(20, 30)) for logits in dense]
    return [label_map.to_safetensors(dtype) for label_map in maps]


def read(blobs):
    (decoded,) = codec.decode(blobs)
    assert isinstance(decoded.content, StoredTensors)
    return Encoded(decoded.encoding, decoded.content, decoded.num_classes)


def pool_decoded(encoded, views, divisor=1.0):
    """Pool the decoded tensors in float64. In float32, torch's softmax of 70,000 equal logits is wrong by 1e-4."""
    double = {
        name: values.double() if values.is_floating_point() else values for name, values in encoded.tensors.items()
    }
    return encoded.encoding.pool(encoded._replace(tensors=double), views, 1, divisor).float()


@pytest.mark.parametrize("divisor", [1.0, 3, 0.25, np.linspace(0.5, 4, BATCH).reshape(BATCH, 1, 1)], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_labels_are_those_of_the_decoded_tensors(form, divisor):
    encoded, views = read(blobs_of(form)), to_rows(list(VIEWS.values()))
    soft = encoded.encoding.pool(encoded, views, 1, divisor)
    assert encoded.tensors._decoded is None
    assert (soft.dtype, soft.shape, soft.device.type) == (torch.float32, (BATCH, form[2]), "cpu")
    torch.testing.assert_close(soft, pool_decoded(encoded, views, divisor), atol=1e-6, rtol=2e-5)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_labels_of_random_crops_are_those_of_the_decoded_tensors(form):
    rng = np.random.default_rng(0)
    encoded = read(blobs_of(form))
    for _ in range(20):
        sides, corners = rng.uniform(-1.2, 1.2, (BATCH, 2)), rng.uniform(-0.3, 1.3, (BATCH, 2))
        views = to_rows([View(w, 0.0, x, 0.0, h, y) for (w, h), (x, y) in zip(sides, corners, strict=True)])
        soft = encoded.encoding.pool(encoded, views)
        torch.testing.assert_close(soft, pool_decoded(encoded, views), atol=1e-6, rtol=2e-5)


@pytest.mark.parametrize("output_size", [1, 2, (1, 1)])
def test_rotated_views_and_grids_are_pooled_from_the_decoded_tensors(output_size):
    encoded = read(blobs_of(FORMS[0]))
    views = [*list(VIEWS.values())[:-1], View(0.3, 0.1, 0.2, -0.1, 0.3, 0.2)]
    soft = encoded.encoding.pool(encoded, to_rows(views), output_size)
    expected = encoded._replace(tensors=dict(encoded.tensors))
    assert torch.equal(soft, expected.encoding.pool(expected, to_rows(views), output_size))


@pytest.mark.parametrize(
    ("views", "divisor"),
    [
        ([View(x0=float("nan"))] * BATCH, 1.0),
        ([View(xx=float("inf"))] * BATCH, 1.0),
        ([View()] * (BATCH - 1), 1.0),
        ([View()] * BATCH, 0.0),
        ([View()] * BATCH, -1.0),
        ([View()] * BATCH, float("nan")),
    ],
    ids=str,
)
def test_wrong_arguments_raise_the_errors_of_decoded_tensors(views, divisor):
    encoded, rows = read(blobs_of(FORMS[0])), to_rows(views)
    with pytest.raises(ValueError, match=r"\w") as expected:
        pool_decoded(encoded, rows, divisor)
    with pytest.raises(ValueError, match=r"\w") as error:
        encoded.encoding.pool(encoded, rows, 1, divisor)
    assert str(error.value) == str(expected.value)


def test_a_view_of_a_thousand_images_is_a_mean_over_the_visible_part():
    encoded = read(blobs_of(FORMS[0]))
    views = to_rows([View(1000.0, 0.0, -500.0, 0.0, 1000.0, -500.0, (-1e9, -1e9, 1e9, 1e9))] * BATCH)
    torch.testing.assert_close(
        encoded.encoding.pool(encoded, views), pool_decoded(encoded, views), atol=1e-6, rtol=2e-5
    )


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_extension_accepts_the_values_that_can_be_decoded(form, monkeypatch):
    blob = blobs_of(form)[0]
    layout = codec._parse_header(blob[8 : 8 + int.from_bytes(blob[:8], "little")])[0]
    rng, start = random.Random(0), 8 + int.from_bytes(blob[:8], "little")
    monkeypatch.setattr(stored, "pooling_extension", lambda: None)
    outcomes = set()
    for _ in range(60):
        damaged = bytearray(blob)
        for _ in range(rng.choice([1, 3, 30])):
            damaged[rng.randrange(start, len(blob))] = rng.choice([0, 1, 124, 255])
        try:
            codec.decode([bytes(damaged)])
            can_decode = True
        except LabelMapError:
            can_decode = False
        assert pooling_extension().check((blob, bytes(damaged)), layout.form) == can_decode
        outcomes.add(can_decode)
    assert True in outcomes


def test_without_the_extension_label_maps_are_decoded_when_they_are_read(monkeypatch):
    blobs, views = blobs_of(FORMS[0]), to_rows(list(VIEWS.values()))
    soft = read(blobs).encoding.pool(read(blobs), views)
    monkeypatch.setattr(stored, "pooling_extension", lambda: None)
    (decoded,) = codec.decode(blobs)
    assert type(decoded.content) is dict
    encoded = Encoded(decoded.encoding, decoded.content, decoded.num_classes)
    torch.testing.assert_close(encoded.encoding.pool(encoded, views), soft, atol=1e-6, rtol=2e-5)


def test_the_extension_refuses_what_does_not_fit_together():
    blobs = tuple(blobs_of(FORMS[0]))
    form, extension = read(blobs).tensors._form, pooling_extension()
    views, divisors = bytes(80 * BATCH), np.ones(BATCH).tobytes()
    for name, value in itertools.product(form._fields, (-1, 0, 3, 7, 1 << 20, 1 << 31, 1 << 62)):
        if name in ("is_topk", "bits") and value > 100:
            continue
        other = form._replace(**{name: value})
        with contextlib.suppress(ValueError):  # some are layouts of other values in the same bytes
            extension.check(blobs, other)
            extension.pool(blobs, other, views, divisors)
    for wrong in (form[:-1], (*form, 1), None, 5):
        with pytest.raises(TypeError):
            extension.check(blobs, wrong)
    for wrong in (list(blobs), (*blobs[:-1], "text"), (*blobs[:-1], None)):
        with pytest.raises(TypeError):
            extension.check(wrong, form)
    for wrong in ((*blobs[:-1], blobs[0][:-1]), (*blobs[:-1], b"")):
        with pytest.raises(ValueError, match="length"):
            extension.check(wrong, form)
    for wrong in ((views[:-1], divisors), (views, divisors[:-8]), (b"", b"")):
        with pytest.raises(ValueError, match="one view and one divisor"):
            extension.pool(blobs, form, *wrong)


def test_threads_pool_at_the_same_time():
    encoded, views = read(blobs_of(FORMS[0])), to_rows(list(VIEWS.values()))
    expected, results = encoded.encoding.pool(encoded, views), {}

    def work(number):
        results[number] = all(torch.equal(encoded.encoding.pool(encoded, views), expected) for _ in range(50))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(4), True)
