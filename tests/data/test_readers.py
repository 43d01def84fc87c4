"""Other libraries read the same keys, labels, images and label maps from the shards, sample by sample."""

import io

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import webdataset
from timm.data import create_dataset

import relabel_datasets as rd

# webdataset leaves its tars to the garbage collector
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def ours(dataset_folder):
    return rd.RelabelDataset(dataset_folder, "colours")


@pytest.fixture(autouse=True)
def _hf_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    datasets.disable_progress_bars()


def assert_same_samples(samples, ours, *, images=True):
    """Compare (key, class index, RGB image or None, safetensors bytes) with our dataset, in order."""
    samples = list(samples)
    assert [key for key, *_ in samples] == list(ours.keys)
    for i, (_, label, image, blob) in enumerate(samples):
        assert label == ours.targets[i]
        expected = ours.label_maps.at(i)
        torch.testing.assert_close(rd.LabelMap.from_safetensors(blob).dense(), expected.dense(), rtol=0, atol=0)
        assert rd.LabelMap.from_safetensors(blob).canvas_size == expected.canvas_size
        if images:
            np.testing.assert_array_equal(np.asarray(image), np.asarray(ours.image(i)))


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_reads_the_tars(dataset_folder, ours, streaming):
    files = sorted(map(str, (dataset_folder / "colours").glob("train-*.tar")))
    read = datasets.load_dataset("webdataset", data_files={"train": files}, split="train", streaming=streaming)
    assert_same_samples(((s["__key__"], s["cls"], s["jpg"], s["safetensors"]) for s in read), ours)


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_reads_the_folder_by_its_card(dataset_folder, ours, streaming):
    read = datasets.load_dataset(str(dataset_folder), "colours", split="train", streaming=streaming)
    assert read.features["cls"].names == list(ours.classes)
    assert read.info.splits["train"].num_examples == len(ours)
    assert_same_samples(((s["__key__"], s["cls"], s["jpg"], s["safetensors"]) for s in read), ours)


def test_datasets_reads_label_only_configs_by_the_card(dataset_folder, ours):
    read = datasets.load_dataset(str(dataset_folder), "labels-only", split="train")
    assert sorted(read.features) == ["__key__", "__url__", "cls", "safetensors"]
    assert_same_samples(((s["__key__"], s["cls"], None, s["safetensors"]) for s in read), ours, images=False)


def test_webdataset_reads_the_tars(dataset_folder, ours):
    files = sorted(map(str, (dataset_folder / "colours").glob("train-*.tar")))
    pipeline = webdataset.WebDataset(files, shardshuffle=False).decode("pil")
    assert_same_samples(((s["__key__"], s["cls"], s["jpg"], s["safetensors"]) for s in pipeline), ours)


def test_timm_reads_images_and_labels_by_the_manifest(dataset_folder, ours):
    read = create_dataset("wds/", root=str(dataset_folder / "colours"), split="train", is_training=False, batch_size=4)
    samples = list(read)
    assert len(read) == len(samples) == len(ours)
    for i, (image, label) in enumerate(samples):  # the reader gives no keys, but reads in order
        assert label == ours.targets[i]
        np.testing.assert_array_equal(np.asarray(image), np.asarray(ours.image(i)))


def test_members_are_the_bytes_of_the_image_files(ours, image_folder):
    for i, key in enumerate(ours.keys):
        (path,) = image_folder.glob(f"*/{key}.jpg")
        assert ours.label_maps.image_bytes(i) == path.read_bytes()
        assert PIL.Image.open(io.BytesIO(ours.label_maps.image_bytes(i))).format == "JPEG"
