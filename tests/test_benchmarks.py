"""Every benchmark of the README runs at a small size."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import PIL.Image
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
SMALL = {  # IMAGES and MANY stand for folders of ImageFolders, CHECKPOINT for the weights of the annotator
    "annotators": "IMAGES --num-images 2 --num-crops 1 --steps 1",
    "building": "--num-images 40 --annotator resnet18 --checkpoint CHECKPOINT --input-size 64 --batch-size 4 --bare eager "
    "--profile 2 --out out",
    "crop_codec": "IMAGES/train --annotator resnet18 --checkpoint CHECKPOINT --input-size 64 --num-images 2 --num-crops 6 --subset 3",
    "crop_fidelity": "IMAGES/train --annotator resnet18 --checkpoint CHECKPOINT --input-size 64 --num-images 4 --num-crops 2 --size 64 "
    "--sizes 64 96 128",
    "decoding": "IMAGES/train --rounds 1",
    "fidelity": "IMAGES/train --annotator resnet18 --checkpoint CHECKPOINT --num-images 4 --num-crops 2 --sizes 64",
    "label_errors": "IMAGES/train --annotator resnet18 --checkpoint CHECKPOINT --input-size 64 --num-mosaics 20 --num-crops 2 --seeds 1",
    "loading": "--small",
    "lookup": "",
    "pooling": "",
    "readers": "--num-samples 128 --rounds 1",
    "shuffling": "--num-shards 8 --num-samples 50 --epochs 1",
    "shown_classes": "IMAGES/train --annotator resnet18 --checkpoint CHECKPOINT --input-size 64 --num-mosaics 20 --full-size IMAGES/val",
    "sizes": "",
    "students": "few MANY --out out --results results --annotator resnet18 --checkpoint CHECKPOINT --input-size 64 --teacher-size 48 "
    "--image-size 32 --epochs 1 --batch-size 4 --seeds 1 --num-crops 2 --crop-input-size 64 --scale-sizes 64 96",
    "startup": "--part imports --rounds 1",
    "streaming": "--num-samples 192 --num-shards 4 --rounds 1",
    "training": "--rounds 1 --num-images 32 --batch-size 8 --steps 1 --step-batch-size 2",
}


@pytest.fixture
def run(tmp_path):
    """Function that runs a benchmark with the arguments in a string and returns the rows of its tables."""
    for folder, split, count in (
        ("images", "train", 40),
        ("images", "val", 40),
        ("many", "train", 200),
        ("many", "val", 10),
    ):
        for i in range(count):
            path = tmp_path / folder / split / SYNSETS[i % 10] / f"{split}{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(i, (80, 64)).save(path)
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "weights.pt")
    paths = {
        "IMAGES": str(tmp_path / "images"), "MANY": str(tmp_path / "many"), "CHECKPOINT": str(tmp_path / "weights.pt"),
    }  # fmt: skip

    def run(name, arguments):
        for word, path in paths.items():
            arguments = arguments.replace(word, path)
        command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments.split()]
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]
        rows = [line for line in result.stdout.splitlines() if line.startswith("| ") and "---" not in line]
        assert len(rows) > 1, result.stdout
        return rows

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("[!_]*.py")))
def test_a_benchmark_runs_and_prints_a_table(name, run):
    if name == "label_errors":
        pytest.importorskip("cleanlab")
    run(name, SMALL[name])


@pytest.mark.slow
def test_students_are_trained_once_and_their_tables_come_from_the_results(run, tmp_path):
    options = SMALL["students"].removeprefix("few ")
    results = tmp_path / "results" / "few.json"
    run("students", f"noise {options}")
    first = json.loads(results.read_text())["runs"]
    assert [(row["labels"], row["noise"]) for row in first] == [
        ("single label", 0), ("single label", 40), ("single label", 20), ("ReLabel", 0), ("ReLabel + CutMix", 0),
        ("label smoothing", 0), ("label smoothing", 40), ("label smoothing", 20),
    ]  # fmt: skip
    rows = run("students", f"noise {options} --seeds 2 --figure figure.png")
    both = json.loads(results.read_text())["runs"]
    assert both[: len(first)] == first
    assert [row["seed"] for row in both] == [0] * len(first) + [1] * len(first)
    assert len({row["accuracy"] for row in both}) > 1
    with PIL.Image.open(tmp_path / "figure.png") as figure:
        assert figure.format == "PNG"
    assert run("students", "noise --results results") == rows
    run("students", f"mosaics {options}")
    assert len(json.loads((results.parent / "mosaics.json").read_text())["runs"]) == 4


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("_building_suite")


def test_the_steps_for_a_gpu_have_valid_arguments_and_enough_batches_to_profile(suite, tmp_path, monkeypatch):
    building = importlib.import_module("building")
    for step in suite.STEPS.values():
        monkeypatch.setattr(sys, "argv", ["building.py", *step.arguments.split(), "--out", str(tmp_path)])
        args = building.parse_arguments()
        assert timm.is_model(args.annotator[0])
        assert (args.profile or 0) < args.num_images // args.batch_size * 3 // 4


@pytest.mark.slow
def test_a_step_that_fails_or_exceeds_its_limit_does_not_stop_the_next_one(suite, tmp_path, capsys):
    small = (
        "--random-weights --annotator test_resnet --input-size 64 --num-images 48 --batch-size 4 --shard-size 20 --all-classes "
        "--num-samples 0 --no-images --no-calibration --bare eager --device cpu"
    )
    steps = {
        "fails": suite.Step("--random-weights --annotator no_such_model", 100),
        "stops": suite.Step(small, 0.1),
        "runs": suite.Step(f"{small} --profile 2", 300),
    }
    suite.run_suite(FOLDER / "building.py", tmp_path, steps)
    suite.run_suite(FOLDER / "building.py", tmp_path, {"late": suite.Step(small, 100)}, limit_s=0)
    results = [line.partition(" after")[0] for line in capsys.readouterr().out.splitlines()]
    assert results == [
        "fails: exit status 1", "stops: stopped at its limit", "runs: exit status 0", "late: left out, the limit of 0 s is reached",
    ]  # fmt: skip
    assert "no_such_model" in (tmp_path / "fails.txt").read_text().splitlines()[-1]
    text = (tmp_path / "runs.txt").read_text()
    assert "| images, skipped, forward passes | 48, 0, 48 |" in text  # no crops
    assert "| between first and last tenth / bare model, eager |" in text
    files = {"fails.txt", "stops.txt", "runs.txt", "test_resnet_profile.txt", "test_resnet_trace.json.gz"}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert "aten::convolution" in (tmp_path / "test_resnet_profile.txt").read_text()


def test_the_names_of_all_benchmarks_have_small_arguments():
    assert sorted(SMALL) == sorted(path.stem for path in FOLDER.glob("[!_]*.py"))
