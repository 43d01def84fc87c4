"""Operating systems and versions of Python that the tests do not run on are imitated in processes of their own."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from relabel_datasets import compatibility
from relabel_datasets.compatibility import _name_by_class, qualified_name, read_at, sha256_digest

# Windows lacks these, and refuses to delete or rename open files. The libraries are imported before, as they are for Linux.
AS_ON_WINDOWS = """
import asyncio, logging, multiprocessing.popen_spawn_posix, os, random, signal, subprocess, sys
import aiohttp, fsspec.implementations.http, torch, torchvision.transforms.v2
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "geteuid", "getuid", "pread", "pwrite", "register_at_fork",
             "sched_getaffinity"):
    delattr(os, name)
for name in ("SIGHUP", "SIGKILL", "SIGPIPE"):
    delattr(signal, name)
def refuse_if_open(event, args):
    if event in ("os.remove", "os.rename"):
        opened = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        if os.path.realpath(args[0]) in opened:
            raise PermissionError(13, "the process cannot access the file because it is being used", args[0])
sys.addaudithook(refuse_if_open)
import relabel_datasets as rd
logging.basicConfig(format="%(message)s")
"""


def _run_as_on_windows(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", AS_ON_WINDOWS + script, *map(str, args)], capture_output=True, text=True
    )


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="imitating Windows needs /proc")


@needs_proc
def test_on_windows_all_modules_are_imported_and_local_datasets_are_read(dataset_folder):
    script = """
import pkgutil
from importlib import import_module
for module in pkgutil.walk_packages(rd.__path__, "relabel_datasets."):
    if "__main__" not in module.name and not module.name.endswith("._jpeg"):  # optional: does not load beside old torchvisions
        import_module(module.name)
dataset = rd.load_dataset(sys.argv[1], "colours", "train")
stream = rd.load_dataset(sys.argv[1], "colours", "train", streaming=True)
print(len(dataset), len(list(dataset)), len(list(stream)), rd.verify(sys.argv[1], progress=False).problems)
"""
    run = _run_as_on_windows(script, dataset_folder)
    assert run.stdout == "13 13 13 []\n", run.stderr


@needs_proc
def test_on_windows_builds_warn_that_nothing_locks_them(tmp_path, image_folder):
    out = tmp_path / "out"
    script = """
from tests.conftest import ColourNet
annotator = rd.ModuleAnnotator(ColourNet(), (48, 64), classes=("cat", "dog", "emu"), name="colours")
rd.build(rd.data.ImageFolderSource(sys.argv[1]), sys.argv[2], annotator, shard_size=5, progress=False)
print(rd.verify(sys.argv[2], progress=False).problems)
"""
    run = _run_as_on_windows(script, image_folder, out)
    assert run.stdout == "[]\n", run.stderr
    assert "cannot be locked on Windows: make sure that no other process builds it" in run.stderr
    assert not list(out.rglob("*.tmp")) + list(out.rglob(".*"))


@needs_proc
def test_on_windows_the_cache_of_remote_datasets_is_refused_with_what_to_do(http, tmp_path):
    script = """
try:
    rd.load_dataset(sys.argv[1], "colours", "train", cache_dir=sys.argv[2])[0]
except OSError as error:
    print(error)
"""
    run = _run_as_on_windows(script, http.url, tmp_path)
    assert "the cache of remote datasets does not work on Windows" in run.stdout, run.stderr


def test_bytes_at_an_offset_are_read_without_pread_and_the_position_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    monkeypatch.delattr(compatibility.os, "pread")
    with path.open("rb", buffering=0) as file:
        file.seek(7)
        assert read_at(file.fileno(), 5, 90) == bytes(range(90, 95))
        assert read_at(file.fileno(), 50, 90) == bytes(range(90, 100))
        assert file.read(1) == b"\x07"


def test_the_digest_is_that_of_the_rest_of_the_file(tmp_path):
    path = tmp_path / "file"
    content = bytes(range(256)) * 3000
    path.write_bytes(content)
    with path.open("rb") as file:
        assert sha256_digest(file).hexdigest() == hashlib.sha256(content).hexdigest()
        assert file.tell() == len(content)
        file.seek(1000)
        assert sha256_digest(file).hexdigest() == hashlib.sha256(content[1000:]).hexdigest()


class _Base:
    def __iter__(self):
        yield _names()

    def renamed(self):
        return _names()


class _Derived(_Base):
    def __iter__(self):
        yield from super().__iter__()
        yield _names()


def _names():
    """Return the name of the caller, as Python 3.11 and as Python 3.10 find it."""
    frame = sys._getframe(1)
    return qualified_name(frame), _name_by_class(frame)


def _function(self=None):
    return _names()


def test_the_name_of_a_method_has_the_class_that_defines_it():
    assert list(_Derived()) == [("_Base.__iter__",) * 2, ("_Derived.__iter__",) * 2]
    assert _Derived().renamed() == ("_Base.renamed",) * 2
    assert _function() == _function(_Base()) == ("_function",) * 2


def test_allowed_globals_are_forgotten_after_the_block():
    import argparse

    from torch import serialization

    before = set(serialization.get_safe_globals())
    with compatibility.safe_globals([argparse.Namespace]):
        assert argparse.Namespace in serialization.get_safe_globals()
    assert set(serialization.get_safe_globals()) == before
