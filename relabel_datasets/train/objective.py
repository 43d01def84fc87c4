"""Loss of a student on a batch: mixing, distillation and cross-entropy.

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
from ..annotate.combine import Ensemble, FlipAveraged, models_of
from ..labels.blending import blend_labels
from ..labels.precision import autocast
from .classifier import Normalize
from .recipe import Recipe
from .tokens import MixToken, token_label_loss


class Objective:
    """Loss of a student on a batch of crops.

    Args:
        recipe: Recipe with the kind of labels, mixing, erasing and precision.
        classes: Names of the C classes.
        normalize: Normalization of images. The loss is computed on its device.
        annotator: Annotator of distilled labels. Default: none.

    Attributes:
        mixing: Whether mixup and CutMix of the recipe are active. Default: True.
        crop_size: (height, width) of the crops that the loader must return. It is larger than the image size of the recipe if
            distilled labels come from an annotator with a larger input, which must not see an enlarged crop.

    Raises:
        ValueError: The labels of the recipe are distilled, but there is no annotator or it lacks classes.
    """

    def __init__(
        self,
        recipe: Recipe,
        classes: Sequence[str],
        normalize: Normalize,
        *,
        annotator: Annotator | None = None,
    ) -> None:
        self.recipe = recipe
        self.num_classes = len(classes)
        self.mixing = True
        self._normalize, self._device = normalize, normalize.device
        self._mixup = Mixup(
            recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=self.num_classes, multi_label=True
        )  # type: ignore[no-untyped-call]
        self._erase = RandomErasing(recipe.random_erasing, mode="pixel", device=self._device.type)  # type: ignore[no-untyped-call]
        self._cross_entropy = SoftTargetCrossEntropy()  # type: ignore[no-untyped-call]
        config = recipe.label_config
        self._teacher = Teacher(annotator, classes, config.temperature) if config.distilled else None
        self._student_size = recipe.image_size, recipe.image_size
        self.crop_size = self._student_size
        if self._teacher is not None and min(self._teacher.input_size) > recipe.image_size:
            self.crop_size = self._teacher.input_size

    def loss(self, student: nn.Module, images: Tensor, targets: Any) -> Tensor:
        """Return the mean loss of a batch.

        Args:
            student: Model that maps normalized images to logits `[B, C]`, or a `TokenStudent`.
            images: Crops from the loader, uint8 `[B, 3, s, s]`. If they are larger than those of the student, see `crop_size`, it
                is trained on reduced ones.
            targets: Targets from the loader, see `train_loader`.
        """
        if self._teacher is not None:
            images = images.to(self._device, non_blocking=True)
            class_labels, targets = targets, self._teacher(images)
            images = _resize(images, self._student_size)
            if weight := self.recipe.label_config.label_weight:
                targets = blend_labels(targets, class_labels, weight)
        inputs = self._normalize(images)
        if self.recipe.label_config.tokens:
            return self._token_loss(student, inputs, targets)
        soft = self._soft(targets.to(self._device, non_blocking=True))
        if self.mixing and (self.recipe.mixup or self.recipe.cutmix):
            inputs, soft = self._mixup(inputs, soft)
        if self.recipe.random_erasing:
            inputs = self._erase(inputs)
        with autocast(self._device, getattr(torch, self.recipe.dtype)):
            logits = student(inputs)
        loss: Tensor = self._cross_entropy(logits.float(), soft)
        return loss

    def _token_loss(self, student: nn.Module, inputs: Tensor, targets: Sequence[Tensor]) -> Tensor:
        soft, tokens = (target.to(self._device, non_blocking=True) for target in targets)
        if self.mixing and self.recipe.cutmix:
            inputs, (soft, tokens) = MixToken(self.recipe.cutmix)(inputs, (soft, tokens))
        if self.recipe.random_erasing:
            inputs = self._erase(inputs)
        with autocast(self._device, getattr(torch, self.recipe.dtype)):
            class_logits, token_logits = student(inputs)
        return token_label_loss(class_logits.float(), token_logits.float(), soft, tokens)

    def _soft(self, targets: Tensor) -> Tensor:
        """Convert class indices `[B]` to smoothed soft labels `[B, C]`. Soft labels are returned unchanged."""
        if targets.is_floating_point():
            return targets
        smoothing = self.recipe.label_config.smoothing
        shape = len(targets), self.num_classes
        soft = torch.full(shape, smoothing / self.num_classes, dtype=torch.float32, device=targets.device)
        return soft.scatter_(1, targets[:, None], 1 - smoothing + smoothing / self.num_classes)


class Teacher:
    """Annotator that labels each crop during training: online distillation, whose cost ReLabel avoids.

    Args:
        annotator: Annotator whose mean logits over a crop, resized to its input size, are the label.
        classes: Names of the classes of the dataset.
        temperature: Divisor of the logits before the softmax. Default: 1.

    Attributes:
        input_size: (height, width) of the input of the annotator in pixels, of an ensemble the largest of its members.

    Raises:
        ValueError: The annotator is None, lacks a class, or has no fixed input size.
    """

    def __init__(self, annotator: Annotator | None, classes: Sequence[str], temperature: float = 1.0) -> None:
        if annotator is None:
            raise ValueError("labels='distilled' needs an annotator, but none was given: give annotator=")
        self._annotator, self._temperature = annotator, temperature
        self._rows: list[int] | None = None
        if annotator.classes is None or tuple(annotator.classes) != tuple(classes):
            self._rows = match_classes(annotator.classes, classes, None, annotator.num_classes)
        sizes = []
        for model in models_of(annotator):
            if getattr(model, "input_size", None) is None:
                raise ValueError(
                    f"labels='distilled' needs an annotator with an attribute `input_size` (height, width), but "
                    f"{type(model).__name__} has none: choose another annotator"
                )
            sizes.append(_input_size(model))
        self.input_size = max(height for height, _ in sizes), max(width for _, width in sizes)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the soft labels `[B, C]` of uint8 crops `[B, 3, s, s]`."""
        logits = _crop_logits(self._annotator, images)
        logits = logits if self._rows is None else logits[:, self._rows]
        return (logits if self._temperature == 1 else logits / self._temperature).softmax(1)


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 images to (height, width). Images of that size are returned unchanged."""
    resized: Tensor = F.resize(images, list(size), interpolation=F.InterpolationMode.BICUBIC, antialias=True)
    return resized


def _input_size(model: Annotator) -> tuple[int, int]:
    height, width = model.input_size  # type: ignore[attr-defined]
    return height, width


def _crop_logits(annotator: Annotator, images: Tensor) -> Tensor:
    """Return the mean logits `[B, C]` over crops, uint8 `[B, 3, s, s]`, which each model sees at its own input size."""
    if isinstance(annotator, Ensemble):  # the mean over its map is the average of the means of its members
        members = [_crop_logits(member, images) for member in annotator.annotators]
        return torch.stack([logits.to(members[0].device) for logits in members]).mean(0)
    if isinstance(annotator, FlipAveraged):
        return (_crop_logits(annotator.annotator, images) + _crop_logits(annotator.annotator, images.flip(-1))) / 2
    return annotator(_resize(images, _input_size(annotator))).mean((2, 3))
