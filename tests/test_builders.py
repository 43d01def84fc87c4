"""Builder scripts run as commands on a few images with a small model."""

import json
import runpy
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import relabel_datasets as rd
from relabel_datasets.demo.annotator import load_demo_annotator
from tests.annotate.crop_releases import write_fkd, write_plus
from tests.annotate.releases import publish, random_map, write_release
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
    name, images_inside, imagenet, checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("RELABEL_CACHE", str(tmp_path / "cache"))
    arguments = ["--annotator", "mobilenetv3_small_050", "--checkpoint", str(checkpoint), "--input-size", "96"]
    command = [str(ROOT / "builders" / f"{name}_relabel.py"), str(imagenet), *arguments]
    if name == "imagenet":  # in this process, which is faster
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(command[0], run_name="__main__")
        assert ended.value.code is None
        printed = capsys.readouterr().out
    else:
        printed = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert printed.strip() == str(tmp_path / "cache" / f"{name}-relabel")
    splits = rd.load_dataset(f"{name}-relabel", images=None if images_inside else imagenet)
    assert {split: len(dataset) for split, dataset in splits.items()} == {"train": 6, "validation": 4}
    dataset = splits["train"]
    assert dataset.classes == SYNSETS
    assert dataset.label_maps.index.has_images == images_inside
    assert dataset[0][1].shape == (2, 3, 3)
    card = (tmp_path / "cache" / f"{name}-relabel" / "README.md").read_text()
    assert f"pretty_name: {name}-relabel" in card


@pytest.mark.parametrize(
    "published", ["fkd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("relabel", "imagenet-plus"))]
)
def test_the_imagenet_script_converts_published_labels(published, imagenet, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RELABEL_CACHE", str(tmp_path / "cache"))
    images, release = imagenet / "train", tmp_path / "release"
    if published == "fkd":
        write_fkd(release / "train", images)
    elif published == "imagenet-plus":
        write_plus(release, images)
    else:
        write_release(release, images, lambda i, _: publish(random_map(i)))
    script = runpy.run_path(str(ROOT / "builders" / "imagenet_relabel.py"))
    for _ in range(1 if published == "relabel" else 2):  # stored crops may be converted again, which changes nothing
        monkeypatch.setattr("sys.argv", ["imagenet_relabel.py", str(imagenet), "--published", str(release)])
        script["main"]()
        assert capsys.readouterr().out.strip() == str(tmp_path / "cache" / "imagenet-relabel")
    dataset = rd.load_dataset("imagenet-relabel", split="train", images=imagenet)
    assert len(dataset) == 6
    assert len(dataset.classes) == 1000
    image, labels = dataset[0]
    assert labels.num_classes == 1000
    assert labels.canvas_size == (image.height, image.width)
    assert labels.encoding == ("topk" if published == "relabel" else "crops")
    assert "pretty_name: imagenet-relabel" in (tmp_path / "cache" / "imagenet-relabel" / "README.md").read_text()


def test_the_script_of_the_scenes_annotator_writes_weights_that_load_and_are_the_same_each_time(tmp_path, capsys):
    script = runpy.run_path(str(ROOT / "builders" / "scenes_annotator.py"))
    threads = torch.get_num_threads()
    tiny = ["--num-clean", "64", "--clean-epochs", "1", "--num-scenes", "16", "--scene-epochs", "2"]
    script["accuracy"].__globals__["VALIDATION_SCENES"] = 8
    files = [tmp_path / f"{name}.safetensors" for name in ("first", "second")]
    for file in files:
        script["main"]([str(file), *tiny])
    torch.set_num_threads(threads)
    metadata = json.loads("[" + capsys.readouterr().out.replace("}\n{", "},{") + "]")[0]
    assert json.loads(metadata["settings"]) == {
        "num_clean": 64, "clean_epochs": 1, "num_scenes": 16, "scene_epochs": 2, "seed": 1000,
    }  # fmt: skip
    first, second = map(load_file, files)
    assert all(torch.equal(second[name], value) for name, value in first.items())
    logits = load_demo_annotator(files[0])(torch.zeros(1, 3, 128, 128, dtype=torch.uint8))
    assert logits.shape == (1, 12, 8, 8)
    assert logits.isfinite().all()


def test_mosaics_arrange_tiles_row_by_row():
    script = runpy.run_path(str(ROOT / "builders" / "scenes_annotator.py"))
    tiles = torch.arange(8.0)[:, None, None, None].expand(8, 3, 2, 5)
    mosaics = script["mosaics"](tiles)
    assert mosaics.shape == (2, 3, 4, 10)
    assert mosaics[1, 0, ::2, ::5].tolist() == [[4, 5], [6, 7]]
