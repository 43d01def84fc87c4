"""What a student is told about a batch, and what it loses: mixing, distillation and the loss.

Shapes: B images, C classes, s x s pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from ..annotate.annotator import Annotator
from ..annotate.classes import match_classes
from .recipe import Recipe


class Objective:
    """The loss of a student on a batch of crops.

    Args:
        recipe: says what the student is told.
        classes: names of the C classes.
        mean: of each channel of RGB in 0..1, by which images are normalised.
        std: of each channel.
        device: to compute on.
        annotator: answers to each crop, where the recipe distils.

    Attributes:
        mixing: whether images are mixed, if the recipe says so at all.

    Raises:
        ValueError: the recipe distils and there is no annotator, or its classes are others.
    """

    def __init__(
        self,
        recipe: Recipe,
        classes: Sequence[str],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        annotator: Annotator | None = None,
    ) -> None:
        self.recipe = recipe
        self.num_classes = len(classes)
        self.mixing = True
        self._device = device
        self._mean = torch.tensor(mean, device=device)[:, None, None] * 255
        self._std = torch.tensor(std, device=device)[:, None, None] * 255
        self._mixup = Mixup(
            recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=self.num_classes, multi_label=True
        )  # type: ignore[no-untyped-call]
        self._erase = RandomErasing(recipe.random_erasing, mode="pixel", device=device.type)  # type: ignore[no-untyped-call]
        self._cross_entropy = SoftTargetCrossEntropy()  # type: ignore[no-untyped-call]
        self._teacher = Teacher(annotator, classes) if recipe.told.distilled else None

    def normalize(self, images: Tensor) -> Tensor:
        """Return uint8 images `[B, 3, s, s]` as the student takes them, on its device."""
        images = images.to(self._device, non_blocking=True)
        return ((images - self._mean) / self._std).contiguous(memory_format=torch.channels_last)

    def loss(self, student: nn.Module, images: Tensor, targets: Any) -> Tensor:
        """Return the mean loss of a batch as the loader gives it."""
        if self._teacher is not None:
            targets = self._teacher(images.to(self._device, non_blocking=True))
        inputs = self.normalize(images)
        soft = self._soft(targets.to(self._device, non_blocking=True))
        if self.mixing and (self.recipe.mixup or self.recipe.cutmix):
            inputs, soft = self._mixup(inputs, soft)
        if self.recipe.random_erasing:
            inputs = self._erase(inputs)
        with self.autocast():
            logits = student(inputs)
        loss: Tensor = self._cross_entropy(logits.float(), soft)
        return loss

    def autocast(self) -> torch.autocast:
        """Return the context of the forward pass."""
        dtype = getattr(torch, self.recipe.dtype)
        return torch.autocast(self._device.type, dtype, enabled=dtype != torch.float32)

    def _soft(self, targets: Tensor) -> Tensor:
        """Return soft labels `[B, C]` of class indices, smoothed; soft ones as they are."""
        if targets.is_floating_point():
            return targets
        smoothing = self.recipe.told.smoothing
        soft = torch.full((len(targets), self.num_classes), smoothing / self.num_classes, device=targets.device)
        return soft.scatter_(1, targets[:, None], 1 - smoothing + smoothing / self.num_classes)


class Teacher:
    """An annotator that answers to each crop as training goes: online knowledge distillation, what ReLabel saves.

    Args:
        annotator: its mean logits over a crop, squashed to its input size, are its answer.
        classes: names of the dataset's classes.

    Raises:
        ValueError: there is none, or it does not know the classes.
    """

    def __init__(self, annotator: Annotator | None, classes: Sequence[str]) -> None:
        if annotator is None:
            raise ValueError("labels are distilled from an annotator, and none was given: name one, with its weights")
        self._annotator = annotator
        self._rows: list[int] | None = None
        if annotator.classes is None or tuple(annotator.classes) != tuple(classes):
            self._rows = match_classes(annotator.classes, classes, None, annotator.num_classes)
        size = getattr(annotator, "input_size", None)
        if size is None:
            raise ValueError("an annotator that is to teach crops must have one input_size (height, width)")
        self._size = list(size)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Return soft labels `[B, C]` of uint8 crops `[B, 3, s, s]`."""
        resized = F.resize(images, self._size, interpolation=F.InterpolationMode.BICUBIC, antialias=True)
        logits = self._annotator(resized).mean((2, 3))
        soft = (logits if self._rows is None else logits[:, self._rows]).softmax(1)
        return soft.clone()  # out of inference mode, for autograd
