"""Every benchmark of the README runs at a small size."""

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
SMALL = {  # IMAGES stands for an ImageFolder, CHECKPOINT for the weights of the annotator
    "annotators": "IMAGES --num-images 2 --num-crops 1 --steps 1",
    "building": "IMAGES/train --annotator resnet18 --checkpoint CHECKPOINT --input-size 64 --batch-size 4",
    "fidelity": "IMAGES/train --annotator resnet18 --checkpoint CHECKPOINT --num-images 4 --num-crops 2 --sizes 64",
    "label_errors": "IMAGES/train --annotator resnet18 --checkpoint CHECKPOINT --input-size 64 --num-mosaics 20 --seeds 1",
    "loading": "--num-images 8 --rounds 1 --num-workers 0",
    "lookup": "",
    "pooling": "",
    "readers": "--num-samples 128 --rounds 1",
    "shuffling": "--num-shards 8 --num-samples 50 --epochs 1",
    "shown_classes": "IMAGES/train --annotator resnet18 --checkpoint CHECKPOINT --input-size 64 --num-mosaics 20 --full-size IMAGES/val",
    "sizes": "",
    "streaming": "--num-samples 192 --num-shards 4 --rounds 1",
    "training": "--rounds 1 --num-images 32 --batch-size 8 --steps 1 --step-batch-size 2",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_a_benchmark_runs_and_prints_a_table(name, tmp_path):
    if name == "label_errors":
        pytest.importorskip("cleanlab")
    for split in ("train", "val"):
        for i in range(40):
            path = tmp_path / split / SYNSETS[i % 10] / f"{split}{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(i, (80, 64)).save(path)
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "weights.pt")
    paths = {"IMAGES": str(tmp_path), "CHECKPOINT": str(tmp_path / "weights.pt")}
    arguments = SMALL[name]
    for word, path in paths.items():
        arguments = arguments.replace(word, path)
    command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments.split()]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [line for line in result.stdout.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) > 1, result.stdout
