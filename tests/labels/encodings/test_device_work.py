"""How much an encoding computes on the device of the annotator, and how often the builder waits for it."""

import hashlib

import numpy as np
import pytest
import torch

from relabel_datasets.devices import copy_to_cpu
from relabel_datasets.labels import codec
from relabel_datasets.labels.encodings import Encoded, base, encode_logits, encode_to_cpu, get_encoding
from relabel_datasets.labels.statistics import crop_fidelity, image_statistics

from ..device_work import DeviceWork
from ..samples import ENCODINGS, HEIGHT, NUM_CLASSES, SPARSE, STORED_FORMS, WIDTH, random_dense

MAX_OPERATIONS = 60
SHAPE = (4, NUM_CLASSES, HEIGHT, WIDTH)
SIZES = [(17, 11)] * SHAPE[0]


@pytest.mark.parametrize(("encoding", "dtype"), STORED_FORMS)
def test_a_batch_takes_few_operations_on_the_device_and_one_wait(encoding, dtype, monkeypatch):
    copies = []

    def copy(tensors):
        copies.append(list(tensors))
        want = encode_logits(random_dense(*SHAPE), encoding, 3).tensors
        assert {name: tensor.shape for name, tensor in tensors.items() if name in want} == {
            name: tensor.shape for name, tensor in want.items()
        }
        return {name: want.get(name, torch.tensor(True)) for name in tensors}

    monkeypatch.setattr(base, "copy_to_cpu", copy)
    with DeviceWork() as work, torch.no_grad():  # in inference mode, operations are not split into their parts
        encoded = encode_to_cpu(torch.empty(*SHAPE, device="meta"), encoding, 3)
        blobs = codec.encode(encoded, SIZES, dtype)
        statistics = image_statistics(encoded, [0] * len(blobs))
    assert statistics.shown >= 0
    assert len(blobs) == SHAPE[0]
    assert len(copies) == 1
    assert 0 < work.operations.total() + len(copies[0]) <= MAX_OPERATIONS


def test_work_on_a_device_is_counted_and_waits_are_errors():
    with DeviceWork() as work:
        values = torch.zeros(3, device="meta")
        doubled = 2 * values[1:]
        assert torch.ones(3).sum() == 3  # on the CPU
    assert dict(work.operations) == {"aten.zeros.default": 1, "aten.mul.Tensor": 1}
    for wait in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.nonzero, lambda tensor: tensor.sum().item()):
        with pytest.raises((RuntimeError, NotImplementedError, TypeError), match=r"(?i)meta"):
            wait(doubled)
    with pytest.raises(NotImplementedError, match=r"(?i)meta"):
        copy_to_cpu({"values": doubled})


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encoding_for_the_cpu_gives_and_refuses_the_same(encoding):
    dense = random_dense(*SHAPE)
    got, want = encode_to_cpu(dense, encoding, 3), encode_logits(dense, encoding, 3)
    assert got.tensors.keys() == want.tensors.keys()
    assert all(torch.equal(got.tensors[name], want.tensors[name]) for name in want.tensors)
    for value in (torch.nan, torch.inf, -torch.inf):
        dense[1, 2, 3, 4] = value
        with pytest.raises(ValueError, match="dense logits must be finite"):
            encode_to_cpu(dense, encoding, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("encoding", "dtype"), STORED_FORMS)
def test_a_gpu_is_waited_for_by_its_event_only(encoding, dtype):
    dense = random_dense(*SHAPE)
    want = encode_logits(dense, encoding, 3)
    on_gpu = dense.cuda()
    encode_to_cpu(on_gpu, encoding, 3)  # libraries may wait while they start
    torch.cuda.set_sync_debug_mode("error")
    try:
        encoded = encode_to_cpu(on_gpu, encoding, 3)
        blobs = codec.encode(encoded, SIZES, dtype)
        image_statistics(encoded, [0] * len(blobs))
        fidelity = crop_fidelity(on_gpu, blobs, SIZES, np.random.default_rng(0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert fidelity.crops == SHAPE[0]
    for name, tensor in encoded.tensors.items():
        assert tensor.is_pinned()
        torch.testing.assert_close(tensor, want.tensors[name], rtol=1e-3, atol=1e-3)


# Digests of the bytes that the first version stored for `encoded_of_numbers`.
DIGESTS = {
    ("heatmaps", "uint4"): "e57ab4b46161eee40254532c3123a2d0f16404d63e2ac4786fac529c3dbd0d59",
    ("heatmaps", "uint8"): "fced2cae8a99e36e399331c5c61e7fafa174b2d30909ca6bb61177263aef3507",
    ("heatmaps", "float16"): "0a80b8cd3abd939a240ff00c3fd0feebaa3ceb187c8ddf155f3f50601e37cd58",
    ("topk", "float16"): "99d79fa082b02d76b20688460d7a28c49bf03fbfc6d3051ff1276b46f64e4daa",
    ("topk", "uint8"): "1fe3ad50475c27f4aaf9e6ed13d276794ae6256e96b48353741134b8d809452c",
}
STORED_SHAPES = [  # images, classes, classes kept, height, width
    (3, 13, 3, 7, 5), (2, 300, 10, 15, 15), (2, 9, 9, 1, 8), (1, 40, 5, 9, 1), (2, 6, 2, 1, 1), (1, 70000, 4, 4, 6)
]  # fmt: skip


def encoded_of_numbers(encoding, batch, num_classes, k, height, width):
    """Return encoded logits with the same bits on every machine, one heatmap of them constant."""
    rng = np.random.default_rng(batch * num_classes + height)
    logits = (rng.random((batch, k, height, width), np.float32) - np.float32(0.5)) * np.float32(24)
    logits[0, -1] = 2.5
    grid = (height, width) if encoding == "topk" else (1, 1)
    classes = rng.random((batch, num_classes, *grid), np.float32).argsort(1)[:, :k]
    tensors = {"logits": torch.from_numpy(logits), "classes": torch.from_numpy(classes)}
    if encoding == "heatmaps":
        base_logits = (rng.random((batch, num_classes), np.float32) - np.float32(0.7)) * np.float32(9)
        tensors["base"] = torch.from_numpy(base_logits)
    return Encoded(get_encoding(encoding), tensors, num_classes)


@pytest.mark.parametrize("form", [form for form in STORED_FORMS if form[0] in SPARSE], ids="-".join)
def test_stored_bytes_never_change(form):
    encoding, dtype = form
    digest = hashlib.sha256()
    for shape in STORED_SHAPES:
        for blob in codec.encode(encoded_of_numbers(encoding, *shape), [(17, 11)] * shape[0], dtype):
            digest.update(blob)
    assert digest.hexdigest() == DIGESTS[form]
