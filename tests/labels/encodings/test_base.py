"""What holds for every encoding of the registry."""

import pytest
import torch

import relabel_datasets as rd
from relabel_datasets.labels.encodings import encode_logits

from ..samples import ENCODINGS, HEIGHT, NUM_CLASSES, WIDTH, random_dense


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_all_classes_kept_give_the_dense_logits_back(encoding):
    dense = random_dense()
    label_map = rd.LabelMap.from_logits(dense, encoding, k=NUM_CLASSES)
    torch.testing.assert_close(label_map.dense(), dense, rtol=0, atol=1e-5)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 1, 1), (3, 1, 6)])
def test_no_more_classes_are_kept_than_there_are(encoding, shape):
    dense = random_dense(2, *shape)
    more, all_of_them = (encode_logits(dense, encoding, k) for k in (10, shape[0]))
    for name, tensor in more.tensors.items():
        assert torch.equal(tensor, all_of_them.tensors[name])
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_any_dtype_are_encoded_in_float32(encoding, dtype):
    encoded = encode_logits(random_dense(1, NUM_CLASSES, HEIGHT, WIDTH).to(dtype), encoding)
    assert encoded.logits.dtype == torch.float32
    assert {tensor.dtype for tensor in encoded.tensors.values()} <= {torch.float32, torch.int64}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_batch_is_its_images_one_by_one_and_the_same_on_every_run(encoding):
    dense = random_dense(4, NUM_CLASSES, HEIGHT, WIDTH)
    encoded, again = encode_logits(dense, encoding, 3), encode_logits(dense.clone(), encoding, 3)
    for name, tensor in encoded.tensors.items():
        assert torch.equal(tensor, again.tensors[name])
    for i in range(4):
        single = encode_logits(dense[i : i + 1], encoding, 3)
        for name, tensor in encoded.tensors.items():
            torch.testing.assert_close(single.tensors[name][0], tensor[i], rtol=0, atol=1e-5)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_empty_batch_gives_an_empty_batch(encoding):
    none, one = (encode_logits(random_dense(n, NUM_CLASSES, HEIGHT, WIDTH), encoding, 3) for n in (0, 1))
    for name, tensor in one.tensors.items():
        assert none.tensors[name].shape == (0, *tensor.shape[1:])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_dense_logits_are_not_written_to(encoding):
    dense = random_dense(1, NUM_CLASSES, HEIGHT, WIDTH)
    version = dense._version
    encode_logits(dense, encoding)
    assert dense._version == version


@pytest.mark.parametrize(
    ("dense", "arguments", "message"),
    [
        (torch.zeros(2, 3, 4), (), r"must be \[B, C, H, W\]"),
        (torch.zeros(1, 2, 0, 4), (), "with no empty side"),
        (torch.zeros(1, 2, 3, 4), ("svd",), r"encoding must be one of \['heatmaps', .*'topk'\], got 'svd'"),
        (torch.zeros(1, 2, 3, 4), ("topk", 0), "k must be at least 1, got 0"),
        (torch.full((1, 2, 3, 4), torch.nan), (), "must be finite"),
        (torch.full((1, 2, 3, 4), -torch.inf), ("topk",), "must be finite"),
    ],
)
def test_what_cannot_be_encoded_is_refused(dense, arguments, message):
    with pytest.raises(ValueError, match=message):
        encode_logits(dense, *arguments)
