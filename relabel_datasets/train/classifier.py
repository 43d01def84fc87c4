"""Classifiers with their preprocessing: students, checkpoints, and timm models.

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
from ..keywords import checked_keywords
from ..labels.precision import autocast
from ..storage.folders import is_url, local_path
from ..storage.redaction import redact_path
from .checkpoints import load_checkpoint
from .recipe import Dtype, Recipe


class Normalize:
    """Move uint8 images `[B, 3, h, w]` to a device and normalize them.

    Args:
        mean: Mean of each RGB channel, 0 to 1.
        std: Standard deviation of each RGB channel, 0 to 1.
        device: Device to move images to.
        channels_last: Whether the result has the channels-last memory format. Default: True.
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
    """Model with preprocessing. Calling it maps uint8 images `[B, 3, h, w]` to float32 logits `[B, C]` on its device.

    Attributes:
        model: Model that accepts the output of `normalize`.
        num_classes: Number of classes C.
        classes: Names of the C classes, or None if they are unknown.
        image_size: (height, width) of the input in pixels.
        crop_pct: Share of each side that the center crop of an image keeps, 0 to 1.
        interpolation: Name of the interpolation of the resize, as in timm.
        normalize: Normalization of the images.
        dtype: Precision of the forward pass under autocast.
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
        with autocast(self.normalize.device, getattr(torch, self.dtype)):
            logits: Tensor = self.model(self.normalize(images))
        return logits.float()


def make_student(recipe: Recipe, num_classes: int) -> nn.Module:
    """Create the model of a recipe with random weights that depend on the seed of the recipe only."""
    arguments = dict(recipe.model_kwargs)
    if recipe.drop_path is not None:
        arguments["drop_path_rate"] = recipe.drop_path
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model: nn.Module = timm.create_model(recipe.model, num_classes=num_classes, **arguments)
    return model


@checked_keywords()
def load_classifier(
    model: str | os.PathLike[str],
    *,
    pretrained: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    crop_pct: float | None = None,
    device: str | torch.device | None = None,
) -> Classifier:
    """Load a classifier for `evaluate`.

    Args:
        model: Checkpoint of `train_student`, or name of a timm model. Of a checkpoint, the moving average of the weights is
            loaded if there is one.
        pretrained: Whether to load the pretrained weights of a timm model. Default: False.
        checkpoint: File with the weights of a timm model. Default: none.
        model_kwargs: Keyword arguments of `timm.create_model` for a timm model. Default: none.
        image_size: Side of the input in pixels. Default: that of the checkpoint, or timm's test size.
        crop_pct: Share of each side that the center crop of an image keeps, 0 to 1. Default: that of the checkpoint, or timm's.
        device: Device to compute on. Default: the current CUDA device, or the CPU if there is none.

    Returns:
        The classifier on its device.

    Raises:
        FileNotFoundError: The file of the model or of the weights does not exist.
        ValueError: The file is not a checkpoint, the weights do not fit, timm has no such model, or arguments of a timm model
            are given for a checkpoint of `train_student`.

    Example:
        >>> classifier = load_classifier("runs/student/model_best.pth.tar")
        >>> classifier(images).shape  # uint8 images [B, 3, h, w]
        torch.Size([64, 10])
    """
    target_device = find_device(device)
    path = local_path(model, "the model") if is_url(model) or redact_path(model) != os.fspath(model) else Path(model)
    if path.is_file() or path.suffix in (".tar", ".pth", ".pt"):
        if pretrained or checkpoint is not None or model_kwargs:
            raise ValueError(
                f"{model} is a checkpoint of a training run, which contains its weights and arguments: leave out "
                "pretrained=, checkpoint= and model_kwargs="
            )
        return _from_checkpoint(path, image_size, crop_pct, target_device)
    timm_model, _ = create_model(
        os.fspath(model), pretrained, None if checkpoint is None else Path(checkpoint), None, dict(model_kwargs or {})
    )
    config = resolve_model_data_config(timm_model, use_test_size=True)  # type: ignore[no-untyped-call]
    size = config["input_size"][1:] if image_size is None else (image_size, image_size)
    return Classifier(
        timm_model.to(target_device, memory_format=torch.channels_last),
        timm_model.num_classes,
        imagenet_classes(timm_model),
        (size[0], size[1]),
        config["crop_pct"] if crop_pct is None else crop_pct,
        config["interpolation"],
        Normalize(config["mean"], config["std"], target_device),
    )


def _from_checkpoint(path: Path, image_size: int | None, crop_pct: float | None, device: torch.device) -> Classifier:
    state = load_checkpoint(path)
    saved = state["args"].recipe
    recipe = Recipe(**{field.name: saved[field.name] for field in fields(Recipe) if field.name in saved})
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
