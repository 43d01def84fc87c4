"""Maps of all families of timm classifiers are correct. Weights are random."""

from __future__ import annotations

import pytest
import timm
import torch

from relabel_datasets.annotate.catalogue import _quiet, _randomize_zeros, cheap_models
from relabel_datasets.annotate.heads import DenseClassifier
from relabel_datasets.annotate.timm_models import create_model, make_dense
from tests.annotate.random_models import settle

# Warnings in the code of timm that resizes relative position biases.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning"),
]

# One model per layout and pooling: name, size, arguments, and whether the head is linear.
FEW = [
    ("test_resnet", (96, 128), {}, True),
    ("test_efficientnet", (96, 128), {}, True),
    ("test_convnext", (96, 128), {}, False),  # a norm after pooling
    ("mobilenetv3_small_050", (224, 256), {}, False),  # a layer with activation after pooling
    ("test_mambaout", (96, 128), {}, False),  # channels last
    ("test_vit", (96, 128), {}, False),  # a class token
    ("test_vit", (96, 128), {"global_pool": "avg", "class_token": False, "fc_norm": False}, True),
    ("deit_tiny_distilled_patch16_224", (96, 128), {"depth": 1}, False),  # two tokens, two heads
    ("vit_tiny_patch16_224", (96, 128), {"global_pool": "map", "reg_tokens": 4, "depth": 1}, False),  # attention
    ("levit_128s", (128, 192), {}, True),  # tokens without a prefix, two heads
    ("pit_ti_distilled_224", None, {}, False),  # features are class tokens only
    ("coat_tiny", (128, 160), {}, False),  # three scales
    ("crossvit_tiny_240", (240, 480), {}, False),  # two scales that do not divide each other
    ("efficientvim_m1", (256, 320), {}, True),  # states without positions, and a map
]
# With random weights, every location of these depends on the whole image at these sizes.
MIXED = {
    "efficientvim_m1", "efficientvit_b0", "efficientvit_m0", "haloregnetz_b", "levit_128s", "rexnet_100", "shvit_s1",
}  # fmt: skip


def make(name: str, size: tuple[int, int] | None, args: dict[str, object]) -> tuple[DenseClassifier, tuple[int, int]]:
    torch.manual_seed(0)
    with _quiet():
        try:
            model, size = create_model(name, False, None, size, args)
        except ValueError as error:
            if "has no classifier" not in str(error):
                raise
            model, size = create_model(name, False, None, size, {**args, "num_classes": 1000})
    _randomize_zeros(model)
    settle(model.eval().requires_grad_(False), size)
    return make_dense(model, name, "linearised"), size


@torch.inference_mode()
def check(name: str, size: tuple[int, int] | None, args: dict[str, object], order: bool) -> DenseClassifier:
    dense, size = make(name, size, args)
    images = changed_in_the_corners(size)
    expected = dense.model(images[:2])
    linearized = dense(images[:2])  # the local map if the head is linear
    spread = (linearized - linearized.mean((2, 3), keepdim=True)).abs().max()
    assert expected.std() > 0
    assert spread > 0
    assert (linearized.mean((2, 3)) - expected).abs().max() < 1e-4 * (spread + expected.std())
    dense.mode = "local"
    local = dense(images)
    assert local.shape == (5, expected.shape[1], *dense.grid)
    deviation = (local[:2].mean((2, 3)) - expected).abs().max()
    assert bool(deviation < 1e-3 * (spread + expected.std())) or not dense.linear_head
    if dense.streams[-1].layout in ("NLC", "NCL"):
        check_tokens(dense, images[:1])
    if order:
        check_order(local)
    return dense


@torch.inference_mode()
def check_tokens(dense: DenseClassifier, images: torch.Tensor) -> None:
    """Check that tokens have the positions of the model's own map, which may lack the final norm."""
    features = dense._body(images)
    last = features if isinstance(features, torch.Tensor) else features[-1]
    (expected,) = dense.model.forward_intermediates(images, indices=1, output_fmt="NCHW", intermediates_only=True)
    actual, expected = (
        torch.nn.functional.normalize(maps - maps.mean((2, 3), keepdim=True), dim=1).flatten(2)
        for maps in (dense.streams[-1].map(last), expected)
    )
    similarity = actual.transpose(1, 2) @ expected  # [B, location, location]
    assert (similarity.argmax(2) == torch.arange(similarity.shape[2])).float().mean() > 0.95


def changed_in_the_corners(size: tuple[int, int]) -> torch.Tensor:
    """Return an image and four copies with one corner changed: upper left, upper right, lower left, lower right."""
    image = torch.randn(1, 3, *size)
    images = image.repeat(5, 1, 1, 1)
    height, width = (side * 3 // 8 for side in size)
    corners = [(rows, columns) for rows in (slice(0, height), slice(-height, None))
               for columns in (slice(0, width), slice(-width, None))]  # fmt: skip
    for changed, (rows, columns) in zip(images[1:], corners, strict=True):
        changed[:, rows, columns] = torch.randn(3, height, width) + 2
    return images


def check_order(maps: torch.Tensor) -> None:
    """Check that each change has most effect in its own quarter of the map."""
    maps = maps - maps.mean((2, 3), keepdim=True)  # features without positions change all locations
    changes = (maps[1:] - maps[:1]).square().mean(1).sqrt()
    quarters = torch.nn.functional.adaptive_avg_pool2d(changes, 2).flatten(1)  # [change, quarter]
    for _ in range(30):  # normalize the total effect of each change and the total change of each quarter
        quarters = quarters / quarters.sum(0)
        quarters = quarters / quarters.sum(1, keepdim=True)
    assert quarters.argmax(1).tolist() == [0, 1, 2, 3], quarters


@pytest.mark.parametrize(
    ("name", "size", "args", "linear"), FEW, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_few_families(name, size, args, linear):
    dense = check(name, size, args, name != "levit_128s")
    assert dense.linear_head == linear
    assert dense.grid[0] > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", cheap_models())
def test_every_module_of_timm(name):
    config = timm.get_pretrained_cfg(name)
    large = not config.fixed_input_size and max(config.input_size) > 256
    check(name, (224, 224) if large else None, {}, name not in MIXED)
