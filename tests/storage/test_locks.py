"""Locks end with their holder, also if it has forked."""

import os
import signal
import sys
import threading
import time

import pytest

from relabel_datasets.compatibility import lock_file
from relabel_datasets.errors import DatasetError
from relabel_datasets.storage.locks import FileLock, acquire, release

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


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_is_forked_while_a_thread_waits_for_a_lock_does_not_have_it(tmp_path):
    path = tmp_path / "lock"
    is_waiting, is_forked, descriptors = threading.Event(), threading.Event(), []

    def wait(descriptor):
        descriptors.append(descriptor)
        is_waiting.set()
        assert is_forked.wait(10)
        lock_file(descriptor, wait=True)

    thread = threading.Thread(target=lambda: acquire(path, wait))
    thread.start()
    assert is_waiting.wait(10)
    child = os.fork()
    if not child:
        try:
            os.fstat(descriptors[0])
        except OSError:
            os._exit(0)
        os._exit(1)
    is_forked.set()
    thread.join()
    release(descriptors[0])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


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
