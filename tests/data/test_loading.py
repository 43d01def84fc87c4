import subprocess
import sys

import pytest

import relabel_datasets as rd
from relabel_datasets.data.loading import LoadOptions, StreamOptions, load_dataset
from relabel_datasets.data.store import find_config
from relabel_datasets.shards.manifest import Manifest
from relabel_datasets.storage import resolve
from tests.conftest import ROOT


@pytest.fixture
def two_splits(tmp_path, image_folder, annotator):
    for split in ("train", "validation"):
        rd.build(rd.data.ImageFolderSource(image_folder), tmp_path / "data", annotator, split=split, progress=False)
    return tmp_path / "data"


def test_a_folder_returns_one_split_or_a_dict_of_all(dataset_folder):
    assert isinstance(rd.load_dataset(dataset_folder, "colours", "train"), rd.RelabelDataset)
    assert {name: len(split) for name, split in rd.load_dataset(dataset_folder, "colours").items()} == {"train": 13}


@pytest.mark.parametrize("split", [None, "train"])
@pytest.mark.parametrize("streaming", [False, True])
def test_the_manifest_is_read_once(two_splits, monkeypatch, split, streaming):
    paths, read = [], Manifest.read
    monkeypatch.setattr(Manifest, "read", lambda folder: paths.append(str(folder)) or read(folder))
    rd.load_dataset(two_splits, split=split, streaming=streaming)
    assert len(paths) == 1


@pytest.mark.parametrize("split", ["val", "valid"])
def test_val_and_valid_are_the_validation_split(two_splits, split):
    assert len(rd.load_dataset(two_splits, split=split)) == 13


def test_the_root_of_a_dataset_is_its_path(dataset_folder):
    by_class = rd.RelabelDataset(dataset_folder, "colours")
    assert rd.load_dataset(dataset_folder, "colours", "train").root == by_class.root == str(dataset_folder)


def test_an_opened_config_is_not_another_config(dataset_folder):
    opened = find_config(dataset_folder, "colours")
    with pytest.raises(rd.DatasetError, match="is config 'colours', not 'labels-only'"):
        rd.LabelMaps(opened, "labels-only")


def test_an_unknown_path_lists_the_short_names():
    with pytest.raises(FileNotFoundError, match=r"nowhere.*scenes-relabel"):
        rd.load_dataset("nowhere", split="train")


def test_a_short_name_is_made_in_the_cache_on_first_use_and_found_there_afterwards(
    tmp_path, dataset_folder, monkeypatch
):
    made = []

    def make(root):
        made.append(root)
        dataset_folder.rename(root)

    monkeypatch.setattr("relabel_datasets.demo.make_scenes_relabel", make)
    monkeypatch.setenv("RELABEL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    for _ in range(2):
        assert len(rd.load_dataset("scenes-relabel", "colours", "train")) == 13
    assert made == [tmp_path / "cache" / "scenes-relabel"]


def test_a_short_name_that_another_process_made_at_the_same_time_is_used(tmp_path, dataset_folder, monkeypatch):
    def make(root):
        dataset_folder.rename(root)  # the other process
        raise FileExistsError(root)

    monkeypatch.setattr("relabel_datasets.demo.make_scenes_relabel", make)
    assert len(rd.load_dataset("scenes-relabel", "colours", "train", cache_dir=tmp_path)) == 13


def test_an_error_while_a_short_name_is_made_is_raised(tmp_path, monkeypatch):
    def make(root):
        raise OSError("no space left")

    monkeypatch.setattr("relabel_datasets.demo.make_scenes_relabel", make)
    with pytest.raises(OSError, match="no space left"):
        rd.load_dataset("scenes-relabel", split="train", cache_dir=tmp_path)


def test_every_builder_that_an_error_names_exists():
    assert all((ROOT / "builders" / text.split()[0]).is_file() for text in resolve._BUILDERS.values())


def test_the_typed_options_are_the_parameters_of_load_dataset():
    wrapped = load_dataset.__wrapped__
    assert set(wrapped.__kwdefaults__) - {"streaming"} == set(LoadOptions.__annotations__)
    stream = rd.RelabelStream.__init__.__wrapped__
    assert set(stream.__kwdefaults__) == set(StreamOptions.__annotations__)


TYPED = """
from collections.abc import Mapping
from relabel_datasets import RelabelDataset, RelabelLoader, RelabelStream, load_dataset

dataset: RelabelDataset = load_dataset("x", split="train", images="y", download=True)
splits: Mapping[str, RelabelDataset] = load_dataset("x", "config", cache_limit="1G")
stream: RelabelStream = load_dataset("x", split="train", streaming=True, seed=1, window=None)
loader = RelabelLoader(stream, 64, num_workers=2, drop_last=True, pin_memory=True, collate_fn=None, prefetch_factor=2)
streams: Mapping[str, RelabelStream] = load_dataset("x", streaming=True, rank=0, world_size=1)
"""
MISTYPED = {
    "a misspelled keyword": 'load_dataset("x", split="train", imagse="y")',
    "a misspelled keyword of a stream": 'load_dataset("x", split="train", streaming=True, sed=1)',
    "a keyword of a stream without streaming": 'load_dataset("x", split="train", seed=1)',
    "a wrong type": 'load_dataset("x", split="train", download="yes")',
    "a wrong choice": 'load_dataset("x", split="train", unmatched="drop")',
    "a wrong type of a stream": 'load_dataset("x", split="train", streaming=True, seed="1")',
    "a dict of splits used as a stream": 'load_dataset("x", streaming=True).set_epoch(1)',
    "a misspelled keyword of a loader": "relabel_datasets.RelabelLoader(stream, num_worker=2)",
    "a wrong type of a loader": 'relabel_datasets.RelabelLoader(stream, num_workers="2")',
    "an old name of an argument": 'relabel_datasets.RelabelDataset("x", name="config")',
}


@pytest.mark.slow
def test_mypy_accepts_correct_calls_and_rejects_wrong_ones(tmp_path):
    lines = ["import relabel_datasets", *TYPED.splitlines(), *MISTYPED.values()]
    script = tmp_path / "calls.py"
    script.write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "mypy", "--strict", f"--cache-dir={tmp_path / 'cache'}", str(script)]
    config = ["--config-file", str(ROOT / "pyproject.toml")]
    run = subprocess.run([*command, *config], capture_output=True, text=True, cwd=ROOT)
    reported = {int(line.split(":")[1]) for line in run.stdout.splitlines() if "calls.py:" in line and "error" in line}
    first = len(lines) - len(MISTYPED) + 1
    assert reported == set(range(first, len(lines) + 1)), run.stdout + run.stderr
