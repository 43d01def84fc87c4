"""Check the transforms of a dataset: a label map cannot follow torchvision's first API, nor crops after LabelPooling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torchvision.transforms import v2

from .transforms import LabelPooling

_CROPS = (v2.RandomResizedCrop, v2.RandomCrop, v2.CenterCrop, v2.FiveCrop, v2.TenCrop)
_V1_MODULES = ("torchvision.transforms.transforms", "torchvision.transforms.autoaugment")
_TO_TENSOR = "v2.ToImage(), v2.ToDtype(torch.float32, scale=True)"
_V2_NAMES = {"ToTensor": _TO_TENSOR, "MaybeToTensor": _TO_TENSOR, "ConvertImageDtype": "v2.ToDtype(..., scale=True)"}


def check_transforms(transforms: Callable[..., Any] | None) -> None:
    """Raise TypeError unless `transforms` may be called with an image and its label map.

    Args:
        transforms: The `transforms` argument of a dataset. None passes.

    Raises:
        ValueError: It is a `v2.Compose` with a crop after LabelPooling.
        TypeError: It is not callable, or it is or contains a transform of `torchvision.transforms` (v1), which takes an image
            alone. The message names the counterparts in v2.
    """
    if transforms is None:
        return
    if not callable(transforms):
        raise TypeError(
            f"transforms= must be called with an image and its label map, got {type(transforms).__name__}: give a v2.Compose"
        )
    _check_order(transforms)
    v1 = [transform for transform in _flat(transforms) if _is_v1(transform)]
    if not v1:
        return
    steps = [transform for transform in v1 if not hasattr(transform, "transforms")]
    if any(type(transform).__module__.startswith("timm.") for transform in _flat(transforms)):
        advice = "give relabel_datasets.timm_transforms(...), which has the arguments of timm's create_transform"
    else:
        replaced = ", ".join(dict.fromkeys(f"{type(step).__name__} -> {_v2_name(step)}" for step in steps))
        advice = "import v2 from torchvision.transforms and use v2.Compose([...])" + (
            f" with {replaced}" if replaced else ""
        )
    named = ", ".join(dict.fromkeys(type(transform).__name__ for transform in v1))
    raise TypeError(
        f"transforms= has transforms of torchvision.transforms (v1), which take an image alone, so the label map cannot follow "
        f"them: {named}. Instead, {advice}"
    )


def _check_order(transforms: Callable[..., Any]) -> None:
    """Raise ValueError if a `v2.Compose` crops the image after LabelPooling, whose label would be that of the uncropped image."""
    steps: list[Any] = list(getattr(transforms, "transforms", ())) if isinstance(transforms, v2.Compose) else []
    is_pooling = [isinstance(step, LabelPooling) and step.localized for step in steps]
    if True not in is_pooling:
        return
    crop = next((step for step in steps[is_pooling.index(True) :] if isinstance(step, _CROPS)), None)
    if crop is not None:
        name = type(crop).__name__
        raise ValueError(
            f"transforms= has {name} after LabelPooling, so the soft label would not be that of the crop: place LabelPooling after {name}"
        )


def _flat(transform: Any) -> Iterator[Any]:
    """Yield a transform and, if it is a container of torchvision or torch, those in it."""
    yield transform
    is_container = _is_v1(transform) or isinstance(transform, (v2.Transform, nn.Sequential, nn.ModuleList))
    if is_container:
        inner = list(getattr(transform, "transforms", ())) or list(getattr(transform, "children", list)())
        for child in inner:
            yield from _flat(child)


def _is_v1(transform: Any) -> bool:
    """Return whether calling the transform runs code of v1. A subclass may override the call to accept a pair."""
    method = getattr(type(transform), "forward" if isinstance(transform, nn.Module) else "__call__", None)
    return getattr(method, "__module__", "") in _V1_MODULES


def _v2_name(transform: Any) -> str:
    name = type(transform).__name__
    if name in _V2_NAMES:
        return _V2_NAMES[name]
    return f"v2.{name}" if hasattr(v2, name) else "a transform of v2"
