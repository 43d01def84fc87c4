"""The README's Python runs as it is written, but for the names of files."""

import re

import datasets
import pytest

import relabel_datasets as rd
from relabel_datasets.shards.card import write_card
from tests.conftest import ROOT
from tests.servers import FaultyServer

SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture
def in_a_folder_with_a_dataset(dataset_folder, image_folder, tmp_path, monkeypatch, local_hub):
    """A working folder in which the README's paths exist, a cache in which its short name does, and a Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RELABEL_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    (dataset_folder / "labels-only" / "_info.json").unlink()  # one config, as the README has it
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "dataset").symlink_to(dataset_folder)
    (tmp_path / "path" / "to" / "images").symlink_to(image_folder)
    for shard in ("00000", "00001", "00002"):  # whose images are read as those of anybody's tars
        (tmp_path / "path" / "to" / f"images-{shard}.tar").symlink_to(
            dataset_folder / "colours" / f"train-{shard}-of-00003.tar"
        )
    (tmp_path / "scenes-relabel").symlink_to(dataset_folder)
    write_card(dataset_folder)
    commit = local_hub.publish("org/name", dataset_folder)
    local_hub.repos["org/name"].tags["v1"] = commit.oid
    with FaultyServer(tmp_path) as server:
        yield server.url


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its tars open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")  # Trainer pins memory without a GPU, too
@pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning")  # Lightning's, as are the next three
@pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:The 'train_dataloader' does not have")
@pytest.mark.filterwarnings("ignore:`training_step` returned", "ignore:Starting from v1.9")
def test_every_snippet_runs(in_a_folder_with_a_dataset):
    assert len(SNIPPETS) >= 5
    names: dict[str, object] = {}
    for snippet in SNIPPETS:
        code = snippet.replace("https://example.org", in_a_folder_with_a_dataset)
        code = code.replace("n01440764_10026", "photo_03").replace("CONFIG", "colours").replace("00002", "00003")
        code = code.replace("batch_size=64", "batch_size=4").replace("images-{00000..00001}", "images-{00000..00002}")
        # an annotator whose weights need no download, and classes as the images' folders have them
        code = code.replace('"resnet50.a1_in1k", pretrained=True', '"resnet10t", num_classes=3')
        if "transforms(image, label_map)" in code:
            names["image"] = rd.load_dataset("path/to/dataset", split="train").image(3)
        exec(compile(code, "README.md", "exec"), names)
    assert names["soft_labels"].shape[-1] == 3
    assert names["trainer"].state.global_step == 4  # of 13 images
    assert names["token_labels"].shape == (4, 3, 14, 14)
    assert names["checkpoint"]["data"]["epoch"] == 1
    assert names["label_map"].num_classes == 3
