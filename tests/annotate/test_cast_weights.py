"""Annotators in low precision: weights are cast once, and the logits are those of autocast."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from relabel_datasets.annotate.annotator import ModuleAnnotator
from tests.annotate.small_models import ONE_BY_DEFAULT, make, random_pixels


class Casts(TorchDispatchMode):
    """Counter of the casts to a dtype, by whether they are of weights."""

    def __init__(self, module, dtype):
        super().__init__()
        self._weights, self._dtype = {id(tensor) for tensor in module.parameters()}, dtype
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # In inference mode, `to` is not yet split into its parts here.
        is_cast = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.to)
        if is_cast and self._dtype in (*args[1:], *kwargs.values()) and args[0].dtype != self._dtype:
            self.count["weights" if id(args[0]) in self._weights else "others"] += 1
        return func(*args, **kwargs)


def with_autocast(annotator, pixels, dtype):
    """Return the logits of maps and images of a float32 annotator under autocast."""
    normalized = (pixels.float() - annotator._mean) / annotator._std
    normalized = normalized.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), torch.autocast("cpu", dtype):
        return annotator._module(normalized).float(), annotator._module.classify(normalized).float()


@pytest.mark.filterwarnings("ignore:.*random weights")
@pytest.mark.parametrize("name", ONE_BY_DEFAULT)
def test_logits_are_those_of_autocast_and_no_weight_is_cast_again(name):
    exact, low = make(name, "float32"), make(name, "bfloat16")
    pixels = random_pixels()
    with Casts(exact._module, torch.bfloat16) as casts_of_autocast:
        expected = with_autocast(exact, pixels, torch.bfloat16)
    with Casts(low._module, torch.bfloat16) as casts:
        logits = low(pixels), low.classify(pixels)
    assert casts_of_autocast.count["weights"] > 0
    assert casts.count["weights"] == 0
    for got, want in zip(logits, expected, strict=True):
        assert torch.equal(got, want)
    weights = dict(low._module.named_parameters())
    assert any(weight.dtype == torch.bfloat16 for weight in weights.values())
    assert all(weight.dtype == torch.float32 for key, weight in weights.items() if "norm" in key or "bn" in key)
    assert low.describe() == {**exact.describe(), "dtype": "bfloat16"}


def test_autocast_casts_weights_at_every_call_unless_they_require_gradients():
    module, pixels = nn.Conv2d(3, 4, 2), torch.zeros(1, 3, 4, 4)
    counts = []
    for requires_grad in (True, False):
        module.requires_grad_(requires_grad)
        with Casts(module, torch.bfloat16) as casts, torch.autocast("cpu", torch.bfloat16):
            for _ in range(3):
                module(pixels)
        counts.append(casts.count["weights"])
    assert counts == [2, 6]  # the weight and the bias


@pytest.mark.filterwarnings("ignore:.*random weights")
@pytest.mark.parametrize("head", ["local", "linearised"])
def test_a_head_that_is_linearised_in_float32_keeps_its_weights(head):
    low, exact = (make("test_vit", dtype, head=head) for dtype in ("bfloat16", "float32"))
    assert low._module.model.head.weight.dtype == (torch.float32 if head == "linearised" else torch.bfloat16)
    pixels = random_pixels()
    assert torch.equal(low(pixels), with_autocast(exact, pixels, torch.bfloat16)[0])


class Shared(nn.Module):
    """Network that uses one weight in a convolution and in float32."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 5, 8, stride=8)

    def forward(self, images):
        return self.second(self.first(images)) + self.first.weight.sum()


def test_weights_that_are_also_used_in_float32_are_not_cast_and_the_module_is_not_changed():
    module = Shared()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    annotator = ModuleAnnotator(module, 16, dtype="bfloat16", device="cpu")
    dtypes = {name: tensor.dtype for name, tensor in annotator._module.named_parameters()}
    assert dtypes == {
        "first.weight": torch.float32,
        "first.bias": torch.bfloat16,
        "second.weight": torch.bfloat16,
        "second.bias": torch.bfloat16,
    }
    assert annotator._module.first.weight is module.first.weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    pixels = random_pixels(size=16)
    exact = ModuleAnnotator(module, 16, device="cpu")
    normalized = ((pixels.float() - exact._mean) / exact._std).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(annotator(pixels), module(normalized).float())


class Hooked(nn.Module):
    """Network whose hook belongs to the original, so that a copy would return its features of earlier images."""

    def __init__(self):
        super().__init__()
        self.conv, self.found = nn.Conv2d(3, 5, 8, stride=8), {}
        self.conv.register_forward_hook(lambda _module, _args, output: self.found.update(map=output))

    def forward(self, images):
        self.conv(images)
        return self.found["map"]


class Uncopyable(Hooked):
    def __deepcopy__(self, memo):
        raise TypeError("cannot be copied")


@pytest.mark.parametrize("module_type", [Hooked, Uncopyable])
def test_a_network_that_cannot_be_copied_is_cast_by_autocast(module_type, caplog):
    module = module_type()
    with caplog.at_level("INFO"):
        annotator = ModuleAnnotator(module, 16, dtype="bfloat16", device="cpu")
    assert annotator._module is module
    assert f"{module_type.__name__} cannot be copied" in caplog.text
    pixels = random_pixels(size=16)
    assert not torch.equal(annotator(pixels), annotator(255 - pixels))
