"""Every benchmark runs, small: README's figures are of commands that anyone can repeat."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from .conftest import picture

FOLDER = Path(__file__).parent / "benchmarks"
SYNSETS = [
    "n01440764",
    "n02102040",
    "n02979186",
    "n03000684",
    "n03028079",
    "n03394916",
    "n03417042",
    "n03425413",
    "n03445777",
    "n03888257",
]
SMALL = {  # IMAGES is an ImageFolder, WEIGHTS a checkpoint of the annotator
    "annotators": "IMAGES --images 2 --crops 1 --steps 1",
    "building": "IMAGES/train --annotator resnet18 --checkpoint WEIGHTS --input-size 64 --batch-size 4",
    "fidelity": "IMAGES/train --annotator resnet18 --checkpoint WEIGHTS --num-images 4 --crops 2 --sizes 64",
    "loading": "--images 8 --rounds 1 --workers 0",
    "lookup": "",
    "pooling": "",
    "readers": "--samples 128 --rounds 1",
    "shuffling": "--shards 8 --samples 50 --epochs 1",
    "sizes": "",
    "streaming": "--samples 192 --shards 4 --rounds 1",
    "training": "--rounds 1 --images 32 --batch 8 --steps 1 --step-batch 2",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_it_runs_and_prints_a_table(name, tmp_path):
    for split in ("train", "val"):
        for i in range(40):
            path = tmp_path / split / SYNSETS[i % 10] / f"{split}{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(i, (80, 64)).save(path)
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "weights.pt")
    places = {"IMAGES": str(tmp_path), "WEIGHTS": str(tmp_path / "weights.pt")}
    arguments = SMALL[name]
    for word, place in places.items():
        arguments = arguments.replace(word, place)
    command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments.split()]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [line for line in result.stdout.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) > 1, result.stdout
