"""Annotators of torch modules, and of selected classes of another annotator."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

from relabel_datasets.annotate.annotator import ModuleAnnotator, check_size, hash_weights
from relabel_datasets.annotate.class_subset import ClassSubset
from tests.conftest import picture

SIZE = (24, 40)


class Patches(nn.Module):
    """Linear classifier of patches of 8 x 8 pixels."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, num_classes, kernel_size=8, stride=8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images)


class FixedOutput(nn.Module):
    """Network with the same output for all images."""

    def __init__(self, output) -> None:
        super().__init__()
        self.output = output

    def forward(self, images: torch.Tensor):
        return self.output


def random_images(batch: int = 3, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)


def test_logits_are_those_of_the_module_for_normalized_images():
    module, mean, std = Patches(), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    annotator = ModuleAnnotator(module, SIZE, mean=mean, std=std, device="cpu")
    images = random_images()
    expected = np.zeros((3, 5, 3, 5))
    weight, bias = module.conv.weight.double().numpy(), module.conv.bias.double().numpy()
    for b, c, y, x in np.ndindex(*expected.shape):
        patch = images[b, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].numpy() / 255
        normalized = (patch - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
        expected[b, c, y, x] = (weight[c] * normalized).sum() + bias[c]
    logits = annotator(images)
    assert logits.dtype == torch.float32
    assert logits.is_inference()
    np.testing.assert_allclose(logits.numpy(), expected, atol=1e-5)
    assert (annotator.num_classes, annotator.map_size, annotator.input_size) == (5, (3, 5), SIZE)


def test_memory_format_does_not_change_logits():
    module, images = Patches(), random_images()
    logits = [ModuleAnnotator(module, SIZE, channels_last=last, device="cpu")(images) for last in (True, False)]
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.005)])
def test_low_precision_returns_close_float32_logits(dtype, tolerance):
    module, images = Patches(), random_images()
    exact = ModuleAnnotator(module, SIZE, device="cpu")(images)
    logits = ModuleAnnotator(module, SIZE, dtype=dtype, device="cpu")(images)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, exact, atol=tolerance, rtol=tolerance)
    assert not torch.equal(logits, exact)
    assert module.conv.weight.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu():
    images, module = random_images(), Patches()
    expected = ModuleAnnotator(copy.deepcopy(module), SIZE, device="cpu")(images)
    logits = ModuleAnnotator(module, SIZE)(images)
    assert logits.is_cuda
    torch.testing.assert_close(logits.cpu(), expected, atol=1e-2, rtol=1e-2)


def test_the_module_is_in_evaluation_mode_without_gradients():
    module = nn.Sequential(nn.Dropout(0.5), Patches())
    images = random_images()
    annotator = ModuleAnnotator(module.train(), SIZE, device="cpu")
    assert torch.equal(annotator(images), annotator(images))
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos", "nearest"])
def test_preprocess_squashes_the_whole_image(interpolation):
    annotator = ModuleAnnotator(Patches(), SIZE, interpolation=interpolation, device="cpu")
    image = picture(1, (50, 31))
    expected = image.resize((40, 24), getattr(PIL.Image.Resampling, interpolation.upper()))
    pixels = annotator.preprocess(image)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, 24, 40)
    assert pixels.permute(1, 2, 0).is_contiguous()  # as convolutions prefer, and as Pillow returns them
    for y, x in ((0, 0), (23, 39), (5, 30)):
        assert tuple(pixels[:, y, x].tolist()) == expected.getpixel((x, y))


def test_preprocess_is_thread_safe():
    annotator = ModuleAnnotator(Patches(), SIZE, device="cpu")
    images = [picture(i, (40 + i, 61 - i)) for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(annotator.preprocess, images))
    assert all(torch.equal(a, annotator.preprocess(b)) for a, b in zip(together, images, strict=True))


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK"])
def test_preprocess_refuses_other_modes(mode):
    with pytest.raises(ValueError, match=f"RGB, got mode '{mode}'"):
        ModuleAnnotator(Patches(), SIZE, device="cpu").preprocess(PIL.Image.new(mode, (9, 9)))


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (torch.zeros(1, 3, *SIZE), r"torch.float32 \[1, 3, 24, 40\]"),
        (torch.zeros(3, *SIZE, dtype=torch.uint8), r"torch.uint8 \[3, 24, 40\]"),
        (torch.zeros(1, 3, 40, 24, dtype=torch.uint8), r"torch.uint8 \[1, 3, 40, 24\]"),
    ],
)
def test_only_images_of_the_input_size_are_accepted(images, got):
    with pytest.raises(ValueError, match=rf"must be uint8 \[B, 3, 24, 40\], .*got {got}"):
        ModuleAnnotator(Patches(), SIZE, device="cpu")(images)


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (torch.zeros(1, 5), r"torch.float32 \[1, 5\]"),
        (torch.zeros(2, 5, 1, 1), r"torch.float32 \[2, 5, 1, 1\]"),
        (torch.zeros(1, 5, 0, 1), r"torch.float32 \[1, 5, 0, 1\]"),
        ((torch.zeros(1, 5, 1, 1),), "tuple"),
    ],
)
def test_modules_without_a_map_are_refused(output, got):
    with pytest.raises(ValueError, match=rf"FixedOutput must return logits \[B, C, H, W\].*got {got}$"):
        ModuleAnnotator(FixedOutput(output), SIZE, device="cpu")


def test_failing_modules_are_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"Patches fails for images of \[4, 4\] pixels: .*[Kk]ernel size"):
        ModuleAnnotator(Patches(), 4, device="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interpolation": "cubic"}, "interpolation must be one of .*'bicubic'.* got 'cubic'"),
        ({"dtype": "int8"}, r"dtype must be one of \['bfloat16', 'float16', 'float32'\], got 'int8'"),
        ({"mean": (0.5,)}, "mean and std must have three numbers"),
        ({"std": (1, 1, 0)}, "std must be positive"),
        ({"classes": ("a", "b")}, "returns logits of 5 classes, but classes has 2 names"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ModuleAnnotator(Patches(), SIZE, device="cpu", **arguments)


@pytest.mark.parametrize("size", [0, -1, (24,), (24, 40, 3), (24, 0), (24.0, 40)])
def test_sizes_must_be_positive_integers(size):
    with pytest.raises(ValueError, match="input_size must be a positive int or two"):
        check_size(size)


def test_an_int_is_a_square_size():
    assert check_size(7) == (7, 7)
    assert check_size([7, 9]) == (7, 9)


def test_describe_is_json_and_equal_for_equal_annotators():
    module = Patches()
    first = ModuleAnnotator(module, SIZE, mean=[0, 0, 0], device="cpu").describe()
    again = ModuleAnnotator(module, list(SIZE), mean=(0.0, 0.0, 0.0), channels_last=False, device="cpu").describe()
    assert json.loads(json.dumps(first)) == first == again
    assert first["name"] == "Patches"
    assert first["num_classes"] == 5


@pytest.mark.parametrize(
    "other",
    [
        {"input_size": (32, 40)},
        {"mean": (0.5, 0.5, 0.5)},
        {"std": (0.5, 0.5, 0.5)},
        {"interpolation": "bilinear"},
        {"dtype": "bfloat16"},
        {"name": "another"},
        {"module": Patches()},
    ],
)
def test_describe_differs_if_maps_may_differ(other):
    base = {"module": Patches(), "input_size": SIZE, "device": "cpu"}
    assert ModuleAnnotator(**base).describe() != ModuleAnnotator(**{**base, **other}).describe()


def test_weights_are_hashed_by_name_dtype_shape_and_value():
    class Weights(nn.Module):
        def __init__(self, name="w", values=(1.0, 2.0, 3.0, 4.0), shape=(2, 2), dtype=torch.float32) -> None:
            super().__init__()
            self.register_buffer(name, torch.tensor(values, dtype=dtype).reshape(shape))
            self.register_buffer("count", torch.tensor(3))

    different = [
        Weights(),
        Weights("v"),
        Weights(values=(1.0, 2.0, 3.0, 5.0)),
        Weights(shape=(1, 4)),
        Weights(dtype=torch.bfloat16),
    ]
    hashes = [hash_weights(module) for module in different]
    assert len(set(hashes)) == len(different)
    assert hash_weights(Weights()) == hashes[0]
    transposed = Weights(values=(1.0, 3.0, 2.0, 4.0))
    transposed.w = transposed.w.T
    assert hash_weights(transposed) == hashes[0]  # independent of the memory format


@pytest.fixture
def five_classes() -> ModuleAnnotator:
    return ModuleAnnotator(Patches(), SIZE, classes=tuple("abcde"), device="cpu")


def test_class_subset_reorders_logits(five_classes):
    subset = ClassSubset(five_classes, [3, 0, 4], ("x", "y", "z"))
    images = random_images()
    logits = subset(images)
    assert logits.shape == (3, 3, 3, 5)
    for c, row in enumerate((3, 0, 4)):
        assert torch.equal(logits[:, c], five_classes(images)[:, row])
    assert (subset.classes, subset.num_classes) == (("x", "y", "z"), 3)
    image = picture(0)
    assert torch.equal(subset.preprocess(image), five_classes.preprocess(image))


def test_class_subset_describes_rows_but_not_names(five_classes):
    described = ClassSubset(five_classes, [3, 0], ("x", "y")).describe()
    assert json.loads(json.dumps(described)) == described
    assert described.items() >= {**five_classes.describe(), "num_classes": 2}.items()
    assert described == ClassSubset(five_classes, (3, 0), ("p", "q")).describe()
    assert described != ClassSubset(five_classes, [0, 3], ("x", "y")).describe()


def test_nested_class_subsets_have_different_descriptions(five_classes):
    first, second = (ClassSubset(five_classes, rows, ("x", "y")) for rows in ([3, 0], [0, 3]))
    outer = [ClassSubset(inner, [1], ("z",)) for inner in (first, second)]
    assert outer[0].describe() != outer[1].describe()
    images = random_images()
    assert torch.equal(outer[0](images)[:, 0], five_classes(images)[:, 0])


@pytest.mark.parametrize(
    ("rows", "message"),
    [([0, 5], r"0 \.\. 4, got \[5\]"), ([-1, 0], r"got \[-1\]"), ([0], "got 1 rows and 2 classes")],
)
def test_class_subset_refuses_invalid_rows(five_classes, rows, message):
    with pytest.raises(ValueError, match=message):
        ClassSubset(five_classes, rows, ("x", "y"))
