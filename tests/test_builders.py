"""Builder scripts run as commands on a few images with a small model."""

import subprocess
import sys

import pytest
import timm
from safetensors.torch import save_file

import relabel_datasets as rd
from tests.conftest import ROOT, picture

SYNSETS = ("n01440764", "n02102040")


@pytest.fixture
def imagenet(tmp_path):
    """Folder with the layout of ImageNet and two of its classes."""
    for split, count in (("train", 3), ("val", 2)):
        for synset in SYNSETS:
            (tmp_path / "imagenet" / split / synset).mkdir(parents=True)
            for i in range(count):
                picture(i).save(tmp_path / "imagenet" / split / synset / f"{synset}_{split}_{i}.JPEG")
    return tmp_path / "imagenet"


@pytest.fixture
def checkpoint(tmp_path):
    save_file(timm.create_model("mobilenetv3_small_050").state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


@pytest.mark.parametrize(
    ("name", "images_inside"), [("imagenet", False), pytest.param("imagenette", True, marks=pytest.mark.slow)]
)
def test_a_builder_script_builds_the_dataset_of_its_name(
    name, images_inside, imagenet, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setenv("RELABEL_CACHE", str(tmp_path / "cache"))
    arguments = ["--annotator", "mobilenetv3_small_050", "--checkpoint", str(checkpoint), "--input-size", "96"]
    command = [sys.executable, str(ROOT / "builders" / f"{name}_relabel.py"), str(imagenet), *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == str(tmp_path / "cache" / f"{name}-relabel")
    splits = rd.load_dataset(f"{name}-relabel", images=None if images_inside else imagenet)
    assert {split: len(dataset) for split, dataset in splits.items()} == {"train": 6, "validation": 4}
    dataset = splits["train"]
    assert dataset.classes == SYNSETS
    assert dataset.label_maps.index.has_images == images_inside
    assert dataset[0][1].shape == (2, 3, 3)
    card = (tmp_path / "cache" / f"{name}-relabel" / "README.md").read_text()
    assert f"pretty_name: {name}-relabel" in card
