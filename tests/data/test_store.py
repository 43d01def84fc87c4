import json
import multiprocessing
import pickle

import pytest
import torch

import relabel_datasets as rd
from relabel_datasets.shards.manifest import _checksum
from relabel_datasets.storage.folders import MANIFEST_NAME


@pytest.fixture
def label_maps(dataset_folder):
    return rd.LabelMaps(dataset_folder, "labels-only")


def test_label_maps_are_a_mapping_from_key_to_label_map(label_maps):
    assert len(label_maps) == 13
    assert sorted(label_maps) == [f"photo_{i:02d}" for i in range(13)]
    assert "photo_03" in label_maps
    assert "nothing" not in label_maps
    for key, label_map in label_maps.items():
        assert isinstance(label_map, rd.LabelMap)
        number = int(key[-2:])
        assert (label_map.key, label_map.label) == (key, number % 3)
        assert label_map.canvas_size == ((40, 56) if number % 2 else (48, 32))
        assert label_map.shape == (3, 6, 8)
    with pytest.raises(KeyError, match="nothing"):
        label_maps["nothing"]


def test_rows_and_keys_return_the_same_label_maps(label_maps):
    for row, key in enumerate(label_maps):
        torch.testing.assert_close(label_maps.at(row).logits, label_maps[key].logits, rtol=0, atol=0)


def test_the_path_may_be_the_folder_of_a_config(dataset_folder):
    assert list(rd.LabelMaps(dataset_folder / "colours")) == list(rd.LabelMaps(dataset_folder, "colours"))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_label_maps_work_in_forked_and_spawned_processes(label_maps, method):
    expected = {key: label_map.logits.sum().item() for key, label_map in label_maps.items()}  # opens the shards first
    copy = pickle.loads(pickle.dumps(label_maps))
    assert {key: label_map.logits.sum().item() for key, label_map in copy.items()} == expected
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert dict(zip(expected, pool.map(SumOf(label_maps), expected), strict=True)) == expected


class SumOf:
    def __init__(self, label_maps):
        self.label_maps = label_maps

    def __call__(self, key):
        return self.label_maps[key].logits.sum().item()


def test_missing_datasets_configs_and_splits_are_named(dataset_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        rd.LabelMaps(tmp_path / "nowhere")
    with pytest.raises(rd.DatasetError, match=r"several configs.*colours.*labels-only"):
        rd.LabelMaps(dataset_folder)
    with pytest.raises(rd.DatasetError, match=r"no config 'other'.*colours"):
        rd.LabelMaps(dataset_folder, "other")
    with pytest.raises(rd.DatasetError, match=r"no split 'test'.*train"):
        rd.LabelMaps(dataset_folder, "colours", "test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=99), "version 99"),
        (lambda m: m.pop("version"), "version None"),
        (lambda m: m["splits"]["train"].update(num_samples=12), r"splits\['train'\]\.(num_samples|shard_)"),
        (lambda m: m["splits"]["train"]["shard_bytes"].pop(), r"splits\['train'\]\.(num_samples|shard_)"),
        (lambda m: m["splits"]["train"].pop("index"), "damaged"),
        (lambda m: m.update(extra=1), "damaged"),
        (lambda m: m.pop("classes"), "damaged"),
    ],
)
def test_corrupt_manifests_are_rejected_by_name(dataset_folder, change, message):
    path = dataset_folder / "colours" / MANIFEST_NAME
    content = json.loads(path.read_text())
    del content["checksum"]
    change(content)
    content["checksum"] = _checksum(content)
    path.write_text(json.dumps(content))
    with pytest.raises(rd.DatasetError, match=message) as caught:
        rd.LabelMaps(dataset_folder, "colours")
    assert str(path) in str(caught.value)


def test_a_changed_manifest_is_rejected(dataset_folder):
    path = dataset_folder / "colours" / MANIFEST_NAME
    path.write_text(path.read_text().replace('"emu"', '"gnu"'))
    with pytest.raises(rd.DatasetError, match="checksum"):
        rd.LabelMaps(dataset_folder, "colours")


def test_a_manifest_that_is_not_json_is_rejected(dataset_folder):
    path = dataset_folder / "colours" / MANIFEST_NAME
    path.write_text(path.read_text()[:100])
    with pytest.raises(rd.DatasetError, match="not JSON"):
        rd.LabelMaps(dataset_folder, "colours")


def test_a_corrupt_label_map_is_named_by_its_key(dataset_folder):
    label_maps = rd.LabelMaps(dataset_folder, "labels-only")
    offset, _ = label_maps.index.extent(0, "map")
    path = dataset_folder / "labels-only" / label_maps.split.filenames[0]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 8)
    with pytest.raises(rd.errors.LabelMapError, match=label_maps.index.key(0)):
        label_maps.at(0)


def test_one_corrupt_label_map_of_a_batch_is_named_by_its_key(dataset_folder):
    label_maps = rd.LabelMaps(dataset_folder, "labels-only")
    row = 4
    offset, size = label_maps.index.extent(row, "map")
    path = dataset_folder / "labels-only" / label_maps.split.filenames[0]
    data = bytearray(path.read_bytes())
    data[offset + 8 : offset + size] = bytes(size - 8)
    path.write_bytes(data)
    with pytest.raises(rd.errors.LabelMapError, match=f"'{label_maps.index.key(row)}'"):
        label_maps.at_rows(range(7))


def test_label_maps_of_a_batch_equal_single_ones_and_are_pickled_separately(label_maps):
    rows = [5, 0, 12, 5]
    for row, label_map in zip(rows, label_maps.at_rows(rows), strict=True):
        expected = label_maps.at(row)
        assert torch.equal(label_map, expected)
        assert torch.equal(label_map.dense(), expected.dense())
        assert repr(label_map) == repr(expected)
        assert (
            len(pickle.dumps(label_map)) <= len(pickle.dumps(expected)) + 8
        )  # strings that are equal, but not the same
        assert torch.equal(pickle.loads(pickle.dumps(label_map)).dense(), expected.dense())
    assert label_maps.at_rows([]) == []
