"""Every family of timm's classifiers: maps are right, not just of the right shape. Weights are random."""

from __future__ import annotations

import pytest
import timm
import torch

from relabel_datasets.annotate.catalogue import _quiet, _wake, cheap_models
from relabel_datasets.annotate.heads import DenseClassifier
from relabel_datasets.annotate.timm_models import create_model, make_dense
from tests.annotate.random_models import settle

# timm warns of its own code where it fits relative position biases to another size.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning"),
]

# One of each way to lay out features and to pool them: name, size, arguments, whether the head is linear.
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
    ("pit_ti_distilled_224", None, {}, False),  # its features are class tokens alone
    ("coat_tiny", (128, 160), {}, False),  # three scales
    ("crossvit_tiny_240", (240, 480), {}, False),  # two scales that do not divide each other
    ("efficientvim_m1", (256, 320), {}, True),  # states that are nowhere, and a map
]
# With random weights every location of these depends on all of the image, at the sizes tried here.
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
    _wake(model)
    settle(model.eval().requires_grad_(False), size)
    return make_dense(model, name, "linearised"), size


@torch.inference_mode()
def check(name: str, size: tuple[int, int] | None, args: dict[str, object], order: bool) -> DenseClassifier:
    dense, size = make(name, size, args)
    images = changed_in_the_corners(size)
    own = dense.model(images[:2])
    linearised = dense(images[:2])  # of a linear head, this is the local map
    spread = (linearised - linearised.mean((2, 3), keepdim=True)).abs().max()
    assert own.std() > 0
    assert spread > 0
    assert (linearised.mean((2, 3)) - own).abs().max() < 1e-4 * (spread + own.std())
    dense.mode = "local"
    local = dense(images)
    assert local.shape == (5, own.shape[1], *dense.grid)
    deviation = (local[:2].mean((2, 3)) - own).abs().max()
    assert bool(deviation < 1e-3 * (spread + own.std())) or not dense.linear_head
    if dense.streams[-1].layout in ("NLC", "NCL"):
        check_tokens(dense, images[:1])
    if order:
        check_order(local)
    return dense


@torch.inference_mode()
def check_tokens(dense: DenseClassifier, images: torch.Tensor) -> None:
    """Tokens must lie as in the map that the model itself makes of them, which may lack their norm."""
    features = dense._body(images)
    last = features if isinstance(features, torch.Tensor) else features[-1]
    (expected,) = dense.model.forward_intermediates(images, indices=1, output_fmt="NCHW", intermediates_only=True)
    found, expected = (
        torch.nn.functional.normalize(maps - maps.mean((2, 3), keepdim=True), dim=1).flatten(2)
        for maps in (dense.streams[-1].map(last), expected)
    )
    likeness = found.transpose(1, 2) @ expected  # [B, location, location]
    assert (likeness.argmax(2) == torch.arange(likeness.shape[2])).float().mean() > 0.95


def changed_in_the_corners(size: tuple[int, int]) -> torch.Tensor:
    """Return an image, and it again with each of its corners changed: upper left, upper right, lower left, lower right."""
    image = torch.randn(1, 3, *size)
    images = image.repeat(5, 1, 1, 1)
    height, width = (side * 3 // 8 for side in size)
    corners = [(rows, columns) for rows in (slice(0, height), slice(-height, None))
               for columns in (slice(0, width), slice(-width, None))]  # fmt: skip
    for changed, (rows, columns) in zip(images[1:], corners, strict=True):
        changed[:, rows, columns] = torch.randn(3, height, width) + 2
    return images


def check_order(maps: torch.Tensor) -> None:
    """Each change must count most in its own quarter of the map."""
    maps = maps - maps.mean((2, 3), keepdim=True)  # what is nowhere changes everywhere
    changes = (maps[1:] - maps[:1]).square().mean(1).sqrt()
    quarters = torch.nn.functional.adaptive_avg_pool2d(changes, 2).flatten(1)  # [change, quarter]
    for _ in range(30):  # apart from how much each change does anywhere, and how much any does to each quarter
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
