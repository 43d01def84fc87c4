import errno
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from relabel_datasets.storage import open_maps
from relabel_datasets.storage.open_maps import MapTable, max_open_maps, within_file_limit
from tests.conftest import ROOT


@contextmanager
def file_limit(num_files):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = num_files if before[1] == resource.RLIM_INFINITY else min(num_files, before[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / str(i) for i in range(60)]
    for i, path in enumerate(paths):
        path.write_bytes(f"content {i}".encode())
    return paths


def read(table, files, number):
    mapped = table.get(number)
    if mapped is None:
        mapped = table.open(number, lambda: files[number].open("rb"))
    return mapped[:]


@pytest.mark.parametrize(
    ("soft", "expected"),
    [(256, 128), (1024, 512), (1 << 20, 2048), (10, 5), (1, 1), (resource.RLIM_INFINITY, 2048)],
)
def test_half_of_the_open_files_may_be_maps(monkeypatch, soft, expected):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    assert max_open_maps() == expected


def test_the_budget_is_small_if_the_limit_is_unknown(monkeypatch):
    monkeypatch.setattr(open_maps, "resource", None)
    assert max_open_maps() == 256


def test_all_tables_share_the_budget_and_close_the_least_recently_used(files, monkeypatch):
    monkeypatch.setattr(open_maps, "max_open_maps", lambda: 16)
    one, two = MapTable(), MapTable()
    for number in range(8):
        assert read(one, files, number) == files[number].read_bytes()
    for number in range(8, 60):
        assert read(two, files, number) == files[number].read_bytes()
        assert read(one, files, 0) == files[0].read_bytes()  # opened first, but used
        assert len(one) + len(two) <= 16
    assert one.get(0) is not None
    assert all(one.get(number) is None for number in range(1, 8))
    assert two.get(59) is not None
    assert read(one, files, 5) == files[5].read_bytes()  # opened again


def test_maps_of_deleted_tables_do_not_count(files, monkeypatch):
    monkeypatch.setattr(open_maps, "max_open_maps", lambda: 8)
    for number in range(7):
        read(MapTable(), files, number)
    table = MapTable()
    for number in range(7):
        read(table, files, number)
    assert len(table) == 7


def test_only_current_maps_are_kept(files):
    table = MapTable()
    for number in range(5):
        read(table, files, number)
    table.keep(lambda number: number % 2 == 0)
    assert [table.get(number) is not None for number in range(5)] == [True, False, True, False, True]


def failing(number, times):
    attempts = itertools.count()

    def open_something():
        if next(attempts) < times:
            raise OSError(number, os.strerror(number), "some file")
        return "opened"

    return open_something


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_maps_are_closed_and_opening_is_retried(files, number):
    table = MapTable()
    read(table, files, 0)
    assert within_file_limit(failing(number, 1)) == "opened"
    assert table.get(0) is None


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EMFILE, r"Too many open files: this process may open \d+ files.*`ulimit -n \d+`.*'some file'"),
        (errno.ENFILE, r"fs\.file-max"),
        (errno.ENOMEM, r"`ulimit -v`"),
    ],
)
def test_a_permanent_error_names_the_limit_to_raise(number, message):
    with pytest.raises(OSError, match=message) as caught:
        within_file_limit(failing(number, 2))
    assert caught.value.errno == number


def test_other_errors_are_not_retried():
    with pytest.raises(OSError, match="Permission denied") as caught:
        within_file_limit(failing(errno.EACCES, 1))
    assert caught.value.errno == errno.EACCES


def test_a_process_at_its_file_limit_can_read(files):
    table = MapTable()
    for number in range(20):
        read(table, files, number)
    others = []  # open files
    with file_limit(512):
        with pytest.raises(OSError, match="Too many open files"):
            others.extend(iter(files[0].open, None))
        try:
            assert [read(table, files, number) for number in range(40)] == [path.read_bytes() for path in files[:40]]
        finally:
            for other in others:
                other.close()


def test_threads_share_a_table(files, monkeypatch):
    monkeypatch.setattr(open_maps, "max_open_maps", lambda: 4)
    table, wrong = MapTable(), []

    def work(seed):
        for i in range(400):
            number = (seed * 17 + i * 7) % len(files)
            if read(table, files, number) != files[number].read_bytes():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(table) <= 4


def run_with_limit(code, *arguments, num_files):
    """Run a program with a limit of open files (`ulimit -n`) and return the JSON that it prints."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({num_files}, {num_files}))\n"
    command = [sys.executable, "-c", "import json, sys\n" + limit + code, *map(str, arguments)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


FORKED = (
    f"""
import os, types
package = types.ModuleType("relabel_datasets")  # without its __init__, which imports torch
package.__path__ = [{str(ROOT / "relabel_datasets")!r}]
sys.modules["relabel_datasets"] = package
"""
    + """
from relabel_datasets.storage import open_maps
table = open_maps.MapTable()
def read(number):
    mapped = table.get(number)
    if mapped is None:
        mapped = table.open(number, lambda: open(f"{sys.argv[1]}/{number}", "rb"))
    return mapped[:].decode()
first = [read(i) for i in range(60)]
with open_maps._lock:  # as if another thread were closing maps
    child = os.fork()
    if not child:
        os._exit(0 if [read(i) for i in range(60)] == first else 1)
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(table)]))
"""
)


def test_a_forked_process_reads_within_the_limit(files, tmp_path):
    status, num_open = run_with_limit(FORKED, tmp_path, num_files=40)
    assert status == 0
    assert num_open <= 20


READS_ALL = """
import torch, relabel_datasets as rd
from torch.utils.data import ConcatDataset, DataLoader
datasets = [rd.load_dataset(f"{sys.argv[1]}/{name}", "many", "train", transforms=lambda image, label_map: (
    image.height, label_map.key)) for name in ("one", "two")]
both = ConcatDataset(datasets)
torch.manual_seed(0)
here = [sorted(both[i] for i in torch.randperm(len(both)).tolist()) for _ in range(2)]
loader = DataLoader(both, 4, shuffle=True, num_workers=2, collate_fn=list)
there = [sorted(sample for batch in loader for sample in batch) for _ in range(2)]
stream = rd.RelabelStream(datasets[0], seed=1)
streamed = sorted(sample for batch in rd.RelabelLoader(stream, 4, num_workers=2, collate_fn=list) for sample in batch)
print(json.dumps([here, there, streamed]))
"""


@pytest.fixture(scope="session")
def many_shards(tmp_path_factory):
    """Two datasets with 300 shards of one sample each."""
    from relabel_datasets.annotate.annotator import ModuleAnnotator
    from relabel_datasets.annotate.builder import build
    from relabel_datasets.annotate.shard import BuildConfig
    from relabel_datasets.data.sources import ImageFolderSource
    from tests.conftest import ColourNet, picture

    folder = tmp_path_factory.mktemp("many")
    for i in range(300):
        path = folder / "images" / "cat" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, (8, 8 + i % 3)).save(path)
    annotator = ModuleAnnotator(ColourNet(), (8, 8), classes=("cat", "dog", "emu"), name="many")
    build_config = BuildConfig(batch_size=1, num_threads=1)
    arguments = {"shard_size": 1, "all_classes": True, "progress": False}
    build(ImageFolderSource(folder / "images"), folder / "one", annotator, build_config=build_config, **arguments)
    shutil.copytree(folder / "one", folder / "two")
    return folder


@pytest.mark.slow
def test_600_shards_of_two_datasets_are_read_with_256_open_files(many_shards):
    here, there, streamed = run_with_limit(READS_ALL, many_shards, num_files=256)
    expected = [[8, f"{i:03d}"] for i in range(300)]
    assert here == [sorted(expected * 2)] * 2
    assert there == [sorted(expected * 2)] * 2
    assert streamed == expected
