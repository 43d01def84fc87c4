"""The README's Python runs as it is written, but for the names of files."""

import re

import datasets
import pytest

import relabel_datasets as rd
from tests.conftest import ROOT

SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture
def in_a_folder_with_a_dataset(dataset_folder, image_folder, tmp_path, monkeypatch):
    """A working folder in which the README's paths exist, and a cache in which its short name does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RELABEL_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    (dataset_folder / "labels-only" / "_info.json").unlink()  # one config, as the README has it
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "dataset").symlink_to(dataset_folder)
    (tmp_path / "path" / "to" / "images").symlink_to(image_folder)
    (tmp_path / "scenes-relabel").symlink_to(dataset_folder)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its tars open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("in_a_folder_with_a_dataset")
def test_every_snippet_runs():
    assert len(SNIPPETS) >= 5
    names: dict[str, object] = {}
    for snippet in SNIPPETS:
        code = snippet.replace("n01440764_10026", "photo_03").replace("CONFIG", "colours").replace("00002", "00003")
        code = code.replace("batch_size=64", "batch_size=8")
        # an annotator whose weights need no download, and classes as the images' folders have them
        code = code.replace('"resnet50.a1_in1k", pretrained=True', '"resnet10t", num_classes=3')
        if "transforms(image, label_map)" in code:
            names["image"] = rd.load_dataset("path/to/dataset", split="train").image(3)
        exec(compile(code, "README.md", "exec"), names)
    assert names["soft_labels"].shape == (8, 3)
    assert names["label_map"].num_classes == 3
