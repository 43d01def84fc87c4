"""Labels that the C extension pools from stored bytes are those of the decoded tensors, and it accepts what decoding accepts."""

import contextlib
import itertools
import random
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from relabel_datasets.errors import LabelMapError
from relabel_datasets.labels import codec, stored
from relabel_datasets.labels.label_map import LabelMap
from relabel_datasets.labels.reading import read_rows
from relabel_datasets.labels.stored import StoredTensors, pooling_extension
from relabel_datasets.labels.view import View
from tests.labels.samples import GAINS

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
ROUNDING = {"atol": 1e-6, "rtol": 2e-5}


def blobs_of(form, seed=0):
    encoding, dtype, num_classes, k, height, width = form
    torch.manual_seed(seed)
    dense = 4 * torch.randn(BATCH, num_classes, height, width)
    maps = [LabelMap.from_logits(logits, encoding, k=k, canvas_size=(20, 30)) for logits in dense]
    return [label_map.to_safetensors(dtype) for label_map in maps]


def read(blobs):
    """Return the batch of stored label maps, not decoded."""
    batch = read_rows(blobs, [""] * len(blobs), [0] * len(blobs))[0].batch
    assert isinstance(batch.encoded.tensors, StoredTensors)
    return batch


def decoded(batch):
    return replace(batch, encoded=batch.encoded._replace(tensors=dict(batch.encoded.tensors)))


def pool_decoded(batch, temperature=1.0, **options):
    """Pool the decoded tensors in float64. In float32, torch's softmax of 70,000 equal logits is wrong by 1e-4."""
    tensors = {
        name: values.double() if values.is_floating_point() else values
        for name, values in batch.encoded.tensors.items()
    }
    double = replace(batch, encoded=batch.encoded._replace(tensors=tensors))
    return double.pool(1, temperature, **options).float()


@pytest.mark.parametrize("options", [{}, {"temperature": 3}, {"temperature": 0.25}, {"calibrated": True}], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_labels_are_those_of_the_decoded_tensors(form, options):
    batch = replace(read(blobs_of(form)).with_views(VIEWS.values()), calibrations=(GAINS,) * BATCH)
    soft = batch.pool(**options)
    assert batch.encoded.tensors._decoded is None
    assert (soft.dtype, soft.shape, soft.device.type) == (torch.float32, (BATCH, form[2]), "cpu")
    torch.testing.assert_close(soft, pool_decoded(batch, **options), **ROUNDING)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_labels_of_random_crops_are_those_of_the_decoded_tensors(form):
    rng = np.random.default_rng(0)
    batch = read(blobs_of(form))
    for _ in range(20):
        sides, corners = rng.uniform(-1.2, 1.2, (BATCH, 2)), rng.uniform(-0.3, 1.3, (BATCH, 2))
        crops = batch.with_views([View(w, 0.0, x, 0.0, h, y) for (w, h), (x, y) in zip(sides, corners, strict=True)])
        torch.testing.assert_close(crops.pool(), pool_decoded(crops), **ROUNDING)


@pytest.mark.parametrize("output_size", [1, 2, (1, 1)])
def test_rotated_views_and_grids_are_pooled_from_the_decoded_tensors(output_size):
    views = [*list(VIEWS.values())[:-1], View(0.3, 0.1, 0.2, -0.1, 0.3, 0.2)]
    batch = read(blobs_of(FORMS[0])).with_views(views)
    soft = batch.pool(output_size)
    assert torch.equal(soft, decoded(batch).pool(output_size))


@pytest.mark.parametrize(
    ("views", "options"),
    [
        ([View(x0=float("nan"))] * BATCH, {}),
        ([View(xx=float("inf"))] * BATCH, {}),
        ([View(visible_xyxy=(0.0, 0.0, float("nan"), 1.0))] * BATCH, {}),
        ([View()] * (BATCH - 1), {}),
        ([View()] * BATCH, {"temperature": 0.0}),
        ([View()] * BATCH, {"temperature": -1.0}),
        ([View()] * BATCH, {"temperature": float("nan")}),
        ([View()] * BATCH, {"temperature": float("inf")}),
        ([View()] * BATCH, {"temperature": "3"}),
        ([View()] * BATCH, {"calibrated": True}),
    ],
    ids=str,
)
def test_wrong_arguments_raise_the_errors_of_decoded_tensors(views, options):
    batch = read(blobs_of(FORMS[0])).with_views(views)
    with pytest.raises((ValueError, TypeError)) as expected:
        decoded(batch).pool(**options)
    with pytest.raises(expected.type) as error:
        batch.pool(**options)
    assert str(error.value) == str(expected.value)


def test_a_view_of_a_thousand_images_is_a_mean_over_the_visible_part():
    view = View(1000.0, 0.0, -500.0, 0.0, 1000.0, -500.0, (-1e9, -1e9, 1e9, 1e9))
    batch = read(blobs_of(FORMS[0])).with_views([view] * BATCH)
    torch.testing.assert_close(batch.pool(), pool_decoded(batch), **ROUNDING)


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
    blobs = blobs_of(FORMS[0])
    soft = read(blobs).with_views(VIEWS.values()).pool()
    monkeypatch.setattr(stored, "pooling_extension", lambda: None)
    batch = read_rows(blobs, [""] * BATCH, [0] * BATCH)[0].batch
    assert type(batch.encoded.tensors) is dict
    torch.testing.assert_close(batch.with_views(VIEWS.values()).pool(), soft, **ROUNDING)


def test_the_extension_refuses_what_does_not_fit_together():
    blobs = tuple(blobs_of(FORMS[0]))
    form, extension = read(blobs).encoded.tensors._form, pooling_extension()
    views, divisors = tuple(VIEWS.values()), np.ones(BATCH).tobytes()
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
    for wrong in ((views[:-1], divisors), (views, divisors[:-8]), ((), b""), (list(views), divisors)):
        with pytest.raises(ValueError, match="one view and one divisor"):
            extension.pool(blobs, form, *wrong)
    for wrong in ((), (1.0,) * 9, (1.0,) * 11, (*views[0][:6], (1.0,) * 5), (*views[0][:6], 1.0), None):
        with pytest.raises(ValueError, match="wrong number"):
            extension.pool(blobs, form, (*views[:-1], wrong), divisors)
    with pytest.raises(TypeError):
        extension.pool(blobs, form, (*views[:-1], ("text",) * 10), divisors)


def test_threads_pool_at_the_same_time():
    batch = read(blobs_of(FORMS[0])).with_views(VIEWS.values())
    expected, results = batch.pool(), {}

    def work(number):
        results[number] = all(torch.equal(batch.pool(), expected) for _ in range(50))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(4), True)
