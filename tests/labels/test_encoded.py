"""A crop that comes first decodes only its box, with the samples and random numbers of a full decode."""

import random

import numpy as np
import PIL.Image
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

import relabel_datasets as rd
from relabel_datasets.labels.compose import run_batch, run_pipeline
from relabel_datasets.labels.encoded import EncodedImage
from relabel_datasets.train.seeds import SeededTransforms, seed_all
from tests.conftest import picture

from .test_crop_labels import made
from .test_crop_transforms import IMAGE

SIZE = (83, 121)


class Recorded(EncodedImage):
    """Encoded image that records what was decoded: a box, or None for the whole image."""

    def __init__(self, image):
        super().__init__((image.height, image.width) if isinstance(image, PIL.Image.Image) else tuple(image.shape[-2:]))
        self.image, self.boxes = image, []

    def decode(self):
        self.boxes.append(None)
        return self.image

    def decode_box(self, box):
        self.boxes.append(box)
        return F.crop(self.image, *box)


class Subclass(v2.RandomResizedCrop):
    pass


LAST = [rd.LabelPooling(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
PARTIAL = {  # pipelines of label maps
    "resized": v2.Compose([v2.RandomResizedCrop(24), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4), *LAST]),
    "bicubic": v2.Compose(
        [v2.RandomResizedCrop((24, 30), (0.1, 0.3), interpolation=v2.InterpolationMode.BICUBIC), *LAST]
    ),
    "crop": v2.Compose([v2.RandomCrop(40), *LAST]),
    "one side": v2.Compose([v2.RandomCrop((83, 40)), *LAST]),
    "center": v2.Compose([v2.CenterCrop((30, 41)), *LAST]),
    "alone": v2.Compose([v2.RandomResizedCrop(24)]),
    "seeded": SeededTransforms(v2.Compose([v2.RandomResizedCrop(24), *LAST]), 3),
    "timm": rd.timm_transforms(24),
    "timm, random interpolation": rd.timm_transforms(24, interpolation="random", auto_augment="rand-m9-mstd0.5-inc1"),
    "timm, seeded": SeededTransforms(rd.timm_transforms(24, use_prefetcher=True), 3),
}
WHOLE = {
    "resize first": v2.Compose([v2.Resize(40), v2.RandomResizedCrop(24), *LAST]),
    "flip first": v2.Compose([v2.RandomHorizontalFlip(), v2.RandomResizedCrop(24), *LAST]),
    "pooling first": v2.Compose([rd.LabelPooling(), v2.RandomResizedCrop(24)]),
    "subclass": v2.Compose([Subclass(24), *LAST]),
    "padded": v2.Compose([v2.RandomCrop(40, padding=4), *LAST]),
    "padded if needed": v2.Compose([v2.RandomCrop(90, pad_if_needed=True), *LAST]),
    "larger center": v2.Compose([v2.CenterCrop(90), *LAST]),
    "no compose": v2.RandomResizedCrop(24),
    "function": lambda image, label_map: (F.to_image(image), label_map),
    "empty": lambda image, label_map: v2.Compose([v2.Identity()])(image, label_map),
    "timm, validation": rd.timm_transforms(24, is_training=False),
    "timm, resize and crop": rd.timm_transforms(24, train_crop_mode="rkrc"),
}


def as_arrays(output):
    return [np.asarray(value.view[:6] if isinstance(value, rd.LabelMap) else value) for value in output]


def assert_same(pipeline, image, target, num_seeds=5):
    """Return the boxes that were decoded."""
    recorded = Recorded(image)
    for seed in range(num_seeds):
        results = []
        for given in (image, recorded):
            seed_all(seed)
            results.append([*as_arrays(run_pipeline(pipeline, given, target)), random.random(), torch.rand(()).item()])
        for expected, got in zip(*results, strict=True):
            np.testing.assert_array_equal(got, expected)
    return recorded.boxes


def label_map():
    return rd.LabelMap.from_logits(torch.randn(5, 4, 3), canvas_size=SIZE, key="one")


@pytest.mark.parametrize("form", [lambda image: image, F.to_image], ids=["pil", "tensor"])
@pytest.mark.parametrize("name", [*PARTIAL, *WHOLE])
def test_samples_and_random_numbers_are_those_of_a_full_decode(name, form):
    boxes = assert_same({**PARTIAL, **WHOLE}[name], form(picture(0, SIZE)), label_map())
    assert len(boxes) == 5
    assert all((box is None) == (name in WHOLE) for box in boxes)


@pytest.mark.parametrize("num_crops", [1, 3])
@pytest.mark.parametrize("form", [lambda image: image, F.to_image], ids=["pil", "tensor"])
@pytest.mark.parametrize("timm", [False, True])
def test_stored_crops_decode_the_smallest_box_that_holds_them(num_crops, form, timm):
    labels, crop = made(), rd.RandomStoredCrop(24, num_crops=num_crops)
    pipeline = rd.timm_transforms(24, crop=crop) if timm else v2.Compose([crop, v2.ToImage()])
    boxes = assert_same(pipeline, form(IMAGE), labels)
    assert len(boxes) == 5
    assert None not in boxes


def test_a_batch_equals_its_samples():
    pairs = [(picture(i, SIZE), label_map()) for i in range(4)]
    results = []
    for wrap in (lambda image: image, Recorded):
        seed_all(1)
        results.append(run_batch(PARTIAL["resized"], [(wrap(image), target) for image, target in pairs]))
    for expected, got in zip(*results, strict=True):
        assert all(map(torch.equal, got, expected))


def test_errors_of_transforms_are_those_of_decoded_images():
    for pipeline, image, target, message in (
        (v2.Compose([v2.RandomCrop(200)]), picture(0, SIZE), label_map(), "larger than"),
        (v2.Compose([rd.RandomStoredCrop(24)]), picture(0, SIZE), label_map(), "needs CropLabels"),
        (v2.Compose([v2.RandomResizedCrop(24)]), IMAGE, made(), "cannot be followed by CropLabels"),
    ):
        for given in (image, Recorded(image)):
            with pytest.raises((TypeError, ValueError), match=message):
                run_pipeline(pipeline, given, target)


@pytest.mark.parametrize(
    "transforms", [PARTIAL["resized"], rd.timm_transforms(24, use_prefetcher=True)], ids=["v2", "timm"]
)
def test_the_channels_of_a_cropped_tensor_are_contiguous(transforms):
    interleaved = F.to_image(torch.from_numpy(np.array(picture(0, SIZE))).permute(2, 0, 1))
    assert not interleaved.is_contiguous()
    for image in (interleaved, Recorded(interleaved)):
        assert run_pipeline(transforms, image, label_map())[0].is_contiguous()
