"""SIGKILL in the middle of an epoch: rerunning the command writes the same logs as a run without interruption."""

import csv
import os
import signal
import subprocess
import sys
import time

import pytest

from relabel_datasets.cli import main
from tests.conftest import ROOT
from tests.train.tiny import OPTIONS

# Six steps per epoch. Each row of steps.csv has the mean of two losses, and checkpoints lie between rows.
RUN = (
    *OPTIONS, "--epochs", "4", "--batch-size", "8", "--cutmix", "1", "--mix-off-epochs", "1", "--ema-decay", "0.9",
    "--save-every", "1", "--log-every", "2",
)  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(scenes, out, *options, ranks=1):
    launch = ["-m", "relabel_datasets.train"]
    if ranks > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *launch]
    return [sys.executable, *launch, str(scenes), "--out", str(out), *RUN, *options]


def run_to_end(*args, **options):
    done = subprocess.run(
        command(*args, **options), capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def recovery_positions(folder):
    """Return (epoch, step) of the recovery checkpoints."""
    return [tuple(map(int, path.name.split(".")[0].split("-")[1:])) for path in folder.glob("recovery-*.pth.tar")]


def kill_at(scenes, out, position, *options, ranks=1):
    """Start a run and kill its processes once it has written a checkpoint at `position`, (epoch, step), or later."""
    process = subprocess.Popen(
        command(scenes, out, *options, ranks=ranks), cwd=ROOT, env=ENVIRONMENT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + 240
    try:
        while max(recovery_positions(out), default=(0, 0)) < position:
            assert process.poll() is None, "the run ended before it was killed"
            assert time.monotonic() < end
            time.sleep(0.002)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def logs(folder):
    """Return the rows of steps.csv and epochs.csv without columns of time."""
    tables = []
    for name in ("steps.csv", "epochs.csv"):
        with (folder / name).open(newline="") as file:
            rows = list(csv.DictReader(file))
        tables.append([{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows])
    return tables


def assert_same_logs(folder, reference):
    steps, epochs = logs(folder)
    whole_steps, whole_epochs = logs(reference)
    assert len(whole_steps) == 4 * 6 // 2
    assert len(whole_epochs) == 4
    assert steps == whole_steps
    assert epochs == whole_epochs


def test_a_killed_run_resumes_exactly(scenes, tmp_path, capsys):
    kill_at(scenes, tmp_path / "killed", (1, 3), "--num-workers", "1")
    assert len(logs(tmp_path / "killed")[1]) < 4
    for out in ("killed", "whole"):
        assert main(["train", str(scenes), "--out", str(tmp_path / out), *RUN, "--num-workers", "0"]) == 0
    assert_same_logs(tmp_path / "killed", tmp_path / "whole")
    killed, whole = capsys.readouterr().out.splitlines()
    assert killed.removeprefix(str(tmp_path / "killed")) == whole.removeprefix(str(tmp_path / "whole"))
    assert "top1" in whole


@pytest.mark.slow
def test_a_run_that_is_killed_several_times_resumes_exactly(scenes, tmp_path):
    for position in ((0, 1), (0, 6), (1, 2), (2, 5), (3, 1)):
        kill_at(scenes, tmp_path / "killed", position, "--num-workers", "1")
    run_to_end(scenes, tmp_path / "killed", "--num-workers", "2")
    run_to_end(scenes, tmp_path / "whole", "--num-workers", "0")
    assert_same_logs(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_two_killed_ranks_resume_exactly(scenes, tmp_path):
    for position in ((0, 3), (1, 4), (3, 1)):
        kill_at(scenes, tmp_path / "killed", position, "--num-workers", "1", ranks=2)
    printed = run_to_end(scenes, tmp_path / "killed", "--num-workers", "0", ranks=2)
    run_to_end(scenes, tmp_path / "whole", "--num-workers", "0", ranks=2)
    assert_same_logs(tmp_path / "killed", tmp_path / "whole")
    assert len(printed.splitlines()) == 1  # printed by rank 0 only
