"""Hostile manifests, indexes, label maps and cards cause documented errors, use little memory and touch no other file."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.hostile import MAX_BYTES


def check(folder, seconds):
    command = [sys.executable, "-m", "tests.hostile", str(folder), str(seconds)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": str(folder),
    }
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-8000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["grown_bytes"] < MAX_BYTES
    assert report["written_outside"] == []
    return report["variants"]


def test_hostile_datasets_give_documented_errors(tmp_path):
    assert check(tmp_path, 0) >= 40


@pytest.mark.slow
def test_hostile_datasets_give_documented_errors_for_two_minutes(tmp_path):
    assert check(tmp_path, 120) >= 400
