"""The cache with many processes and threads, killed processes, and other programs that delete its files."""

import hashlib
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from relabel_datasets.storage.cache import ShardCache
from relabel_datasets.storage.resolve import open_folder
from tests.fixtures import SHARDS, check_cache, contents, run_apart
from tests.sabotage import at_once, files_first, nth, sabotaged
from tests.storage.cached import Content, names, read

pytestmark = pytest.mark.usefixtures("quick")


def test_threads_download_a_shared_file_once(tmp_path, remote, files, expected):
    folder = open_folder(remote.url, cache_dir=tmp_path, storage_options=remote.options).child("colours")

    def fetch(file):
        with folder.open(*file) as opened:
            return hashlib.sha256(opened.read()).hexdigest() == file.sha256

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(fetch, [file for file in files for _ in range(6)]))
    counts = Counter((request.path, request.range) for request in remote.server.requests if request.method == "GET")
    assert set(counts.values()) == {1}
    check_cache(tmp_path)


def test_threads_with_a_small_limit_read_all_files(cache):
    """Each open downloads at most once, although other threads may delete the file at any time."""
    contents = [Content(i, 1000 + i) for i in range(8)]
    picks = [random.Random(i).choices(contents, k=50) for i in range(8)]

    def work(mine):
        assert all(read(cache, content) == content.data for content in mine)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, picks))
    assert sum(content.downloads for content in contents) <= 400
    assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= 3500


def test_the_limit_is_kept_by_simultaneous_downloads(cache):
    contents, started = [Content(i, 2000) for i in range(2)], threading.Barrier(2, timeout=60)

    def opened(content):
        def download(file):
            started.wait()
            content.download(file)

        with cache.open(content.sha256, 2000, download) as file:
            return file.read()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(opened, contents)) == [content.data for content in contents]
    assert len(names(cache)) == 1


def test_a_file_is_returned_even_if_another_process_deletes_it(cache, monkeypatch):
    content = Content(0)
    delete = lambda self, num_bytes, keep: keep.unlink(missing_ok=True)  # noqa: E731  as another process would
    monkeypatch.setattr(ShardCache, "_make_room", delete)
    assert read(cache, content) == content.data
    assert content.downloads == 1


@pytest.mark.parametrize("limit", [None, 3500])
@pytest.mark.parametrize("remove", [at_once, files_first])
def test_the_cache_may_be_removed_at_any_moment(tmp_path, remove, limit):
    came, number = True, 0
    while came:
        number += 1
        cache, content = ShardCache(tmp_path / f"{number}" / "shards", limit), Content(number)
        read(cache, Content(0))
        with sabotaged(cache.folder, nth(number), remove) as has_come:
            assert read(cache, content) == content.data
            came = has_come()
        assert content.downloads <= 2
        assert read(cache, content) == content.data
    assert number > 8


def test_eviction_does_not_delete_a_download_in_progress(cache):
    started, resume = threading.Event(), threading.Event()
    slow = Content(0, 3000)

    def download(file):
        file.write(slow.data[:2000])
        file.flush()
        started.set()
        assert resume.wait(60)
        slow.download(file)

    with ThreadPoolExecutor(1) as pool:
        opened = pool.submit(cache.open, slow.sha256, 3000, download)
        assert started.wait(60)
        for i in range(1, 5):
            assert read(cache, Content(i)) == Content(i).data
        assert f"{slow.sha256}.part" in names(cache)
        resume.set()
        with opened.result() as file:
            assert file.read() == slow.data


PROCESSES = """
url, folder, files, num_processes = arguments
remote.FIRST_PAUSE_S, remote.RANGE_BYTES = 0.01, 4096
readers = []
for number in range(num_processes):
    readers.append(os.fork())
    if readers[-1] == 0:
        try:
            import hashlib
            random.Random(number).shuffle(files)
            folder = resolve.open_folder(url, cache_dir=folder).child("colours")
            for name, num_bytes, sha256 in files:
                with folder.open(name, num_bytes, sha256) as file:
                    assert hashlib.sha256(file.read()).hexdigest() == sha256
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
print(json.dumps([os.waitpid(reader, 0)[1] for reader in readers]))
"""


def test_processes_download_shared_files_once(tmp_path, http, files):
    http.server.pause_s = 0.002
    try:
        assert run_apart(PROCESSES, http.url, tmp_path, files, 6) == [0] * 6
    finally:
        http.server.pause_s = 0.0
    counts = Counter((request.path, request.range) for request in http.server.requests)
    assert set(counts.values()) == {1}
    assert all(f"/colours/{name}" in {path for path, _ in counts} for name in SHARDS)
    check_cache(tmp_path)


def test_a_child_forked_during_a_download_does_not_keep_its_lock(tmp_path):
    """The child also has the locked file open, so the parent must unlock it explicitly."""
    assert (
        run_apart(
            """
import hashlib
folder, = arguments
data = b"data" * 100
sha256 = hashlib.sha256(data).hexdigest()
shards = cache.ShardCache(folders.Path(folder), None)
started, forked = threading.Event(), threading.Event()
def download(file):
    file.write(data[:10])
    started.set()
    forked.wait()
    raise OSError("gone")
def fail():
    try:
        shards.open(sha256, 400, download)
    except OSError:
        pass
thread = threading.Thread(target=fail)
thread.start()
started.wait()
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    os.close(writer)
    os.read(reader, 1)  # wait for the parent
    os._exit(0)
forked.set()
thread.join()
with shards.open(sha256, 400, lambda file: file.write(data[len(file.read()):]) and file.flush()) as file:
    assert file.read() == data
print(json.dumps(os.waitpid(child, os.WNOHANG)[0]))
os.close(writer)
os.waitpid(child, 0)
""",
            tmp_path / "shards",
        )
        == 0
    )


READERS = """
import aiohttp, fsspec.implementations.http, hashlib, traceback
from pathlib import Path

url, folder, limit, files, num_kills, num_readers = arguments
remote.FIRST_PAUSE_S, remote.LONGEST_PAUSE_S, remote.RANGE_BYTES = 0.01, 0.05, 4096
driver, served, damage = os.getpid(), Path(folder, "served"), Path(folder, "damage")

def read_forever():
    remote_folder = resolve.open_folder(url, cache_dir=folder, cache_limit=limit).child("colours")
    while os.getppid() == driver:
        name, num_bytes, sha256 = random.choice(files)
        with remote_folder.open(name, num_bytes, sha256) as file:
            time.sleep(random.uniform(0, 0.01))
            if hashlib.sha256(file.read()).hexdigest() != sha256:
                raise ValueError(f"{name} is damaged")
        with served.open("ab") as file:
            file.write(b".")

def start():
    reader = os.fork()
    if reader == 0:
        try:
            random.seed()
            read_forever()
        except BaseException:
            with damage.open("a") as file:
                file.write(traceback.format_exc())
        finally:
            os._exit(1)
    return reader

def size_of(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:  # it was renamed: the download is complete
        return 0

readers = [start() for _ in range(num_readers)]
num_parts = 0  # interrupted downloads after a kill
for kill in range(num_kills):
    time.sleep(random.uniform(0.02, 0.15))
    while not served.exists() or served.stat().st_size < kill:  # let the readers make progress on a slow machine
        time.sleep(0.01)
    victim = random.randrange(num_readers)
    os.kill(readers[victim], signal.SIGKILL)
    os.waitpid(readers[victim], 0)
    num_parts += any(map(size_of, Path(folder, "shards").glob("*.part")))
    readers[victim] = start()
for reader in readers:
    os.kill(reader, signal.SIGKILL)
    os.waitpid(reader, 0)
print(json.dumps({"damage": damage.read_text() if damage.exists() else "", "served": served.stat().st_size, "num_parts": num_parts}))
"""


@pytest.mark.slow
def test_killed_readers_damage_nothing(tmp_path, http, files, expected):
    """Kill 50 processes that share a cache so small that it deletes files all the time."""
    limit = sum(sorted(file.num_bytes for file in files)[-2:])
    http.server.pause_s = 0.003
    try:
        done = run_apart(READERS, http.url, tmp_path, limit, files, 50, 5)
    finally:
        http.server.pause_s = 0.0
    assert done["damage"] == ""
    assert done["served"] >= 49
    assert done["num_parts"] > 0
    check_cache(tmp_path)
    requests = len(http.server.requests)
    dataset = http.load(tmp_path, cache_limit=limit)
    assert contents(dataset) == expected
    assert len(http.server.requests) > requests
    check_cache(tmp_path)
