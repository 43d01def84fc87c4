"""`verify` reads remote datasets as they are on the server, and reports the same problems as for local ones."""

import pytest

import relabel_datasets as rd
from relabel_datasets.storage import remote
from tests.servers import FaultyServer
from tests.shards.damage import check, flip, named, set_field, shard_of, texts


@pytest.fixture
def server(dataset_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(remote, "LONGEST_PAUSE_S", 0.002)
    monkeypatch.setenv("RELABEL_CACHE", str(tmp_path / "cache"))
    with FaultyServer(dataset_folder) as server:
        yield server


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_good_remote_dataset_is_ok_and_leaves_nothing_on_disk(server, dataset_folder, tmp_path, num_workers):
    report = check(server.url, num_workers=num_workers)
    assert report.problems == []
    assert report.splits == check(dataset_folder).splits
    assert report.path == server.url
    assert list((tmp_path / "cache").rglob("*")) == []
    assert check(f"{server.url}/colours").ok


@pytest.mark.parametrize("num_workers", [0, 1])
def test_problems_of_a_remote_dataset_are_those_of_the_local_one(server, dataset_folder, num_workers):
    folder = dataset_folder / "colours"
    key = set_field(1, 3)(folder)
    report = check(server.url, num_workers=num_workers)
    assert named(report) == {("colours", 1, key), ("colours", None, None)}
    texts_of = [[problem.problem.replace(root, "") for problem in each.problems]
                for each, root in ((report, server.url), (check(dataset_folder), str(dataset_folder)))]  # fmt: skip
    assert texts_of[0] == texts_of[1]


def test_a_remote_dataset_is_not_read_from_the_cache(server, dataset_folder):
    dataset = rd.load_dataset(server.url, "colours", "train", download=True)
    path = shard_of(dataset_folder / "colours", 1)
    flip(path, path.stat().st_size // 2)
    assert len([dataset[i] for i in range(13)]) == 13
    report = check(server.url)
    assert named(report) == {("colours", 1, None)}
    assert "its SHA-256 is" in texts(report, None)
    assert [each.num_samples for each in report.splits] == [8, 13]


def test_missing_and_unreachable_remote_shards_are_named(server, dataset_folder):
    shard_of(dataset_folder / "colours", 0).unlink()
    server.fail("503", "labels-only/train-00002-of-00003.tar", times=None)
    report = check(server.url)
    assert named(report) == {("colours", 0, None), ("labels-only", 2, None)}
    assert "there is no colours/train-00000-of-00003.tar" in report.problems[0].problem
    assert "times in a row" in report.problems[1].problem


def test_a_bad_remote_index_or_manifest_is_named(server, dataset_folder):
    (dataset_folder / "labels-only" / "_info.json").write_bytes(b"{")
    (dataset_folder / "colours" / "train.index.safetensors").unlink()
    report = check(server.url)
    assert named(report) == {("labels-only", None, None), ("colours", None, None)}
    assert [(each.config, each.num_samples) for each in report.splits] == [("colours", 13)]


def test_a_missing_remote_dataset_raises(server, dataset_folder):
    with pytest.raises(FileNotFoundError, match="no dataset at"):
        check(f"{server.url}/nowhere")
    with pytest.raises(rd.DatasetError, match="no config 'blue'"):
        check(server.url, "blue")
