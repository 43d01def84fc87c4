"""The cache with limits, damaged files and full disks."""

import errno
import fcntl
import os
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

import relabel_datasets as rd
from relabel_datasets.storage import cache as cache_module
from relabel_datasets.storage.cache import ShardCache
from tests.fixtures import check_cache, contents, run_apart
from tests.storage.cached import Content, names, read

pytestmark = pytest.mark.usefixtures("quick")


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


class Disk:
    """A disk of `shutil.disk_usage`: its free bytes without the files of the cache."""

    def __init__(self, total, free):
        self.total, self.free = total, free

    def usage(self, folder):
        used = sum(path.stat().st_size for path in folder.iterdir())
        return SimpleNamespace(total=self.total, free=self.free - used)


@pytest.mark.parametrize(
    ("total", "reserve"),
    [(20_000, 2_000), (50 * 10**9, 5 * 10**9), (50 * 10**12, 5 * 10**9)],
    ids=["small", "50 GB", "50 TB"],
)
def test_without_a_limit_a_tenth_of_the_disk_stays_free_and_at_most_5_gb(tmp_path, monkeypatch, caplog, total, reserve):
    disk = Disk(total, reserve + 3_000)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", disk.usage)
    cache = ShardCache(tmp_path / "shards", None)
    for i in range(5):
        read(cache, Content(i))
    assert len(names(cache)) == 3
    assert not caplog.messages


def test_a_disk_that_others_fill_is_reported_once_and_files_are_still_returned(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache_module.shutil, "disk_usage", Disk(10**12, 0).usage)
    cache = ShardCache(tmp_path / "shards", None)
    for i in range(3):
        assert read(cache, Content(i)) == Content(i).data
        assert names(cache) == [Content(i).sha256]
    assert [message.replace(str(cache.folder), "FOLDER") for message in caplog.messages] == [
        "the disk of the cache FOLDER is almost full, so each downloaded file is soon deleted, and downloaded again when it is "
        "needed: free some space, or choose another folder with cache_dir= or the environment variable RELABEL_CACHE"
    ]


def test_a_folder_that_cannot_be_created_is_named():
    with pytest.raises(OSError, match="/proc/none"):  # where even root cannot create a folder
        read(ShardCache(Path("/proc/none/shards"), None), Content(0))
