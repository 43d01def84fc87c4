import pickle

import numpy as np
import pytest

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


def open_index(path, num_samples):
    split = Split(
        "train", num_samples, [], [], [], [], [], path.name, path.stat().st_size, "", None, None, "",
    )  # fmt: skip
    return Index(LocalFolder(path.parent), split)


def test_every_row_comes_back_by_number_and_by_key(path):
    index = open_index(path, len(ROWS))
    assert len(index) == len(ROWS)
    for number, row in enumerate(ROWS):
        assert index.key(number) == row.key
        assert index.row(row.key) == number
        assert index.extent(number, "map") == (row.map_offset, row.map_size)
        assert index.extent(number, "image") == (row.image_offset, row.image_size)
    assert index.labels.tolist() == [row.label for row in ROWS]
    assert index.row("absent") is None


def test_keys_that_share_a_hash_are_told_apart(path, monkeypatch):
    monkeypatch.setattr(index_module, "hash_key", lambda key: len(key))
    path.write_bytes(make_index(ROWS, images=True))
    index = open_index(path, len(ROWS))
    assert [index.row(row.key) for row in ROWS] == list(range(len(ROWS)))
    assert index.row("n0000_x") is None


def test_keys_beyond_ascii_and_offsets_beyond_4_gib(path):
    rows = [Row("katze/größe", 0, 5 << 40, 7), Row("犬/一", 1, 6 << 40, 8)]
    path.write_bytes(make_index(rows, images=False))
    index = open_index(path, 2)
    assert [index.row(row.key) for row in rows] == [0, 1]
    assert index.extent(1, "map") == (6 << 40, 8)
    assert not index.has_images


def test_no_rows_at_all(path):
    path.write_bytes(make_index([], images=False))
    index = open_index(path, 0)
    assert len(index) == 0
    assert index.row("any") is None


def test_a_repeated_key_is_refused_by_name():
    with pytest.raises(DatasetError, match="n0003_21"):
        make_index([*ROWS, ROWS[3]], images=True)


def test_it_is_the_same_in_another_process(path):
    index = pickle.loads(pickle.dumps(open_index(path, len(ROWS))))
    assert index.row(ROWS[150].key) == 150


def test_the_same_rows_give_the_same_bytes():
    assert make_index(ROWS, images=True) == make_index(ROWS, images=True)


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
