"""Every kind of file of a dataset, damaged in every way that is independent of its content."""

import json
import shutil

import pytest
import torch
from safetensors.numpy import load, save

import relabel_datasets as rd
from relabel_datasets.report.terminal import describe
from relabel_datasets.shards.index import make_index
from relabel_datasets.shards.manifest import Manifest, _checksum
from relabel_datasets.shards.tars import ShardWriter
from relabel_datasets.storage.local import sha256_of

FILES = {
    "card": "README.md",
    "manifest": "colours/_info.json",
    "index": "colours/train.index.safetensors",
    "shard": "colours/train-00001-of-00003.tar",
}


def truncate(path):
    path.write_bytes(path.read_bytes()[: min(path.stat().st_size // 2, 300)])


def empty(path):
    path.write_bytes(b"")


def oversize(path):
    with path.open("r+b") as file:
        file.truncate(1 << 40)  # without blocks on disk


def append(path):
    path.write_bytes(path.read_bytes() + b"\0" * 512)


def to_folder(path):
    path.unlink()
    path.mkdir()


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES = {f.__name__: f for f in (truncate, empty, oversize, append, to_folder, zeros)}


@pytest.fixture
def root(served_folder, tmp_path):
    return shutil.copytree(served_folder, tmp_path / "dataset")


def read_all(root):
    dataset = rd.load_dataset(root, "colours", "train")
    return [dataset[index] for index in range(len(dataset))]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_is_named_and_the_other_config_is_checked(root, kind, damage):
    path = root / FILES[kind]
    damage(path)
    if kind == "card":
        if damage is append:
            assert rd.verify(root, num_workers=0, progress=False).ok
            return
        assert len(read_all(root)) == 13  # a local dataset is read without its card
    else:
        with pytest.raises(rd.DatasetError, match=path.name) as caught:
            read_all(root)
        assert str(path) in str(caught.value)
    report = rd.verify(root, num_workers=0, progress=False)
    assert not report.ok
    assert {problem.config for problem in report.problems} == {None if kind == "card" else "colours"}
    assert any(path.name in str(problem) for problem in report.problems)
    assert ("labels-only", 13) in [(each.config, each.num_samples) for each in report.splits]


@pytest.mark.parametrize("damage", [truncate, empty, to_folder, zeros])
@pytest.mark.parametrize("kind", ["manifest", "index"])
def test_inspect_and_verify_agree_on_a_damaged_file(root, kind, damage):
    damage(root / FILES[kind])
    with pytest.raises(rd.DatasetError, match=(root / FILES[kind]).name):
        describe(root, "colours")
    problems = rd.verify(root, "colours", num_workers=0, progress=False).problems
    assert any((root / FILES[kind]).name in problem.problem for problem in problems)


def rewritten(root, change_map=lambda row, blob: blob, change_index=lambda columns: columns):
    """Write the label-only config again with other maps or another index, and with valid hashes."""
    folder = root / "labels-only"
    maps = rd.LabelMaps(folder)
    rows = iter(range(len(maps)))
    infos = []
    for name, length in zip(maps.split.filenames, maps.split.shard_lengths, strict=True):
        with ShardWriter(root / name, None) as writer:
            for row in (next(rows) for _ in range(length)):
                writer.add(maps.index.key(row), int(maps.index.labels[row]), None, change_map(row, maps.map_bytes(row)))
            infos.append(writer.close())
    index = make_index([row for info in infos for row in info.rows], images=False)
    index = save(change_index({name: column.copy() for name, column in load(index).items()}))
    for name in maps.split.filenames:
        (root / name).replace(folder / name)
    (folder / maps.split.index).write_bytes(index)
    reseal(folder)
    return folder


def reseal(folder, **encoding):
    """Write the sizes and hashes of the files on disk to the manifest, and changes of the encoding."""
    path = folder / "_info.json"
    content = json.loads(path.read_bytes())
    del content["checksum"]
    content["encoding"].update(encoding)
    for split in content["splits"].values():
        split["shard_bytes"] = [(folder / name).stat().st_size for name in split["filenames"]]
        split["shard_sha256"] = [sha256_of(folder / name) for name in split["filenames"]]
        split["index_bytes"], split["index_sha256"] = (
            (folder / split["index"]).stat().st_size,
            sha256_of(folder / split["index"]),
        )
    path.write_text(json.dumps({**content, "checksum": _checksum(content)}))
    Manifest.load(folder)


def test_a_map_with_another_number_of_classes_is_refused_by_key(root):
    other = rd.LabelMap.from_logits(torch.randn(6, 6, 8), canvas_size=(40, 56)).to_safetensors()
    folder = rewritten(root, lambda row, blob: other if row == 4 else blob)
    maps = rd.LabelMaps(folder)
    for read in (lambda: maps.at(4), lambda: maps.at_rows(range(7)), lambda: maps[maps.index.key(4)]):
        with pytest.raises(
            rd.errors.LabelMapError, match=f"{maps.index.key(4)!r}: it has 6 classes, but its dataset has 3"
        ):
            read()
    assert maps.at(3).num_classes == 3
    report = rd.verify(root, "labels-only", num_workers=0, progress=False)
    assert [problem.key for problem in report.problems] == [maps.index.key(4)]
    assert "has 6 classes, the manifest has 3" in report.problems[0].problem


def test_a_topk_map_with_a_repeated_class_at_a_location_is_named_by_verify(root):
    def twice(row, blob):
        label_map = rd.LabelMap.from_logits(torch.randn(3, 6, 8), "topk", k=2, canvas_size=(40, 56))
        blob = label_map.to_safetensors()
        length = int.from_bytes(blob[:8], "little")
        header = json.loads(blob[8 : 8 + length])
        start = 8 + length + header["classes"]["data_offsets"][0]
        return blob[:start] + bytes(96) + blob[start + 96 :] if row == 4 else blob

    folder = rewritten(root, twice)
    reseal(folder, name="topk", k=2, dtype="float16")
    problems = rd.verify(root, "labels-only", num_workers=0, progress=False).problems
    assert [(problem.key, problem.problem) for problem in problems] == [
        (rd.LabelMaps(folder).index.key(4), "label map: a class is stored more than once at a location")
    ]


@pytest.mark.parametrize("label", [-5, 10**9, 3])
def test_labels_that_are_not_class_indices_are_refused(root, label):
    def change(columns):
        columns["label"][4] = label
        return columns

    folder = rewritten(root, change_index=change)
    for read in (lambda: rd.LabelMaps(folder), lambda: describe(folder)):
        with pytest.raises(rd.DatasetError, match=f"label of row 4 must be in 0 .. 2, got {label}"):
            read()
    report = rd.verify(root, "labels-only", num_workers=0, progress=False)
    assert [f"got {label}" in problem.problem for problem in report.problems] == [True]


@pytest.mark.parametrize(
    ("column", "value"), [("map_offset", 2**63), ("map_offset", 5), ("map_size", 2**64 - 1), ("map_size", 2**20)]
)
def test_a_sample_outside_of_its_shard_is_refused_when_it_is_read(root, column, value):
    def change(columns):
        columns[column][4] = value
        return columns

    maps = rd.LabelMaps(rewritten(root, change_index=change))
    assert maps.at(3).num_classes == 3
    with pytest.raises(rd.DatasetError, match=r"train\.index\.safetensors is damaged: it has .* at bytes \d+ to \d+"):
        maps.at(4)
    report = rd.verify(root, "labels-only", num_workers=0, progress=False)
    assert [problem.key for problem in report.problems] == [maps.index.key(4)]
