import json
import pickle

import numpy as np
import pytest
from safetensors.numpy import load, save

from relabel_datasets.errors import DatasetError
from relabel_datasets.shards import index as index_module
from relabel_datasets.shards.index import Index, Row, make_index
from relabel_datasets.shards.manifest import Split
from relabel_datasets.storage.folders import LocalFolder

ROWS = [Row(f"n{i:04d}_{i * 7}", i % 5, 1000 * i + 512, 100 + i, 2000 * i, 50 + i) for i in range(200)]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "train.index.safetensors"
    path.write_bytes(make_index(ROWS, images=True))
    return path


def open_index(path, num_samples, images=True):
    split = Split(
        "train", num_samples, [], [], [], [], [], path.name, path.stat().st_size, "", "jpg" if images else None, None, "",
    )  # fmt: skip
    return Index(LocalFolder(path.parent), split, 5)


def test_every_row_is_found_by_number_and_by_key(path):
    index = open_index(path, len(ROWS))
    assert len(index) == len(ROWS)
    for number, row in enumerate(ROWS):
        assert index.key(number) == row.key
        assert index.row(row.key) == number
        assert index.extent(number, "map") == (row.map_offset, row.map_size)
        assert index.extent(number, "image") == (row.image_offset, row.image_size)
    assert index.labels.tolist() == [row.label for row in ROWS]
    assert index.row("absent") is None


def test_keys_with_the_same_hash_are_distinguished(path, monkeypatch):
    monkeypatch.setattr(index_module, "hash_key", lambda key: len(key))
    path.write_bytes(make_index(ROWS, images=True))
    index = open_index(path, len(ROWS))
    assert [index.row(row.key) for row in ROWS] == list(range(len(ROWS)))
    assert index.row("n0000_x") is None


def test_non_ascii_keys_and_offsets_above_4_gib(path):
    rows = [Row("katze/größe", 0, 5 << 40, 7), Row("犬/一", 1, 6 << 40, 8)]
    path.write_bytes(make_index(rows, images=False))
    index = open_index(path, 2, images=False)
    assert [index.row(row.key) for row in rows] == [0, 1]
    assert index.extent(1, "map") == (6 << 40, 8)
    assert not index.has_images


def test_an_index_without_rows(path):
    path.write_bytes(make_index([], images=False))
    index = open_index(path, 0, images=False)
    assert len(index) == 0
    assert index.row("any") is None


def test_a_repeated_key_is_refused_by_name():
    with pytest.raises(DatasetError, match="n0003_21"):
        make_index([*ROWS, ROWS[3]], images=True)


def test_an_index_is_equal_in_another_process(path):
    index = pickle.loads(pickle.dumps(open_index(path, len(ROWS))))
    assert index.row(ROWS[150].key) == 150


def test_the_same_rows_give_the_same_bytes():
    assert make_index(ROWS, images=True) == make_index(ROWS, images=True)


def with_header(change, data=b""):
    """Return a function that changes the header of an index file and appends to its data."""

    def damage(good):
        length = int.from_bytes(good[:8], "little")
        header = json.loads(good[8 : 8 + length])
        header = change(header) or header
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + good[8 + length :] + data

    return damage


def with_field(column, **fields):
    return with_header(lambda header: header[column].update(fields))


def with_column(name, change):
    """Return a function that changes the values of a column."""

    def damage(good):
        columns = load(good)
        columns[name] = np.ascontiguousarray(change(columns[name].copy()))
        return save(columns)

    return damage


def set_row(row, value):
    def change(column):
        column[row] = value
        return column

    return change


N = len(ROWS)
BAD = {
    "nothing but zeros": (lambda good: bytes(len(good)), "Expecting value"),
    "a header length beyond the file": (lambda good: b"\xff" * 8 + good[8:], "not a complete safetensors file"),
    "a header of 4 GiB": (lambda good: (2**32).to_bytes(8, "little") + good[8:], "not a complete safetensors file"),
    "a header larger than any": (
        lambda good: (2**17).to_bytes(8, "little") + b" " * 2**18,
        "not a complete safetensors",
    ),
    "fewer than 8 bytes": (lambda good: b"1234", "its 4 bytes are not a complete"),
    "a list for a header": (with_header(lambda _: b"[]"), r"the content must be a dict, got \[\]"),
    "a header nested too deep": (with_header(lambda _: b"[" * 60_000), "nested too deeply"),
    "a repeated column": (with_header(lambda _: b'{"label": 1, "label": 2}'), "the key 'label' is repeated"),
    "a column that is a list": (with_header(lambda h: h.update(label=[1])), r"label must be a dict, got \[1\]"),
    "metadata": (with_header(lambda h: h.update(__metadata__={"a": "b"})), "'__metadata__' is not a known field"),
    "another column": (with_header(lambda h: h.update(extra=h["label"])), "'extra' is not a known field"),
    "no labels": (with_header(lambda h: h.pop("label") and None), "label is missing"),
    "no images": (with_header(lambda h: h.pop("image_size") and None), "image_size is missing"),
    "no dtype": (with_header(lambda h: h["label"].pop("dtype") and None), "label.dtype is missing"),
    "labels of 64 bits": (with_field("label", dtype="I64"), "label.dtype must be one of I32, got 'I64'"),
    "a dtype that is a list": (with_field("key_end", dtype=["U64"]), "key_end.dtype must be one of U64"),
    "a shape of two sides": (with_field("label", shape=[N, 1]), "label.shape must be a list of 1 values"),
    "a shape of text": (with_field("label", shape="200"), "label.shape must be a list"),
    "a float shape": (with_field("label", shape=[200.0]), r"label.shape\[0\] must be 200, got 200.0"),
    "a shape of others": (with_field("label", shape=[199]), r"label.shape\[0\] must be 200, got 199"),
    "negative key bytes": (
        with_field("key_bytes", shape=[-1]),
        r"key_bytes.shape\[0\] must be an integer of at least 0",
    ),
    "endless key bytes": (with_field("key_bytes", shape=[2**62]), "key_bytes.data_offsets must be"),
    "three offsets": (with_field("label", data_offsets=[0, 1, 2]), "label.data_offsets must be a list of 2 values"),
    "negative offsets": (with_field("label", data_offsets=[-800, 0]), r"label.data_offsets\[0\] must be an integer"),
    "offsets of text": (with_field("label", data_offsets=["0", "8"]), r"label.data_offsets\[0\] must be an integer"),
    "offsets beyond the file": (with_field("label", data_offsets=[2**40, 2**40 + 4 * N]), "data_offsets must be"),
    "offsets that overlap": (
        with_header(lambda h: h["map_size"].update(data_offsets=h["map_offset"]["data_offsets"])),
        "data_offsets must be",
    ),
    "bytes that belong to no column": (with_header(lambda _: None, b"\0" * 8), "its header describes"),
    "a negative label": (with_column("label", set_row(7, -5)), "label of row 7 must be in 0 .. 4, got -5"),
    "a huge label": (with_column("label", set_row(7, 10**9)), "label of row 7 must be in 0 .. 4, got 1000000000"),
    "a label of one class more": (with_column("label", set_row(199, 5)), "label of row 199 must be in 0 .. 4, got 5"),
    "rows beyond all": (with_column("sorted_row", set_row(3, N)), "sorted_row must be in 0 .. 199, got 200"),
    "keys that end before they begin": (with_column("key_end", set_row(9, 1)), "key_end must increase"),
    "an empty key": (with_column("key_end", lambda ends: np.append(ends[:1], ends[:-1])), "key_end must increase"),
    "an empty first key": (with_column("key_end", set_row(0, 0)), "key_end must increase"),
    "keys that end beyond all": (with_column("key_end", set_row(-1, 2**63)), "key_end must reach the end of key_bytes"),
    "keys that end too soon": (
        with_column("key_bytes", lambda keys: np.append(keys, np.uint8(65))),
        "must reach the end",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BAD.values(), ids=BAD)
def test_a_bad_index_is_refused_by_file_and_column(path, damage, message):
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DatasetError, match=f"{path.name} is damaged or not the index of these shards: .*{message}"):
        open_index(path, N)


def test_an_index_with_images_is_refused_for_label_only_shards(path):
    with pytest.raises(DatasetError, match="'image_offset' is not a known field"):
        open_index(path, N, images=False)


def test_a_key_that_is_not_utf8_is_refused_when_it_is_read(path):
    path.write_bytes(with_column("key_bytes", set_row(3, 0xFF))(path.read_bytes()))
    index = open_index(path, N)
    with pytest.raises(DatasetError, match=f"{path.name} is damaged: key_bytes of row 0 must be UTF-8"):
        index.key(0)
    assert index.key(1) == ROWS[1].key


def test_rows_that_are_not_a_permutation_return_no_wrong_sample(path):
    path.write_bytes(with_column("sorted_row", lambda rows: np.zeros_like(rows))(path.read_bytes()))
    index = open_index(path, N)
    assert [index.row(row.key) for row in ROWS] == [0] + [None] * (N - 1)
    assert index.rows([row.key for row in ROWS]).tolist() == [0] + [-1] * (N - 1)


def test_damaged_or_foreign_files_are_refused_by_name(path):
    good = path.read_bytes()
    with pytest.raises(DatasetError, match="not the index of these shards"):
        open_index(path, len(ROWS) + 1)
    for bad in (
        b"",
        good[: len(good) // 2],
        b"\xff" * 100,
        good[:8] + b"x" + good[9:],
        np.random.default_rng(0).bytes(999),
    ):
        path.write_bytes(bad)
        with pytest.raises(DatasetError, match=r"train\.index"):
            open_index(path, len(ROWS))
