"""Checkpoints and logs that are complete, truncated, corrupt or malicious."""

import argparse
import os
import pickle
import subprocess
import sys

import pytest
import torch

from relabel_datasets.train.checkpoints import Checkpoints, CsvLog, load_checkpoint
from relabel_datasets.train.recipe import Recipe
from tests.conftest import ROOT


class Harm:
    """Object that runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch harmed",)


def checkpoints(folder, model=None, recipe=Recipe()):
    model = torch.nn.Linear(2, 2) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return Checkpoints(folder, recipe, model, optimizer, ema=None, scaler=None, classes=("cat", "dog"))


def progress_at(step):
    return {"loader": {"epoch": 1}, "losses": [float(step), 1.0], "window": [0.0, 0.0], "seconds": float(step)}


def resumed(folder):
    return checkpoints(folder).resume(torch.device("cpu"))


def test_resume_loads_the_most_advanced_checkpoint(tmp_path):
    assert resumed(tmp_path)["epoch"] == 0
    model = torch.nn.Linear(2, 2)
    kept = checkpoints(tmp_path, model)
    kept.save_epoch(0, 0.5, 2.0)
    assert resumed(tmp_path) == {
        "epoch": 1, "step": 0, "seconds": 2.0, "loader": None, "losses": [0.0, 0.0], "window": [0.0, 0.0]
    }  # fmt: skip
    for step in (2, 10, 12):
        kept.save_step(1, step, **progress_at(step))
    assert sorted(path.name for path in tmp_path.glob("recovery*")) == [
        "recovery-1-10.pth.tar", "recovery-1-12.pth.tar"
    ]  # fmt: skip
    again = torch.nn.Linear(2, 2)
    assert checkpoints(tmp_path, again).resume(torch.device("cpu")) == {"epoch": 1, "step": 12, **progress_at(12)}
    assert torch.equal(again.weight, model.weight)
    kept.save_epoch(1, 0.4, 3.0)
    assert resumed(tmp_path)["epoch"] == 2
    kept.drop_steps()
    assert not list(tmp_path.glob("recovery*"))
    assert kept.best == 0.5


def test_a_run_whose_recipe_lacks_a_newer_value_is_resumed_if_the_value_is_the_default(tmp_path):
    checkpoints(tmp_path).save_epoch(0, 0.5, 2.0)
    state = load_checkpoint(tmp_path / "last.pth.tar")
    del state["args"].recipe["temperature"]
    torch.save(state, tmp_path / "last.pth.tar")
    assert resumed(tmp_path)["epoch"] == 1
    changed = checkpoints(tmp_path, recipe=Recipe(temperature=2.0))
    with pytest.raises(ValueError, match=r"temperature=1.0 in that run, 2.0 now"):
        changed.resume(torch.device("cpu"))


def test_the_best_metric_survives_a_resume(tmp_path):
    model = torch.nn.Linear(2, 2)
    kept = checkpoints(tmp_path, model)
    kept.save_epoch(0, 0.5, 1.0)
    best = model.weight.detach().clone()
    again = checkpoints(tmp_path)
    again.resume(torch.device("cpu"))
    assert again.best == 0.5
    again.save_epoch(1, 0.4, 2.0)
    assert torch.equal(load_checkpoint(tmp_path / "model_best.pth.tar")["state_dict"]["weight"], best)


KILLED = """
import os, sys, torch
from pathlib import Path
from tests.train.test_checkpoints import checkpoints, progress_at

def write(folder, call):
    '''Write several checkpoints, but exit at the given call of a function that changes files.'''
    calls = 0

    def counted(function):
        def run(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                if function is save:  # while writing
                    args[1].write(b"PK half of it")
                    args[1].flush()
                os._exit(9)
            return function(*args, **kwargs)
        return run

    save = torch.save
    torch.save = counted(save)
    for name in ("replace", "link", "unlink", "remove"):
        setattr(os, name, counted(getattr(os, name)))
    kept = checkpoints(folder)
    kept.save_epoch(0, 0.5, 1.0)
    for step in (1, 2, 3):
        kept.save_step(1, step, **progress_at(step))
    kept.save_epoch(1, 0.6, 2.0)
    kept.drop_steps()
    kept.save_epoch(2, 0.7, 3.0)
    os._exit(0)

torch.set_num_threads(1)
for call in range(1, 1000):
    folder = Path(sys.argv[1], str(call))
    folder.mkdir()
    child = os.fork()
    if not child:
        write(folder, call)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9), status
    if status == 0:
        break
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_of_writing_leaves_a_valid_checkpoint(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=True, cwd=ROOT, timeout=300)
    reached = []
    for folder in sorted(tmp_path.iterdir(), key=lambda path: int(path.name)):
        state = resumed(folder)
        reached.append((state["epoch"], state["step"]))
        if reached[-1] > (1, 0):
            load_checkpoint(folder / "model_best.pth.tar")
    assert len(reached) > 20
    assert reached == sorted(reached)
    assert set(reached) == {(0, 0), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (3, 0)}


@pytest.mark.parametrize("name", ["last.pth.tar", "recovery-1-2.pth.tar"])
def test_a_corrupt_checkpoint_is_an_error_with_its_name(tmp_path, name):
    kept = checkpoints(tmp_path)
    kept.save_epoch(0, 0.5, 1.0)
    kept.save_step(1, 2, **progress_at(2))
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=f"{name} is not a checkpoint of a training run, or is corrupt"):
        resumed(tmp_path)
    path.unlink()
    resumed(tmp_path)


def test_code_in_a_checkpoint_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(recipe={}, classes=[], progress={"epoch": 3, "step": 0})
    for content in (Harm(), {"args": args, "state_dict": {}, "harm": Harm()}):
        torch.save(content, "last.pth.tar")
        with pytest.raises(ValueError, match=r"last\.pth\.tar is not a checkpoint"):
            resumed(tmp_path)
        with open("bare.pth", "wb") as file:  # noqa: PTH123
            pickle.dump(content, file)
        with pytest.raises(ValueError, match=r"bare\.pth is not a checkpoint"):
            load_checkpoint("bare.pth")
    assert not (tmp_path / "harmed").exists()
    pickle.loads(pickle.dumps(Harm()))
    assert (tmp_path / "harmed").exists()  # unpickling it would have run the command


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1], {"args": argparse.Namespace(model="resnet18")}])
def test_a_checkpoint_of_another_training_loop_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth.tar")
    with pytest.raises(ValueError, match="contains no recipe"):
        load_checkpoint(tmp_path / "other.pth.tar")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*none\.pth\.tar"):
        load_checkpoint(tmp_path / "none.pth.tar")


def test_a_csv_log_drops_rows_after_its_start_and_a_truncated_row(tmp_path):
    path = tmp_path / "steps.csv"
    log = CsvLog(path, ("epoch", "step", "loss"), (0, 0))
    for epoch, step, loss in ((0, 1, 0.5), (0, 2, 1 / 3), (1, 1, 0.1), (1, 2, 0.2)):
        log.add({"epoch": epoch, "step": step, "loss": loss})
    log.add({"epoch": 1, "step": 3})
    text = path.read_text()
    assert text == "epoch,step,loss\n0,1,0.5\n0,2,0.333333333\n1,1,0.1\n1,2,0.2\n1,3,\n"
    for cut in ("", "1", "1,4", "1,1"):
        path.write_text(text + cut)
        CsvLog(path, ("epoch", "step", "loss"), (1, 1))
        assert path.read_text() == "epoch,step,loss\n0,1,0.5\n0,2,0.333333333\n1,1,0.1\n"
        CsvLog(path, ("epoch", "step", "loss"), (0, 0))
        assert path.read_text() == "epoch,step,loss\n"
