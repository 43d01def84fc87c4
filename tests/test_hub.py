"""Publishing is atomic under faults, and published datasets load like the local folder."""

from __future__ import annotations

import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import datasets
import PIL.Image
import pytest
import torch
import webdataset
import yaml

import relabel_datasets as rd
from relabel_datasets import hub as hub_module
from relabel_datasets.errors import DatasetError
from relabel_datasets.report.overlay import contact_sheet
from tests.conftest import ROOT, picture
from tests.fixtures import contents
from tests.hub import LocalHub

REPO, TOKEN = "org/photos", "hf_of_a_user"
CONFIGS = ("colours", "labels-only")
# webdataset leaves tar files open until they are garbage-collected
_UNCLOSED = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

pytestmark = [pytest.mark.usefixtures("impatient"), *_UNCLOSED]


def slow(parameter: object) -> object:
    return pytest.param(parameter, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def _caches(request, tmp_path, monkeypatch):
    monkeypatch.setenv("RELABEL_CACHE", str(tmp_path / "our-cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    monkeypatch.setattr(hub_module, "_COMMIT_PAUSES_S", (0.01, 0.01, 0.01))
    monkeypatch.setattr("relabel_datasets.storage.retries.time.sleep", lambda _: None)
    # Worker processes and drawing take most of the time of publishing so few samples; the slow tests have both.
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(hub_module, "verify", partial(rd.verify, num_workers=0))
        monkeypatch.setattr(hub_module, "contact_sheet", _one_image)
    datasets.disable_progress_bars()


def _one_image(dataset: rd.RelabelDataset) -> PIL.Image.Image:
    return dataset[0][0]


@pytest.fixture
def folder(dataset_folder) -> Path:
    """A dataset with two configs."""
    return dataset_folder


def publish(folder: Path, repo: str = REPO, **arguments: object) -> rd.hub.PublishResult:
    return rd.publish(folder, repo, progress=False, **arguments)


def load(name: str = "colours", repo: str = REPO, **arguments: object) -> rd.RelabelDataset:
    return rd.load_dataset(repo, name, "train", **arguments)


def maps_of(root: Path | str, name: str) -> dict[str, bytes]:
    """Return the stored label maps of a split by key."""
    maps = rd.LabelMaps(root, name)
    return {key: maps.shards.read(row, maps.index.extent(row, "map"), key) for row, key in enumerate(maps)}


def assert_holds(hub: LocalHub, folder: Path, revision: str = "main", repo: str = REPO) -> None:
    """Assert that the repository holds the files of a folder, the card, example pictures, and nothing else."""
    files = hub.files(repo, revision)
    expected = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.glob("*/*") if path.is_file()}
    pictures = {name for name in files if name.endswith("/examples.png")}
    assert {name: files[name] for name in files.keys() - pictures - {"README.md", ".gitattributes"}} == expected


class TestPublishing:
    def test_every_reader_gets_every_sample(self, local_hub, folder):
        result = publish(folder)
        assert_holds(local_hub, folder)
        assert (result.commit, result.tag) == (local_hub.repos[REPO].head.oid, "v1")
        expected = contents(rd.load_dataset(folder, "colours", "train"))
        assert contents(load()) == expected
        streamed = datasets.load_dataset(REPO, "colours", split="train", streaming=True)
        streamed = streamed.cast_column("jpg", datasets.Image(decode=False))
        assert [
            (sample["__key__"], sample["cls"], sample["jpg"]["bytes"], sample["safetensors"]) for sample in streamed
        ] == expected
        tars = f"hf://datasets/{REPO}/colours/train-{{00000..00002}}-of-00003.tar"
        read = webdataset.WebDataset(tars, shardshuffle=False)
        assert [
            (sample["__key__"], int(sample["cls"]), sample["jpg"], sample["safetensors"]) for sample in read
        ] == expected

        maps = maps_of(folder, "labels-only")
        assert maps_of(REPO, "labels-only") == maps
        streamed = datasets.load_dataset(REPO, "labels-only", split="train", streaming=True)
        assert {sample["__key__"]: sample["safetensors"] for sample in streamed} == maps
        read = webdataset.WebDataset(tars.replace("/colours/", "/labels-only/"), shardshuffle=False)
        assert {sample["__key__"]: sample["safetensors"] for sample in read} == maps
        assert local_hub.leaks == []

    def test_load_line_loads_the_dataset(self, local_hub, folder, image_folder):
        for config in CONFIGS:
            line = publish(folder, f"org/{config}", config=config).load_line
            line = line.replace("path/to/images", str(image_folder))
            dataset = eval(line, {"load_dataset": rd.load_dataset})
            assert len(dataset) == 13
            assert ("images=" in line) == (config == "labels-only")

    def test_a_repository_is_private_by_default(self, local_hub, folder, caplog):
        publish(folder)
        publish(folder, "org/seen", public=True)
        assert local_hub.repos[REPO].private
        assert not local_hub.repos["org/seen"].private
        publish(folder, public=True)
        assert local_hub.repos[REPO].private
        assert "org/photos exists and remains private" in caplog.text

    def test_publishing_again_uploads_nothing(self, local_hub, folder):
        first = publish(folder)
        local_hub.reset()
        assert publish(folder) == first
        assert not local_hub.asked("PUT")
        assert not local_hub.asked("POST", "/commit/main")
        assert len(local_hub.uploads) == len(set(local_hub.uploads))

    def test_only_changed_files_are_uploaded(self, local_hub, folder, image_folder, annotator):
        publish(folder)
        uploads = len(local_hub.uploads)
        rd.build(rd.data.ImageFolderSource(image_folder), folder, annotator, config="colours", split="validation",
                 shard_size=5, progress=False, build_config=rd.annotate.BuildConfig(batch_size=4))  # fmt: skip
        second = publish(folder)
        assert second.tag == "v2"
        assert_holds(local_hub, folder)
        changed = {"colours/validation.index.safetensors"}
        changed |= {f"colours/validation-{i:05d}-of-00003.tar" for i in range(3)}
        before, after = local_hub.files(REPO, "v1"), local_hub.files(REPO, "v2")
        assert {name for name in after if name not in before} == changed
        assert len(local_hub.uploads) == uploads  # equal shards are recognized by their sha256
        assert {name: len(split) for name, split in rd.load_dataset(REPO, "colours").items()} == {
            "train": 13, "validation": 13}  # fmt: skip

    def test_obsolete_shards_are_deleted_and_other_files_are_kept(self, local_hub, folder, image_folder, annotator):
        publish(folder)
        local_hub.commit(
            REPO, {"colours/notes.txt": b"mine", "colours/other.tar": b"of an older build", "a/b.tar": b"c"}
        )
        shutil.rmtree(folder / "colours")
        rd.build(
            rd.data.ImageFolderSource(image_folder), folder, annotator, config="colours", shard_size=7, progress=False
        )
        publish(folder)
        files = local_hub.files(REPO)
        tars = {name for name in files if name.startswith("colours/") and name.endswith(".tar")}
        assert tars == {"colours/train-00000-of-00002.tar", "colours/train-00001-of-00002.tar"}
        assert files["colours/notes.txt"] == b"mine"
        assert files["a/b.tar"] == b"c"

    def test_configs_can_be_published_one_by_one(self, local_hub, folder, tmp_path):
        for name in CONFIGS:
            single = tmp_path / f"only-{name}"
            shutil.copytree(folder / name, single / name)
            hub_module.write_card(single)
            publish(single)
        assert_holds(local_hub, folder)
        card = local_hub.files(REPO)["README.md"].decode()
        assert card.count("## Config `") == 2
        assert "](colours/examples.png)" in card
        for name in CONFIGS:
            assert maps_of(REPO, name) == maps_of(folder, name)
        before = local_hub.files(REPO)
        publish(folder, config="labels-only")
        assert local_hub.files(REPO) == before

    def test_concurrent_publishing_is_safe(self, local_hub, folder):
        # The repository changes between the comparison and the commit of each process.
        with ThreadPoolExecutor(2) as pool:
            tags = {result.tag for result in pool.map(lambda name: publish(folder, config=name), CONFIGS)}
        assert_holds(local_hub, folder)
        assert tags == {"v1", "v2"}
        assert local_hub.files(REPO)["README.md"].count(b"## Config `") == 2

    def test_a_concurrent_commit_is_not_overwritten(self, local_hub, folder):
        def intervene(request):
            if request.method == "POST" and request.path.endswith("/commit/main"):
                local_hub.before = None
                local_hub.commit(REPO, {"other.txt": b"other"})

        local_hub.before = intervene
        publish(folder)
        assert local_hub.files(REPO)["other.txt"] == b"other"
        assert len(local_hub.asked("POST", "/commit/main")) == 2
        assert contents(load()) == contents(rd.load_dataset(folder, "colours", "train"))

    def test_publishing_never_deletes_a_split(self, local_hub, folder, image_folder, annotator):
        more = shutil.copytree(folder, folder.with_name("more"))
        rd.build(rd.data.ImageFolderSource(image_folder), more, annotator, config="colours", split="validation",
                 shard_size=5, progress=False, build_config=rd.annotate.BuildConfig(batch_size=4))  # fmt: skip
        publish(more)
        head = local_hub.repos[REPO].head.oid
        with pytest.raises(DatasetError, match=r"has splits \['validation'\] of config 'colours' that are missing in"):
            publish(folder)
        assert local_hub.repos[REPO].head.oid == head

    @pytest.mark.slow
    def test_tags_are_permanent(self, local_hub, folder):
        assert publish(folder, config="colours", tag="first").tag == "first"
        assert publish(folder, config="colours").tag == "first"  # unchanged
        with pytest.raises(DatasetError, match=r"org/photos already has a tag 'first'"):
            publish(folder, tag="first")
        assert "labels-only/_info.json" not in local_hub.files(REPO)
        assert publish(folder).tag == "v1"
        assert publish(folder, tag="also").tag == "also"
        assert set(local_hub.repos[REPO].tags) == {"first", "v1", "also"}

    def test_a_corrupt_dataset_is_not_published(self, local_hub, folder):
        shard = folder / "colours" / "train-00001-of-00003.tar"
        shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(DatasetError, match=r"is corrupt, nothing was published:[\s\S]*train-00001-of-00003.tar"):
            publish(folder)
        assert local_hub.requests == []

    @pytest.mark.parametrize(
        ("subfolder", "config", "error"),
        [
            ("", "other", r"has no config 'other': expected one of \['colours', 'labels-only'\]"),
            ("colours", None, "is one config of a dataset: give its parent folder"),
            ("nowhere", None, "no dataset at .*/nowhere: there is no such folder"),
            ("empty", None, "no dataset at .*/empty: expected"),
        ],
    )
    def test_a_folder_that_is_not_a_dataset_raises_an_error(self, local_hub, folder, subfolder, config, error):
        (folder / "empty").mkdir()
        with pytest.raises((DatasetError, FileNotFoundError), match=error):
            publish(folder / subfolder, config=config)
        assert local_hub.requests == []

    def test_a_file_that_changes_during_publishing_raises_an_error(self, local_hub, folder, monkeypatch):
        shard = folder / "colours" / "train-00001-of-00003.tar"
        create = hub_module._Publisher.create

        def change(self, public):
            create(self, public)
            shard.write_bytes(shard.read_bytes()[:-1] + b"1")

        monkeypatch.setattr(hub_module._Publisher, "create", change)
        with pytest.raises(DatasetError, match=r"train-00001-of-00003\.tar has changed during publishing"):
            publish(folder)
        assert "colours/_info.json" not in local_hub.files(REPO)

    def test_a_corrupt_upload_raises_an_error(self, local_hub, folder):
        def damage(request):
            if "/tree/" in request.path and "colours/_info.json" in local_hub.files(REPO):
                file = local_hub.repos[REPO].resolve("main").files["colours/train-00001-of-00003.tar"]
                object.__setattr__(file, "sha256", "0" * 64)

        local_hub.before = damage
        with pytest.raises(
            DatasetError, match=r"colours/train-00001-of-00003\.tar in commit \w+ does not match the uploaded file"
        ):
            publish(folder)


class Thousand(torch.nn.Module):
    """A classifier with 1000 classes."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images, 8)[:, :1].expand(-1, 1000, -1, -1)


class TestCardsAndRestrictedImages:
    def test_restricted_images_raise_an_error(self, local_hub, folder):
        with pytest.raises(
            DatasetError, match=r"contain images of ImageNet, which must not .*restricted_images='ImageNet'"
        ):
            publish(folder, card="imagenet-relabel")
        with pytest.raises(DatasetError, match="contain images of ImageNet"):
            publish(folder, card="imagenet-relabel", restricted_images="Images")
        assert [name for name in local_hub.files(REPO) if name != ".gitattributes"] == []
        assert not local_hub.uploads
        publish(folder, config="labels-only", card="imagenet-relabel")
        assert {name.split("/")[0] for name in local_hub.files(REPO)} == {".gitattributes", "README.md", "labels-only"}

    def test_restricted_images_can_be_allowed_by_name(self, local_hub, folder):
        publish(folder, card="imagenet-relabel", restricted_images="ImageNet")
        assert_holds(local_hub, folder)
        assert "colours/examples.png" not in local_hub.files(REPO)
        assert b"examples.png" not in local_hub.files(REPO)["README.md"]

    def test_imagenet_is_recognized_by_its_classes(self, local_hub, tmp_path):
        synsets = [f"n{i:08d}" for i in range(1000)]
        for i in range(3):
            (tmp_path / "images" / synsets[i]).mkdir(parents=True)
            picture(i).save(tmp_path / "images" / synsets[i] / f"{i}.jpg")
        source = rd.data.ImageFolderSource(tmp_path / "images")
        source.classes = None  # those of the annotator
        root = tmp_path / "data"
        rd.build(source, root, rd.ModuleAnnotator(Thousand(), (32, 32), classes=synsets), config="any", progress=False)
        with pytest.raises(DatasetError, match="contain images of ImageNet"):
            publish(root)

    def test_handwritten_cards_are_kept(self, local_hub, folder):
        handwritten = "---\nlicense: mit\npretty_name: Ours\n---\n# Ours\n\nAll about them.\n"
        publish(folder)
        local_hub.commit(REPO, {"README.md": handwritten.encode()})
        publish(folder)
        card = local_hub.files(REPO)["README.md"].decode()
        assert card.endswith("# Ours\n\nAll about them.\n")
        metadata = read_metadata_of(card)
        assert (metadata["license"], metadata["pretty_name"]) == ("mit", "Ours")
        assert [config["config_name"] for config in metadata["configs"]] == list(CONFIGS)
        (folder / "README.md").write_text(handwritten.replace("All about", "More about"))
        publish(folder)
        assert "More about them." in local_hub.files(REPO)["README.md"].decode()

    def test_restrictions_of_handwritten_cards_apply(self, local_hub, folder):
        (folder / "README.md").write_text("---\nrestricted_images: Photos of ours\n---\n# Ours\n")
        with pytest.raises(DatasetError, match="restricted_images='Photos of ours'"):
            publish(folder)

    def test_example_pictures_are_published(self, local_hub, folder, monkeypatch):
        monkeypatch.setattr(hub_module, "contact_sheet", contact_sheet)
        publish(folder)
        data = local_hub.files(REPO)["colours/examples.png"]
        picture = PIL.Image.open(io.BytesIO(data))
        assert picture.width > 600
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
        assert "labels-only/examples.png" not in local_hub.files(REPO)


def read_metadata_of(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---")[1])


ENDPOINTS = (
    ("POST", "/api/repos/create"), ("GET", f"/api/datasets/{REPO}"), ("POST", "/validate-yaml"),
    ("POST", "/preupload/main"), ("POST", "/objects/batch"), ("POST", "/objects/verify"), ("POST", "/commit/main"),
    ("GET", "/refs"), ("POST", "/tag/"), ("PUT", ""),
)  # fmt: skip
DEFAULT_FAULTS = (("POST", "/commit/main", "lost"), ("POST", "/commit/main", "503"), ("PUT", "", "drop"))


class TestFailing:
    """Publishing survives a fault of each request, and uploads no file twice."""

    @pytest.mark.parametrize(
        ("method", "path", "fault"),
        [
            pytest.param(*endpoint, fault, marks=() if (*endpoint, fault) in DEFAULT_FAULTS else pytest.mark.slow)
            for endpoint, fault in itertools.product(ENDPOINTS, ["503", "429", "drop", "lost"])
        ],
    )
    def test_one_fault_is_survived(self, local_hub, folder, method, path, fault):
        if path == "/tag/":  # the path contains the commit

            def arm(request):
                if "/tag/" in request.path:
                    local_hub.before = None
                    local_hub.fail(fault, request.path, method="POST")

            local_hub.before = arm
        else:
            local_hub.fail(fault, path, method=method, headers={"Retry-After": "0"} if fault == "429" else None)
        result = publish(folder)
        assert_holds(local_hub, folder)
        assert local_hub.repos[REPO].tags == {result.tag: result.commit} == {"v1": local_hub.repos[REPO].head.oid}
        assert (
            len(local_hub.repos[REPO].history(local_hub.repos[REPO].head)) == 2
        )  # the first is the initial commit of the Hub
        if fault != "lost":
            assert len(local_hub.uploads) == len(set(local_hub.uploads))

    @pytest.mark.slow
    def test_publishing_resumes_after_an_outage(self, local_hub, folder):
        local_hub.fail("503", "/commit/main", method="POST", times=None)
        with pytest.raises(DatasetError, match=r"org/photos: the Hub answers 503"):
            publish(folder)
        assert len(local_hub.repos[REPO].history(local_hub.repos[REPO].head)) == 1
        uploads = list(local_hub.uploads)
        assert len(uploads) == len(set(uploads)) == 9  # 2 configs with 3 shards and an index each, and a picture
        local_hub.reset()
        publish(folder)
        assert_holds(local_hub, folder)
        assert local_hub.uploads == uploads

    @pytest.mark.parametrize("after", [slow(step) for step in (0, 1, 4, 8, "commit", "tag")])
    def test_publishing_resumes_after_sigkill_at_any_step(self, local_hub, folder, after, tmp_path):
        if isinstance(after, int):
            local_hub.fail("stall", "", method="PUT", after=after, times=None)
        elif after == "commit":
            local_hub.fail("stall", "/commit/main", method="POST")
        else:
            local_hub.fail("stall", "/refs", method="GET")
        process = run_cli("publish", folder, REPO)
        end = time.monotonic() + 300  # on a busy machine, a process may take a minute to start
        while not is_stalled(local_hub, after):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        uploads = list(local_hub.uploads)
        is_committed = after == "tag"
        assert ("colours/_info.json" in local_hub.files(REPO)) == is_committed
        local_hub.reset()
        assert publish(folder).tag == "v1"
        assert_holds(local_hub, folder)
        assert local_hub.uploads[: len(uploads)] == uploads
        assert len(local_hub.uploads) == len(set(local_hub.uploads))
        assert contents(load()) == contents(rd.load_dataset(folder, "colours", "train"))

    @pytest.mark.parametrize(
        ("token", "repo", "error"),
        [
            ("hf_of_another", REPO, "the Hub refuses access: .*: check the token"),
            ("hf_of_nobody", REPO, "the Hub refuses access: .*: check the token"),
            (TOKEN, "not a name", "is not the name of a repository"),
        ],
    )
    def test_missing_write_access_raises_an_error(self, local_hub, folder, monkeypatch, token, repo, error):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(DatasetError, match=error) as caught:
            publish(folder, repo)
        assert token not in str(caught.value)
        assert local_hub.repos == {}


def is_stalled(hub: LocalHub, after: int | str) -> bool:
    if isinstance(after, int):
        return len(hub.uploads) >= after and len(hub.asked("PUT")) > after
    return bool(hub.asked("POST", "/commit/main") if after == "commit" else hub.asked("GET", "/refs"))


def run_cli(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    code = "import sys; from relabel_datasets.cli import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
