"""Table of server faults x protocols x repetitions x files: all samples are read correctly, or an error says why not."""

import itertools
import re
import shutil
import traceback

import fsspec
import pytest

import relabel_datasets as rd
from relabel_datasets.storage import remote as remote_module
from tests.fixtures import INDEX, MANIFEST, SHARDS, check_cache, contents
from tests.servers import FAULTS

pytestmark = pytest.mark.usefixtures("quick")

FILES = {"shard": SHARDS[1], "index": INDEX, "manifest": MANIFEST}
TEMPORARY = [*FAULTS, "408", "429", "500", "503"]
MESSAGES = {  # of permanent faults
    "drop": "not completed",
    "reset": "not completed|reset",
    "stall": r"no complete response within 0\.5 s",
    "short": r"the server sent \d+ instead of \d+ bytes",
    "cut": r"the server sent \d+ instead of \d+ bytes",
    "flip": "SHA-256",
    "page": r"the server sent \d+ instead of \d+ bytes",
}
DAMAGED = ("short", "cut", "flip", "page")  # detected by the checksum of a manifest, whose length is unknown


def inject(remote, kind, file, times, monkeypatch):
    if kind == "stall":
        monkeypatch.setattr(remote_module, "STALL_S", 0.5)
    # a fault of a shard begins after its first range
    remote.server.fail(kind, FILES[file], times=times, after=int(file == "shard"), headers={"Retry-After": "1"})


def grid(kinds, times, in_default_run):
    """Return the combinations of faults, files and repetitions. Those not in the default run are marked as slow."""
    return [
        pytest.param(*case, marks=() if in_default_run(*case) else pytest.mark.slow)
        for case in itertools.product(kinds, FILES, times)
    ]


@pytest.mark.parametrize(
    ("kind", "file", "times"), grid(TEMPORARY, (1, 2), lambda kind, file, times: (file, times) == ("shard", 2))
)
def test_temporary_faults_are_recovered_from(tmp_path, remote, expected, monkeypatch, kind, file, times):
    inject(remote, kind, file, times, monkeypatch)
    dataset = remote.load(tmp_path)
    dataset.download(progress=False)
    assert contents(dataset) == expected
    check_cache(tmp_path)


@pytest.mark.parametrize(
    ("kind", "file", "times"),
    grid(
        [*TEMPORARY, "403", "404"],
        (None,),
        lambda kind, file, times: file == "shard" or kind == "flip",
    ),
)
def test_permanent_faults_raise_an_error_and_leave_no_damaged_file(
    tmp_path, remote, expected, monkeypatch, kind, file, times
):
    monkeypatch.setattr(remote_module, "MAX_ATTEMPTS", 3)
    inject(remote, kind, file, times, monkeypatch)
    if kind != "whole":  # is handled
        with pytest.raises((FileNotFoundError, rd.DatasetError)) as caught:
            remote.load(tmp_path).download(progress=False)
        assert remote.url in str(caught.value)
        if (kind, file) != ("404", "manifest"):  # raises another error: there is no dataset
            assert isinstance(caught.value, FileNotFoundError) == (kind == "404")
            assert FILES[file] in str(caught.value)
            says = "is damaged" if file == "manifest" and kind in DAMAGED else MESSAGES.get(kind, kind)
            assert re.search(says if kind != "404" else "there is no", str(caught.value))
        if file != "manifest":
            check_cache(tmp_path)
    remote.server.reset()
    monkeypatch.setattr(remote_module, "STALL_S", 60.0)
    dataset = remote.load(tmp_path)
    dataset.download(progress=False)
    assert contents(dataset) == expected
    check_cache(tmp_path)


@pytest.mark.parametrize("file", ["shard", "manifest"])
@pytest.mark.parametrize("kind", ["drop", "reset", "short", "cut", "whole", "flip", "429", "503", "403", "404"])
def test_faults_of_the_hub_are_handled_in_the_same_way(tmp_path, hub, expected, monkeypatch, kind, file):
    if kind not in ("403", "404"):
        hub.server.fail(kind, FILES[file], times=2)
        assert contents(hub.load(tmp_path / "temporary")) == expected
    monkeypatch.setattr(remote_module, "MAX_ATTEMPTS", 2)
    hub.server.fail(kind, FILES[file], times=None, after=int(file == "shard"))
    if kind != "whole":
        with pytest.raises((FileNotFoundError, rd.DatasetError)) as caught:
            contents(hub.load(tmp_path))
        assert hub.url in str(caught.value)
        assert "hf_of_a_user" not in "".join(traceback.format_exception(caught.value))
        if file == "shard":
            check_cache(tmp_path)
    hub.server.reset()
    assert contents(hub.load(tmp_path)) == expected
    check_cache(tmp_path)


@pytest.fixture
def in_memory(served_folder):
    """URL of the dataset in fsspec's memory file system."""
    memory = fsspec.filesystem("memory")
    for path in served_folder.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/data/{path.relative_to(served_folder).as_posix()}", path.read_bytes())
    yield "memory://data"
    memory.rm("/data", recursive=True)


def fails(self, path, start, end, data):
    raise ConnectionResetError("gone")


def is_short(self, path, start, end, data):
    return data[:-2]


def is_long(self, path, start, end, data):
    return data + b"?"


def is_flipped(self, path, start, end, data):
    return bytes([data[0] ^ 1]) + data[1:]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("times", [1, 2, None])
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (fails, "ConnectionResetError: gone"),
        (is_short, "the server sent"),
        (is_long, "the server sent"),
        (is_flipped, "SHA-256"),
    ],
)
def test_faults_of_other_protocols_are_handled_in_the_same_way(
    tmp_path, in_memory, expected, monkeypatch, fault, says, times, file
):
    left = {"times": times}
    cat_file = type(fsspec.filesystem("memory")).cat_file

    def faulty(self, path, start=None, end=None, **kwargs):
        data = cat_file(self, path, start=start, end=end, **kwargs)
        if not path.endswith(FILES[file]) or left["times"] == 0:
            return data
        left["times"] = left["times"] and left["times"] - 1
        return fault(self, path, start, end, data)

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", faulty)

    def load():
        dataset = rd.load_dataset(in_memory, "colours", "train", cache_dir=tmp_path)
        dataset.download(progress=False)
        return contents(dataset)

    if times is None:
        says = "is damaged" if file == "manifest" and fault is not fails else says
        with pytest.raises(rd.DatasetError, match=rf"{in_memory}/colours/{re.escape(FILES[file])}.*{says}"):
            load()
        left["times"] = 0
    assert load() == expected
    check_cache(tmp_path)


@pytest.mark.parametrize("file", FILES)
def test_a_local_file_of_wrong_length_is_named(tmp_path, served_folder, file):
    shutil.copytree(served_folder, tmp_path / "data")
    path = tmp_path / "data" / "colours" / FILES[file]
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(rd.DatasetError, match=re.escape(str(path))):
        contents(rd.load_dataset((tmp_path / "data").as_uri(), "colours", "train"))


def test_a_truncated_manifest_is_read_again(tmp_path, remote, expected):
    """Without the name of a config, several paths are requested for the manifest and the card."""
    remote.server.fail("short", MANIFEST, times=2)
    remote.server.fail("cut", "README.md", times=2)
    with pytest.raises(rd.DatasetError, match=r"several configs, name one of \['colours', 'labels-only'\]"):
        remote.load(tmp_path, name=None)
    remote.server.fail("503", MANIFEST, times=2)
    dataset = rd.load_dataset(
        f"{remote.url}/colours", split="train", cache_dir=tmp_path, storage_options=remote.options
    )
    assert contents(dataset) == expected
