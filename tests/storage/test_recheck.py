"""A bit flips on disk after a file was verified: unnoticed by default, detected with RELABEL_CHECK_ON_OPEN=1."""

import logging
import multiprocessing
import os

import pytest

import relabel_datasets as rd
from relabel_datasets.storage import recheck
from relabel_datasets.storage.hub import HubRepo
from relabel_datasets.storage.local import sha256_of
from tests.fixtures import SHARDS
from tests.servers import FaultyServer

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(autouse=True)
def _new_process(monkeypatch):
    """Start each test as a process that has not verified any file."""
    monkeypatch.setattr(recheck, "_checked", set())


def find_pixel(folder, config="colours"):
    """Return the SHA-256 of the first shard, and the offset of a byte in the pixels of its first image."""
    maps = rd.LabelMaps(folder, config)
    offset, size = maps.index.extent(0, "image")
    return maps.split.shard_sha256[0], offset + size // 2


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x01
    path.write_bytes(data)


def read_first(dataset):
    return dataset.label_maps.image_bytes(0)


def test_a_flipped_bit_in_the_cache_is_detected_if_the_check_is_on(served_folder, tmp_path, monkeypatch, caplog):
    sha256, offset = find_pixel(served_folder)
    with FaultyServer(served_folder) as server:

        def load():
            return rd.load_dataset(server.url, "colours", "train", cache_dir=tmp_path)

        good = read_first(load())
        cached = tmp_path / "shards" / sha256
        flip(cached, offset)
        assert read_first(load()) != good
        monkeypatch.setenv("RELABEL_CHECK_ON_OPEN", "1")
        with caplog.at_level(logging.WARNING):
            assert read_first(load()) == good
        assert "is damaged and is downloaded again" in caplog.text
        assert sha256_of(cached) == sha256


def test_a_flipped_bit_on_disk_is_an_error_if_the_check_is_on(dataset_folder, monkeypatch):
    _, offset = find_pixel(dataset_folder)
    path = dataset_folder / "colours" / SHARDS[0]
    flip(path, offset)
    assert read_first(rd.load_dataset(dataset_folder, "colours", "train"))
    monkeypatch.setenv("RELABEL_CHECK_ON_OPEN", "1")
    with pytest.raises(rd.DatasetError, match=f"{path} is damaged: its SHA-256 is not"):
        read_first(rd.load_dataset(dataset_folder, "colours", "train"))


def test_a_flipped_bit_in_the_hub_cache_is_detected_if_the_check_is_on(served_folder, tmp_path, monkeypatch):
    sha256, offset = find_pixel(served_folder)
    good = served_folder / "colours" / SHARDS[0]
    path = tmp_path / SHARDS[0]
    fetched = []

    def fetch(self, name, *, force=False):
        fetched.append(force)
        if force or not path.exists():
            path.write_bytes(good.read_bytes())
        return path

    monkeypatch.setattr(HubRepo, "fetch", fetch)
    repo = HubRepo("org/name", cache_dir=tmp_path)
    repo.verified(SHARDS[0], good.stat().st_size, sha256)
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))

    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # a failing disk does not change the modification time
    assert sha256_of(repo.verified(SHARDS[0], good.stat().st_size, sha256)) != sha256
    monkeypatch.setenv("RELABEL_CHECK_ON_OPEN", "1")
    assert sha256_of(repo.verified(SHARDS[0], good.stat().st_size, sha256)) == sha256
    assert fetched == [False, False, False, True]


def test_each_file_is_hashed_once_in_a_process_and_its_forked_workers(dataset_folder, monkeypatch):
    monkeypatch.setenv("RELABEL_CHECK_ON_OPEN", "1")
    hashed = []
    real = recheck.sha256_digest
    monkeypatch.setattr(
        recheck, "sha256_digest", lambda file: hashed.append(os.fstat(file.fileno()).st_ino) or real(file)
    )
    for _ in range(3):
        dataset = rd.load_dataset(dataset_folder, "colours", "train")
        assert len(list(dataset.label_maps.values())) == 13
    assert len(hashed) == len(set(hashed)) == 4  # the index and three shards
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_count_checked) == 4


def _count_checked():
    return len(recheck._checked)


@pytest.mark.parametrize("value", ["yes", "2", "true"])
def test_an_invalid_value_is_refused(dataset_folder, monkeypatch, value):
    monkeypatch.setenv("RELABEL_CHECK_ON_OPEN", value)
    with pytest.raises(rd.DatasetError, match=f"RELABEL_CHECK_ON_OPEN must be 0 or 1, got '{value}'"):
        rd.load_dataset(dataset_folder, "colours", "train")


def test_the_check_is_off_by_default(dataset_folder, monkeypatch):
    monkeypatch.delenv("RELABEL_CHECK_ON_OPEN", raising=False)
    monkeypatch.setattr(recheck, "sha256_digest", None)
    assert len(list(rd.load_dataset(dataset_folder, "colours", "train").label_maps.values())) == 13
