"""Locks end with their holder, also if it has forked."""

import os
import signal
import sys
import time

import pytest

from relabel_datasets.errors import DatasetError
from relabel_datasets.storage.locks import FileLock

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork and no such locks")


def test_a_forked_process_neither_keeps_nor_releases_the_lock_of_its_parent(tmp_path):
    path = tmp_path / "lock"
    reading, writing = os.pipe()
    with FileLock(path, "split"):
        child = os.fork()
        if not child:
            os.read(reading, 1)
            os._exit(0)
        with pytest.raises(DatasetError, match="is being built by process"), FileLock(path, "split"):
            pass
    with FileLock(path, "split"):  # while the child is alive
        assert path.exists()
    os.write(writing, b"x")
    assert os.waitpid(child, 0)[1] == 0


def test_a_fork_within_the_lock_that_leaves_it_does_not_release_it(tmp_path):
    path = tmp_path / "lock"
    with FileLock(path, "split") as lock:
        child = os.fork()
        if not child:
            lock.__exit__(None, None, None)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert path.exists()
        with pytest.raises(DatasetError, match="is being built by process"), FileLock(path, "split"):
            pass


def test_the_lock_of_a_killed_process_is_free_although_its_children_live(tmp_path):
    path = tmp_path / "lock"
    reading, writing = os.pipe()
    holder = os.fork()
    if not holder:
        FileLock(path, "split").__enter__()
        if not os.fork():
            os.write(writing, str(os.getpid()).encode())
        time.sleep(60)
        os._exit(0)
    child = int(os.read(reading, 20))
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    try:
        with FileLock(path, "split"):
            assert path.exists()
    finally:
        os.kill(child, signal.SIGKILL)
