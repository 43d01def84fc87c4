"""Special files in a dataset: reading one is an immediate error, and links are never written through."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import stat
from pathlib import Path

import pytest

import relabel_datasets as rd
from relabel_datasets.annotate.annotator import ModuleAnnotator
from relabel_datasets.report.terminal import describe
from relabel_datasets.shards.card import write_card
from relabel_datasets.storage.local import temp_path_for, write_atomically
from relabel_datasets.storage.locks import FileLock
from relabel_datasets.storage.regular_files import create_new, open_regular, read_inside, read_regular
from tests.bad_names import snapshot
from tests.conftest import ColourNet, picture

SHARD, INDEX, MANIFEST, CARD = "train-00000-of-00001.tar", "train.index.safetensors", "_info.json", "README.md"
FILES = {"shard": f"colours/{SHARD}", "index": f"colours/{INDEX}", "manifest": f"colours/{MANIFEST}", "card": CARD}


def _socket(path):
    short = f"/tmp/relabel-{os.getpid()}.socket"  # the path of a socket may have at most 107 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(short)
    shutil.move(short, path)


KINDS = {
    "a FIFO": os.mkfifo,
    "a socket": _socket,
    "a folder": lambda path: path.mkdir(),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "Too many levels of symbolic links": lambda path: path.symlink_to(path.name),
}


NO_CONFIG = ("manifest", "Too many levels of symbolic links")  # a broken link: the folder is not a config


@pytest.fixture(autouse=True)
def _no_test_blocks_on_a_fifo():
    def stop(*_):
        raise AssertionError("blocked")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def _build(root):
    annotator = ModuleAnnotator(ColourNet(), (48, 64), classes=("cat", "dog", "emu"), name="colours")
    return rd.build(rd.data.ImageFolderSource(root / "images"), root / "data", annotator, progress=False)


@pytest.fixture(scope="module")
def _built(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    for i, name in enumerate(("cat", "dog", "emu")):
        (root / "images" / name).mkdir(parents=True)
        picture(i).save(root / "images" / name / f"photo_{i}.jpg")
    _build(root)
    return root


@pytest.fixture
def root(_built, tmp_path):
    """Folder with images and a dataset built from them."""
    shutil.copytree(_built, tmp_path, dirs_exist_ok=True)
    return tmp_path


def _card_problem(kind):
    """Return the pattern of the error for a card. A link to a device is also a link out of the dataset."""
    return f"{kind}|outside of the dataset" if kind == "a device" else kind


def _replace(path, kind):
    path.unlink()
    KINDS[kind](path)


@pytest.mark.parametrize("kind", KINDS)
def test_special_files_are_not_opened(tmp_path, kind):
    KINDS[kind](tmp_path / "file")
    for call in (open_regular, lambda path: read_regular(path, 9), lambda path: read_inside(path, 9)):
        with pytest.raises((rd.DatasetError, OSError), match=_card_problem(kind)) as caught:
            call(tmp_path / "file")
        assert str(tmp_path / "file") in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["shard", "index", "manifest"])
def test_a_special_file_is_an_error_when_the_dataset_is_read(root, file, kind):
    _replace(root / "data" / FILES[file], kind)
    kind = f"{kind}|no dataset at" if (file, kind) == NO_CONFIG else kind
    for call in (lambda: rd.load_dataset(root / "data", "colours", "train")[0], lambda: describe(root / "data")):
        with pytest.raises((rd.DatasetError, OSError), match=kind):
            call()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", FILES)
def test_verify_reports_a_special_file_and_continues(root, file, kind):
    shutil.copytree(root / "data" / "colours", root / "data" / "other")
    _replace(root / "data" / FILES[file], kind)
    report = rd.verify(root / "data", num_workers=0, progress=False)
    expected = _card_problem(kind) if file == "card" else "no _info.json" if (file, kind) == NO_CONFIG else kind
    assert any(re.search(expected, problem.problem) for problem in report.problems)
    assert any(problem.config == "other" for problem in report.problems)  # its manifest is that of `colours`


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_that_is_a_special_file_is_an_error_and_unchanged(root, kind):
    _replace(root / "data" / CARD, kind)
    before = snapshot(root / "data")
    with pytest.raises((rd.DatasetError, OSError), match=_card_problem(kind)):
        write_card(root / "data")
    assert snapshot(root / "data") == before


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_that_is_a_special_file_is_skipped_with_its_reason(root, kind):
    shutil.rmtree(root / "data")
    if kind == "a folder":
        pytest.skip("subfolders of an ImageFolder are searched")
    KINDS[kind](root / "images" / "cat" / "photo_9.jpg")
    split = _build(root).splits["train"]
    assert split.num_samples == 3
    assert [skipped["key"] for skipped in split.skipped] == ["photo_9"]
    assert kind in split.skipped[0]["error"]


def test_a_dataset_of_links_is_read_as_in_the_cache_of_the_hub(root):
    blobs = root / "blobs"
    blobs.mkdir()
    snapshots = root / "snapshots" / "0123"
    for number, path in enumerate(sorted(path for path in (root / "data").rglob("*") if path.is_file())):
        link = snapshots / path.relative_to(root / "data")
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    assert len(rd.load_dataset(snapshots, "colours", "train")) == 3
    assert rd.verify(snapshots, num_workers=0, progress=False).ok


@pytest.mark.parametrize("is_relative", [False, True])
def test_a_card_that_is_a_link_out_of_the_dataset_is_not_read(root, is_relative):
    secret = root / "secret.txt"
    secret.write_text("my secret")
    (root / "data" / CARD).unlink()
    (root / "data" / CARD).symlink_to("../secret.txt" if is_relative else secret)
    for call in (lambda: write_card(root / "data"), lambda: rd.publish(root / "data", "org/name", progress=False)):
        with pytest.raises(rd.DatasetError, match=r"symbolic link to .*outside of the dataset") as caught:
            call()
        assert "my secret" not in str(caught.value)
    report = rd.verify(root / "data", num_workers=0, progress=False)
    assert [problem.problem[:26] for problem in report.problems] == ["README.md cannot be read, "]


def test_a_link_to_a_card_within_the_dataset_is_read(root):
    (root / "data" / CARD).rename(root / "data" / "card.md")
    (root / "data" / CARD).symlink_to("card.md")
    assert rd.verify(root / "data", num_workers=0, progress=False).ok


# Links in a dataset to which a build would write: their path, and whether their target is a folder.
LINKS = {
    "config": ("colours", True),
    "records": ("colours/.build-train", True),
    "lock": ("colours/.build-train/lock", False),
    "lock of manifest and card": (".relabel-lock", False),
    "plan": (f"colours/.build-train/{temp_path_for(Path('plan.json')).name}", False),
    "manifest": (f"colours/{MANIFEST}", False),
    "manifest in the making": (f"colours/{temp_path_for(Path(MANIFEST)).name}", False),
    "shard": (f"colours/{SHARD}", False),
    "shard in the making": (f"colours/{temp_path_for(Path(SHARD)).name}", False),
    "index in the making": (f"colours/{temp_path_for(Path(INDEX)).name}", False),
    "card in the making": (temp_path_for(Path(CARD)).name, False),
    "probe": (temp_path_for(Path("probe")).name, False),
}


@pytest.mark.parametrize(("link", "is_folder"), LINKS.values(), ids=LINKS)
def test_a_build_does_not_write_through_links(root, link, is_folder):
    shutil.rmtree(root / "data")
    outside = root / "outside"
    (outside / "folder").mkdir(parents=True)
    (outside / "file").write_text("mine")
    (root / "data" / link).parent.mkdir(parents=True)
    (root / "data" / link).symlink_to(outside / ("folder" if is_folder else "file"))
    before = snapshot(outside)
    if is_folder or "lock" in link or link.endswith(MANIFEST):  # elsewhere the build replaces the link
        with pytest.raises((rd.DatasetError, OSError), match=r"symbolic link|not JSON"):
            _build(root)
    else:
        _build(root)
        assert rd.verify(root / "data", num_workers=0, progress=False).ok
    assert snapshot(outside) == before


@pytest.mark.parametrize("kind", ["a FIFO", "a folder", "a device"])
def test_a_lock_must_be_a_regular_file(tmp_path, kind):
    KINDS[kind](tmp_path / "lock")
    with (
        pytest.raises(OSError, match=r"not a regular file|symbolic link|Is a directory"),
        FileLock(tmp_path / "lock", "it"),
    ):
        pass
    assert stat.S_IFMT((tmp_path / "lock").lstat().st_mode) != stat.S_IFREG


def test_a_new_file_replaces_a_link(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("file")
    with create_new(tmp_path / "link") as file:
        file.write(b"new")
    assert ((tmp_path / "file").read_text(), (tmp_path / "link").read_text()) == ("mine", "new")
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to("file")
    write_atomically(tmp_path / "link", b"newer")
    assert ((tmp_path / "file").read_text(), (tmp_path / "link").read_text()) == ("mine", "newer")


@pytest.mark.parametrize("num_bytes", [8, 9, 10])
def test_a_file_above_the_limit_is_refused(tmp_path, num_bytes):
    (tmp_path / "file").write_bytes(bytes(num_bytes))
    if num_bytes <= 9:
        assert len(read_regular(tmp_path / "file", 9)) == num_bytes
    else:
        with pytest.raises(rd.DatasetError, match="more than 9 bytes"):
            read_regular(tmp_path / "file", 9)
