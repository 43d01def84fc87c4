"""Full disk: for each kind of file, the previous content survives and no partial file is left."""

import os
import resource
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import relabel_datasets as rd
from relabel_datasets.cli import main
from relabel_datasets.shards.card import write_card
from relabel_datasets.storage.local import write_atomically
from tests.train.test_checkpoints import checkpoints, progress_at, resumed

FULL = "is full (No space left on device)"


def fill(folder: Path) -> Path:
    """Fill the disk of a folder, and return the file that fills it."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    return ballast


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "ballast"
    }


def test_an_atomically_written_file_keeps_its_previous_content(small_disk):
    write_atomically(small_disk / "a.json", b"old")
    ballast = fill(small_disk)
    with pytest.raises(OSError, match=rf"the disk of {small_disk} is full .*, a.json was not written: free some space"):
        write_atomically(small_disk / "a.json", b"new" * 10_000)
    assert contents(small_disk) == {"a.json": b"old"}
    ballast.unlink()
    write_atomically(small_disk / "a.json", b"new")
    assert contents(small_disk) == {"a.json": b"new"}


@contextmanager
def file_size_limit(num_bytes):
    """Limit the size of files. Not a fixture, which would also limit the file that the output of pytest may go to."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_limit_of_the_file_size_is_treated_like_a_full_disk(tmp_path):
    write_atomically(tmp_path / "a", b"old")
    with file_size_limit(100), pytest.raises(OSError, match=r"is full \(File too large\), a was not written"):
        write_atomically(tmp_path / "a", b"new" * 1000)
    assert contents(tmp_path) == {"a": b"old"}


class TestCheckpoints:
    @pytest.mark.parametrize("free", [0, 3000, 6000, 9000])
    def test_previous_checkpoints_stay_valid_and_the_run_resumes(self, small_disk, free):
        model = torch.nn.Linear(2, 2)
        kept = checkpoints(small_disk, model)
        kept.save_epoch(0, 0.5, 1.0)
        kept.save_step(1, 1, **progress_at(1))
        before, weights = contents(small_disk), model.weight.detach().clone()
        ballast = fill(small_disk)
        os.truncate(ballast, ballast.stat().st_size - free)
        with torch.no_grad():
            model.weight += 1
        large = {**progress_at(2), "losses": [float(i) for i in range(100_000)]}
        with pytest.raises(OSError, match=rf"the disk of {small_disk} is full .*: free some space and run the same"):
            kept.save_step(1, 2, **large)
        assert contents(small_disk) == before
        ballast.unlink()
        again = torch.nn.Linear(2, 2)
        assert checkpoints(small_disk, again).resume(torch.device("cpu"))["step"] == 1
        assert torch.equal(again.weight, weights)
        kept.save_epoch(1, 0.6, 2.0)
        assert resumed(small_disk)["epoch"] == 2

    def test_previous_checkpoints_stay_valid_at_the_end_of_an_epoch(self, small_disk):
        kept = checkpoints(small_disk, torch.nn.Linear(2, 2))
        kept.save_epoch(0, 0.5, 1.0)
        before = contents(small_disk)
        fill(small_disk)
        with pytest.raises(OSError, match="is full"):
            kept.save_epoch(1, 0.6, 2.0)
        assert contents(small_disk) == before

    def test_without_hard_links_a_copy_is_complete_or_absent(self, small_disk, monkeypatch):
        def no_links(*_: object) -> None:
            raise PermissionError

        def full(source: str, target: str) -> None:
            Path(target).write_bytes(b"half")
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr(os, "link", no_links)
        kept = checkpoints(small_disk, torch.nn.Linear(2, 2))
        kept.save_epoch(0, 0.5, 1.0)
        before = set(contents(small_disk))
        monkeypatch.setattr(shutil, "copy2", full)
        with pytest.raises(OSError, match="is full"):
            kept.save_epoch(1, 0.6, 2.0)
        assert set(contents(small_disk)) <= before


@pytest.fixture
def weights(tmp_path):
    import timm

    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), path)
    return path


COMMANDS = {
    "verify": ["{data}/colours", "--num-workers", "0", "--json", "{disk}/report.json"],
    "analyze": ["{data}", "--config", "colours", "--num-crops", "26", "--out", "{disk}/analysis"],
    "report": ["{data}", "--config", "colours", "--num-crops", "26", "--out", "{disk}/report.html"],
    "pictures": ["{data}", "--config", "colours", "--count", "2", "--out", "{disk}/pictures"],
    "annotators": ["test_resnet*", "--input-size", "64", "--json", "{disk}/annotators.json"],
    "evaluate": [
        "test_resnet", "{data}", "--config", "colours", "--split", "train", "--checkpoint", "{weights}", "--model-kwargs",
        "num_classes=3", "--device", "cpu", "--num-workers", "0", "--image-size", "64", "--json", "{disk}/a.json",
    ],
    "build": [
        "{images}", "{disk}/built", "--annotator", "test_resnet", "--checkpoint", "{weights}", "--model-kwargs",
        "num_classes=3", "--input-size", "64", "--device", "cpu",
    ],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_prints_one_line_and_leaves_no_partial_file(
    command, dataset_folder, image_folder, weights, small_disk, capsys
):
    values = {"data": dataset_folder, "disk": small_disk, "weights": weights, "images": image_folder}
    arguments = [argument.format(**values) for argument in COMMANDS[command]]
    ballast = fill(small_disk)
    capsys.readouterr()
    assert main([command, *arguments]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"relabel {command}: ")
    assert str(small_disk) in last
    assert FULL in last or "(No space left on device)" in last
    assert not any(contents(small_disk).values())
    ballast.unlink()
    assert main([command, *arguments]) == 0
    assert any(contents(small_disk).values())


def test_a_card_keeps_its_previous_text(dataset_folder, small_disk):
    shutil.copytree(dataset_folder, small_disk / "data")
    before = contents(small_disk)
    fill(small_disk)
    with pytest.raises(OSError, match=rf"the disk of {small_disk}/data is full"):
        write_card(small_disk / "data", "imagenette-relabel")
    assert contents(small_disk) == before


def test_csv_logs_drop_a_truncated_row(small_disk):
    from relabel_datasets.train.checkpoints import CsvLog

    log = CsvLog(small_disk / "steps.csv", ("epoch", "step", "loss"), (0, 0))
    fill(small_disk)

    def add_rows():
        for step in range(10_000):
            log.add({"epoch": 0, "step": step, "loss": 0.1})

    with pytest.raises(OSError, match="is full"):
        add_rows()
    (small_disk / "ballast").unlink()
    CsvLog(small_disk / "steps.csv", ("epoch", "step", "loss"), (0, 10_000))
    rows = (small_disk / "steps.csv").read_text().splitlines()
    assert all(row.endswith(("loss", ",0.1")) for row in rows)


def test_an_error_of_the_cache_names_its_disk(dataset_folder, small_disk):
    from tests.servers import FaultyServer

    fill(small_disk)
    with FaultyServer(dataset_folder) as server, pytest.raises(OSError, match=rf"the disk of the cache {small_disk}"):
        rd.load_dataset(server.url, "colours", "train", cache_dir=small_disk)
