"""Locations of a cache or a dataset: each works, or the error says what to choose instead."""

import errno
import fcntl
import hashlib
import mmap
import os
import sys
from pathlib import Path

import pytest

from relabel_datasets.storage.cache import ShardCache
from relabel_datasets.storage.folders import default_cache
from relabel_datasets.storage.open_maps import MapTable

CONTENT = b"a shard"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def open_in(folder):
    def download(file):
        file.write(CONTENT)
        file.flush()

    with ShardCache(folder, None).open(SHA256, len(CONTENT), download) as file:
        return file.read()


def under_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    return tmp_path / "file" / "cache"


LOCATIONS = {
    "below a file": under_a_file,
    "a file": lambda tmp_path: under_a_file(tmp_path).parent,
    "a name that is too long": lambda tmp_path: tmp_path / ("x" * 300),
    "a path that is too long": lambda tmp_path: tmp_path.joinpath(*["y" * 200] * 30),
    "not writable": lambda tmp_path: Path("/sys/relabel"),
}


@pytest.mark.parametrize("location", LOCATIONS.values(), ids=LOCATIONS)
def test_a_cache_without_write_access_is_named(tmp_path, location):
    folder = location(tmp_path)
    if folder.parts[1] == "sys" and sys.platform != "linux":
        pytest.skip("requires a folder that even root cannot write to")
    with pytest.raises(
        OSError, match=r"the cache .* cannot be (read|written to) \(.*\): choose another folder with cache_dir="
    ):
        open_in(folder)


def test_a_read_only_cache_returns_its_shards(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    assert open_in(tmp_path) == CONTENT
    with monkeypatch.context() as patch:
        for name in ("utime", "mkdir", "unlink", "rename"):
            patch.setattr(os, name, refuse)
        assert open_in(tmp_path) == CONTENT


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_cache_on_a_file_system_without_locks_is_refused(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    before = set(os.listdir("/dev/fd"))  # noqa: PTH208
    with pytest.raises(OSError, match=r"is on a file system without file locks .*RELABEL_CACHE") as caught:
        open_in(tmp_path)
    assert caught.value.errno == number
    assert len(os.listdir("/dev/fd")) == len(before)  # noqa: PTH208


def test_without_a_home_directory_a_cache_folder_must_be_given(monkeypatch, tmp_path):
    def refuse():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("RELABEL_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", refuse)
    with pytest.raises(OSError, match="no home directory for the cache: choose a folder with cache_dir="):
        default_cache()
    monkeypatch.setenv("RELABEL_CACHE", str(tmp_path))
    assert default_cache() == tmp_path


def test_a_file_system_without_memory_maps_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    (tmp_path / "shard").write_bytes(CONTENT)
    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(OSError, match=r"its file system has no memory maps: .*shard"):
        MapTable().open(0, lambda: (tmp_path / "shard").open("rb"))
