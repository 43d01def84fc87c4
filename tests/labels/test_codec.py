import hashlib
import os
import struct
import subprocess
import sys

import pytest
import safetensors
import safetensors.numpy
import torch

import relabel_datasets as rd
from relabel_datasets.labels import codec
from relabel_datasets.labels.batch import LabelMapBatch
from relabel_datasets.labels.encodings import Encoded, get_encoding
from relabel_datasets.labels.encodings.levels import BITS
from relabel_datasets.labels.reading import read_labels

from .samples import (
    ENCODINGS,
    HEIGHT,
    SPARSE,
    STORED_FORMS,
    WIDTH,
    assert_same_map,
    random_classes,
    random_dense,
    stored_map,
)

SPARSE_FORMS = [form for form in STORED_FORMS if form[0] in SPARSE]

# Golden bytes. 4 classes, a 1x3 map, a 20x30 image; the values are such that every level is exact.
# Halves: 0 0000, 1 3C00, 2 4000, 3 4200, 6 4600, 14 4B00, 15 4B80, 30 4F80, 255 5BF8, 510 5FF8, -1 BC00, 254 5BF0.


def tiny_heatmaps(first, second, base):
    logits = torch.tensor([[first], [second]], dtype=torch.float32)
    return rd.LabelMap(logits, "heatmaps", classes=[[[2]], [[0]]], base=base, num_classes=4, canvas_size=(20, 30))


def tiny_topk(first, second):
    logits = torch.tensor([[first], [second]], dtype=torch.float32)
    return rd.LabelMap(logits, "topk", classes=[[[2, 0, 1]], [[0, 3, 2]]], num_classes=4, canvas_size=(20, 30))


def header(*tensors: str) -> str:
    return (
        r'{"__metadata__":{"relabel":"{\"canvas\":[20,30],\"num_classes\":4,\"version\":1}"},' + ",".join(tensors) + "}"
    )


GOLDEN = {
    "heatmaps uint4": (
        tiny_heatmaps([0, 5, 15], [30, 6, 0], [9, -1, 9, 14]),
        "uint4",
        header(
            '"ranges":{"dtype":"F16","shape":[3,2],"data_offsets":[0,12]}',
            '"base":{"dtype":"U8","shape":[2],"data_offsets":[12,14]}',
            '"classes":{"dtype":"U8","shape":[2],"data_offsets":[14,16]}',
            '"logits":{"dtype":"U8","shape":[1,1,3],"data_offsets":[16,19]}',
        ),
        "0000 804b  0000 804f  00bc 004b"  # 0..15 of class 2, 0..30 of class 0, -1..14 of the base
        "00 f0"  # levels of classes 0 and 2, which have heatmaps, then 1 (lowest) and 3 (highest)
        "02 00"
        "f0 35 0f",  # class 2: 0, 5, 15 in the low halves; class 0: 15, 3, 0 in the high
    ),
    "heatmaps uint8": (
        tiny_heatmaps([0, 51, 255], [510, 2, 0], [9, -1, 9, 254]),
        "uint8",
        header(
            '"ranges":{"dtype":"F16","shape":[3,2],"data_offsets":[0,12]}',
            '"base":{"dtype":"U8","shape":[4],"data_offsets":[12,16]}',
            '"classes":{"dtype":"U8","shape":[2],"data_offsets":[16,18]}',
            '"logits":{"dtype":"U8","shape":[2,1,3],"data_offsets":[18,24]}',
        ),
        "0000 f85b  0000 f85f  00bc f05b  00 00 00 ff  02 00  00 33 ff  ff 01 00",
    ),
    "heatmaps float16": (
        tiny_heatmaps([0, 1, 15], [30, 6, 0], [1, -1, 2, 254]),
        "float16",
        header(
            '"base":{"dtype":"F16","shape":[4],"data_offsets":[0,8]}',
            '"logits":{"dtype":"F16","shape":[2,1,3],"data_offsets":[8,20]}',
            '"classes":{"dtype":"U8","shape":[2],"data_offsets":[20,22]}',
        ),
        "003c 00bc 0040 f05b  0000 003c 804b  804f 0046 0000  02 00",
    ),
    "topk uint8": (
        tiny_topk([0, 51, 255], [510, 2, 0]),
        "uint8",
        header(
            '"ranges":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]}',
            '"classes":{"dtype":"U8","shape":[2,1,3],"data_offsets":[8,14]}',
            '"logits":{"dtype":"U8","shape":[2,1,3],"data_offsets":[14,20]}',
        ),
        "0000 f85b  0000 f85f  02 00 01  00 03 02  00 33 ff  ff 01 00",
    ),
    "topk float16": (
        tiny_topk([30, 15, 6], [3, 2, -1]),
        None,
        header(
            '"logits":{"dtype":"F16","shape":[2,1,3],"data_offsets":[0,12]}',
            '"classes":{"dtype":"U8","shape":[2,1,3],"data_offsets":[12,18]}',
        ),
        "804f 804b 0046  0042 0040 00bc  02 00 01  00 03 02",
    ),
}


@pytest.mark.parametrize(("label_map", "dtype", "head", "data"), GOLDEN.values(), ids=GOLDEN)
def test_golden_bytes_and_back(label_map, dtype, head, data):
    padded = head + " " * (-len(head) % 8)
    golden = struct.pack("<Q", len(padded)) + padded.encode() + bytes.fromhex(data)
    assert label_map.to_safetensors(dtype) == golden
    back = rd.LabelMap.from_safetensors(golden)
    assert torch.equal(back.logits, label_map.logits)
    assert torch.equal(back.classes, label_map.classes)
    assert (back.encoding, back.num_classes, back.canvas_size) == (label_map.encoding, 4, (20, 30))
    if label_map.encoding == "heatmaps":
        assert torch.equal(back.base[[1, 3]], label_map.base[[1, 3]])
        # of a class with a heatmap it is the heatmap's mean, whatever was given
        torch.testing.assert_close(back.base[[2, 0]], label_map.logits.mean((1, 2)))


def test_maps_read_at_once_are_those_read_by_themselves():
    torch.manual_seed(0)
    blobs = [stored_map(*form, canvas_size=size) for size in [(9, 99), (1234, 5)] for form in STORED_FORMS * 2]
    blobs = [blobs[i] for i in torch.randperm(len(blobs)).tolist()]
    keys, labels = [f"image {i}" for i in range(len(blobs))], [*range(len(blobs))]
    for blob, key, label, found in zip(blobs, keys, labels, read_labels(blobs, keys, labels), strict=True):
        expected = rd.LabelMap.from_safetensors(blob, key=key, label=label)
        assert_same_map(found, expected)
        assert torch.equal(found.dense(), expected.dense())


def hashes() -> str:
    torch.manual_seed(0)
    return " ".join(hashlib.sha256(stored_map(*form)).hexdigest() for form in STORED_FORMS)


@pytest.mark.slow  # in every run, the golden bytes are those of another process
def test_equal_maps_have_equal_bytes_in_another_process():
    command = [sys.executable, "-c", "from tests.labels.test_codec import hashes; print(hashes())"]
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == hashes()


@pytest.mark.parametrize(
    ("num_classes", "id_dtype"),
    [(2, "U8"), (255, "U8"), (256, "U8"), (257, "U16"), (1000, "U16"), (21841, "U16"), (65536, "U16"), (70000, "U32")],
)
@pytest.mark.parametrize(("encoding", "dtype"), SPARSE_FORMS)
def test_round_trip_with_the_narrowest_class_ids(num_classes, id_dtype, encoding, dtype):
    k, size = min(3, num_classes), (3, 2)
    grid = (1, 1) if encoding == "heatmaps" else size
    classes = random_classes(k, num_classes, *grid)
    classes[0] += num_classes - 1 - classes[0].max()  # the highest index, which needs all bits
    classes[1:] %= num_classes - 2 if num_classes > 3 else num_classes
    if k == 2:
        classes[1] = 1 - classes[0]
    elif k == 3:
        classes[2] = (classes[1] + 1) % (num_classes - 2)
    tensors = {"classes": classes, **({"base": random_dense(num_classes)} if encoding == "heatmaps" else {})}
    label_map = rd.LabelMap(random_dense(k, *size), encoding, num_classes=num_classes, canvas_size=(4, 5), **tensors)
    blob = label_map.to_safetensors(dtype)
    assert dict(safetensors.deserialize(blob))["classes"]["dtype"] == id_dtype
    back = rd.LabelMap.from_safetensors(blob, key="a", label=1)
    assert (back.num_classes, back.canvas_size, back.key, back.label) == (num_classes, (4, 5), "a", 1)
    assert back.view == rd.labels.View()
    assert torch.equal(back.classes, classes)
    assert (back.dtype, back.classes.dtype, back.encoding) == (torch.float32, torch.int64, encoding)


@pytest.mark.parametrize(("encoding", "dtype"), SPARSE_FORMS)
@pytest.mark.parametrize("k", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (1, 1), (1, 6)])
def test_what_is_read_differs_by_no_more_than_the_rounding(encoding, dtype, k, size):
    label_map = rd.LabelMap.from_logits(random_dense(13, *size), encoding, k=k)
    back = rd.LabelMap.from_safetensors(label_map.to_safetensors(dtype))
    assert torch.equal(back.classes, label_map.classes)
    error = (back.logits - label_map.logits).abs()
    if dtype == "float16":
        assert (error <= label_map.logits.abs() * 2**-11).all()
        return
    # ranges are rounded outwards to float16, by at most 2^-10 of the larger end
    spread = label_map.logits.flatten(1).amax(1) - label_map.logits.flatten(1).amin(1)
    spread = spread + label_map.logits.flatten(1).abs().amax(1) * 2**-9
    step = (spread / 2 ** BITS[dtype])[:, None, None] * 1.1 + 1e-6
    assert (error <= (step / 2 if encoding == "topk" else step)).all()  # dithering moves by half a step more
    if encoding == "heatmaps":
        rest = torch.ones(13, dtype=torch.bool)
        rest[label_map.classes.flatten()] = False
        others = label_map.base[rest]
        step = (others.max() - others.min() + others.abs().max() * 2**-9) / 2 ** BITS[dtype] * 1.1 + 1e-6
        assert (back.base[rest] - others).abs().max() <= step / 2


def test_dithering_keeps_the_mean_of_four_bit_heatmaps():
    label_map = rd.LabelMap.from_logits(random_dense(13, 15, 15))
    back = rd.LabelMap.from_safetensors(label_map.to_safetensors("uint4"))
    step = (label_map.logits.flatten(1).amax(1) - label_map.logits.flatten(1).amin(1)) / 15
    assert ((back.logits - label_map.logits).mean((1, 2)).abs() < step / 30).all()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_was_read_from_float16_is_stored_again_without_loss(encoding):
    blob = stored_map(encoding, "float16")
    first = rd.LabelMap.from_safetensors(blob)
    again = rd.LabelMap.from_safetensors(first.to_safetensors("float16"))
    assert_same_map(again, first)


@pytest.mark.parametrize(("encoding", "dtype"), STORED_FORMS)
def test_safetensors_itself_opens_what_is_stored(encoding, dtype):
    blob = stored_map(encoding, dtype)
    tensors = safetensors.numpy.load(blob)
    assert set(tensors) == {name for name, _ in safetensors.deserialize(blob)}
    stored, optional = get_encoding(encoding).stored_tensors, get_encoding(encoding).optional_tensors
    assert set(stored) - set(optional) <= set(tensors) <= set(stored)


@pytest.mark.parametrize("side", [1, 9999])
def test_a_15x15x1000_map_of_10_heatmaps_takes_at_most_2048_bytes(side):
    label_map = rd.LabelMap.from_logits(random_dense(1000, 15, 15), k=10, canvas_size=(side, side))
    assert len(label_map.to_safetensors()) <= 2048


def test_a_batch_is_stored_as_its_maps_one_by_one():
    maps = [rd.LabelMap.from_logits(random_dense(), k=3, canvas_size=(4 + i, 9)) for i in range(3)]
    batch = LabelMapBatch.of(maps)
    assert codec.encode(batch.encoded, [m.canvas_size for m in maps]) == [m.to_safetensors() for m in maps]


def test_reading_gives_memory_of_its_own():
    blob = stored_map()
    rd.LabelMap.from_safetensors(blob).logits.zero_()
    assert rd.LabelMap.from_safetensors(blob).logits.abs().max() > 0


def encoded(name="heatmaps", num_classes=5, **changes) -> Encoded:
    logits, first = torch.zeros(1, 2, 3, 4), torch.arange(2).reshape(1, 2, 1, 1)
    tensors = {"heatmaps": {"classes": first, "base": torch.zeros(1, 5)}, "topk": {"classes": first.expand(1, 2, 3, 4)}}
    return Encoded(get_encoding(name), {"logits": logits, **tensors[name], **changes}, num_classes)


def indices(*classes) -> torch.Tensor:
    return torch.tensor(classes).reshape(1, -1, 1, 1)


@pytest.mark.parametrize(
    ("wrong", "canvas_sizes", "dtype", "message"),
    [
        (encoded(), [(1, 1)], "int8", "storage_dtype must be one of 'uint4', .* for heatmaps maps, got 'int8'"),
        (encoded("topk"), [(1, 1)], "uint4", "must be one of 'float16', 'uint8' for topk maps, got 'uint4'"),
        (encoded(), [(0, 1)], None, "canvas sizes of positive height and width"),
        (encoded(), [(1, 2**31)], None, "canvas sizes must be at most"),
        (encoded(), [], None, "expected 1 canvas sizes"),
        (encoded(classes=indices(0, 5)), [(1, 1)], None, "must be in 0 .. 4"),
        (encoded(classes=indices(0, -1)), [(1, 1)], None, "must be in 0 .. 4"),
        (encoded(classes=indices(3, 3)), [(1, 1)], None, "must differ"),
        (encoded("topk", classes=torch.zeros(1, 2, 3, 4).long()), [(1, 1)], None, "must differ"),
        (encoded(num_classes=1), [(1, 1)], None, "has 2 to"),
        (encoded(num_classes=2**20, logits=torch.zeros(1, 2, 8, 8)), [(1, 1)], None, "at most 33554432 classes x loc"),
        (encoded(classes=encoded("topk").tensors["classes"]), [(1, 1)], None, "stored heatmaps maps have logits"),
        (
            encoded("topk", classes=indices(0, 1)),
            [(1, 1)],
            None,
            r"topk maps have logits .* and classes \(2, 3, 4\), got",
        ),
        (encoded(logits=torch.zeros(1, 0, 3, 4), classes=torch.zeros(1, 0, 1, 1).long()), [(1, 1)], None, "K, H"),
        (encoded(logits=torch.full((1, 2, 3, 4), torch.nan)), [(1, 1)], None, "logits must be finite"),
        (encoded(base=torch.full((1, 5), 65505.0)), [(1, 1)], None, "base must be finite and within float16"),
        (encoded(base=torch.zeros(1, 4)), [(1, 1)], None, r"base must have shape \(5,\), got \(4,\)"),
    ],
)
def test_what_could_not_be_read_back_is_not_stored(wrong, canvas_sizes, dtype, message):
    with pytest.raises(ValueError, match=message):
        codec.encode(wrong, canvas_sizes, dtype)
