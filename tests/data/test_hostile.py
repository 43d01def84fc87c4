"""Hostile manifests, indexes, label maps and cards cause documented errors, use little memory and touch no other file."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.hostile import MAX_BYTES


def check(good, scratch, seconds):
    scratch.mkdir()
    command = [sys.executable, "-m", "tests.hostile", str(good), str(scratch.resolve()), str(seconds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1",
                   "TMPDIR": str(scratch), "HYPOTHESIS_STORAGE_DIRECTORY": str(scratch / ".hypothesis")}  # fmt: skip
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-8000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["grown_bytes"] < MAX_BYTES
    assert report["written_outside"] == []
    return report["variants"]


def test_hostile_datasets_give_documented_errors(served_folder, tmp_path):
    assert check(served_folder, tmp_path / "scratch", 0) >= 40


@pytest.mark.slow
def test_hostile_datasets_give_documented_errors_for_two_minutes(served_folder, tmp_path):
    assert check(served_folder, tmp_path / "scratch", 120) >= 400
