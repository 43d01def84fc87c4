"""A temporary folder is removed by its process, or by the next one if that was killed, and never while it is in use."""

import multiprocessing
import os
import platform
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from relabel_datasets.storage import temp_folders
from relabel_datasets.storage.temp_folders import temporary_folder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork and no such locks")


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def killed(tmp_path):
    """Folder of a process that was killed while it used the folder."""
    return leave(tmp_path)


def leave(parent):
    """Return a folder of a process that was killed while it used the folder."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with temporary_folder("build-", parent) as path:
            (path / "sub").mkdir()
            (path / "sub" / "shard.tar").write_bytes(b"part")
            os.write(writing, str(path).encode())
            signal.pause()
    path = Path(os.read(reading, 4096).decode())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return path


def test_a_folder_is_private_and_removed_with_its_content(tmp_path):
    with temporary_folder("build-", tmp_path) as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "file").write_bytes(b"part")
    assert names_in(tmp_path) == []


def test_the_folder_of_a_killed_process_is_removed_by_the_next(tmp_path, killed):
    assert (killed / "sub" / "shard.tar").exists()
    with temporary_folder("build-", tmp_path) as folder:
        assert names_in(tmp_path) == [folder.name]


def test_a_folder_without_lock_file_is_removed(tmp_path, killed):
    (killed / ".lock").unlink()  # killed before the folder was locked
    with temporary_folder("build-", tmp_path):
        assert not killed.exists()


def rename(name):
    def change(folder, monkeypatch):
        return folder.rename(folder.with_name(name(folder.name)))

    return change


def change_owner(folder, monkeypatch):
    user = os.getuid()
    monkeypatch.setattr(temp_folders, "user_id", lambda: user + 1)
    return folder.rename(folder.with_name(folder.name.replace(f"-{user}-", f"-{user + 1}-")))


def replace_by_link(folder, monkeypatch):
    target = folder.rename(folder.with_name("target"))
    folder.symlink_to(target)
    return folder


def lose_locks(folder, monkeypatch):
    def fail(descriptor, *, wait):
        raise OSError("no locks available")

    monkeypatch.setattr(temp_folders, "lock_file", fail)
    return folder


NOT_REMOVED = {
    "of another purpose": rename(lambda name: f"other-{name}"),
    "of another machine": rename(lambda name: name.replace(platform.node(), "another")),
    "of a machine whose name begins alike": rename(lambda name: name.replace(platform.node(), f"{platform.node()}-2")),
    "of another user": change_owner,
    "behind a link": replace_by_link,
    "on a file system without locks": lose_locks,
}


@pytest.mark.parametrize("change", NOT_REMOVED.values(), ids=NOT_REMOVED)
def test_a_folder_is_not_removed(tmp_path, killed, monkeypatch, change):
    kept = change(killed, monkeypatch)
    with temporary_folder("build-", tmp_path) as folder:
        assert folder != kept
    assert (kept / "sub" / "shard.tar").exists()
    assert not folder.exists()


def test_folders_of_living_processes_and_of_this_one_are_not_removed(tmp_path):
    reading, writing = os.pipe()
    with temporary_folder("build-", tmp_path) as own:
        child = os.fork()
        if not child:
            with temporary_folder("build-", tmp_path) as folder:
                os.write(writing, folder.name.encode())
                signal.pause()
        name = os.read(reading, 4096).decode()
        try:
            with temporary_folder("build-", tmp_path) as third:
                assert names_in(tmp_path) == sorted([own.name, name, third.name])
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_a_forked_process_does_not_remove_the_folder_of_its_parent(tmp_path):
    with ExitStack() as stack:
        folder = stack.enter_context(temporary_folder("build-", tmp_path))
        child = os.fork()
        if not child:
            stack.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert folder.exists()


def create_many(parent):
    for _ in range(50):
        with temporary_folder("build-", parent) as folder:
            (folder / "file").write_bytes(b"part")
            assert names_in(folder) == [".lock", "file"]


def test_processes_that_create_folders_at_the_same_time_do_not_remove_those_of_others(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=create_many, args=(tmp_path,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert names_in(tmp_path) == []


def test_names_of_parents_and_prefixes_are_not_patterns(tmp_path):
    parent = tmp_path / "a[b]*?"
    parent.mkdir()
    with temporary_folder("build[1]*-", parent):
        pass
    killed = leave(parent)
    with temporary_folder("build*-", parent):
        assert killed.exists()
    with temporary_folder("build-", parent):
        assert not killed.exists()
