"""RandomStoredCrop, and transforms before and after it."""

import pickle

import numpy as np
import PIL.Image
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

import relabel_datasets as rd
from relabel_datasets.labels.compose import run_pipeline

from .samples import random_map
from .test_crop_labels import CANVAS, NUM_CLASSES, NUM_CROPS, imported, made
from .test_transforms import FOLLOWED, PIXELS_ONLY, REFUSED

IMAGE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (*CANVAS, 3), np.uint8))


def tensor_of(image):
    return image if isinstance(image, torch.Tensor) else F.pil_to_tensor(image)


def crops_of(image, labels, size):
    """Return all crops of an image, cut in the plainest way, with their labels."""
    crops = []
    for box, flip in zip(labels.boxes_xyxy.tolist(), labels.flips.tolist(), strict=True):
        left, top, right, bottom = (
            round(edge * side) for edge, side in zip(box, [image.width, image.height] * 2, strict=True)
        )
        crop = image.crop((left, top, right, bottom)).resize((size[1], size[0]), PIL.Image.Resampling.BILINEAR)
        crops.append(tensor_of(crop.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop))
    return crops, labels.soft_labels()


def place_of(label, labels):
    """Return the index of the crop that has a label."""
    return int((labels - label).abs().sum(1).argmin())


@pytest.mark.parametrize("labels", [made(), imported()], ids=["seeded", "imported"])
def test_a_crop_is_cut_resized_and_mirrored_and_has_its_own_label(labels):
    crops, soft = crops_of(IMAGE, labels, (9, 7))
    seen = set()
    for _ in range(60):
        crop, label = rd.RandomStoredCrop((9, 7))(IMAGE, labels)
        place = place_of(label, soft)
        assert torch.equal(label, soft[place])
        assert torch.equal(tensor_of(crop), crops[place])
        seen.add(place)
    assert seen == set(range(NUM_CROPS))


def test_several_crops_of_an_image_are_different_and_have_their_own_labels():
    labels = made()
    crops, soft = crops_of(IMAGE, labels, (8, 8))
    images, some = rd.RandomStoredCrop(8, num_crops=4)(IMAGE, labels)
    assert isinstance(images, tv_tensors.Image)
    assert (images.shape, images.dtype, some.shape) == ((4, 3, 8, 8), torch.uint8, (4, NUM_CLASSES))
    places = [place_of(label, soft) for label in some]
    assert len(set(places)) == 4
    for image, label, place in zip(images, some, places, strict=True):
        assert torch.equal(label, soft[place])
        assert torch.equal(image, crops[place])


def test_several_crops_become_rows_of_the_batch():
    transform = rd.RandomStoredCrop(8, num_crops=3)
    samples = [
        {"pair": transform(IMAGE, made(key)), "key": key, "index": torch.tensor(i)} for i, key in enumerate("ab")
    ]
    batch = rd.collate_crops(samples)
    images, labels = batch["pair"]
    assert (images.shape, labels.shape) == ((6, 3, 8, 8), (6, NUM_CLASSES))
    assert torch.equal(images[4], samples[1]["pair"][0][1])
    assert torch.equal(labels[4], samples[1]["pair"][1][1])
    assert (batch["key"], batch["index"].tolist()) == (list("aaabbb"), [0, 0, 0, 1, 1, 1])
    mixed, targets = v2.CutMix(num_classes=NUM_CLASSES)(images.float(), labels)
    assert mixed.shape == images.shape
    torch.testing.assert_close(targets.sum(1), torch.ones(6))


def test_samples_without_several_crops_are_not_collated_as_such():
    with pytest.raises(ValueError, match="number of crops as first dimension"):
        rd.collate_crops([(torch.zeros(3, 8, 8), torch.zeros(NUM_CLASSES))])


@pytest.mark.parametrize("kind", ["pil", "image", "tensor"])
def test_every_kind_of_image_is_cropped_at_the_same_place(kind):
    labels = made()
    image = {"pil": IMAGE, "image": F.to_image(IMAGE), "tensor": F.pil_to_tensor(IMAGE)}[kind]
    torch.manual_seed(3)
    crop, label = rd.RandomStoredCrop(8)(image, labels)
    torch.manual_seed(3)
    expected, same_label = rd.RandomStoredCrop(8)(IMAGE, labels)
    assert type(crop) is type(image)
    assert torch.equal(label, same_label)
    assert (tensor_of(crop).float() - tensor_of(expected).float()).abs().max() <= 2  # of 255; Pillow rounds otherwise


def test_blended_labels_have_the_temperature_and_the_class_of_the_image():
    labels = made()
    torch.manual_seed(0)
    _, blended = rd.RandomStoredCrop(8, temperature=2.0, label_weight=0.25)(IMAGE, labels)
    soft = labels.soft_labels(temperature=2.0)
    expected = 0.75 * soft
    expected[:, 4] += 0.25
    torch.testing.assert_close(blended, expected[place_of(blended, expected)])


@pytest.mark.parametrize("num_crops", [1, 2, 4, 5, 6])
def test_epochs_show_all_crops_of_an_image_before_any_of_them_again(num_crops):
    labels_of_image = made()
    transform, shown = rd.RandomStoredCrop(8, num_crops=num_crops), {}
    for seed in (0, 1):
        labels = [
            label
            for e in range(12)
            for label in transform(IMAGE, labels_of_image.at_epoch(e, seed))[1].view(num_crops, -1)
        ]
        shown[seed] = [place_of(label, labels_of_image.soft_labels()) for label in labels]
        for start in range(0, len(labels) - NUM_CROPS + 1, NUM_CROPS):
            assert sorted(shown[seed][start : start + NUM_CROPS]) == list(range(NUM_CROPS))
        for start in range(0, len(labels), num_crops):
            assert len(set(shown[seed][start : start + num_crops])) == num_crops
    assert shown[0] != shown[1]
    assert shown[0][:NUM_CROPS] != shown[0][NUM_CROPS : 2 * NUM_CROPS]


def test_a_pipeline_gives_the_same_as_its_transforms_and_is_pickled():
    pipeline = v2.Compose(
        [v2.Resize(40), rd.RandomStoredCrop(8), v2.ColorJitter(0.4), v2.ToImage(), v2.RandomErasing(0.5)]
    )
    labels = made()
    for seed in range(4):
        torch.manual_seed(seed)
        image, label = pickle.loads(pickle.dumps(pipeline))(IMAGE, labels)
        torch.manual_seed(seed)
        same_image, same_label = run_pipeline(pipeline, IMAGE, labels)
        assert torch.equal(image, same_image)
        assert torch.equal(label, same_label)


def test_samples_of_any_nesting_keep_their_other_items():
    labels, other = made(), torch.arange(3)
    sample = {"image": IMAGE, "target": [labels, other], "key": "a"}
    got = rd.RandomStoredCrop(8)(sample)
    assert got["image"].size == (8, 8)
    assert got["target"][0].shape == (NUM_CLASSES,)
    assert got["target"][1] is other
    assert got["key"] == "a"


MOVING = {**FOLLOWED, "five_crop": [{"size": 5}], "ten_crop": [{"size": 5}]}
ARGUMENTS = {name: cases[0] for name, cases in MOVING.items() if name != "resize"}
ARGUMENTS |= {
    "perspective": {"startpoints": [[0, 0]] * 4, "endpoints": [[0, 0]] * 4},
    "elastic": {"displacement": torch.zeros(1, *CANVAS, 2)},
    "uniform_temporal_subsample": {"num_samples": 1},
}


def test_every_functional_that_moves_pixels_is_refused_or_known_to_be_a_resize():
    assert ARGUMENTS.keys() == (MOVING.keys() | REFUSED) - {"resize"}


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_transforms_that_move_the_image_are_refused(name):
    with pytest.raises(TypeError, match=rf"{name} cannot be followed by CropLabels.* RandomStoredCrop\(size\) instead"):
        getattr(F, name)(made(), **ARGUMENTS[name])


def test_a_resize_changes_the_canvas_only():
    labels = made()
    for size in (40, [20], [30, 11]):
        resized = F.resize(labels, size)
        assert resized.canvas_size == (F.resize(IMAGE, size).height, F.resize(IMAGE, size).width)
        assert torch.equal(resized.boxes_xyxy, labels.boxes_xyxy)


@pytest.mark.parametrize("name", sorted(PIXELS_ONLY & {"normalize", "erase", "to_dtype", "invert", "gaussian_blur"}))
def test_transforms_of_pixel_values_ignore_crop_labels(name):
    arguments = {
        "normalize": {"mean": [0.0], "std": [1.0]}, "erase": {"i": 0, "j": 0, "h": 1, "w": 1, "v": torch.zeros(1)},
        "gaussian_blur": {"kernel_size": 3},
    }  # fmt: skip
    labels = made()
    functional = getattr(F, name)
    kernel = v2.functional._utils._get_kernel(functional, rd.CropLabels, allow_passthrough=True)
    assert kernel(labels, **arguments.get(name, {})) is labels


@pytest.mark.parametrize("policy", [v2.RandAugment, v2.TrivialAugmentWide, v2.AutoAugment])
def test_automatic_augmentation_before_the_crop_is_refused_if_it_moves_the_image(policy):
    transforms = v2.Compose([policy()] * 100)
    with pytest.raises(TypeError, match="cannot be followed by CropLabels"):
        transforms(IMAGE, made())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rd.RandomStoredCrop(0), ValueError, "size must be at least 1"),
        (lambda: rd.RandomStoredCrop((8, 8, 8)), ValueError, r"size must be an int or \(height, width\)"),
        (lambda: rd.RandomStoredCrop(8, num_crops=0), ValueError, "num_crops must be at least 1"),
        (lambda: rd.RandomStoredCrop(8, temperature=0), ValueError, "temperature"),
        (lambda: rd.RandomStoredCrop(8, label_weight=2), ValueError, "label_weight"),
        (lambda: rd.RandomStoredCrop(8, "cubist"), ValueError, "cubist"),
        (lambda: rd.RandomStoredCrop(8, num_crops=7)(IMAGE, made()), ValueError, "num_crops=7 is more than the 6 stored"),
        (lambda: rd.RandomStoredCrop(8)(IMAGE, random_map()), TypeError, "needs CropLabels, but the sample has a LabelMap"),
        (lambda: rd.RandomStoredCrop(8)(IMAGE), TypeError, "needs one CropLabels in the sample, got 0"),
        (lambda: rd.RandomStoredCrop(8)(F.crop(IMAGE, 0, 0, 9, 9), made()), ValueError, "before all other transforms"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
