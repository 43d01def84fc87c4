"""The cache with many processes and threads, limits, full disks and killed processes."""

import errno
import fcntl
import hashlib
import os
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import relabel_datasets as rd
from relabel_datasets.storage import cache as cache_module
from relabel_datasets.storage.cache import ShardCache
from relabel_datasets.storage.resolve import open_folder
from tests.fixtures import SHARDS, check_cache, contents, run_apart
from tests.sabotage import at_once, files_first, nth, sabotaged

pytestmark = pytest.mark.usefixtures("quick")


class Content:
    """File content for a cache: `cache.open(*content)`."""

    def __init__(self, seed: int, num_bytes: int = 1000) -> None:
        self.data = random.Random(seed).randbytes(num_bytes)
        self.sha256 = hashlib.sha256(self.data).hexdigest()
        self.downloads = 0

    def __iter__(self):
        return iter((self.sha256, len(self.data), self.download))

    def download(self, file):
        self.downloads += 1
        file.seek(0)
        rest = self.data[len(file.read()) :]
        file.write(rest)
        file.flush()


def read(cache, content):
    with cache.open(*content) as file:
        return file.read()


def names(cache):
    """Return the names of the files in the cache's folder, without its lock."""
    return sorted(path.name for path in cache.folder.iterdir() if path.name != ".evict")


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "shards", 3500)


def test_a_file_is_downloaded_once(cache):
    content = Content(0)
    assert [read(cache, content) for _ in range(3)] == [content.data] * 3
    assert content.downloads == 1
    assert names(cache) == [content.sha256]
    assert cache.has(content.sha256)


def test_the_least_recently_opened_file_is_deleted_first(cache):
    contents = [Content(i) for i in range(4)]
    for age, content in enumerate(contents[:3]):
        read(cache, content)
        os.utime(cache.folder / content.sha256, (age, age))
    read(cache, contents[0])  # now the most recently opened
    read(cache, contents[3])
    assert [cache.has(content.sha256) for content in contents] == [True, False, True, True]
    assert read(cache, contents[1]) == contents[1].data
    assert [cache.has(content.sha256) for content in contents] == [True, True, False, True]


def test_the_limit_is_kept_after_each_open(cache):
    rng = random.Random(0)
    contents = [Content(i, rng.randrange(1, 3500)) for i in range(20)]
    for content in rng.choices(contents, k=100):
        assert read(cache, content) == content.data
        assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= 3500
        assert cache.has(content.sha256)


def test_an_open_file_stays_readable_after_the_cache_deletes_it(cache):
    contents = [Content(i) for i in range(4)]
    file = cache.open(*contents[0])
    for content in contents[1:]:
        read(cache, content)
    assert not cache.has(contents[0].sha256)
    with file:
        assert file.read() == contents[0].data


def test_a_file_larger_than_the_limit_is_refused_before_the_download(cache):
    content = Content(0, 3501)
    with pytest.raises(
        rd.DatasetError, match=r"is 3500 bytes, but one shard needs 3501 bytes: raise the limit.*RELABEL_CACHE_LIMIT"
    ):
        cache.open(*content)
    assert content.downloads == 0


def test_a_limit_smaller_than_a_shard_is_an_error_of_load_dataset(tmp_path, http):
    with pytest.raises(rd.DatasetError, match=r"is 20000 bytes, but one shard needs \d+ bytes: raise the limit"):
        contents(http.load(tmp_path, cache_limit="20K"))
    with pytest.raises(rd.DatasetError, match=r"is 50000 bytes, but the download of .*/colours needs \d+"):
        http.load(tmp_path, cache_limit="50K").download()


def test_a_dataset_larger_than_the_limit_can_be_read(tmp_path, remote, files, expected):
    limit = max(file.num_bytes for file in files)
    dataset = remote.load(tmp_path, cache_limit=limit)
    for _ in range(2):
        assert contents(dataset) == expected
        assert sum(path.stat().st_size for path in (tmp_path / "shards").iterdir()) <= limit
    check_cache(tmp_path)


def test_the_remains_of_a_killed_download_are_resumed_or_deleted(cache):
    contents = [Content(i) for i in range(4)]
    cache.folder.mkdir()
    part = cache.folder / f"{contents[0].sha256}.part"
    part.write_bytes(contents[0].data[:700])
    assert read(cache, contents[0]) == contents[0].data
    assert names(cache) == [contents[0].sha256]
    part = cache.folder / f"{'0' * 64}.part"
    part.write_bytes(bytes(900))
    os.utime(part, (1, 1))
    for content in contents[1:]:
        read(cache, content)
    assert not part.exists()


def test_a_failed_download_keeps_its_first_bytes_and_leaves_no_empty_file(cache):
    def fails(num_bytes):
        def download(file):
            file.write(content.data[:num_bytes])
            raise rd.DatasetError("cannot be reached")

        return download

    content = Content(0)
    for num_bytes, remains in ((0, []), (10, [f"{content.sha256}.part"])):
        with pytest.raises(rd.DatasetError, match="cannot be reached"):
            cache.open(content.sha256, 1000, fails(num_bytes))
        assert names(cache) == remains
    assert read(cache, content) == content.data


def test_no_byte_is_written_after_the_lock_is_released(cache, monkeypatch):
    """Otherwise the buffer of a failed download could overwrite the verified bytes of the next one."""

    def download(file):
        file.write(content.data[:10])
        raise rd.DatasetError("cannot be reached")

    def flock(file, operation):
        if operation == fcntl.LOCK_UN and part.exists():
            sizes.append(part.stat().st_size)
        return original(file, operation)

    content, sizes, original = Content(0), [], fcntl.flock
    cache.folder.mkdir()
    part = cache.folder / f"{content.sha256}.part"
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(rd.DatasetError, match="cannot be reached"):
        cache.open(content.sha256, 1000, download)
    assert sizes[-1] == 10


@pytest.mark.parametrize("num_bytes", [0, 999, 1001])
def test_a_cached_file_of_wrong_length_is_downloaded_again(cache, num_bytes):
    content = Content(0)
    read(cache, content)
    (cache.folder / content.sha256).write_bytes(bytes(num_bytes))
    assert read(cache, content) == content.data
    assert content.downloads == 2


def test_other_files_in_the_folder_are_neither_counted_nor_deleted(cache):
    """`cache_dir` may be any folder, even one in which the user has a folder `shards`."""
    (cache.folder / "folder").mkdir(parents=True)
    (cache.folder / "folder" / "mine").write_bytes(bytes(9000))
    for name in ("mine.tar", "0" * 63, "0" * 65, "G" * 64, "0" * 64 + ".part2", "x.part", ".hidden"):
        (cache.folder / name).write_bytes(bytes(9000))
    before = names(cache)
    contents = [Content(i) for i in range(5)]
    for content in contents:
        assert read(cache, content) == content.data
    assert names(cache) == sorted([*before, *(content.sha256 for content in contents[2:])])


@pytest.mark.parametrize("sha256", ["", "../mine", "0" * 63, "0" * 64 + ".part", "A" * 64, "0" * 64 + "\n"])
def test_a_manifest_cannot_write_outside_of_the_cache(cache, tmp_path, sha256):
    (tmp_path / "mine").write_bytes(b"mine")
    with pytest.raises(rd.DatasetError, match="not a valid sha256"):
        cache.open(sha256, 7, lambda file: file.write(b"not you"))
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_on_a_full_disk_the_oldest_files_are_deleted(cache, code):
    contents = [Content(i) for i in range(3)]
    for age, content in enumerate(contents[:2]):
        read(cache, content)
        os.utime(cache.folder / content.sha256, (age, age))

    def download(file):
        if cache.has(contents[0].sha256):
            file.write(contents[2].data[:500])
            raise OSError(code, "no space")
        contents[2].download(file)

    with cache.open(contents[2].sha256, 1000, download) as file:
        assert file.read() == contents[2].data
    assert names(cache) == sorted([contents[1].sha256, contents[2].sha256])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_full_of_other_files_is_an_error(cache, code):
    def download(file):
        file.seek(0)
        file.write(content.data[:500])
        raise OSError(code, "no space")

    content, other = Content(0), Content(1)
    read(cache, other)
    with pytest.raises(OSError, match=r"the disk of the cache .* is full: free some space, or.*cache_dir=") as caught:
        cache.open(content.sha256, 1000, download)
    assert caught.value.errno == code
    assert names(cache) == [f"{content.sha256}.part"]
    assert read(cache, content) == content.data


def test_a_download_resumes_after_a_failed_write(tmp_path, http, files):
    """Simulate a full disk by a limit of the file size, which makes the same calls fail."""
    assert run_apart(
        """
import errno, hashlib, resource
url, folder, files = arguments
cache._DISK_FULL, remote.RANGE_BYTES = (errno.EFBIG,), 4096
deleted = []
def delete_oldest(self):
    deleted.append(resource.getrlimit(resource.RLIMIT_FSIZE)[0])
    resource.setrlimit(resource.RLIMIT_FSIZE, (deleted[-1] + 5001, -1))
    return True
cache.ShardCache._delete_oldest = delete_oldest
resource.setrlimit(resource.RLIMIT_FSIZE, (5001, -1))
remote_folder = resolve.open_folder(url, cache_dir=folder).child("colours")
for name, num_bytes, sha256 in files:
    with remote_folder.open(name, num_bytes, sha256) as file:
        assert hashlib.sha256(file.read()).hexdigest() == sha256
print(json.dumps(len(deleted) > 2))
""",
        http.url,
        tmp_path,
        files,
    )
    check_cache(tmp_path)
    for file in files:  # only ranges that did not fit are downloaded twice
        assert len(http.server.gets(file.name)) <= file.num_bytes // 4096 + 1 + 5


def test_other_disk_errors_delete_nothing(cache):
    def download(file):
        raise OSError(errno.EIO, "broken")

    other = Content(1)
    read(cache, other)
    with pytest.raises(OSError, match="broken"):
        cache.open(Content(0).sha256, 1000, download)
    assert names(cache) == [other.sha256]


def test_without_a_limit_a_tenth_of_the_disk_stays_free(tmp_path, monkeypatch):
    disk = {"total": 20_000, "free": 5_000}

    def usage(folder):
        used = sum(path.stat().st_size for path in folder.iterdir())
        return type("Usage", (), {"total": disk["total"], "free": disk["free"] - used})

    monkeypatch.setattr(cache_module.shutil, "disk_usage", usage)
    cache = ShardCache(tmp_path / "shards", None)
    for i in range(5):
        read(cache, Content(i))
    assert len(names(cache)) == 3
    disk["free"] = 0  # other files fill the disk: the cache makes room, and the file is still returned
    assert read(cache, Content(9)) == Content(9).data
    assert names(cache) == [Content(9).sha256]


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


def test_a_folder_that_cannot_be_created_is_named():
    with pytest.raises(OSError, match="/proc/none"):  # where even root cannot create a folder
        read(ShardCache(Path("/proc/none/shards"), None), Content(0))


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
