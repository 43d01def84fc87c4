"""What is not a label map is refused, by name and never by another error."""

import json
import pickle

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch.utils.data import DataLoader

import relabel_datasets as rd
from relabel_datasets.labels import codec
from relabel_datasets.labels.reading import read_labels

from .samples import STORED_FORMS, stored_map


def split(blob: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(blob[:8], "little")
    return json.loads(blob[8 : 8 + length]), blob[8 + length :]


def join(head: object, data: bytes) -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + data


def with_header(change, encoding="heatmaps", dtype=None) -> bytes:
    head, data = split(stored_map(encoding, dtype))
    return join(change(head) or head, data)


def with_metadata(**changes) -> bytes:
    def change(head):
        metadata = json.loads(head["__metadata__"]["relabel"])
        metadata.update(changes)
        head["__metadata__"]["relabel"] = json.dumps({k: v for k, v in metadata.items() if v is not None})

    return with_header(change)


def with_tensor(name: str, encoding="heatmaps", stored_as=None, /, **fields) -> bytes:
    return with_header(lambda head: head[name].update(fields), encoding, stored_as)


def with_values(name: str, values, encoding="heatmaps", dtype=None) -> bytes:
    """Return a stored map whose tensor begins with other values."""
    head, data = split(stored_map(encoding, dtype))
    begin = head[name]["data_offsets"][0]
    new = np.array(values, {"U8": np.uint8, "F16": np.float16}[head[name]["dtype"]]).tobytes()
    return join(head, data[:begin] + new + data[begin + len(new) :])


def with_extra_tensor() -> bytes:
    head, data = split(stored_map())
    head["extra"] = {"dtype": "U8", "shape": [1], "data_offsets": [len(data), len(data) + 1]}
    return join(head, data + b"\0")


def empty_topk(num_classes: int, k: int = 1, height: int = 1, width: int = 1) -> bytes:
    """Return a topk map of zeros."""
    ids = "U8" if num_classes <= 256 else "U16" if num_classes <= 65536 else "U32"
    count, size = k * height * width, {"U8": 1, "U16": 2, "U32": 4}[ids]
    metadata = {"canvas": [4, 4], "num_classes": num_classes, "version": 1}
    head = {
        "__metadata__": {"relabel": json.dumps(metadata)},
        "classes": {"dtype": ids, "shape": [k, height, width], "data_offsets": [0, size * count]},
        "logits": {"dtype": "F16", "shape": [k, height, width], "data_offsets": [size * count, (size + 2) * count]},
    }
    return join(head, bytes((size + 2) * count))


TWICE = json.dumps({"__metadata__": {"relabel": '{"num_classes": 3, "num_classes": 4}'}}).encode()

DAMAGED = {
    "nothing": (b"", "0 bytes are not a whole safetensors file"),
    "no header": (b"\0" * 8, "not the header of a label map"),
    "huge header length": (b"\xff" * 8 + stored_map()[8:], "not a whole safetensors file"),
    "header longer than any label map's": (join(b" " * 5000, b""), "not a whole safetensors file"),
    "a byte too many": (stored_map() + b"\0", "truncated or damaged"),
    "header not UTF-8": (join(b"\x80\x81\x82", b""), "not the header of a label map: 'utf-8' codec"),
    "header not JSON": (join(b"{canvas}", b""), "not the header of a label map: Expecting property name"),
    "header nested too deep": (join(b"[" * 4000, b""), "nested too deeply"),
    "header a list": (join([], b""), "not the header of a label map"),
    "header a string": (join("relabel", b""), "not the header of a label map"),
    "header a number": (join(1, b""), "not the header of a label map"),
    "other safetensors": (safetensors.numpy.save({"a": np.zeros(3)}), "__metadata__ must be a dict, got None"),
    "other metadata": (safetensors.numpy.save({"a": np.zeros(3)}, {"format": "np"}), "__metadata__.relabel is missing"),
    "metadata null": (
        with_header(lambda head: {**head, "__metadata__": None}),
        "__metadata__ must be a dict, got None",
    ),
    "metadata not JSON": (with_header(lambda h: h["__metadata__"].update(relabel="{")), "Expecting property name"),
    "metadata a list": (with_header(lambda h: h["__metadata__"].update(relabel="[1]")), r"must be a dict, got \[1\]"),
    "metadata not text": (
        with_header(lambda h: h["__metadata__"].update(relabel=1)),
        "__metadata__.relabel must be text, got 1",
    ),
    "entry not a dict": (with_header(lambda head: {**head, "logits": 3}), "logits must be a dict, got 3"),
    "no shape": (with_header(lambda head: head["logits"].pop("shape") and None), "logits.shape is missing"),
    "no version": (with_metadata(version=None), "version is missing"),
    "no canvas": (with_metadata(canvas=None), "canvas is missing"),
    "no num_classes": (with_metadata(num_classes=None), "num_classes is missing"),
    "later version": (with_metadata(version=2), "format version 2 cannot be read, only 1: update relabel_datasets"),
    "version as text": (with_metadata(version="1"), "format version '1'"),
    "version true": (with_metadata(version=True), "format version True"),
    "version a float": (with_metadata(version=1.0), "format version 1.0"),
    "num_classes a float": (with_metadata(num_classes=13.0), "num_classes must be an integer"),
    "num_classes true": (with_metadata(num_classes=True), "num_classes must be an integer"),
    "num_classes negative": (with_metadata(num_classes=-13), "num_classes must be an integer"),
    "num_classes 1": (with_metadata(num_classes=1), "num_classes must be an integer in 2"),
    "num_classes endless": (with_metadata(num_classes=10**12), "num_classes must be an integer in 2"),
    "num_classes of others": (with_metadata(num_classes=300), "classes must be uint16"),
    "num_classes less than base": (with_metadata(num_classes=12), "base must be"),
    "canvas of 0": (with_metadata(canvas=[0, 4]), r"canvas\[0\] must be an integer in 1"),
    "canvas negative": (with_metadata(canvas=[3, -4]), r"canvas\[1\] must be"),
    "num_classes beyond any dataset": (with_metadata(num_classes=2**20 + 1), "num_classes must be an integer in 2"),
    "num_classes twice": (join(TWICE, b""), "the key 'num_classes' is repeated"),
    "canvas beyond any image": (with_metadata(canvas=[3, 2**31]), r"canvas\[1\] must be an integer in 1"),
    "canvas of one side": (with_metadata(canvas=[3]), "canvas must be"),
    "canvas of floats": (with_metadata(canvas=[3.0, 4.0]), r"canvas\[0\] must be"),
    "canvas true": (with_metadata(canvas=[True, 4]), r"canvas\[0\] must be"),
    "canvas a number": (with_metadata(canvas=3), "canvas must be"),
    "canvas a dict": (with_metadata(canvas={"1": 2, "3": 4}), "canvas must be"),
    "float32 logits": (with_tensor("logits", dtype="F32"), "logits.dtype must be one of U8, U16, U32, F16, got 'F32'"),
    "signed classes": (with_tensor("classes", dtype="I8"), "classes.dtype must be one of .*, got 'I8'"),
    "dtype a list": (with_tensor("logits", dtype=["U8"]), r"logits.dtype must be one of .*, got \['U8'\]"),
    "dtype null": (with_tensor("logits", dtype=None), "logits.dtype must be one of .*, got None"),
    "shape a number": (with_tensor("logits", shape=4), "logits.shape must be a list, got 4"),
    "shape with a zero": (
        with_tensor("logits", shape=[2, 0, 5]),
        r"logits.shape\[1\] must be an integer of at least 1, got 0",
    ),
    "shape of floats": (with_tensor("logits", shape=[2.0, 7, 5]), r"logits.shape\[0\] must be an integer"),
    "shape too large": (with_tensor("logits", shape=[2, 7, 10**30]), r"logits.shape\[2\] must be an integer"),
    "shape transposed": (with_tensor("logits", "topk", "uint8", shape=[3, 5, 7]), "classes must be|logits must be"),
    "shape of other rank": (with_tensor("logits", shape=[70]), r"logits must be \[K, H, W\]"),
    "classes without a side": (
        with_tensor("classes", shape=[], data_offsets=[0, 1]),
        "do not fit|do not start|must be",
    ),
    "offsets of three": (with_tensor("logits", data_offsets=[0, 1, 2]), "logits.data_offsets must be a list of 2"),
    "offsets of text": (with_tensor("logits", data_offsets=["0", "1"]), r"logits.data_offsets\[0\] must be an integer"),
    "offsets of floats": (with_tensor("base", data_offsets=[16.0, 23.0]), r"base.data_offsets\[0\] must be an integer"),
    "offsets negative": (with_tensor("ranges", data_offsets=[-16, 0]), r"ranges.data_offsets\[0\] must be an integer"),
    "offsets backwards": (with_tensor("ranges", data_offsets=[16, 0]), "do not start at"),
    "offsets with a gap": (with_tensor("logits", data_offsets=[27, 97]), "do not start at"),
    "offsets that overlap": (with_tensor("logits", data_offsets=[0, 70]), "do not start at"),
    "no logits": (
        with_header(lambda head: head.pop("logits") and None),
        "logits is missing",
    ),
    "extra tensor": (with_extra_tensor(), "'extra' is not a known field"),
    "num_classes that pooling cannot afford": (empty_topk(2**32), "num_classes must be an integer in 2 .. 1048576"),
    "dense logits that nobody can afford": (empty_topk(2**20, 1, 5, 13), "exceeds 33554432 classes x locations"),
    "more logits than classes": (empty_topk(3, 4), "3 classes cannot store 4 of them"),
    "class out of range": (with_values("classes", [13]), "class index 13 is not below num_classes=13"),
    "topk class out of range": (with_values("classes", [255], "topk"), "class index 255"),
    "two heatmaps of a class": (with_values("classes", [4, 4]), "each heatmap must be of another class, got"),
    "range to nan": (with_values("ranges", [np.nan]), "ranges must be finite"),
    "range to inf": (with_values("ranges", [-np.inf, np.inf], "topk", "uint8"), "ranges must be finite"),
    "nan logits": (with_values("logits", [1, np.nan], "topk"), "logits must be finite"),
    "infinite logits": (with_values("logits", [np.inf], "heatmaps", "float16"), "logits must be finite"),
    "nan base": (with_values("base", [np.nan], "heatmaps", "float16"), "base must be finite"),
}


@pytest.mark.parametrize(("blob", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damage_is_refused_by_its_name(blob, message):
    with pytest.raises(rd.errors.LabelMapError, match=message):
        codec.decode([blob])


def test_the_largest_map_that_is_read_pools_in_little_memory():
    blob = empty_topk(2**20, 1, 8, 4)
    assert len(blob) < 1000
    assert rd.LabelPooling()(rd.LabelMap.from_safetensors(blob)).shape == (2**20,)


def test_a_map_of_another_number_of_classes_than_its_dataset_is_refused_by_key():
    blobs = [empty_topk(10), empty_topk(20), empty_topk(10)]
    with pytest.raises(rd.errors.LabelMapError, match="label map 'b': it has 20 classes, but its dataset has 10"):
        read_labels(blobs, ["a", "b", "c"], [0, 1, 2], 10)
    assert [each.num_classes for each in read_labels(blobs, ["a", "b", "c"], [0, 1, 2])] == [10, 20, 10]


@pytest.mark.parametrize(("encoding", "dtype"), STORED_FORMS)
def test_a_map_cut_anywhere_is_refused(encoding, dtype):
    blob = stored_map(encoding, dtype)
    for length in range(len(blob)):
        with pytest.raises(rd.errors.LabelMapError):
            codec.decode([blob[:length]])


@pytest.mark.parametrize(("encoding", "dtype"), STORED_FORMS)
def test_flipped_bytes_give_a_valid_map_or_a_label_map_error(encoding, dtype):
    blob, rng = stored_map(encoding, dtype), np.random.default_rng(0)
    num_refused = 0
    for _ in range(1500):
        damaged = bytearray(blob)
        for place in rng.integers(len(blob), size=rng.integers(1, 4)):
            damaged[place] ^= int(rng.integers(1, 256))
        try:
            label_map = rd.LabelMap.from_safetensors(bytes(damaged))
        except rd.errors.LabelMapError:
            num_refused += 1
        else:
            assert torch.isfinite(label_map.logits).all()
            assert 0 <= label_map.classes.min() <= label_map.classes.max() < label_map.num_classes
            assert min(label_map.canvas_size) > 0
    assert 0 < num_refused < 1500


def test_errors_name_the_key_and_are_value_errors():
    with pytest.raises(ValueError, match=r"label map 'a/b': 3 bytes are not a whole safetensors file") as caught:
        rd.LabelMap.from_safetensors(b"abc", key="a/b")
    assert type(caught.value) is rd.errors.LabelMapError
    copied = pickle.loads(pickle.dumps(caught.value))
    assert (type(copied), str(copied)) == (rd.errors.LabelMapError, str(caught.value))


def test_the_error_comes_out_of_a_dataloader_worker_as_it_is():
    loader = DataLoader([b"abc"], batch_size=None, num_workers=1, collate_fn=rd.LabelMap.from_safetensors)
    with pytest.raises(rd.errors.LabelMapError, match="3 bytes are not a whole safetensors file"):
        next(iter(loader))
