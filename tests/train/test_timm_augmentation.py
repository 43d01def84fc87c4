"""Images equal those of timm bit by bit, and views match the geometric transforms of the images."""

from __future__ import annotations

import copy
import pickle
import random
import threading

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import timm.data.auto_augment as timm_ops
import torch
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms.v2 import functional as F

import relabel_datasets as rd
from relabel_datasets.labels.compose import run_batch
from relabel_datasets.train.timm_augmentation import timm_transforms
from relabel_datasets.train.timm_steps import MOVING_OPS, PIXEL_OPS
from tests.conftest import picture
from tests.labels.ramps import ramp

SIZE, CROP, PARTS = (121, 83), (64, 48), 4
SHOW = {"mean": (1.0, 1.0, 1.0), "std": (1.0, 1.0, 1.0), "color_jitter": 0.0}  # fills with 255, gives pixels - 1
PIPELINES = [
    {},
    {"vflip": 0.5, "interpolation": "random", "color_jitter": (0.4, 0.3, 0.2, 0.1), "color_jitter_prob": 0.5},
    {"grayscale_prob": 0.5, "gaussian_blur_prob": 0.5, "re_prob": 0.5, "re_mode": "pixel", "re_count": 3},
    {"train_crop_mode": "rrc", "scale": (0.3, 0.5), "ratio": (0.5, 2.0), "interpolation": "bicubic"},
    {"train_crop_mode": "rkrc"},
    {"train_crop_mode": "rkrr", "scale": (0.2, 2.0), "ratio": (0.5, 2.0), "interpolation": "random"},
    {"auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": "bicubic", "re_prob": 0.25},
    {"auto_augment": "rand-m9-n4-p0.9-mstd101", "interpolation": "random"},
    {"auto_augment": "rand-m15-mmax20-n3-tweights"},
    {"auto_augment": "rand-m8-n2-t3aw", "color_jitter": 0.3},
    {"auto_augment": "v0-mstd0.5"},
    {"auto_augment": "v0r"},
    {"auto_augment": "original", "train_crop_mode": "rkrc"},
    {"auto_augment": "originalr-mstd1"},
    {"auto_augment": "3a"},
    {"no_aug": True},
    {"is_training": False},
    {"is_training": False, "crop_mode": "squash", "crop_pct": 0.8},
    {"is_training": False, "crop_mode": "border", "crop_border_pixels": 3},
    {"use_prefetcher": True},
    {"normalize": False, "hflip": 1.0},
]


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  timm draws from it
    torch.manual_seed(seed)


def label_map(size: tuple[int, int] = SIZE) -> rd.LabelMap:
    return rd.LabelMap.from_logits(torch.randn(5, 4, 3), canvas_size=size)


def positions(part: int) -> PIL.Image.Image:
    """Return an image whose red encodes x and whose green encodes y, within one of `PARTS` equal parts of each side."""
    x_and_y = (PARTS * ramp(SIZE) - part).clamp(0, 1)
    channels = torch.cat([x_and_y, torch.zeros(1, *SIZE)])
    return PIL.Image.fromarray((255 * channels).round().byte().permute(1, 2, 0).numpy())


def seen_from(label_map: rd.LabelMap) -> tuple[Tensor, Tensor]:
    """Return the source position of each pixel according to the view `[2, H, W]`, and its distance to the visible border in pixels."""
    view, (u, v) = label_map.view, ramp(label_map.canvas_size)
    x, y = view.xx * u + view.xy * v + view.x0, view.yx * u + view.yy * v + view.y0
    x1, y1, x2, y2 = view.compose(rd.labels.View()).visible_xyxy
    inwards = torch.stack([(x - x1) * SIZE[1], (x2 - x) * SIZE[1], (y - y1) * SIZE[0], (y2 - y) * SIZE[0]])
    return torch.stack([x, y]), inwards.amin(0)


def assert_shows(image: Tensor, part: int, label_map: rd.LabelMap, *, num_steps: int, filled: bool = True) -> int:
    """Check the pixels of a transformed `positions` image against the view, and return the number of checked pixels.

    Args:
        image: Transformed image `[3, h, w]`, 0 to 1.
        part: Part that the original image encodes.
        label_map: Transformed label map.
        num_steps: Number of transforms, each of which may round a pixel value up or down.
        filled: Whether pixels outside the visible region must be filled with 1.
    """
    assert image.shape == (3, *label_map.canvas_size)
    expected, depth = seen_from(label_map)
    got, inside = image[:2], depth > 5
    # Exclude the ends of the ramp and filled pixels, which interpolation would mix in.
    filled_nearby = torch.nn.functional.max_pool2d(image[2:], 7, 1, 3)[0]
    checked = (got > 0.25) & (got < 0.75) & inside & (filled_nearby < 0.01)
    difference = ((got + part) / PARTS - expected)[checked]
    assert (difference.abs() < (num_steps + 0.6) / 255 / PARTS).all()
    if filled:
        assert not label_map.view.is_box or (image[2][inside] < 0.01).all()  # else the visible region is a bounding box
        assert (image[2][depth < -5] > 0.99).all()
    return int(checked.sum())


@pytest.fixture
def only_positions(monkeypatch):
    """Make timm's pixel operations no-ops that draw the same random numbers."""
    for name in PIXEL_OPS:
        monkeypatch.setitem(timm_ops.NAME_TO_OP, name, lambda image, *args, **kwargs: image)


@pytest.fixture
def pillow_that_keeps_no_bits(monkeypatch):
    """Make Pillow posterize to 0 bits as before release 13: the result is black."""
    posterize = PIL.ImageOps.posterize
    monkeypatch.setattr(
        PIL.ImageOps,
        "posterize",
        lambda image, bits: posterize(image, bits) if bits else image.point(lambda _: 0),
    )


@pytest.mark.parametrize("arguments", PIPELINES, ids=str)
@pytest.mark.parametrize("size", [(40, 56), (97, 31), (64, 64)])
def test_pixels_and_random_numbers_equal_those_of_timm(arguments, size, pillow_that_keeps_no_bits):
    arguments = {"is_training": True, **arguments}
    theirs, ours = create_transform(CROP, **arguments), timm_transforms(CROP, **arguments)
    for seed in range(12):
        image, original = picture(seed, size), label_map(size)
        seed_all(seed)
        expected, after = theirs(image), (random.random(), np.random.rand(), torch.rand(()))  # noqa: NPY002
        seed_all(seed)
        got, soft_label = ours(image, original)
        assert torch.equal(got, expected)
        assert got.dtype == expected.dtype
        assert after == (random.random(), np.random.rand(), torch.rand(()))  # noqa: NPY002
        assert soft_label.shape == (5,)
        assert soft_label.sum() == pytest.approx(1)


@pytest.mark.parametrize("arguments", PIPELINES, ids=str)
def test_tensors_give_the_labels_of_pil_images_and_nearly_their_pixels(arguments, pillow_that_keeps_no_bits):
    arguments = {"is_training": True, "color_jitter": None, **arguments, "pooling": None}
    if not {"auto_augment", "re_mode"} & arguments.keys():
        arguments["normalize"] = False  # pixels of 0 to 255
    transforms = timm_transforms(CROP, **arguments)
    for seed in range(3):
        image, original = picture(seed, SIZE), label_map()
        results = []
        for form in (image, F.to_image(image)):
            seed_all(seed)
            results.append((*transforms(form, original), random.random(), torch.rand(())))
        (pixels, followed, *numbers), (others, other_map, *other_numbers) = results
        assert numbers == other_numbers
        assert followed.view == other_map.view
        assert (type(others), others.dtype, others.shape) == (type(pixels), pixels.dtype, pixels.shape)
        if pixels.dtype == torch.uint8:
            difference = (pixels.float() - others.float()).abs()
            assert difference.mean() < 2
            assert difference.max() <= (20 if "color_jitter_prob" in arguments else 3)  # a hue is sensitive to rounding


def check_all_parts(transforms, num_seeds: int, **checks: object) -> list[rd.labels.View]:
    """Transform images of all parts with each seed, check them, and return the views."""
    original, views, num_checked = label_map(), [], 0
    for seed in range(num_seeds):
        for part in range(PARTS):
            seed_all(seed)
            shown, followed = transforms(positions(part), original)
            shown = shown / 255 if shown.dtype == torch.uint8 else shown + 1
            num_checked += assert_shows(shown, part, followed, **checks)
        views.append(followed.view)
    assert num_checked > 100 * num_seeds
    return views


@pytest.mark.parametrize(
    "arguments", [arguments for arguments in PIPELINES if "grayscale_prob" not in arguments], ids=str
)
def test_the_view_maps_each_pixel_to_its_source(arguments, only_positions):
    arguments = {name: value for name, value in arguments.items() if name not in ("re_prob", "color_jitter_prob")}
    transforms = timm_transforms(CROP, pooling=None, **{**arguments, **SHOW})
    reflects = arguments.get("train_crop_mode", "rrc") != "rrc"
    views = check_all_parts(transforms, 12, num_steps=6 if "auto_augment" in arguments else 2, filled=not reflects)
    is_random = not {"no_aug", "is_training"} & arguments.keys()
    assert len({*views}) > 9 if is_random else len({*views}) == 1


@pytest.mark.parametrize("operation", sorted(MOVING_OPS))
def test_each_geometric_operation_changes_the_view(operation, monkeypatch):
    monkeypatch.setattr(timm_ops, "_RAND_TRANSFORMS", [operation])
    whole = {"scale": (1, 1), "ratio": (SIZE[1] / SIZE[0],) * 2, "hflip": 0}
    transforms = timm_transforms(SIZE, pooling=None, auto_augment="rand-n1-p1-mstd101", **whole, **SHOW)
    views = check_all_parts(transforms, 20, num_steps=1)
    assert len({*views}) == 20  # of any magnitude
    changes = [sum(view[:6]) - 2 for view in views]
    if operation != "Rotate":  # its sum has no sign
        assert min(changes) < 0 < max(changes)


@pytest.mark.parametrize("operation", sorted(PIXEL_OPS))
def test_each_pixel_operation_returns_the_same_label_map_object(operation, monkeypatch):
    monkeypatch.setattr(timm_ops, "_RAND_TRANSFORMS", [operation])
    transforms = timm_transforms(CROP, pooling=None, auto_augment="rand-n2-p1-mstd101")
    follow = transforms.steps[2]
    original = label_map()
    image, followed = follow(picture(0, SIZE), original)
    assert followed is original
    assert isinstance(image, PIL.Image.Image)


def test_posterizing_to_0_bits_is_black_with_any_pillow(monkeypatch):
    monkeypatch.setattr(timm_ops, "_RAND_TRANSFORMS", ["PosterizeIncreasing"])
    transforms = timm_transforms(CROP, auto_augment="rand-m10-p1", hflip=0.0, **SHOW)
    assert (transforms(picture(0, SIZE), label_map())[0] == -1).all()


def test_every_operation_of_timm_is_known_as_geometric_or_of_pixels():
    assert {*timm_ops.NAME_TO_OP} == MOVING_OPS | PIXEL_OPS
    assert not MOVING_OPS & PIXEL_OPS


@pytest.mark.parametrize("auto_augment", ["rand-tnew", "v0"])
def test_an_unknown_operation_is_refused(monkeypatch, auto_augment):
    monkeypatch.setitem(timm_ops.NAME_TO_OP, "Swirl", timm_ops.invert)
    monkeypatch.setitem(timm_ops.LEVEL_TO_ARG, "Swirl", None)
    monkeypatch.setattr(timm_ops, "rand_augment_choices", lambda name, increasing: ["Rotate", "Swirl"])
    monkeypatch.setattr(timm_ops, "auto_augment_policy_v0", lambda hparams: [[timm_ops.AugmentOp("Swirl")]])
    with pytest.raises(ValueError, match="timm's operation Swirl is not known"):
        timm_transforms(CROP, auto_augment=auto_augment)


def test_a_geometric_operation_with_another_implementation_is_refused(monkeypatch):
    def quad(image, factor, **kwargs):
        return image.transform(image.size, PIL.Image.Transform.QUAD, (0, 0, 0, 9, 9, 9, 9, 0))

    def smaller(image, factor, **kwargs):
        return image.transform((9, 9), PIL.Image.Transform.AFFINE, (1, 0, 0, 0, 1, 0))

    monkeypatch.setattr(timm_ops, "_RAND_TRANSFORMS", ["ShearX"])
    for operation in (quad, smaller):
        monkeypatch.setitem(timm_ops.NAME_TO_OP, "ShearX", operation)
        transforms = timm_transforms(CROP, auto_augment="rand-n1-p1")
        with pytest.raises(ValueError, match="a LabelMap cannot follow PIL's transform"):
            transforms(picture(0), label_map((40, 56)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"auto_augment": "augmix-m5"}, "AugMix mixes several views"),
        ({"naflex": True}, "cannot follow timm's RandomResizedCropToSequence"),
        ({"patchify": True}, "cannot follow timm's Patchify"),
        ({"separate": True}, "timm returns a tuple for these arguments"),
    ],
)
def test_transforms_that_a_label_map_cannot_follow_are_refused_at_creation(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm_transforms(CROP, **arguments)


@pytest.mark.parametrize(
    ("name", "meant"), [("colour_jitter", "color_jitter"), ("input_size", "image_size"), ("hflipp", "hflip")]
)
def test_an_argument_that_timm_does_not_know_is_an_error_that_suggests_a_known_one(name, meant):
    with pytest.raises(TypeError, match=rf"timm_transforms\(\) has no argument '{name}': did you mean '{meant}'\?"):
        timm_transforms(**{name: 1})


def test_other_samples_are_refused():
    transforms = timm_transforms(CROP)
    with pytest.raises(TypeError, match="an image and its LabelMap, got Tensor and LabelMap"):
        transforms(torch.zeros(3, *SIZE), label_map())
    with pytest.raises(TypeError, match="got Image and int"):
        transforms(picture(0), 3)


def test_a_label_map_of_another_image_size_is_refused():
    with pytest.raises(ValueError, match="its label map belongs to an image of"):
        timm_transforms(CROP, is_training=False, crop_mode="center")(picture(0, (40, 56)), label_map((56, 40)))


def test_pooling_is_the_given_transform():
    image, original = picture(0, SIZE), label_map()
    seed_all(0)
    shown, followed = timm_transforms(CROP, pooling=None)(image, original)
    assert original.view == rd.labels.View()
    for pooling in (rd.LabelPooling(temperature=2.0), rd.LabelPooling(output_size=(3, 4))):
        seed_all(0)
        got = timm_transforms(CROP, pooling=pooling)(image, original)
        assert torch.equal(got[0], shown)
        assert torch.equal(got[1], pooling(shown, followed)[1])


@pytest.mark.parametrize("pooling", [rd.LabelPooling(temperature=2.0), rd.train.TokenLabelPooling((3, 4)), None])
def test_a_batch_equals_its_samples(pooling):
    transforms = timm_transforms(CROP, pooling=pooling, auto_augment="rand-m9-mstd0.5-inc1")
    pairs = [(picture(i, SIZE), label_map()) for i in range(5)]
    seed_all(4)
    together = run_batch(transforms, pairs)
    seed_all(4)
    singly = [transforms(*pair) for pair in pairs]
    for (image, label), (expected_image, expected_label) in zip(together, singly, strict=True):
        assert torch.equal(image, expected_image)
        assert type(label) is type(expected_label)
        torch.testing.assert_close(label, expected_label, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="its label map belongs to an image of"):
        run_batch(transforms, [(picture(0, (40, 56)), label_map((56, 40)))])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda transforms: pickle.loads(pickle.dumps(transforms))])
def test_copies_and_pickles_return_the_same(copied):
    transforms = timm_transforms(CROP, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25)
    results, original = [], label_map()
    for instance in (transforms, copied(transforms)):
        seed_all(3)
        results.append(instance(picture(0, SIZE), original))
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][0], results[1][0])
    assert repr(transforms) == repr(copied(transforms))
    assert "RandAugment" in repr(transforms)
    assert "LabelPooling" in repr(transforms)


def test_threads_can_share_transforms(only_positions):
    transforms = timm_transforms(CROP, pooling=None, auto_augment="rand-n2-m9", **SHOW)
    failures = []

    def work() -> None:
        for part in [*range(PARTS)] * 10:
            shown, followed = transforms(positions(part), label_map())
            try:
                assert_shows(shown + 1, part, followed, num_steps=4)
            except AssertionError as error:
                failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_dataset_applies_them_in_the_workers_of_a_loader(dataset_folder):
    transforms = timm_transforms(32, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25)
    dataset = rd.load_dataset(dataset_folder, "colours", "train", transforms=transforms)
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=2)
    for images, soft_labels in loader:
        assert images.shape[1:] == (3, 32, 32)
        assert soft_labels.shape == (len(images), 3)
