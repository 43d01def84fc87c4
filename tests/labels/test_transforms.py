"""Label maps follow torchvision's transforms: checked against images whose pixels say where they came from."""

import warnings

import pytest
import torch
import torchvision
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.transforms.v2.functional._utils import _KERNEL_REGISTRY

import relabel_datasets as rd
from tests.versions import installed

from .ramps import FILL, KINDS, assert_follows, ramp_images, ramp_map, read
from .samples import CANVAS_SIZE, ENCODINGS, assert_same_map, random_map

BILINEAR = v2.InterpolationMode.BILINEAR
HAS_SIZE_NONE = installed("torchvision") >= (0, 20)

# Functionals

PIXELS_ONLY = set(
    "adjust_brightness adjust_contrast adjust_gamma adjust_hue adjust_saturation adjust_sharpness autocontrast equalize "  # noqa: SIM905
    "erase gaussian_blur gaussian_noise get_dimensions get_num_channels get_num_frames grayscale_to_rgb invert jpeg "
    "normalize permute_channels posterize rgb_to_grayscale solarize to_dtype".split()
)
REFUSED = {"perspective", "elastic", "uniform_temporal_subsample"}
FOLLOWED = {
    "horizontal_flip": [{}],
    "vertical_flip": [{}],
    "crop": [
        {"top": 2, "left": 3, "height": 9, "width": 5},
        {"top": -2, "left": 4, "height": 10, "width": 12, "outside": 0.0},
    ],
    "resize": [
        {"size": [23, 19]},
        {"size": [20]},
        {"size": 20},
        {"size": [16], "max_size": 24},
        {"size": [12], "max_size": 18},
        *([{"size": None, "max_size": 30}] if HAS_SIZE_NONE else []),
        {"size": [12, 9], "margin": 3.0, "tolerance": 0.01},
    ],
    "resized_crop": [
        {"top": 2, "left": 1, "height": 9, "width": 8, "size": [20, 13]},
        {"top": 2, "left": 3, "height": 7, "width": 5, "size": [11]},
        {"top": -3, "left": 1, "height": 9, "width": 8, "size": [9, 8], "outside": 0.0},
    ],
    "pad": [
        {"padding": 3, "fill": FILL},
        {"padding": [2], "fill": FILL},
        {"padding": [1, 4], "fill": FILL},
        {"padding": [1, 2, 3, 4], "fill": FILL},
        {"padding": (4, 3, 2, 1), "padding_mode": "reflect", "outside": None},
        {"padding": [1, 2], "padding_mode": "edge", "outside": None},
    ],
    "center_crop": [
        {"output_size": [9, 4]},
        {"output_size": [8, 5]},
        {"output_size": [7]},
        {"output_size": 6},
        {"output_size": [25, 20], "outside": 0.0},
        {"output_size": [24, 18], "outside": 0.0},
        {"output_size": [10, 20], "outside": 0.0},
        {"output_size": [20, 6], "outside": 0.0},
    ],
    "affine": [
        {"angle": 25.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]},
        {"angle": 0.0, "translate": [3, -2], "scale": 1.0, "shear": [0.0, 0.0]},
        {"angle": 0.0, "translate": [0, 0], "scale": 1.3, "shear": [0.0, 0.0]},
        {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [15.0, 0.0]},
        {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, -10.0]},
        {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [12.0]},
        {"angle": -40.0, "translate": [1, 2], "scale": 0.8, "shear": [10.0, 5.0]},
        {"angle": 30.0, "translate": [-1, 2], "scale": 1.2, "shear": [5.0, 8.0], "center": [3, 12]},
        {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [16.7, 0.0], "center": [0, 0]},
    ],
    "rotate": [
        {"angle": 33.0},
        {"angle": -70.0, "center": [4, 9]},
        {"angle": 90.0},
        {"angle": 180.0},
        {"angle": 270.0},
        {"angle": 90.0, "expand": True},
        {"angle": -90.0, "expand": True},
        {"angle": 180.0, "expand": True},
        {"angle": 33.0, "expand": True},
        {"angle": 247.0, "expand": True},
        {"angle": 33.0, "expand": True, "center": [2, 3]},
    ],
}  # fmt: skip
CHECKS = {"outside", "margin", "tolerance"}  # the rest goes to the functional


def apply(name: str, inpt, arguments: dict):
    functional = getattr(F, name)
    arguments = {key: value for key, value in arguments.items() if key not in CHECKS}
    if name in ("affine", "rotate"):
        arguments.update(interpolation=BILINEAR, fill=FILL)
    return functional(inpt, **arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "arguments"), [(name, arguments) for name, cases in FOLLOWED.items() for arguments in cases]
)
def test_the_view_follows_the_pixels(name, arguments, kind):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The provided center argument")
        images = [apply(name, image, arguments) for image in ramp_images(kind)]
        label_map = apply(name, ramp_map(), arguments)
    checks = {key: arguments[key] for key in CHECKS & set(arguments)}
    assert_follows(label_map, images, **checks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("five_crop", {"size": [9, 6]}), ("five_crop", {"size": [8]}), ("five_crop", {"size": 7}),
     ("ten_crop", {"size": [9, 6]}), ("ten_crop", {"size": 7, "vertical_flip": True})],
)  # fmt: skip
def test_each_of_several_crops_has_a_map_that_follows_it(name, arguments, kind):
    crops = zip(*(getattr(F, name)(image, **arguments) for image in ramp_images(kind)), strict=True)
    label_maps = getattr(F, name)(ramp_map(), **arguments)
    for images, label_map in zip(crops, label_maps, strict=True):
        assert_follows(label_map, images)


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_follow_one_another_and_cropped_parts_stay_invisible(kind):
    def transform(inpt):
        inpt = F.pad(F.resized_crop(inpt, 1, 2, 14, 8, [20, 16]), [1, 2, 3, 4])
        inpt = F.rotate(F.horizontal_flip(inpt), 90.0, expand=True)
        return F.affine(inpt, 20.0, [4, 2], 0.8, [5.0, 3.0], interpolation=BILINEAR)

    label_map = transform(ramp_map())
    assert label_map.view.visible_xyxy == pytest.approx((2 / 11, 1 / 17, 10 / 11, 15 / 17))
    assert_follows(label_map, [transform(image) for image in ramp_images(kind)], margin=1.5, outside=0.0)


SIZES_TO_EXPAND = [(17, 11), (6, 9), (16, 12), (5, 5)]


@pytest.mark.parametrize("size", SIZES_TO_EXPAND)
def test_an_expanded_canvas_is_as_large_as_the_images(size):
    image, label_map = torch.zeros(1, *size), ramp_map(size)
    for angle in [*range(-360, 361, 15), 8.1, 60.03, 185.7, -57.2]:
        assert F.rotate(label_map, angle, expand=True).canvas_size == F.rotate(image, angle, expand=True).shape[1:]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_only_view_and_canvas_size_change(encoding):
    label_map = random_map(encoding)
    for name, cases in FOLLOWED.items():
        followed = apply(name, label_map, cases[0])
        assert followed.logits.data_ptr() == label_map.logits.data_ptr()
        assert_same_map(rd.LabelMap.wrap(followed, like=label_map), label_map)
        assert (followed.key, followed.label, followed.num_classes) == ("images/a_1", 4, 13)
        assert (label_map.view, label_map.canvas_size) == (rd.labels.View(), CANVAS_SIZE)


def test_every_functional_of_torchvision_is_followed_or_refused_or_of_pixels_only():
    by_name = {functional.__name__: kernels for functional, kernels in _KERNEL_REGISTRY.items()}
    geometric = set(FOLLOWED) | REFUSED | {"five_crop", "ten_crop", "get_size"}
    assert set(by_name) == geometric | PIXELS_ONLY
    assert {name for name, kernels in by_name.items() if rd.LabelMap in kernels} == geometric
    moved_types = {tv_tensors.BoundingBoxes, getattr(tv_tensors, "KeyPoints", tv_tensors.Mask), tv_tensors.Mask}
    assert {name for name, kernels in by_name.items() if moved_types & set(kernels)} - {"to_dtype"} <= geometric


@pytest.mark.parametrize(
    ("functional", "arguments"),
    [
        (F.perspective, ([[0, 0], [9, 0], [9, 9], [0, 9]], [[1, 0], [9, 1], [9, 9], [0, 9]])),
        (F.elastic, (torch.zeros(1, *CANVAS_SIZE, 2),)),
        (F.uniform_temporal_subsample, (1,)),
    ],
)
def test_what_cannot_be_followed_raises(functional, arguments):
    with pytest.raises(TypeError, match=f"{functional.__name__} cannot be followed by a LabelMap"):
        functional(ramp_map(), *arguments)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="padding must be an int or 1, 2 or 4 of them"):
        F.pad(ramp_map(), [1, 2, 3])
    with pytest.raises(ValueError, match=r"crops of size \(18, 5\) do not fit an image of size \(17, 11\)"):
        F.five_crop(ramp_map(), [18, 5])


def test_get_size_is_the_canvas():
    assert F.get_size(ramp_map()) == list(CANVAS_SIZE)


# Transforms


def _newer(name: str, *args):
    """Return a transform that the oldest supported torchvision lacks; None if this one lacks it."""
    return getattr(v2, name)(*args) if hasattr(v2, name) else None


def _skip_if_lacking(what: object, name: str) -> None:
    if what is None:
        pytest.skip(f"torchvision {torchvision.__version__} has no {name}")


GEOMETRIC = {
    "CenterCrop": [v2.CenterCrop(9), v2.CenterCrop((25, 8))],
    "Pad": [v2.Pad([1, 2, 3, 4], fill=FILL)],
    "RandomAffine": [v2.RandomAffine(30, (0.1, 0.2), (0.8, 1.3), (5, 10, -5, 8), BILINEAR, FILL)],
    "RandomCrop": [v2.RandomCrop((9, 5)), v2.RandomCrop((20, 5), pad_if_needed=True, fill=FILL)],
    "RandomHorizontalFlip": [v2.RandomHorizontalFlip(1), v2.RandomHorizontalFlip(0)],
    "RandomResize": [v2.RandomResize(12, 30)],
    "RandomResizedCrop": [v2.RandomResizedCrop((20, 24), scale=(0.3, 1))],
    "RandomRotation": [v2.RandomRotation(180, BILINEAR, fill=FILL), v2.RandomRotation(180, BILINEAR, True, None, FILL)],
    "RandomShortestSize": [v2.RandomShortestSize([12, 20], max_size=40)],
    "RandomVerticalFlip": [v2.RandomVerticalFlip(1)],
    "RandomZoomOut": [v2.RandomZoomOut(FILL, p=1)],
    "Resize": [v2.Resize(20), v2.Resize((20, 30)), *([v2.Resize(None, max_size=25)] if HAS_SIZE_NONE else [])],
    "ScaleJitter": [v2.ScaleJitter((20, 20), (0.9, 2))],
}
CANNOT_FOLLOW = {
    "AugMix": v2.AugMix(),
    "ElasticTransform": v2.ElasticTransform(sigma=1.0),
    "RandomPerspective": v2.RandomPerspective(p=1),
    "UniformTemporalSubsample": v2.UniformTemporalSubsample(1),
}
KEEP_POSITIONS = {
    "ClampBoundingBoxes": v2.ClampBoundingBoxes(),
    "ClampKeyPoints": _newer("ClampKeyPoints"),
    "ColorJitter": v2.ColorJitter(0.5, 0.5, 0.5, 0.3),
    "ConvertBoundingBoxFormat": v2.ConvertBoundingBoxFormat("XYWH"),
    "ConvertImageDtype": v2.ConvertImageDtype(torch.float32),
    "GaussianBlur": v2.GaussianBlur(3),
    "GaussianNoise": v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.GaussianNoise()]),
    "Grayscale": v2.Grayscale(),
    "Identity": v2.Identity(),
    "LinearTransformation": v2.LinearTransformation(torch.eye(3 * 17 * 11), torch.zeros(3 * 17 * 11)),
    "Normalize": v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.2] * 3)]),
    "PILToTensor": v2.PILToTensor(),
    "RGB": v2.RGB(),
    "RandomAdjustSharpness": v2.RandomAdjustSharpness(2, p=1),
    "RandomAutocontrast": v2.RandomAutocontrast(p=1),
    "RandomChannelPermutation": v2.RandomChannelPermutation(),
    "RandomEqualize": v2.RandomEqualize(p=1),
    "RandomErasing": v2.RandomErasing(p=1),
    "RandomGrayscale": v2.RandomGrayscale(p=1),
    "RandomInvert": v2.RandomInvert(p=1),
    "RandomPhotometricDistort": v2.RandomPhotometricDistort(p=1),
    "RandomPosterize": v2.RandomPosterize(4, p=1),
    "RandomSolarize": v2.RandomSolarize(0.5, p=1),
    "SetClampingMode": _newer("SetClampingMode", "soft"),
    "ToDtype": v2.ToDtype(torch.float32, scale=True),
    "ToImage": v2.ToImage(),
    "ToPILImage": v2.ToPILImage(),
}
ELSEWHERE = set(
    "AutoAugment RandAugment TrivialAugmentWide "  # noqa: SIM905 - test_auto_augment.py
    "CutMix MixUp ToPureTensor "  # test_label_pooling.py
    "Compose RandomApply RandomChoice RandomOrder FiveCrop TenCrop RandomIoUCrop "  # below
    "JPEG "  # deprecated: it warns
    "Lambda SanitizeBoundingBoxes SanitizeKeyPoints ToTensor Transform".split()  # do what a user writes, or drop boxes
)


def test_every_transform_of_torchvision_is_tested_or_excused():
    names = {name for name, value in vars(v2).items() if isinstance(value, type) and issubclass(value, v2.Transform)}
    tested = set(GEOMETRIC) | set(CANNOT_FOLLOW) | set(KEEP_POSITIONS) | ELSEWHERE
    assert names == {name for name in tested if hasattr(v2, name)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "transform", [transform for transforms in GEOMETRIC.values() for transform in transforms], ids=repr
)
def test_a_transform_moves_image_and_map_together(transform, kind):
    for seed in range(4):
        torch.manual_seed(seed)
        *images, label_map = transform(*ramp_images(kind), ramp_map())
        outside = 0.0 if isinstance(transform, v2.CenterCrop) else FILL
        assert_follows(label_map, images, outside=outside, margin=2.0, tolerance=0.01)


def test_random_iou_crop_moves_image_and_map_together():
    boxes = tv_tensors.BoundingBoxes([[2, 3, 8, 12]], format="XYXY", canvas_size=CANVAS_SIZE)
    for seed in range(4):
        torch.manual_seed(seed)
        image, _, label_map = v2.RandomIoUCrop()(*ramp_images(), boxes, ramp_map())
        assert_follows(label_map, [image])


@pytest.mark.parametrize("transform", [v2.FiveCrop((9, 6)), v2.TenCrop(7)])
def test_several_crops_come_with_their_maps(transform):
    crops, label_maps = transform(*ramp_images(), ramp_map())
    for image, label_map in zip(crops, label_maps, strict=True):
        assert_follows(label_map, [image])


@pytest.mark.parametrize(
    "container",
    [
        lambda transforms: v2.Compose(transforms),
        lambda transforms: v2.RandomApply(transforms, p=0.7),
        lambda transforms: v2.RandomChoice(transforms),
        lambda transforms: v2.RandomOrder(transforms),
    ],
)
def test_containers_move_image_and_map_together(container):
    transform = container([v2.RandomResizedCrop((20, 24), (0.5, 1)), v2.RandomHorizontalFlip(), v2.Pad(2, fill=FILL)])
    for seed in range(4):
        torch.manual_seed(seed)
        image, label_map = transform(*ramp_images(), ramp_map())
        assert_follows(label_map, [image])


@pytest.mark.parametrize("transform", CANNOT_FOLLOW.values(), ids=CANNOT_FOLLOW)
def test_a_transform_that_cannot_be_followed_raises(transform):
    image = tv_tensors.Image(torch.zeros(3, *CANVAS_SIZE, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"LabelMap"):
        transform(image, ramp_map())


@pytest.mark.parametrize(("name", "transform"), KEEP_POSITIONS.items(), ids=KEEP_POSITIONS)
def test_a_transform_of_colours_leaves_the_map_the_same_object(name, transform):
    _skip_if_lacking(transform, name)
    image, label_map = tv_tensors.Image(torch.randint(256, (3, *CANVAS_SIZE), dtype=torch.uint8)), ramp_map()
    assert transform(image, label_map)[1] is label_map


@pytest.mark.parametrize("kind", KINDS)
def test_the_pooled_label_is_the_mean_of_what_the_image_shows(kind):
    """The map holds the ramp itself, so that its soft label tells the mean place of the pixels in view."""
    transform = v2.Compose([v2.RandomResizedCrop((60, 40), (0.2, 0.8)), v2.RandomHorizontalFlip(), rd.LabelPooling()])
    for seed in range(5):
        torch.manual_seed(seed)
        *images, soft = transform(*ramp_images(kind, (90, 70)), ramp_map((90, 70)))
        assert type(soft) is torch.Tensor
        mean_place = (soft[:2] / soft[2]).log()
        torch.testing.assert_close(mean_place, read(images).mean((1, 2)), rtol=0, atol=5e-3)
