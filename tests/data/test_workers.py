"""Workers of a fork server find what they need imported, and their sockets have short paths."""

import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import relabel_datasets as rd
from relabel_datasets.data import workers
from tests.conftest import ROOT

# The module alone, since its package imports torch.
HEAD = f"""
import importlib.util, json, multiprocessing, sys, types
from multiprocessing import forkserver
spec = importlib.util.spec_from_file_location("relabel_datasets.data.workers", {str(ROOT / "relabel_datasets/data/workers.py")!r})
workers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(workers)
sys.modules["torch"] = sys.modules["relabel_datasets.data.stream"] = types.ModuleType("imported")
chosen = []
server = types.SimpleNamespace(_preload_modules=["__main__", "json"])
forkserver._forkserver = server
forkserver.set_forkserver_preload = lambda modules: chosen.append(modules)
forkserver.ensure_running = lambda: chosen.append("started")
"""
PRELOADED = ["__main__", "json", "torch", "relabel_datasets.data.stream"]


def _run(code: str) -> object:
    run = subprocess.run(
        [sys.executable, "-c", f"{HEAD}{code}\nprint(json.dumps(chosen))"], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize(
    ("code", "chosen"),
    {
        "a context of the loader": (
            'workers.prepare_workers(multiprocessing.get_context("forkserver"))',
            [PRELOADED, "started"],
        ),
        "the default": (
            'multiprocessing.set_start_method("forkserver"); workers.prepare_workers(None)',
            [PRELOADED, "started"],
        ),
        "modules once": (
            'server._preload_modules.append("torch"); workers.prepare_workers(multiprocessing.get_context("forkserver"))',
            [["__main__", "json", "torch", "relabel_datasets.data.stream"], "started"],
        ),
        "spawn": ('workers.prepare_workers(multiprocessing.get_context("spawn"))', []),
        "fork": ('workers.prepare_workers(multiprocessing.get_context("fork"))', []),
        "fork by default": ('multiprocessing.set_start_method("fork"); workers.prepare_workers(None)', []),
        "while a worker imports the main module": (
            "multiprocessing.current_process()._inheriting = True\n"
            'workers.prepare_workers(multiprocessing.get_context("forkserver"))',
            [],
        ),
    }.values(),
    ids=["context", "default", "once", "spawn", "fork", "fork by default", "importing"],
)
def test_a_fork_server_imports_what_this_process_has_imported_and_what_the_program_chose(code, chosen):
    assert _run(code) == chosen


def test_the_start_method_can_still_be_chosen_after_a_loader_was_made():
    assert _run('workers.prepare_workers(None); multiprocessing.set_start_method("spawn"); chosen.clear()') == []


class TestTemporaryFolder:
    @pytest.fixture
    def use(self, monkeypatch):
        """Function that makes the temporary folder one whose path has a number of bytes."""

        def use(parent, num_bytes):
            folder = parent / ("x" * (num_bytes - len(os.fsencode(parent)) - 1))
            folder.mkdir()
            monkeypatch.setattr(tempfile, "tempdir", str(folder))
            process = multiprocessing.current_process()
            monkeypatch.setattr(process, "_config", {k: v for k, v in process._config.items() if k != "tempdir"})
            with monkeypatch.context() as patch:
                patch.setattr(multiprocessing.util, "Finalize", lambda *_, **__: None)  # the test removes the folder
                multiprocessing.util.get_temp_dir()
            return folder

        with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as parent:
            yield functools.partial(use, Path(parent))

    def test_workers_open_their_sockets_in_the_longest_folder(self, use):
        use(75)
        workers.check_temp_folder()
        with multiprocessing.connection.Listener() as listener:
            assert len(listener.address) == 107

    @pytest.mark.skipif(hasattr(multiprocessing.util, "_get_base_temp_dir"), reason="this Python uses /tmp instead")
    @pytest.mark.skipif(sys.platform != "linux", reason="tensors are sent without sockets")
    def test_a_folder_with_a_longer_path_is_refused_before_workers_wait_for_ever(self, use, served_folder):
        folder = use(76)
        stream = rd.load_dataset(served_folder, "colours", "train", streaming=True)
        with pytest.raises(
            ValueError, match=rf"{folder} is too long .* TMPDIR to a folder whose path has at most 75 bytes"
        ):
            rd.RelabelLoader(stream, 2, num_workers=1)
        assert rd.RelabelLoader(stream, 2, num_workers=0) is not None


@pytest.mark.slow
def test_workers_of_a_fork_server_share_one_import_of_torch(dataset_folder, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(f"""
import os, sys
def describe(samples):
    import torch
    return os.getppid(), id(torch)  # addresses of separate imports differ
if __name__ == "__main__":
    import multiprocessing.forkserver
    import relabel_datasets as rd
    stream = rd.load_dataset({str(dataset_folder)!r}, "colours", "train", streaming=True)
    loader = rd.RelabelLoader(stream, 2, num_workers=2, multiprocessing_context="forkserver", collate_fn=describe)
    parents, imports = zip(*loader)
    print(len(parents), len(set(imports)), set(parents) == {{multiprocessing.forkserver._forkserver._forkserver_pid}})
""")
    run = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout == "7 1 True\n", run.stderr
