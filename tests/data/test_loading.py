import pytest

import relabel_datasets as rd
from relabel_datasets.storage import resolve as names


def test_a_folder_gives_one_split_or_a_dict_of_all(dataset_folder):
    assert isinstance(rd.load_dataset(dataset_folder, "colours", "train"), rd.RelabelDataset)
    assert {name: len(split) for name, split in rd.load_dataset(dataset_folder, "colours").items()} == {"train": 13}


def test_val_and_validation_are_the_same_split(tmp_path, image_folder, annotator):
    rd.build(rd.data.ImageFolderSource(image_folder), tmp_path / "data", annotator, split="validation", progress=False)
    assert len(rd.load_dataset(tmp_path / "data", split="val")) == 13


def test_what_is_not_there_says_what_there_is():
    with pytest.raises(FileNotFoundError, match=r"nowhere.*scenes-relabel"):
        rd.load_dataset("nowhere", split="train")


def test_a_short_name_is_made_in_the_cache_on_first_use_and_then_found(tmp_path, dataset_folder, monkeypatch):
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


def test_a_short_name_that_another_process_made_meanwhile_is_used(tmp_path, dataset_folder, monkeypatch):
    def make(root):
        dataset_folder.rename(root)  # the other process
        raise FileExistsError(root)

    monkeypatch.setattr("relabel_datasets.demo.make_scenes_relabel", make)
    assert len(rd.load_dataset("scenes-relabel", "colours", "train", cache_dir=tmp_path)) == 13


def test_an_error_while_a_short_name_is_made_is_shown(tmp_path, monkeypatch):
    def make(root):
        raise OSError("no space left")

    monkeypatch.setattr("relabel_datasets.demo.make_scenes_relabel", make)
    with pytest.raises(OSError, match="no space left"):
        rd.load_dataset("scenes-relabel", split="train", cache_dir=tmp_path)


def test_every_builder_named_in_an_error_is_there():
    from tests.conftest import ROOT

    assert all((ROOT / "builders" / name).is_file() for name in names._BUILDERS.values())
