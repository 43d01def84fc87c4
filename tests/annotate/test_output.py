"""Builds that write to URLs, to unwritable folders and to full disks."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import relabel_datasets as rd
from relabel_datasets.cli import main
from relabel_datasets.storage.output import LocalOutput, open_output
from tests.annotate.test_builder import Interrupted, StopsAfter, annotator_of, files_of
from tests.conftest import ROOT
from tests.servers import s3_server

URL = f"memory://bucket-{os.getpid()}/data"  # its lock is shared by all processes of the machine
OPTIONS = {"shard_size": 4, "build_config": rd.annotate.BuildConfig(batch_size=2), "progress": False}


class PlainFileSystem(MemoryFileSystem):
    """File system that shows incomplete files and requires parent folders."""

    protocol = "plain"
    store: dict = {}  # noqa: RUF012  as in the base class
    pseudo_dirs = [""]  # noqa: RUF012
    seen: list = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("plain://"))

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        assert self.isdir(self._parent(path)), path
        self.seen.append(path)
        super().pipe_file(path, value, mode=mode, **kwargs)

    def put_file(self, lpath, rpath, *args, **kwargs):
        assert self.isdir(self._parent(rpath)), rpath
        self.seen.append(rpath)
        super().put_file(lpath, rpath, *args, **kwargs)


fsspec.register_implementation("plain", PlainFileSystem, clobber=True)


@pytest.fixture
def source(image_folder):
    return rd.data.ImageFolderSource(image_folder)


@pytest.fixture
def whole(tmp_path, source, annotator):
    rd.build(source, tmp_path / "whole", annotator, **OPTIONS)
    return tmp_path / "whole"


@pytest.fixture(params=["memory", "plain"])
def url(request):
    files = fsspec.filesystem(request.param)
    yield f"{request.param}://bucket/data"
    if files.exists("/bucket"):
        files.rm("/bucket", recursive=True)


def remote_files(url):
    files, root = fsspec.core.url_to_fs(url)
    return {path.removeprefix(f"{root}/"): files.cat(path) for path in files.find(root)}


def local_files(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_builds_to_a_url_and_a_folder_write_the_same_files(tmp_path, source, annotator, whole, url):
    rd.build(source, url, annotator, **OPTIONS)
    assert remote_files(url) == local_files(whole)
    if url.startswith("memory"):
        dataset = rd.load_dataset(url, split="train", cache_dir=tmp_path / "cache")
        assert len(dataset) == 13
        assert dataset[3][1].num_classes == 3


def test_files_on_any_protocol_are_complete_or_absent(source, annotator):
    PlainFileSystem.seen.clear()
    rd.build(source, "plain://bucket/data", annotator, **OPTIONS)
    assert len(PlainFileSystem.seen) > 10
    assert all(path.rsplit("/", 1)[1].startswith(".") for path in PlainFileSystem.seen)
    fsspec.filesystem("plain").rm("/bucket", recursive=True)


def test_a_build_to_a_url_is_resumed(source, annotator, whole, url):
    with pytest.raises(Interrupted):
        rd.build(source, url, annotator_of(StopsAfter(5)), **OPTIONS)
    assert sum(name.endswith(".tar") for name in remote_files(url)) == 2
    rest = StopsAfter(3)
    rd.build(source, url, annotator_of(rest), **OPTIONS)
    assert rest.left == 0
    assert remote_files(url) == local_files(whole)
    rd.build(source, url, annotator_of(StopsAfter(0)), **OPTIONS)  # nothing is left to do
    rd.build(source, url, annotator, split="validation", **OPTIONS)
    assert sorted(rd.LabelMaps(url, split="validation").manifest.splits) == ["train", "validation"]
    with pytest.raises(rd.DatasetError, match="encoding"):
        rd.build(source, url, annotator, **{**OPTIONS, "build_config": rd.annotate.BuildConfig(encoding="topk")})


@pytest.fixture
def temp(tmp_path, monkeypatch):
    """Empty folder for temporary files."""
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    return tmp_path / "temp"


def test_a_build_to_a_url_leaves_no_temporary_files_whether_it_ends_or_fails(source, annotator, temp):
    with pytest.raises(Interrupted):
        rd.build(source, URL, annotator_of(StopsAfter(5)), **OPTIONS)
    gc.collect()  # the traceback of the error
    assert list(temp.iterdir()) == []
    rd.build(source, URL, annotator, **OPTIONS)
    assert list(temp.iterdir()) == []
    fsspec.filesystem("memory").rm(URL, recursive=True)


KILLED = """
import os, signal, sys, tempfile
import relabel_datasets as rd
from tests.annotate.test_builder import annotator_of
from tests.annotate.test_output import OPTIONS, Calls

kill = Calls(5, lambda: os.kill(os.getpid(), signal.SIGKILL))
rd.build(rd.data.ImageFolderSource(sys.argv[1]), "memory://bucket/data", annotator_of(kill), **OPTIONS)
"""


@pytest.mark.slow  # tests of `temporary_folder` cover a killed process
def test_the_next_build_to_any_url_removes_the_shards_of_a_killed_one(source, image_folder, annotator, temp):
    process = subprocess.run(
        [sys.executable, "-c", KILLED, image_folder], env={**os.environ, "TMPDIR": str(temp)}, cwd=ROOT
    )
    assert process.returncode == -signal.SIGKILL
    assert [path for path in temp.glob("relabel-build-*/*") if ".tar" in path.name]
    rd.build(source, URL, annotator, **OPTIONS)
    assert list(temp.glob("relabel-build-*")) == []
    fsspec.filesystem("memory").rm(URL, recursive=True)


def test_failed_and_truncated_uploads_are_retried(source, annotator, whole, monkeypatch):
    monkeypatch.setattr("relabel_datasets.storage.output._PAUSES_S", (0, 0))
    monkeypatch.setattr("relabel_datasets.storage.output.RemoteOutput._try.__defaults__", ((0, 0),))
    put, faults = MemoryFileSystem.put_file, ["dropped", "cut", None, "cut"]

    def fail(self, local, remote, *arguments, **more):
        fault = faults.pop(0) if faults else None
        if fault == "dropped":
            raise OSError("connection reset")
        put(self, local, remote, *arguments, **more)
        if fault == "cut":
            self.pipe_file(remote, self.cat_file(remote)[:-1])

    monkeypatch.setattr(MemoryFileSystem, "put_file", fail)
    rd.build(source, URL, annotator, **OPTIONS)
    assert not faults
    assert remote_files(URL) == local_files(whole)
    faults[:] = ["dropped"] * 3
    with pytest.raises(OSError, match=URL + r"/colours/validation-00000-of-00004.tar .*connection reset"):
        rd.build(source, URL, annotator, split="validation", **OPTIONS)
    fsspec.filesystem("memory").rm(URL, recursive=True)


def test_the_command_writes_to_s3_with_credentials_of_the_environment(
    tmp_path, image_folder, checkpoint, monkeypatch, capsys
):
    model = ["--annotator", "mobilenetv3_small_050", "--model-kwargs", "num_classes=3", "--input-size", "64"]
    arguments = [*model, "--checkpoint", checkpoint, "--shard-size", "5"]
    assert main(["build", str(image_folder), str(tmp_path / "whole"), *arguments]) == 0
    (tmp_path / "empty").mkdir()
    with s3_server(tmp_path / "empty", "bucket") as address:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing-secret")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
        monkeypatch.setenv("RELABEL_CACHE", str(tmp_path / "cache"))
        capsys.readouterr()
        assert main(["build", str(image_folder), "s3://bucket/data/", *arguments]) == 0
        call = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("load_dataset("))
        dataset = eval(call, {"load_dataset": rd.load_dataset})
        assert len(dataset) == 13
        assert dataset[0][1].canvas_size in {(40, 56), (48, 32)}
        fsspec.filesystem("s3").invalidate_cache()
        assert {"data/" + name for name in local_files(tmp_path / "whole")} == set(remote_files("s3://bucket"))
        assert main(["build", str(image_folder), "s3://no-such-bucket/data", *arguments]) == 1
        assert "s3://no-such-bucket/data" in (error := capsys.readouterr().err)
        assert "testing-secret" not in error


@pytest.fixture
def checkpoint(tmp_path):
    import timm
    from safetensors.torch import save_file

    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model("mobilenetv3_small_050", num_classes=3).state_dict(), path)
    return str(path)


def test_read_only_protocols_are_refused_before_any_work(source):
    with pytest.raises(OSError, match=r"http://127.0.0.1:9/data"):
        rd.build(source, "http://127.0.0.1:9/data", never_made, progress=False)


@pytest.mark.parametrize("name", ["data*", "da[ta]", "d*/data?x=1"])
def test_a_url_that_fsspec_reads_as_a_pattern_is_refused_before_any_work(source, name):
    with pytest.raises(ValueError, match=r"memory://bucket/d.*: a dataset cannot be written to a URL with \* or \["):
        rd.build(source, f"memory://bucket/{name}", never_made, progress=False)


def never_made():
    raise AssertionError("the annotator must be created after the check of the output")


def test_a_full_disk_stops_the_build_without_damage(source, annotator, whole, small_disk):
    (small_disk / "other").write_bytes(bytes(960_000))
    with pytest.raises(OSError, match=rf"the disk of {small_disk}/data/colours is full: free some space"):
        rd.build(source, small_disk / "data", annotator, **OPTIONS)
    assert not list(small_disk.rglob(".train*.tmp"))
    (small_disk / "other").unlink()
    rd.build(source, small_disk / "data", annotator, **OPTIONS)
    assert local_files(small_disk / "data") == local_files(whole)


def test_an_unwritable_folder_is_refused_before_any_work(source, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OSError, match=f"{small_disk}/data cannot be written to"):
        rd.build(source, small_disk / "data", never_made, progress=False)


def test_checking_whether_a_folder_is_writable_leaves_no_files(tmp_path):
    open_output(tmp_path / "some" / "folder").check_writable()
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_the_folder_is_refused(tmp_path, source):
    (tmp_path / "data").touch()
    with pytest.raises(OSError, match="data cannot be written to"):
        rd.build(source, tmp_path / "data", never_made, progress=False)


class Calls(StopsAfter):
    """Network that calls a function after n batches and continues."""

    def __init__(self, batches, function):
        super().__init__(batches)
        self.function = function

    def forward(self, images):
        if self.left == 0:
            self.function()
            self.left = 1000
        return super().forward(images)


@pytest.mark.parametrize("batches", [5, 6])
def test_removing_the_folder_stops_the_build(tmp_path, source, annotator, whole, batches):
    root = tmp_path / "data"

    def remove():
        root.rename(tmp_path / "removed")  # atomic, because rmtree fails if the writer renames a file at the same time
        shutil.rmtree(tmp_path / "removed")

    with pytest.raises(FileNotFoundError, match=f"{root}/colours was removed during the build"):
        rd.build(source, root, annotator_of(Calls(batches, remove)), **OPTIONS)
    rd.build(source, root, annotator, **OPTIONS)
    assert local_files(root) == local_files(whole)


def test_a_shard_removed_during_the_build_is_reported_and_rebuilt(tmp_path, source, annotator, whole):
    root = tmp_path / "data"
    shard = root / "colours" / "train-00000-of-00004.tar"

    def remove():
        deadline = time.monotonic() + 60
        while not shard.exists():  # it is completed while later batches are annotated
            assert time.monotonic() < deadline
            time.sleep(0.01)
        shard.unlink()

    with pytest.raises(rd.DatasetError, match=f"{shard} is missing: it was removed"):
        rd.build(source, root, annotator_of(Calls(5, remove)), **OPTIONS)
    rest = StopsAfter(2)
    rd.build(source, root, annotator_of(rest), **OPTIONS)
    assert rest.left == 0
    assert local_files(root) == local_files(whole)


def test_images_removed_during_the_build_are_skipped_and_listed(tmp_path, image_folder, source, annotator):
    lost = image_folder / "cat" / "photo_03.jpg"
    manifest = rd.build(source, tmp_path / "data", annotator_of(Calls(1, lost.unlink)), **OPTIONS)
    skipped = manifest.splits["train"].skipped
    assert [entry["key"] for entry in skipped] in (["photo_03"], [])  # unless it was prefetched


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
@pytest.mark.parametrize("finished", [True, False])
def test_only_a_damaged_shard_is_rebuilt(tmp_path, source, annotator, whole, damage, finished):
    root = tmp_path / "data"
    if finished:
        rd.build(source, root, annotator, **OPTIONS)
    else:
        with pytest.raises(Interrupted):
            rd.build(source, root, annotator_of(StopsAfter(5)), **OPTIONS)
    path = root / "colours" / "train-00001-of-00004.tar"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[600] ^= 1
    path.write_bytes(data[:-1] if damage == "cut" else data)
    if damage == "remove":
        path.unlink()
    rest = StopsAfter(2 if finished else 5)
    rd.build(source, root, annotator_of(rest), **OPTIONS)
    assert rest.left == 0
    assert local_files(root) == local_files(whole)


def test_a_damaged_index_or_record_is_rebuilt(tmp_path, source, annotator, whole):
    root = tmp_path / "data"
    with pytest.raises(Interrupted):
        rd.build(source, root, annotator_of(StopsAfter(5)), **OPTIONS)
    (root / "colours" / ".build-train" / "train-00000-of-00004.tar.json").write_text("{")
    rd.build(source, root, annotator_of(StopsAfter(5)), **OPTIONS)
    (root / "colours" / "train.index.safetensors").write_bytes(b"")
    rd.build(source, root, annotator_of(StopsAfter(0)), **OPTIONS)
    assert local_files(root) == local_files(whole)


def test_a_damaged_split_is_not_repaired_with_another_shard_size(tmp_path, source, annotator):
    rd.build(source, tmp_path, annotator, **OPTIONS)
    (tmp_path / "colours" / "train-00001-of-00004.tar").unlink()
    with pytest.raises(rd.DatasetError, match="Use the shard_size it was built with, 4"):
        rd.build(source, tmp_path, annotator, **{**OPTIONS, "shard_size": 5})


def test_temporary_files_of_killed_builders_are_removed(tmp_path, source, annotator, whole):
    root = tmp_path / "data"
    folder = root / "colours"
    folder.mkdir(parents=True)
    for name in (".train-00000-of-00004.tar.old-1.tmp", ".train.index.safetensors.old-1.tmp", "._info.json.old-1.tmp"):
        (folder / name).write_bytes(b"part")
    (root / ".README.md.old-1.tmp").write_bytes(b"part")
    rd.build(source, root, annotator, **OPTIONS)
    assert local_files(root) == local_files(whole)


def test_a_second_builder_of_a_split_is_refused_with_the_process_of_the_first(tmp_path, source, annotator):
    lock = LocalOutput(tmp_path).lock("colours/.build-train/lock", "it")
    with lock:
        with pytest.raises(rd.DatasetError, match=rf"is being built by process {os.getpid()} on .*: wait"):
            rd.build(source, tmp_path, annotator, **OPTIONS)
        rd.build(
            source, tmp_path, annotator, split="validation", **OPTIONS
        )  # another split may be built at the same time
    rd.build(source, tmp_path, annotator, **OPTIONS)
    assert sorted(json.loads((tmp_path / "colours" / "_info.json").read_text())["splits"]) == ["train", "validation"]
    assert not [name for name in files_of(tmp_path / "colours") if name.startswith(".")]


def test_two_builders_of_a_url_on_one_machine_exclude_each_other(source, annotator):
    output = open_output(URL)
    with (
        output.lock("colours/.build-train/lock", "it"),
        pytest.raises(rd.DatasetError, match=f"process {os.getpid()}"),
    ):
        rd.build(source, URL, annotator, **OPTIONS)
