"""Annotators recreated from a manifest compute the same logits, or creating them is an error."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from relabel_datasets.annotate.class_subset import ClassSubset
from relabel_datasets.annotate.combine import Ensemble, FlipAveraged
from relabel_datasets.annotate.remake import remake_annotator
from relabel_datasets.annotate.timm_annotator import TimmAnnotator
from relabel_datasets.errors import DatasetError
from tests.conftest import picture

MODEL_KWARGS = {"num_classes": 3, "pad_type": "same"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Paths of two files with random weights."""
    folder, paths = tmp_path_factory.mktemp("checkpoints"), []
    for seed in range(2):
        torch.manual_seed(seed)
        paths.append(folder / f"weights-{seed}.safetensors")
        save_file(timm.create_model("mobilenetv3_small_050", **MODEL_KWARGS).state_dict(), paths[-1])
    return paths


@pytest.fixture(scope="module")
def annotator(checkpoints):
    return TimmAnnotator(
        "mobilenetv3_small_050", checkpoint=checkpoints[0], input_size=(64, 96), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4),
        interpolation="bilinear", device="cpu", classes=("cat", "dog", "emu"), **MODEL_KWARGS,
    )  # fmt: skip


def model(checkpoint, input_size=64):
    return TimmAnnotator(
        "mobilenetv3_small_050", checkpoint=checkpoint, input_size=input_size, device="cpu", **MODEL_KWARGS
    )


def test_a_recreated_annotator_computes_the_same_logits(annotator, checkpoints):
    again = remake_annotator(annotator.describe(), checkpoint=checkpoints[0], device="cpu")
    assert again.describe() == annotator.describe()
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    assert torch.equal(again(images), annotator(images))


def test_only_the_input_size_may_differ(annotator, checkpoints):
    again = remake_annotator(annotator.describe(), checkpoint=checkpoints[0], input_size=32, device="cpu")
    assert again.input_size == (32, 32)


def test_other_weights_are_refused(annotator, checkpoints):
    with pytest.raises(ValueError, match="weights of mobilenetv3_small_050 are not those that made the label maps"):
        remake_annotator(annotator.describe(), checkpoint=checkpoints[1], device="cpu")


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scales", [(64,), (64, 96)])
def test_an_ensemble_is_recreated_from_one_file_per_model(checkpoints, scales, flip):
    members = [model(path, size) for path in checkpoints for size in scales]
    ensemble = Ensemble([FlipAveraged(member) for member in members] if flip else members)
    again = remake_annotator(ensemble.describe(), checkpoint=checkpoints, device="cpu")
    assert again.describe() == ensemble.describe()
    pixels = torch.stack([ensemble.preprocess(picture(0))])
    assert torch.equal(again(pixels), ensemble(pixels))
    with pytest.raises(
        ValueError, match=r"weights of mobilenetv3_small_050 are not those .*: give the file with those"
    ):
        remake_annotator(ensemble.describe(), checkpoint=checkpoints[::-1], device="cpu")


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_checkpoints_than_models_is_an_error(checkpoints, count):
    ensemble = Ensemble([model(path) for path in checkpoints])
    given = "1 checkpoint was" if count == 1 else "3 checkpoints were"
    message = (
        rf"made by 2 models \(mobilenetv3_small_050, mobilenetv3_small_050\), but {given} given: give checkpoint= once"
    )
    with pytest.raises(ValueError, match=message):
        remake_annotator(ensemble.describe(), checkpoint=[checkpoints[0]] * count, device="cpu")


def test_a_flip_averaged_annotator_is_recreated_with_its_mirror_images(annotator, checkpoints):
    flipped = FlipAveraged(annotator)
    again = remake_annotator(flipped.describe(), checkpoint=checkpoints[0], device="cpu")
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    assert again.describe() == flipped.describe()
    assert torch.equal(again(images), flipped(images))


def test_an_ensemble_of_selected_classes_cannot_be_recreated(checkpoints):
    """The manifest has only a hash of the order of the classes, and another order would average the wrong ones."""
    members = [ClassSubset(model(path), [2, 0], ("emu", "cat")) for path in checkpoints]
    with pytest.raises(ValueError, match=r"members have selected classes: create it in Python"):
        remake_annotator(Ensemble(members).describe(), checkpoint=checkpoints, device="cpu")


@pytest.mark.parametrize("members", [None, [], "abc", [1], {"a": 1}])
def test_an_ensemble_without_a_list_of_members_is_corrupt(members):
    with pytest.raises(DatasetError, match="must have a list of annotators"):
        remake_annotator({"kind": "ensemble", "name": "a+b", "annotators": members}, device="cpu")


@pytest.mark.parametrize("kind", ["module", None])
def test_other_kinds_of_annotators_cannot_be_recreated(annotator, kind):
    with pytest.raises(ValueError, match=r"train_student\(annotator=\.\.\.\)"):
        remake_annotator({**annotator.describe(), "kind": kind}, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "local-dir:/tmp/evil"}, "is not the name of a model"),
        ({"name": "/tmp/evil"}, "is not the name of a model"),
        ({"name": "../evil"}, "is not the name of a model"),
        ({"name": "hf-hub:../../evil"}, "is not the name of a model"),
        ({"name": "a/b/c"}, "is not the name of a model"),
        ({"name": "mobilenetv3_small_050\n"}, "is not the name of a model"),
        ({"name": None}, "is not the name of a model"),
        ({"name": ["mobilenetv3_small_050"]}, "is not the name of a model"),
        ({"kind": "transformers", "name": "/tmp/evil"}, "is not the name of a model"),
        ({"kind": "transformers", "name": "./evil"}, "is not the name of a model"),
        ({"kind": "transformers", "name": "https://host/evil"}, "is not the name of a model"),
        ({"model_args": {"checkpoint_path": "/tmp/evil.pth"}}, "model_args in the manifest have checkpoint_path"),
        (
            {"model_args": {"pretrained_cfg": {"file": "/tmp/evil.pth"}}},
            "model_args in the manifest have pretrained_cfg",
        ),
        ({"model_args": {"pretrained_cfg_overlay": {"url": "http://host/evil.pth"}}}, "have pretrained_cfg_overlay"),
        ({"model_args": {"cache_dir": "/tmp/evil", "pretrained": True}}, "have cache_dir, pretrained"),
        ({"model_args": {"checkpoint": "/tmp/evil.pth"}}, "model_args in the manifest have checkpoint"),
        ({"model_args": {"device": "cpu", "name": "x"}}, "model_args in the manifest have device, name"),
        ({"model_args": ["checkpoint_path"]}, "must be an object, got list"),
    ],
)
@pytest.mark.parametrize("is_given", [False, True])
def test_a_manifest_cannot_name_files_or_urls_to_load(annotator, checkpoints, monkeypatch, changes, message, is_given):
    def create(*args, **kwargs):
        raise AssertionError("no model may be created")

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(ValueError, match=message):
        remake_annotator(
            {**annotator.describe(), **changes}, checkpoint=checkpoints[0] if is_given else None, device="cpu"
        )


@pytest.mark.parametrize(
    "name",
    ["resnet50.a1_in1k", "hf-hub:timm/resnet50.a1_in1k", "hf-hub:timm/resnet50@main", "google/vit-base-patch16-224"],
)
def test_names_of_models_are_allowed(name):
    from relabel_datasets.annotate.remake import _MODEL_NAME

    assert _MODEL_NAME.fullmatch(name)
