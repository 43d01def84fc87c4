"""Annotators that average over annotators and mirror images."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import relabel_datasets as rd
from relabel_datasets.annotate.annotator import ModuleAnnotator
from relabel_datasets.annotate.class_subset import ClassSubset
from relabel_datasets.annotate.combine import models_of
from tests.conftest import picture


def patches(size, stride=8, classes=("a", "b", "c"), seed=0, **options) -> ModuleAnnotator:
    torch.manual_seed(seed)
    module = nn.Conv2d(3, 3, kernel_size=stride, stride=stride)
    return ModuleAnnotator(module, size, classes=classes, device="cpu", name=f"patches{stride}", **options)


def pixels(annotator) -> torch.Tensor:
    return torch.stack([annotator.preprocess(picture(seed)) for seed in range(3)])


def test_an_ensemble_is_the_mean_of_its_members():
    members = [patches((24, 40)), patches((24, 40), seed=1)]
    ensemble = rd.Ensemble(members)
    images = pixels(members[0])
    assert torch.equal(pixels(ensemble), images.flatten(1))  # members with the same preprocessing share their pixels
    logits = ensemble(pixels(ensemble))
    torch.testing.assert_close(logits, (members[0](images) + members[1](images)) / 2)
    assert logits.dtype == torch.float32
    assert (ensemble.classes, ensemble.num_classes) == (("a", "b", "c"), 3)


@pytest.mark.parametrize("combine", [rd.Ensemble, lambda models: rd.annotate.FlipAveraged(models[0])])
@pytest.mark.parametrize("method", ["__call__", "classify"])
def test_a_batch_is_copied_to_the_device_of_the_models_before_it_is_cut_or_mirrored(combine, method, monkeypatch):
    annotator = combine([patches((24, 40)), patches((32, 64))])
    images, devices = pixels(annotator), []

    def answer(_model, part):
        devices.append(part.device.type)
        return torch.zeros(3, 3, 3, 5)

    monkeypatch.setattr(ModuleAnnotator, "__call__", answer)
    for model in models_of(annotator):
        model.device = torch.device("meta")
    getattr(annotator, method)(images)
    assert devices == ["meta"] * 2


def test_members_may_have_different_sizes_and_grids():
    members = [patches((24, 40)), patches((32, 64)), patches((24, 40), 4), patches((32, 64), interpolation="nearest")]
    ensemble = rd.Ensemble(members)
    logits = ensemble(pixels(ensemble))
    assert logits.shape == (3, 3, 6, 10)
    means = [member(pixels(member)).mean((2, 3)) for member in members]
    torch.testing.assert_close(logits.mean((2, 3)), sum(means) / 4)
    assert pixels(ensemble).shape == (3, 3 * (24 * 40 + 2 * 32 * 64))


def test_describe_includes_all_members():
    members = [patches((24, 40)), patches((32, 64)), patches((24, 40), 4)]
    described = rd.Ensemble(members).describe()
    assert json.loads(json.dumps(described)) == described
    assert described["name"] == "patches8+patches4"
    assert described["annotators"] == [member.describe() for member in members]
    assert described != rd.Ensemble(members[:2]).describe()
    assert rd.Ensemble(members, name="mine").describe()["name"] == "mine"


@pytest.mark.parametrize("classes", [("a", "c", "b"), None])
def test_members_must_have_the_same_classes(classes):
    with pytest.raises(ValueError, match=r"same classes in the same order, got 3 \(a, b, c\) and 3 .*ClassSubset"):
        rd.Ensemble([patches((24, 40)), patches((24, 40), classes=classes)])
    other = patches((24, 40), classes=("c", "a", "b"))
    assert rd.Ensemble([patches((24, 40)), ClassSubset(other, [1, 2, 0], ("a", "b", "c"))]).num_classes == 3


def test_empty_ensembles_and_foreign_images_are_refused():
    with pytest.raises(ValueError, match="must have at least one annotator, got none"):
        rd.Ensemble([])
    ensemble = rd.Ensemble([patches((24, 40))])
    with pytest.raises(
        ValueError, match=r"uint8 \[B, 2880\], as returned by preprocess, got torch.uint8 \[3, 3, 24, 40\]"
    ):
        ensemble(pixels(patches((24, 40))))


def test_flip_averaged_maps_are_means_over_both_images_and_flip_with_them():
    inner = patches((24, 40))
    averaged = rd.annotate.FlipAveraged(inner)
    images = pixels(averaged)
    logits = averaged(images)
    torch.testing.assert_close(logits, (inner(images) + inner(images.flip(3)).flip(3)) / 2)
    torch.testing.assert_close(averaged(images.flip(3)), logits.flip(3))
    assert averaged.describe() == {**inner.describe(), "flip_averaged": True}
    assert (averaged.classes, averaged.num_classes) == (inner.classes, 3)


def test_flips_wrap_the_members_of_an_ensemble():
    members = [patches((24, 40)), patches((32, 64))]
    ensemble = rd.Ensemble([rd.annotate.FlipAveraged(member) for member in members])
    assert ensemble(pixels(ensemble)).shape == (3, 3, 4, 8)
    with pytest.raises(ValueError, match="wrap the members of an ensemble, not the ensemble"):
        rd.annotate.FlipAveraged(rd.Ensemble(members))


def test_an_ensemble_can_build_a_dataset(tmp_path, image_folder):
    members = [patches((24, 40), classes=("cat", "dog", "emu")), patches((32, 64), classes=("cat", "dog", "emu"))]
    rd.build(rd.data.ImageFolderSource(image_folder), tmp_path / "out", rd.Ensemble(members), progress=False)
    dataset = rd.load_dataset(str(tmp_path / "out"), "patches8", split="train")
    assert dataset[0][1].shape[1:] == (4, 8)
