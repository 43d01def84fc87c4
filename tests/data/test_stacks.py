"""Unmodified frameworks on real ranks: every loader trains on all samples, in each epoch and after a resume."""

import json
import os
import subprocess
import sys

import psutil
import pytest

import relabel_datasets as rd
from tests.conftest import ROOT, ColourNet, picture

pytestmark = pytest.mark.slow
RANKS = {2: (40, 8), 3: (43, 7)}  # number of ranks: (samples, samples of a shard)
OWN = ("DataLoader(dataset, sampler)", "RelabelLoader(dataset, sampler)", "DataLoader(stream)", "RelabelLoader(stream)")
SHARDS = "dispatch_batches=False"


@pytest.fixture(scope="module", params=list(RANKS), ids=lambda num_ranks: f"{num_ranks} ranks")
def ranks(request, tmp_path_factory):
    """Return (number of ranks, folder of a dataset)."""
    from relabel_datasets.annotate.annotator import ModuleAnnotator
    from relabel_datasets.annotate.builder import build

    num_samples, shard_size = RANKS[request.param]
    root = tmp_path_factory.mktemp("stacks")
    for i in range(num_samples):
        path = root / "images" / "abc"[i % 3] / f"photo_{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, (8, 8)).save(path)
    annotator = ModuleAnnotator(ColourNet(), (48, 64), classes=("a", "b", "c"), name="colours")
    build(rd.data.ImageFolderSource(root / "images"), root / "data", annotator, shard_size=shard_size, progress=False)
    return request.param, root / "data"


# Before Python 3.11.8, a worker forked while another thread of the parent, such as autograd's, starts or ends may deadlock
# (https://github.com/python/cpython/issues/112275).
_FORK_MAY_DEADLOCK = sys.version_info < (3, 11, 8)
_TIMEOUT_S = 300


def launch(name, ranks, tmp_path):
    """Run a program as torchrun does; return {cell: what each rank saw}."""
    num_ranks, folder = ranks
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}",
        "-m", f"tests.data.stacks.{name}", str(folder), str(tmp_path),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for attempts_left in reversed(range(1 + _FORK_MAY_DEADLOCK * 2)):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        try:
            _, errors = process.communicate(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            for child in psutil.Process(process.pid).children(
                recursive=True
            ):  # torchrun gives its ranks sessions of their own
                child.kill()
            process.kill()
            process.communicate()
            assert attempts_left, f"{name} does not end within {_TIMEOUT_S} s"
        else:
            assert process.returncode == 0, errors[-5000:]
            break
    reports = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(num_ranks)]
    assert all(report.keys() == reports[0].keys() for report in reports)
    return {cell: [report[cell] for report in reports] for cell in reports[0]}


def counts(cell):
    """Return (distinct samples, repeated samples) of each epoch of all ranks, or the errors of the ranks."""
    if any(isinstance(rank, str) for rank in cell):
        return cell
    epochs = []
    for epoch in zip(*cell, strict=True):
        seen = [sample for rank in epoch for batch in rank for sample in batch]
        epochs.append((len(set(seen)), len(seen) - len(set(seen))))
    return epochs


def take(cells, kind):
    """Return {the rest of the name: cell} of the cells of a kind."""
    return {name.split(" | ", 1)[1]: cell for name, cell in cells.items() if name.split(" | ")[0] == kind}


def assert_each_epoch(cells, expected):
    """Assert that all epochs of all cells count as expected, and differ in their order."""
    assert cells
    assert {name: counts(cell) for name, cell in cells.items()} == {
        name: [expected(name)] * len(cell[0]) for name, cell in cells.items()
    }
    for name, cell in cells.items():
        assert len({json.dumps(epoch) for epoch in cell[0]}) == len(cell[0]), name


def assert_resumed(cells):
    """Assert that each rank's batches after a resume are the last ones of the run that was not interrupted."""
    assert cells
    for name, cell in cells.items():
        for whole, resumed in cell:
            assert not isinstance(whole, str), (name, whole)
            whole, resumed = ([batch for epoch in run for batch in epoch] for run in (whole, resumed))
            assert 0 < len(resumed) <= len(whole), name
            assert whole[-len(resumed) :] == resumed, name


def assert_refused(cells, *lines):
    """Assert that all ranks raise an error that has these lines of code."""
    assert cells
    for name, cell in cells.items():
        for rank in cell:
            assert isinstance(rank, str), name
            assert all(line in rank for line in lines), (name, rank)


def test_plain_ranks_and_fabric_see_every_sample_once(ranks, tmp_path):
    cells = launch("with_fabric", ranks, tmp_path)
    num_ranks, _ = ranks
    # RelabelSampler leaves the remainder out, torch's DistributedSampler repeats samples.
    own, torchs = ((40, 0), (40, 0)) if num_ranks == 2 else ((42, 0), (43, 2))
    assert_each_epoch(take(cells, "torchrun"), lambda name: own)
    assert_each_epoch(take(cells, "epochs"), lambda name: own if name.startswith(OWN) else torchs)
    assert_resumed(take(cells, "resumed"))


def test_lightning_sees_every_sample_once_and_resumes_exactly(ranks, tmp_path):
    cells = launch("with_lightning", ranks, tmp_path)
    num_ranks, _ = ranks
    own, torchs = ((40, 0), (40, 0)) if num_ranks == 2 else ((42, 0), (43, 2))
    assert_each_epoch(take(cells, "fit"), lambda name: own if name.startswith(OWN) else torchs)
    limited = take(cells, "limited")
    assert_each_epoch(limited, lambda name: (2 * num_ranks * 2 * num_ranks, 0))
    reloaded = take(cells, "reloaded")
    for cell in reloaded.pop("DataLoader(stream)"):  # Lightning announces no epoch to it: a new one reads epoch 0
        assert cell[0] == cell[1] == cell[2]
    assert_each_epoch(reloaded, lambda name: own if name.startswith(OWN) else torchs)
    for kind in ("resumed", "resumed later", "resumed at the end", "resumed limited"):
        assert_resumed(take(cells, kind))
    if num_ranks == 2:  # after 3 of 5 steps of epoch 0
        for cell in take(cells, "resumed").values():
            assert counts([resumed for _, resumed in cell]) == [(16, 0), (40, 0), (40, 0), (40, 0)]


def test_accelerate_sees_every_sample(ranks, tmp_path):
    cells = launch("with_accelerate", ranks, tmp_path)
    num_ranks, _ = ranks
    stateful = (
        "RelabelLoader(stream) | use_stateful_dataloader=True | ",
        "DataLoader(stream) | use_stateful_dataloader=True | ",
    )
    prepared = take(cells, "prepare")
    assert_refused({name: prepared.pop(name) for name in stateful}, "dispatch_batches=False")

    def expected(name):
        """accelerate repeats samples until the last batches of all processes are full, or evenly sized."""
        loader, reader, _ = name.split(" | ")
        if num_ranks == 2:
            return 40, 0
        if "split_batches" in reader:
            return 43, (2 if "stream" in loader and SHARDS not in reader else 5)
        if reader == "even_batches=False" and "stream" not in loader:
            return 43, 0
        dispatches = "stream" in loader or reader == "dispatch_batches=True"
        return 43, (2 if dispatches and SHARDS not in reader else 11)

    assert_each_epoch(prepared, expected)
    for cells_of_kind in (take(cells, "skipped"), take(cells, "stateful")):
        assert_resumed({name: cell for name, cell in cells_of_kind.items() if name.startswith(OWN)})
    assert_refused(take(cells, "skipped without epoch"), "set_epoch(epoch)", "skip_first_batches()")
    assert_refused(take(cells, "stateful without epoch"), "set_epoch(epoch)", "load_state_dict()")
    given = {name: cell for name, cell in cells.items() if name.startswith("rank given")}
    assert_refused(given, "remove rank= and world_size=")


def test_the_trainer_sees_every_sample_and_resumes_exactly(ranks, tmp_path):
    cells = launch("with_trainer", ranks, tmp_path)
    num_ranks, _ = ranks

    def expected(name):
        if num_ranks == 2:
            return 40, 0
        if name.endswith("as it is"):
            return 42, 0
        return 43, (2 if "stream" in name and SHARDS not in name else 11)

    assert_each_epoch(take(cells, "train_dataset"), expected)
    overridden = take(cells, "get_train_dataloader")
    overridden.pop("DataLoader(dataset) | as it is")  # split by nobody, as documented by transformers
    assert_each_epoch(overridden, expected)
    resumed = take(cells, "resumed")
    resumed.pop("DataLoader(dataset) | as it is")
    as_it_is = {name: resumed.pop(name) for name in list(resumed) if name.endswith("as it is")}
    assert_refused(as_it_is, "return self.accelerator.prepare(loader)")
    for name in ("DataLoader(dataset)", "DataLoader(stream)"):
        for whole, again in resumed.pop(f"{name} | ignore_data_skip"):
            assert len(whole) > len(again) > 0
    assert_resumed(resumed)
