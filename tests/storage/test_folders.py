"""Folders: which kind a path or URL is, and which configs it has."""

import re
from pathlib import Path

import pytest

import relabel_datasets as rd
from relabel_datasets.shards.manifest import Manifest
from relabel_datasets.storage.folders import LocalFolder, RemoteFolder, default_cache, is_url
from relabel_datasets.storage.resolve import open_folder
from tests.fixtures import MANIFEST, SHARDS, contents

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize(
    ("limit", "num_bytes"),
    [(1000, 1000), ("1000", 1000), ("1K", 1000), ("2 MB", 2 * 10**6), ("1G", 10**9), ("1g", 10**9), ("3T", 3 * 10**12),
     (None, None)],
)  # fmt: skip
def test_a_limit_is_a_number_of_bytes_with_or_without_a_unit(tmp_path, monkeypatch, limit, num_bytes):
    monkeypatch.delenv("RELABEL_CACHE_LIMIT", raising=False)
    assert open_folder("memory://x", cache_dir=tmp_path, cache_limit=limit)._cache.limit == num_bytes
    monkeypatch.setenv("RELABEL_CACHE_LIMIT", "" if limit is None else str(limit))
    assert open_folder("memory://x", cache_dir=tmp_path)._cache.limit == num_bytes
    assert open_folder("memory://x", cache_dir=tmp_path, cache_limit=77)._cache.limit == 77


@pytest.mark.parametrize("limit", [0, -1, "0", "1.5G", "1X", "G", "lots", ""])
def test_an_invalid_limit_is_refused(limit):
    with pytest.raises(ValueError, match=rf"such as 200000000000 or '200G', got {re.escape(repr(limit))}"):
        open_folder("memory://x", cache_limit=limit)


def test_the_cache_folder_is_the_argument_or_the_environment_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("RELABEL_CACHE", str(tmp_path / "there"))
    assert default_cache() == tmp_path / "there"
    assert open_folder("memory://x")._cache.folder == tmp_path / "there" / "shards"
    assert open_folder("memory://x", cache_dir=tmp_path)._cache.folder == tmp_path / "shards"


@pytest.mark.parametrize(
    "url", ["http://a/b", "https://a", "s3://a/b", "hf://datasets/a/b@c", "memory://a", "file:///a"]
)
def test_a_url_is_recognized(url):
    assert is_url(url)


@pytest.mark.parametrize("path", ["./nowhere", "../nowhere", "nowhere", "a/b/c", "/nowhere", "~/nowhere/data"])
def test_a_folder_that_is_missing_is_not_looked_up_on_the_hub(path):
    with pytest.raises(FileNotFoundError, match=f"no dataset at {path}: there is no such folder"):
        open_folder(path)


def test_a_file_is_not_a_dataset(tmp_path):
    (tmp_path / "x.tar").touch()
    with pytest.raises(FileNotFoundError, match="it is a file, not a folder"):
        rd.load_dataset(tmp_path / "x.tar", split="train")


def test_images_are_not_a_dataset(image_folder):
    with pytest.raises(FileNotFoundError, match="To make a dataset of a folder of images, run `relabel build"):
        rd.load_dataset(image_folder, split="train")


@pytest.mark.parametrize("path", [3, None, ["data"]])
def test_a_path_of_another_type_is_refused(path):
    with pytest.raises(TypeError, match=f"must be a str or a path, got {type(path).__name__}"):
        rd.load_dataset(path, split="train")


@pytest.mark.parametrize("path", ["a/b", "/a/b", "C:/a", "a:b", "./http:/a", "org/name"])
def test_a_path_is_not_a_url(path, tmp_path, monkeypatch):
    assert not is_url(path)
    monkeypatch.chdir(tmp_path)
    if not path.startswith("/"):
        Path(path).mkdir(parents=True)
        assert isinstance(open_folder(path), LocalFolder)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no dataset at {tmp_path}/missing: there is no such folder"):
        open_folder(tmp_path / "missing")


def test_a_file_url_is_a_local_folder(tmp_path):
    folder = tmp_path / "with space, 100% #1?"
    folder.mkdir()
    assert str(open_folder(folder.as_uri())) == str(folder)
    assert not open_folder(folder.as_uri()).is_remote


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://host/a/b/", "https://host/a/b"),
        ("https://me:secret@host:80/a%40b?token=c#d", "https://host:80/a%40b"),
        ("hf://datasets/org/name@main", "hf://datasets/org/name@main"),
        ("s3://bucket/a#b", "s3://bucket/a"),
        ("memory:///a", "memory:///a"),
    ],
)
def test_a_remote_folder_is_shown_as_its_url_without_secrets(url, name):
    folder = open_folder(url)
    assert str(folder) == name
    assert str(folder.child("config")) == f"{name}/config"
    assert isinstance(folder, RemoteFolder)
    assert folder.is_remote
    assert open_folder(folder) is folder


def test_the_card_lists_the_configs_and_a_folder_with_a_manifest_is_a_config(remote):
    folder = open_folder(remote.url, storage_options=remote.options)
    assert folder.configs() == ["colours", "labels-only"]
    assert folder.child("colours").configs() is None
    assert Manifest.read(folder.child("colours")) == Manifest.read(folder.child("colours"))


def test_the_url_of_a_config_can_be_loaded(tmp_path, remote, expected):
    dataset = rd.load_dataset(
        f"{remote.url}/colours", split="train", cache_dir=tmp_path, storage_options=remote.options
    )
    assert contents(dataset) == expected


def test_a_folder_without_card_and_manifest_is_not_a_dataset(remote):
    with pytest.raises(
        FileNotFoundError, match=rf"no dataset at {remote.url}/nothing: it has neither README\.md nor _info\.json"
    ):
        open_folder(f"{remote.url}/nothing", storage_options=remote.options).configs()


def test_s3_may_answer_403_for_a_manifest_that_does_not_exist(remote):
    remote.server.fail("403", MANIFEST, times=None)
    assert open_folder(remote.url, storage_options=remote.options).configs() == ["colours", "labels-only"]


@pytest.mark.parametrize("card", ["403", "404"])
def test_a_config_without_permission_is_not_reported_as_missing(remote, card):
    remote.server.fail("403", MANIFEST, times=None)
    remote.server.fail(card, "README.md", times=None)
    with pytest.raises(rd.DatasetError, match=r"403.*credentials"):
        open_folder(f"{remote.url}/colours", storage_options=remote.options).configs()


@pytest.mark.parametrize(("fault", "says"), [("short", "is damaged"), ("503", "503")])
def test_an_unreadable_manifest_is_named(remote, monkeypatch, fault, says):
    monkeypatch.setattr("relabel_datasets.storage.remote.MAX_ATTEMPTS", 2)
    remote.server.fail(fault, MANIFEST, times=None)
    with pytest.raises(rd.DatasetError, match=rf"{remote.url}/colours/_info\.json.*{says}"):
        Manifest.read(open_folder(f"{remote.url}/colours", storage_options=remote.options))
    assert remote.server.gets("README.md") == []


@pytest.mark.parametrize(
    ("card", "says"),
    [
        (b"", "missing or truncated"),
        (b"---\nconfigs:\n- config_name: a\n", "missing or truncated"),
        (b"# title\n", "missing or truncated"),
        (b"---\na: [\n---\n", "not the card of a dataset"),
        (b"---\nlicense: mit\n---\n", "not the card of a dataset"),
        (b"---\nconfigs: 3\n---\n", "not the card of a dataset"),
        (b"---\n\xff\n---\n", "not UTF-8"),
        (b"---\n- a\n---\n", "not the card of a dataset"),
    ],
)
def test_an_invalid_card_is_named_with_its_url(tmp_path, card, says):
    (tmp_path / "README.md").write_bytes(card)
    with pytest.raises(rd.DatasetError, match=rf"local://{tmp_path}/README\.md.*{says}"):
        open_folder(f"local://{tmp_path}").configs()


def test_a_missing_shard_is_named(tmp_path, remote):
    remote.server.fail("404", SHARDS[2], times=None)
    with pytest.raises(FileNotFoundError, match=rf"there is no colours/{SHARDS[2]} in {remote.url}"):
        contents(remote.load(tmp_path))


def test_has_and_check_room_ask_the_cache(tmp_path, http, files):
    folder = open_folder(http.url, cache_dir=tmp_path, cache_limit="50K").child("colours")
    assert not folder.has(files[0].sha256)
    folder.open(*files[0]).close()
    assert folder.has(files[0].sha256)
    folder.check_room(50_000, "one")
    with pytest.raises(rd.DatasetError, match=rf"is 50000 bytes, but the window of {http.url}/colours needs 50001"):
        folder.check_room(50_001, "the window")


def test_a_config_that_is_missing_but_in_the_card_is_named(remote, tmp_path):
    remote.server.fail("404", "colours/_info.json", times=None)
    with pytest.raises(rd.DatasetError, match=r"colours/_info\.json is missing, although the card lists this config"):
        remote.load(tmp_path)
