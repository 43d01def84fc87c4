"""Losses of a batch, compared with plain formulas."""

import numpy as np
import pytest
import torch
from torch.nn import functional as nnf
from torchvision.transforms.v2 import functional as F

import relabel_datasets as rd
from relabel_datasets.annotate.annotator import ModuleAnnotator
from relabel_datasets.annotate.combine import Ensemble, FlipAveraged
from relabel_datasets.annotate.remake import remake_annotator
from relabel_datasets.demo.annotator import WEIGHTS
from relabel_datasets.train.classifier import Normalize
from relabel_datasets.train.loaders import train_loader
from relabel_datasets.train.objective import Objective, Teacher
from tests.conftest import ColourNet

CLASSES = ("cat", "dog", "emu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


class Remember(torch.nn.Module):
    """Student that stores its inputs and returns constant logits."""

    def forward(self, inputs):
        self.inputs = inputs
        return torch.tensor([[2.0, 0.0, -1.0]]).expand(len(inputs), -1)


def objective(recipe, **options):
    return Objective(recipe, CLASSES, Normalize(MEAN, STD, torch.device("cpu")), **options)


def batch(count=4):
    return torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8)


def test_images_are_normalized_with_the_mean_and_std_of_the_student(tiny):
    student, images = Remember(), batch()
    objective(tiny).loss(student, images, torch.full((4, 3), 1 / 3))
    expected = F.normalize(images / 255, MEAN, STD)
    torch.testing.assert_close(student.inputs, expected, rtol=1e-5, atol=1e-5)
    assert student.inputs.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("labels", "smoothing"), [("single", 0.0), ("smoothed", 0.1)])
def test_the_loss_of_class_indices_equals_that_of_torch(tiny, labels, smoothing):
    targets = torch.tensor([0, 2, 1, 1])
    student = Remember()
    loss = objective(tiny.changed(labels=labels)).loss(student, batch(), targets)
    expected = nnf.cross_entropy(student(batch()), targets, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)


def test_the_loss_of_soft_labels_equals_that_of_torch(tiny):
    targets = torch.rand(4, 3).softmax(1)
    student = Remember()
    loss = objective(tiny).loss(student, batch(), targets)
    torch.testing.assert_close(loss, nnf.cross_entropy(student(batch()), targets))


def test_cutmix_mixes_labels_in_proportion_to_the_area(tiny):
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    images[1] = 255
    targets = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    mixer = objective(tiny.changed(cutmix=1.0))
    student = Remember()
    shares = set()
    for seed in range(20):
        np.random.seed(seed)  # noqa: NPY002  timm draws from it
        loss = mixer.loss(student, images, targets)
        white = student.inputs[0, 0] > 0
        share = float(white.float().mean())
        shares.add(share)
        mixed = torch.tensor([[1 - share, share, 0.0], [share, 1 - share, 0.0]])
        torch.testing.assert_close(loss, nnf.cross_entropy(student(images), mixed))
    assert len(shares) > 3
    mixer.mixing = False
    mixer.loss(student, images, targets)
    assert student.inputs[0].unique().numel() <= 3  # one value per channel


def test_erasing_changes_inputs_but_not_labels(tiny):
    student, images, targets = Remember(), torch.zeros(64, 3, 8, 8, dtype=torch.uint8), torch.rand(64, 3).softmax(1)
    loss = objective(tiny.changed(random_erasing=0.5)).loss(student, images, targets)
    erased = sum(int(image.unique().numel() > 3) for image in student.inputs)
    assert 15 < erased < 50
    torch.testing.assert_close(loss, nnf.cross_entropy(student(images), targets))


def test_distilled_labels_are_the_output_of_the_annotator_on_the_crops(scenes, tiny):
    dataset = rd.load_dataset(scenes, split="train")
    description = dataset.label_maps.manifest.annotator
    annotator = remake_annotator(description, checkpoint=WEIGHTS, device="cpu")
    loader, _ = train_loader(
        dataset,
        tiny.changed(labels="distilled"),
        interpolation="bicubic",
        rank=0,
        world_size=1,
        num_workers=0,
        window=8,
    )
    images, _ = next(iter(loader))
    targets = Teacher(annotator, dataset.classes)(images)
    assert not targets.is_inference()
    resized = F.resize(images, [128, 128], interpolation=F.InterpolationMode.BICUBIC, antialias=True)
    expected = torch.stack([annotator(image[None])[0].mean((1, 2)).softmax(0) for image in resized])
    torch.testing.assert_close(targets, expected, rtol=1e-4, atol=1e-5)


def test_an_ensemble_teaches_the_average_of_its_members_each_at_its_own_input_size():
    members = [ModuleAnnotator(ColourNet(), size, classes=CLASSES, name="colours", device="cpu") for size in (16, 24)]
    images = batch()
    logits = []
    for member in members:
        resized = F.resize(images, [*member.input_size], interpolation=F.InterpolationMode.BICUBIC, antialias=True)
        logits.append((member(resized) + member(resized.flip(-1)).flip(-1)).mean((2, 3)) / 2)
    teacher = Teacher(Ensemble([FlipAveraged(member) for member in members]), CLASSES)
    torch.testing.assert_close(teacher(images), ((logits[0] + logits[1]) / 2).softmax(1), rtol=1e-4, atol=1e-5)


def test_distilled_labels_have_a_temperature_and_a_class_label_and_the_loss_has_no_other_factor(tiny):
    """The student's logits stay at temperature 1, and nothing is multiplied by the squared temperature."""
    annotator = ModuleAnnotator(ColourNet(), 16, classes=CLASSES, name="colours", device="cpu")
    images, class_labels = batch(), torch.tensor([0, 2, 1, 1])
    soft = Teacher(annotator, CLASSES)(images)
    softened = soft.sqrt() / soft.sqrt().sum(1, keepdim=True)
    torch.testing.assert_close(Teacher(annotator, CLASSES, 2.0)(images), softened)
    recipe = tiny.changed(labels="distilled", temperature=2.0, label_weight=0.25)
    student = Remember()
    loss = objective(recipe, annotator=annotator).loss(student, images, class_labels)
    target = 0.75 * softened + 0.25 * nnf.one_hot(class_labels, 3)
    torch.testing.assert_close(loss, nnf.cross_entropy(student(images), target))


def test_classes_of_the_teacher_are_matched_by_name_and_renormalized():
    annotator = ModuleAnnotator(ColourNet(), 16, classes=CLASSES, name="colours", device="cpu")
    images = batch()
    resized = F.resize(images, [16, 16], interpolation=F.InterpolationMode.BICUBIC, antialias=True)
    logits = annotator(resized).mean((2, 3))
    torch.testing.assert_close(Teacher(annotator, ("emu", "cat"))(images), logits[:, [2, 0]].softmax(1))
    with pytest.raises(ValueError, match="fox"):
        Teacher(annotator, ("cat", "fox"))
    with pytest.raises(ValueError, match="none was given"):
        Teacher(None, CLASSES)


@pytest.mark.parametrize(("annotator_size", "crop_size"), [(64, 64), (32, 32), (16, 32)])
def test_distillation_needs_crops_of_the_larger_of_the_inputs_of_annotator_and_student(tiny, annotator_size, crop_size):
    annotator = ModuleAnnotator(ColourNet(), annotator_size, classes=CLASSES, name="colours", device="cpu")
    distillation = objective(tiny.changed(labels="distilled", image_size=32), annotator=annotator)
    assert distillation.crop_size == (crop_size, crop_size)
    images, student = torch.randint(0, 256, (4, 3, crop_size, crop_size), dtype=torch.uint8), Remember()
    loss = distillation.loss(student, images, torch.tensor([0, 1, 2, 0]))
    torch.testing.assert_close(loss, nnf.cross_entropy(student(images), Teacher(annotator, CLASSES)(images)))
    distillation.loss(student, images, torch.tensor([0, 1, 2, 0]))
    reduced = F.resize(images, [32, 32], interpolation=F.InterpolationMode.BICUBIC, antialias=True)
    torch.testing.assert_close(student.inputs, F.normalize(reduced / 255, MEAN, STD), rtol=1e-5, atol=1e-5)


def test_other_labels_need_crops_of_the_size_of_the_student(tiny):
    assert objective(tiny).crop_size == (tiny.image_size, tiny.image_size)


def test_the_loss_of_distillation_uses_the_labels_of_the_teacher(tiny):
    annotator = ModuleAnnotator(ColourNet(), 16, classes=CLASSES, name="colours", device="cpu")
    student, images = Remember(), batch()
    loss = objective(tiny.changed(labels="distilled"), annotator=annotator).loss(
        student, images, torch.tensor([0, 1, 2, 0])
    )
    torch.testing.assert_close(loss, nnf.cross_entropy(student(images), Teacher(annotator, CLASSES)(images)))
