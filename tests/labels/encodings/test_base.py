"""What holds for every encoding of the registry."""

import copy
import pickle

import pytest
import safetensors.numpy
import torch

import relabel_datasets as rd
from relabel_datasets.labels.encodings import encode_logits, get_encoding

from ..samples import ENCODINGS, HEIGHT, NUM_CLASSES, STORED_FORMS, WIDTH, random_dense


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


@pytest.mark.parametrize(("encoding", "dtype"), STORED_FORMS)
@pytest.mark.parametrize("num_classes", [7, 300, 70000])
def test_the_estimated_size_is_that_of_the_stored_tensors(encoding, dtype, num_classes):
    label_map = rd.LabelMap.from_logits(random_dense(num_classes, 3, 2), encoding, k=5)
    tensors = safetensors.numpy.load(label_map.to_safetensors(dtype))
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert get_encoding(encoding).num_bytes(num_classes, 5, (3, 2), dtype) == size


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_class_logits_are_those_of_the_dense_map(encoding):
    encoded = encode_logits(random_dense(6, NUM_CLASSES, HEIGHT, WIDTH), encoding, 4)
    dense, classes = encoded.encoding.dense(encoded), torch.randint(NUM_CLASSES, (6,))
    got = encoded.encoding.class_logits(encoded, classes)
    torch.testing.assert_close(got, dense[torch.arange(6), classes], rtol=0, atol=1e-5)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_there_is_one_object_of_an_encoding_in_each_process(encoding):
    chosen = get_encoding(encoding)
    assert pickle.loads(pickle.dumps(chosen)) is copy.deepcopy(chosen) is get_encoding(encoding)
    assert chosen.name == encoding
    assert chosen.entry.storage_dtypes[0] == chosen.entry.resolve_storage_dtype(None)
    assert chosen.entry.resolve_k(None) == chosen.entry.default_k
