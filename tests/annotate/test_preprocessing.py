"""A wrong normalization or padding is found by the labels, and a right one is never doubted."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import relabel_datasets as rd
from relabel_datasets.annotate.annotator import ModuleAnnotator
from relabel_datasets.annotate.builder import build
from relabel_datasets.annotate.combine import Ensemble, FlipAveraged
from relabel_datasets.annotate.preprocessing import (
    Preprocessing,
    find_better_preprocessing,
    preprocessed,
    preprocessing_of,
)
from relabel_datasets.annotate.timm_annotator import TimmAnnotator
from relabel_datasets.cli import main
from relabel_datasets.data.sources import ImageFolderSource

CLASSES = ("black", "grey", "white")
HALF = ((0.5,) * 3, (0.5,) * 3)
IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


class Brightness(torch.nn.Module):
    """Classifier of three levels of brightness, which expects images normalized to -1 .. 1."""

    def forward(self, images):
        levels = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 8)
        return -20 * (levels - torch.tensor([-0.7, 0.0, 0.7])[None, :, None, None]).abs()


def annotator(normalization):
    return ModuleAnnotator(
        Brightness(), 16, classes=CLASSES, mean=normalization[0], std=normalization[1], name="brightness", device="cpu"
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """200 images of one brightness each, in the folders of their classes."""
    root = tmp_path_factory.mktemp("photos")
    for i, level in enumerate(np.linspace(0, 255, 200).astype(np.uint8)):
        path = root / CLASSES[int(np.abs(level / 127.5 - 1 - np.array([-0.7, 0.0, 0.7])).argmin())] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        PIL.Image.new("RGB", (20, 20), (int(level),) * 3).save(path)
    return root


def check(photos, folder, made_by, **options):
    source = ImageFolderSource(photos)
    build(source, folder, made_by, config="a", progress=False, **options)
    return find_better_preprocessing(made_by, source, rd.LabelMaps(folder, "a"))


@pytest.mark.parametrize("wrap", [lambda model: model, FlipAveraged, lambda model: Ensemble([model])])
def test_a_wrong_normalization_is_found(photos, tmp_path, wrap):
    model = annotator(IMAGENET)
    better = check(photos, tmp_path, wrap(model))
    share = rd.LabelMaps(tmp_path).split.agreement
    assert share < 0.95
    assert better.agreement == pytest.approx(share)
    assert better.options == "--mean 0.5 0.5 0.5 --std 0.5 0.5 0.5"
    assert better.better > 0.97
    assert f"brightness agrees with {share:.1%} of the labels, but with about" in str(better)
    assert (model.mean, model.std) == IMAGENET  # restored


def test_a_right_normalization_is_not_doubted(photos, tmp_path):
    assert check(photos, tmp_path, annotator(HALF)) is None


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_wrong_labels_are_no_reason_to_doubt_the_normalization(photos, tmp_path, share):
    paths = sorted(photos.glob("*/*.png"))
    generator = np.random.default_rng(0)
    for path in paths:
        name = CLASSES[generator.integers(3)] if generator.random() < share else path.parent.name
        (tmp_path / "noisy" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "noisy" / name / path.name).symlink_to(path)
    assert check(tmp_path / "noisy", tmp_path / "data", annotator(HALF)) is None


def test_an_annotator_with_its_own_preprocessing_is_not_checked(photos, tmp_path):
    inner = annotator(IMAGENET)

    class Own:
        classes, num_classes, preprocess, describe = inner.classes, inner.num_classes, inner.preprocess, inner.describe

        def __call__(self, images):
            return inner(images)

    assert check(photos, tmp_path, Own()) is None


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "efficientnet_b0"])
def test_the_padding_of_an_existing_model_can_be_chosen(name):
    torch.manual_seed(0)
    options = {"input_size": 64, "device": "cpu", "num_classes": 3}
    plain = TimmAnnotator(name, **options)
    same = TimmAnnotator(name, pad_type="same", **options)
    same._module.load_state_dict(plain._module.state_dict())
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    before = plain(images), same(images)
    assert not torch.equal(*before)
    for model, other, expected in ((plain, same, before[1]), (same, plain, before[0])):
        assert preprocessing_of(model).same_padding is (model is same)
        with preprocessed(model, preprocessing_of(other)):
            torch.testing.assert_close(model(images), expected)
        assert torch.equal(model(images), before[model is same])


def test_the_padding_of_other_models_is_left_alone():
    model = TimmAnnotator("resnet10t", input_size=64, device="cpu")
    assert preprocessing_of(model) == Preprocessing(model.mean, model.std, None)


@pytest.fixture
def splits(image_folder, tmp_path):
    """A folder with a split train and a split val, which has other images of the same classes."""
    root = tmp_path / "photos"
    root.mkdir()
    image_folder.rename(root / "train")
    for path in (root / "train").glob("*/*.jpg"):
        target = root / "val" / path.parent.name / f"val_{path.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.open(path).rotate(90).save(target)
    return root


SOURCE = """
from tests.conftest import ColourNet
from relabel_datasets import ModuleAnnotator

created = []

def colours():
    created.append(1)
    assert len(created) == 1, "the annotator was created once per split"
    return ModuleAnnotator(ColourNet(), (48, 64), classes=("cat", "dog", "emu"), name="colours", device="cpu")
"""


def command(tmp_path, images, *options):
    (tmp_path / "models.py").write_text(SOURCE)
    return ["build", str(images), str(tmp_path / "data"), "--annotator", f"{tmp_path / 'models.py'}:colours", *options]


@pytest.mark.parametrize("no_images", [False, True])
def test_one_command_builds_all_splits_and_says_how_often_maps_agree(splits, tmp_path, capsys, no_images):
    build_all = command(tmp_path, splits, *(["--no-images"] if no_images else []))
    assert main(build_all) == 0
    captured = capsys.readouterr()
    calls = [line for line in captured.out.splitlines() if line.startswith("load_dataset(")]
    datasets = [eval(call, {"load_dataset": rd.load_dataset}) for call in calls]  # the printed calls must run unchanged
    assert [(dataset.label_maps.split.name, len(dataset)) for dataset in datasets] == [
        ("train", 13),
        ("validation", 13),
    ]
    for dataset in datasets:
        maps = dataset.label_maps
        share = sum(int(maps.at(row).dense().mean((1, 2)).argmax()) == maps.at(row).label for row in range(13)) / 13
        assert maps.split.agreement == pytest.approx(share)
        assert f"{share:.1%} of the label maps, pooled over the whole image, agree with the label" in captured.out
    files = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()}
    assert main(build_all) == 0  # complete
    assert files == {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()}


@pytest.mark.parametrize(("split", "folder"), [("val", "val"), ("validation", "val"), ("train", "train")])
def test_a_named_split_is_built_alone(splits, tmp_path, split, folder):
    assert main(command(tmp_path, splits, "--split", split)) == 0
    dataset = rd.load_dataset(tmp_path / "data", split=split)
    assert list(dataset.label_maps.manifest.splits) == [split]
    assert all(key.startswith("val_") is (folder == "val") for key in dataset.keys)


@pytest.mark.parametrize("split", ["validation", "val", "valid"])
@pytest.mark.parametrize("folder", ["validation", "val", "valid"])
def test_any_name_of_the_validation_split_finds_its_folder(splits, tmp_path, split, folder):
    (splits / "val").rename(splits / folder)
    assert main(command(tmp_path, splits, "--split", split)) == 0
    assert all(key.startswith("val_") for key in rd.load_dataset(tmp_path / "data", split="validation").keys)


def test_a_split_that_does_not_exist_and_splits_of_other_classes_are_errors(splits, tmp_path, capsys):
    assert main(command(tmp_path, splits, "--split", "test")) == 1
    assert f"{splits} has no folder of split 'test', only ['train', 'validation']" in capsys.readouterr().err
    (splits / "val" / "dog").rename(splits / "val" / "dgo")
    assert main(command(tmp_path, splits)) == 1
    err = capsys.readouterr().err
    assert "train has 'dog'; only" in err
    assert "build one of them alone with --split" in err
    assert not (tmp_path / "data").exists()


def test_a_low_agreement_is_a_warning(image_folder, tmp_path, capsys):
    mapping = tmp_path / "mapping.json"
    mapping.write_text(json.dumps({"cat": "dog", "dog": "emu", "emu": "cat"}))
    for folder, seed in (("cat", 0), ("dog", 1), ("emu", 2)):
        for path in (image_folder / folder).iterdir():
            PIL.Image.new("RGB", (32, 32), tuple(255 * (i == seed) for i in range(3))).save(path)
    assert main(command(tmp_path, image_folder)) == 0
    captured = capsys.readouterr()
    assert "100.0% of the label maps" in captured.out
    assert "warning" not in captured.err
    assert main(command(tmp_path, image_folder, "--class-mapping", str(mapping), "--config", "b")) == 0
    captured = capsys.readouterr()
    assert "0.0% of the label maps" in captured.out
    assert "warning: the label maps of split 'train' agree with less than half of the labels" in captured.err
