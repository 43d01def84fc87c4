"""A classifier with how it sees images: a student, one of a checkpoint, or any of timm's.

Shapes: B images, C classes, h x w pixels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import timm
import timm.models
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from ..annotate.timm_models import create_model, imagenet_classes
from ..devices import find_device
from ..storage.folders import is_url, local_path
from ..storage.redaction import redact_path
from .checkpoints import load_checkpoint
from .recipe import Dtype, Recipe


class Normalize:
    """Bring uint8 images `[B, 3, h, w]` to a device, in the units that a model takes.

    Args:
        mean: of each channel of RGB in 0..1.
        std: of each channel.
        device: where to.
        channels_last: whether in the order of memory that convolutions prefer.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], device: torch.device, *, channels_last: bool = True
    ) -> None:
        self.device = device
        self._mean = torch.tensor(mean, dtype=torch.float32, device=device)[:, None, None] * 255
        self._std = torch.tensor(std, dtype=torch.float32, device=device)[:, None, None] * 255
        self._layout = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True)
        return ((images - self._mean) / self._std).contiguous(memory_format=self._layout)


@dataclass(frozen=True)
class Classifier:
    """A model that takes uint8 images `[B, 3, h, w]` when called, and gives float32 logits `[B, C]` on its device.

    Attributes:
        model: takes what `normalize` gives.
        num_classes: C.
        classes: names of the C classes, or None where they are not known.
        image_size: (height, width) in pixels that it sees.
        crop_pct: share of a side that is left of an image after cropping its middle.
        interpolation: of resizing, as timm names it.
        normalize: of its images.
        dtype: of the forward pass under autocast.
    """

    model: nn.Module
    num_classes: int
    classes: tuple[str, ...] | None
    image_size: tuple[int, int]
    crop_pct: float
    interpolation: str
    normalize: Normalize
    dtype: Dtype = "float32"

    def __call__(self, images: Tensor) -> Tensor:
        with autocast(self.normalize.device, self.dtype):
            logits: Tensor = self.model(self.normalize(images))
        return logits.float()


def autocast(device: torch.device, dtype: Dtype) -> torch.autocast:
    """Return the context of a forward pass."""
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")


def make_student(recipe: Recipe, num_classes: int) -> nn.Module:
    """Return the recipe's model with new weights, which its seed decides."""
    arguments = dict(recipe.model_kwargs)
    if recipe.drop_path is not None:
        arguments["drop_path_rate"] = recipe.drop_path
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model: nn.Module = timm.create_model(recipe.model, num_classes=num_classes, **arguments)
    return model


def load_classifier(
    model: str | os.PathLike[str],
    *,
    pretrained: bool = False,
    weights: str | os.PathLike[str] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    crop_pct: float | None = None,
    device: str | torch.device | None = None,
) -> Classifier:
    """Return a classifier that `evaluate` takes.

    Args:
        model: a checkpoint of `train_student`, whose moving average of weights is taken where it has one; or the name of a
            timm model.
        pretrained: load the weights that timm knows for the name.
        weights: file with the weights of a timm model.
        model_kwargs: of `timm.create_model`, for a name.
        image_size: pixels of a side that it sees. Default: the checkpoint's, or timm's for tests.
        crop_pct: share of a side that is left of an image. Default: likewise.
        device: where to compute. Default: a GPU where there is one.

    Raises:
        FileNotFoundError: there is no such checkpoint, or no such file of weights.
        ValueError: a checkpoint that is none, weights that do not fit, a model that timm has not, or arguments for a name
            beside a checkpoint.
    """
    place = find_device(device)
    path = local_path(model, "the model") if is_url(model) or redact_path(model) != os.fspath(model) else Path(model)
    if path.is_file() or path.suffix in (".tar", ".pth", ".pt"):
        if pretrained or weights is not None or model_kwargs:
            raise ValueError(f"{model} is a checkpoint, which has its weights and arguments: give none beside it")
        return _of_checkpoint(path, image_size, crop_pct, place)
    made, _ = create_model(
        os.fspath(model), pretrained, None if weights is None else Path(weights), None, dict(model_kwargs or {})
    )
    config = resolve_model_data_config(made, use_test_size=True)  # type: ignore[no-untyped-call]
    size = config["input_size"][1:] if image_size is None else (image_size, image_size)
    return Classifier(
        made.to(place, memory_format=torch.channels_last),
        made.num_classes,
        imagenet_classes(made),
        (size[0], size[1]),
        config["crop_pct"] if crop_pct is None else crop_pct,
        config["interpolation"],
        Normalize(config["mean"], config["std"], place),
    )


def _of_checkpoint(path: Path, image_size: int | None, crop_pct: float | None, device: torch.device) -> Classifier:
    state = load_checkpoint(path)
    kept = state["args"].recipe
    recipe = Recipe(**{each.name: kept[each.name] for each in fields(Recipe) if each.name in kept})
    classes = tuple(state["args"].classes)
    model = make_student(recipe, len(classes))
    model.load_state_dict(state.get("state_dict_ema") or state["state_dict"])
    config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    size = image_size or recipe.eval_size or recipe.image_size
    return Classifier(
        model.to(device, memory_format=torch.channels_last),  # type: ignore[call-overload]
        len(classes),
        classes,
        (size, size),
        recipe.crop_pct if crop_pct is None else crop_pct,
        config["interpolation"],
        Normalize(config["mean"], config["std"], device),
    )
