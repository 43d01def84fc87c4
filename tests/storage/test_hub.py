"""Datasets on the Hub are read at one commit, through the Hub's cache, and verified; errors say what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download, snapshot_download
from torch.utils.data import DataLoader

import relabel_datasets as rd
from relabel_datasets.errors import DatasetError, RefusedError
from relabel_datasets.storage import hub as hub_module
from tests.fixtures import INDEX, SHARDS, contents
from tests.versions import needs

REPO, TOKEN = "org/photos", "hf_of_a_user"
pytestmark = pytest.mark.usefixtures("impatient")

# Earlier clients read HF_HUB_OFFLINE when they first connect, and report a refused token as a missing file.
newer_client = needs("huggingface_hub", 1)


@pytest.fixture(autouse=True)
def _clean_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("RELABEL_CACHE", str(tmp_path / "our-cache"))
    monkeypatch.delenv("RELABEL_CACHE_LIMIT", raising=False)
    monkeypatch.delenv("RELABEL_NAMESPACE", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub_module, "PAUSES_S", (0, 0))
    monkeypatch.setattr(hub_module.with_hub_errors, "__defaults__", (None, (0, 0)))


@pytest.fixture
def hub(local_hub, served_folder):
    local_hub.publish(REPO, served_folder)
    return local_hub


def load(repo: str = REPO, name: str = "colours", split: str = "train", **arguments: object) -> rd.RelabelDataset:
    return rd.load_dataset(repo, name, split, **arguments)


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory, served_folder) -> Path:
    """Dataset with the same names, but other shards and a validation split."""
    folder = shutil.copytree(served_folder, tmp_path_factory.mktemp("other") / "dataset")
    shutil.rmtree(folder / "colours")
    images = served_folder.parent / "images"
    from relabel_datasets.annotate.annotator import ModuleAnnotator
    from tests.conftest import ColourNet

    annotator = ModuleAnnotator(ColourNet(), (48, 64), classes=("cat", "dog", "emu"), name="colours")
    for split in ("train", "validation"):
        rd.build(rd.data.ImageFolderSource(images), folder, annotator, config="colours", split=split,
                 build_config=rd.annotate.BuildConfig(batch_size=4, encoding="topk", k=2), shard_size=7, progress=False)  # fmt: skip
    return folder


class TestRevisions:
    def test_a_pinned_revision_serves_the_old_shards_after_a_new_publish(self, hub, other_folder, expected):
        old = hub.repos[REPO].head.oid
        hub.repos[REPO].tags["v1"] = old
        opened = load()  # no shard has been read
        files = {path.relative_to(other_folder).as_posix(): path.read_bytes()
                 for path in other_folder.rglob("*") if path.is_file()}  # fmt: skip
        hub.commit(REPO, {path: None for path in hub.files(REPO) if path != ".gitattributes"})
        hub.commit(REPO, files)
        assert contents(opened) == expected
        assert contents(load(revision="v1")) == contents(load(revision=old)) == expected
        new = contents(load())
        assert new == contents(rd.load_dataset(other_folder, "colours", "train")) != expected

    def test_configs_and_splits_load_by_name(self, local_hub, other_folder, image_folder):
        local_hub.publish(REPO, other_folder)
        splits = rd.load_dataset(REPO, "colours")
        assert {name: len(split) for name, split in splits.items()} == {"train": 13, "validation": 13}
        for name, split in splits.items():
            assert contents(split) == contents(rd.load_dataset(other_folder, "colours", name))
        joined = load(name="labels-only", images=image_folder)
        assert len(joined) == 13
        with pytest.raises(DatasetError, match=r"has several configs, name one of \['colours', 'labels-only'\]"):
            rd.load_dataset(REPO, split="train")
        with pytest.raises(DatasetError, match=r"has no config 'other', only \['colours', 'labels-only'\]"):
            load(name="other")
        with pytest.raises(DatasetError, match="no split 'test', only"):
            load(split="test")

    def test_a_branch_is_followed_at_each_opening(self, hub, expected):
        hub.repos[REPO].branches["mine"] = hub.repos[REPO].head.oid
        assert contents(load(revision="mine")) == expected
        hub.commit(REPO, {"colours/_info.json": None}, branch="mine")
        with pytest.raises(DatasetError, match=r"org/photos@.*is missing, although the card lists this config"):
            load(revision="mine")
        assert contents(load()) == expected

    def test_missing_revisions_repositories_and_files_are_named(self, hub):
        with pytest.raises(FileNotFoundError, match="no branch, tag or commit 'v7'"):
            load(revision="v7")
        with pytest.raises(
            FileNotFoundError, match="no folder org/other, and there is no dataset org/other on the Hub"
        ):
            load("org/other")
        hub.create("org/empty")
        with pytest.raises(
            FileNotFoundError, match=r"there is no README.md in org/empty on the Hub: the repository is not a dataset"
        ):
            load("org/empty")

    def test_arguments_of_the_hub_are_refused_for_local_folders(self, served_folder):
        for name in ("revision", "token", "namespace"):
            with pytest.raises(ValueError, match=f"{name}= is for .*, not for"):
                rd.load_dataset(served_folder, "colours", "train", **{name: "x"})

    def test_storage_options_are_refused(self, hub):
        with pytest.raises(ValueError, match="storage_options= is for URLs, not for org/photos on the Hub"):
            load(storage_options={"anon": True})


class TestAccess:
    def test_a_private_repository_needs_a_token(self, hub, expected, monkeypatch):
        hub.repos[REPO].private = True
        with pytest.raises(FileNotFoundError, match=r"no dataset org/photos .* or it is private: .*`hf auth login`"):
            load()
        with pytest.raises(FileNotFoundError, match="or it is private"):
            load(token="hf_of_another")
        assert contents(load(token=TOKEN)) == expected
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert contents(load()) == expected
        assert hub.leaks == []

    def test_the_error_for_a_gated_repository_says_where_to_request_access(self, hub, expected):
        hub.repos[REPO].gated = "manual"
        with pytest.raises(
            RefusedError, match=rf"org/photos is gated: request access at {hub.url}/datasets/org/photos"
        ):
            load(token="hf_of_another")
        hub.repos[REPO].granted.add("another")
        assert contents(load(token="hf_of_another")) == expected

    @newer_client
    def test_an_invalid_token_is_refused_and_not_shown(self, hub):
        with pytest.raises((RefusedError, FileNotFoundError), match="token") as caught:
            load(token="hf_of_nobody")
        assert "hf_of_nobody" not in str(caught.value)


class TestCache:
    @newer_client
    def test_files_of_hf_download_are_read_without_a_network(self, hub, expected, monkeypatch):
        snapshot_download(REPO, repo_type="dataset")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        hub.reset()
        assert contents(load()) == expected
        assert hub.requests == []

    @newer_client
    def test_a_downloaded_dataset_is_read_offline(self, hub, expected, monkeypatch):
        load(download=True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        hub.reset()
        assert contents(load()) == expected
        assert hub.requests == []

    @newer_client
    def test_offline_a_file_missing_in_the_cache_is_named(self, hub, monkeypatch):
        dataset = load()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(FileNotFoundError, match=r"train-0000.*HF_HUB_OFFLINE is set: load it once .*download=True"):
            dataset[0]
        with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set"):
            load("org/other")

    def test_without_a_network_the_cache_is_read(self, hub, expected):
        load(download=True)
        hub.fail("drop", "", times=None)
        hub.fail("503", "", method="HEAD", times=None)
        assert contents(load()) == expected

    def test_each_file_is_downloaded_once_and_only_when_needed(self, hub, expected):
        dataset = load()
        assert not [
            request for request in hub.gets("") if request.host.startswith("localhost") and ".tar" in request.path
        ]
        dataset[0]
        stored = lambda: [request.path for request in hub.gets("") if request.path.startswith("/lfs/")]  # noqa: E731
        assert len(stored()) == 2  # the index and a shard
        assert contents(dataset) == contents(load()) == expected
        assert len(stored()) == len(set(stored())) == 4

    @pytest.mark.parametrize("name", [SHARDS[1], INDEX])
    def test_a_damaged_file_in_the_cache_is_downloaded_again(self, hub, expected, name, caplog):
        path = Path(hf_hub_download(REPO, f"colours/{name}", repo_type="dataset")).resolve()
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        assert contents(load()) == expected
        assert f"{name}: its SHA-256 is" in caplog.text
        assert "downloading it again" in caplog.text

    def test_a_damaged_manifest_in_the_cache_is_downloaded_again(self, hub, expected, caplog):
        path = Path(hf_hub_download(REPO, "colours/_info.json", repo_type="dataset")).resolve()
        path.write_bytes(path.read_bytes()[:40])
        assert contents(load()) == expected
        assert "downloading it again" in caplog.text

    def test_a_damaged_card_in_the_cache_is_downloaded_again(self, hub, caplog):
        path = Path(hf_hub_download(REPO, "README.md", repo_type="dataset")).resolve()
        path.write_bytes(path.read_bytes()[:40])
        with pytest.raises(DatasetError, match="has several configs"):
            rd.load_dataset(REPO)
        assert "downloading it again" in caplog.text

    def test_a_damaged_file_on_the_hub_is_named(self, hub):
        shard = hub.files(REPO)[f"colours/{SHARDS[0]}"]
        hub.commit(REPO, {f"colours/{SHARDS[0]}": shard[:-1] + b"1"})
        with pytest.raises(
            DatasetError,
            match=rf"org/photos@\w+/colours/{SHARDS[0]}: its SHA-256 is .* instead of .*publish the dataset again",
        ):
            contents(load())

    def test_with_a_limit_shards_are_stored_in_the_cache_of_the_package(self, hub, expected, tmp_path, hf_cache):
        cache = tmp_path / "bounded"
        dataset = load(cache_dir=cache, cache_limit="1M")
        hub.commit(
            REPO, {f"colours/{name}": None for name in SHARDS}
        )  # the dataset still reads the commit at which it was opened
        assert contents(dataset) == expected
        assert {path.stat().st_size for path in (cache / "shards").iterdir()}
        assert not list(hf_cache.rglob("*.tar"))

    def test_cache_dir_replaces_the_hubs_cache(self, hub, expected, tmp_path, hf_cache):
        assert contents(load(cache_dir=tmp_path / "here")) == expected
        assert list((tmp_path / "here" / "hub").rglob("*.tar"))
        assert not list(hf_cache.rglob("*.tar"))

    @pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
    def test_a_stream_is_read_through_a_data_loader(self, hub, num_workers, expected):
        stream = rd.load_dataset(REPO, "colours", "train", streaming=True)
        loader = DataLoader(
            stream, batch_size=None, num_workers=num_workers, multiprocessing_context="spawn" if num_workers else None
        )
        assert sorted(label_map.key for _, label_map in loader) == sorted(key for key, *_ in expected)


class TestFaults:
    @pytest.mark.parametrize("kind", ["503", "429", "drop", "reset"])
    def test_failed_requests_are_repeated(self, hub, expected, kind):
        for path in ("README.md", "_info.json", INDEX, SHARDS[0]):
            hub.fail(kind, path, headers={"Retry-After": "0"} if kind == "429" else None)
        assert contents(load()) == expected

    @pytest.mark.parametrize("kind", ["drop", "short", "flip"])
    def test_shards_that_arrive_damaged_are_downloaded_again(self, hub, expected, kind):
        for sha256 in hub.objects:
            hub.fail(kind, sha256)
        assert contents(load()) == expected

    @pytest.mark.parametrize("kind", ["503", "drop"])
    def test_if_the_hub_stays_down_the_error_names_the_file(self, hub, kind):
        dataset = load()
        hub.fail(kind, "", times=None)
        hub.fail("503", "", method="HEAD", times=None)
        with pytest.raises(DatasetError, match=rf"org/photos@\w+/colours/{SHARDS[0]}"):
            dataset.label_maps.at(0)


class TestShortNames:
    def test_a_short_name_is_a_repository_of_a_namespace(
        self, local_hub, served_folder, expected, monkeypatch, tmp_path
    ):
        for repo in ("relabel-datasets/imagenet-relabel", "mine/imagenet-relabel"):
            local_hub.publish(repo, served_folder)
        for arguments in ({}, {"namespace": "mine"}):
            local_hub.reset()
            assert contents(load("imagenet-relabel", **arguments)) == expected
            asked = {
                request.path.split("/resolve/")[0] for request in local_hub.requests if "/resolve/" in request.path
            }
            assert asked == {f"/datasets/{arguments.get('namespace', 'relabel-datasets')}/imagenet-relabel"}
        monkeypatch.setenv("RELABEL_NAMESPACE", "mine")
        local_hub.reset()
        load("imagenet-relabel")
        assert local_hub.requests
        assert all("relabel-datasets" not in request.path for request in local_hub.requests)

    def test_the_cache_has_precedence_unless_a_namespace_is_given(
        self, local_hub, served_folder, other_folder, expected, tmp_path
    ):
        local_hub.publish("mine/imagenet-relabel", other_folder)
        shutil.copytree(served_folder, tmp_path / "our-cache" / "imagenet-relabel")
        assert contents(load("imagenet-relabel")) == expected
        assert local_hub.requests == []
        assert contents(load("imagenet-relabel", namespace="mine")) == contents(load(other_folder)) != expected

    def test_the_error_for_a_missing_dataset_says_how_to_get_it(self, local_hub, tmp_path):
        with pytest.raises(FileNotFoundError) as caught:
            load("imagenet-relabel", namespace="mine")
        for words in (
            str(tmp_path / "our-cache"),
            "mine/imagenet-relabel",
            "builders/imagenet_relabel.py",
            "RELABEL_NAMESPACE",
        ):
            assert words in str(caught.value)

    def test_a_dataset_that_is_built_locally_has_no_revision(self):
        with pytest.raises(ValueError, match="scenes-relabel is built locally and is not on the Hub"):
            rd.load_dataset("scenes-relabel", split="train", revision="v1")


def test_verify_reads_a_dataset_on_the_hub(hub, capsys):
    from relabel_datasets.cli import main

    hub.repos[REPO].tags["v1"] = hub.repos[REPO].head.oid
    broken = hub.files(REPO)[f"colours/{SHARDS[0]}"]
    assert main(["verify", REPO, "--num-workers", "1"]) == 0
    hub.commit(REPO, {f"colours/{SHARDS[0]}": broken[:-1] + b"1"})
    assert main(["verify", REPO, "--revision", "v1", "--num-workers", "1"]) == 0
    capsys.readouterr()
    assert main(["verify", REPO, "--num-workers", "1", "--json", "-"]) == 1
    assert SHARDS[0] in json.dumps(json.loads(capsys.readouterr().out))
