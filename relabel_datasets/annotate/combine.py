"""Annotators that average: over several annotators, and over an image and its mirror image.

Shapes: B images, C classes, H x W locations of the map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..labels.resample import mean_of_maps
from .annotator import Annotator, ModuleAnnotator, classify


class Ensemble:
    """Annotator that averages the logits of several annotators, such as different models or one model at several sizes.

    The encoding multiscale stores the maps of the members separately instead. For all others, maps are resampled to the grid with
    the most locations by `resample_area`, which preserves their means. The mean over the map of the ensemble is therefore the
    average of the means over the maps of its members. Logits are not rescaled before averaging, so a model with widely spread
    logits has more weight.

    Args:
        annotators: Members of the ensemble. Their classes must be the same in the same order, see `ClassSubset`. Their input
            sizes may differ.
        name: Name of the ensemble in the manifest. Default: the distinct names of the members, joined by `+`.

    Raises:
        ValueError: There is no annotator, or the classes of the members differ.

    Example:
        >>> sizes = (224, 288)
        >>> Ensemble([TimmAnnotator("resnet50.a1_in1k", pretrained=True, input_size=size) for size in sizes])
    """

    def __init__(self, annotators: Sequence[Annotator], name: str | None = None) -> None:
        if not annotators:
            raise ValueError("an ensemble must have at least one annotator, got none")
        self.annotators = tuple(annotators)
        first = self.annotators[0]
        for other in self.annotators[1:]:
            if other.num_classes != first.num_classes or other.classes != first.classes:
                raise ValueError(
                    f"the annotators of an ensemble must have the same classes in the same order, got "
                    f"{_describe_classes(first)} and {_describe_classes(other)}: reorder them with ClassSubset"
                )
        self.classes = first.classes
        self.num_classes = first.num_classes
        names = dict.fromkeys(str(annotator.describe()["name"]) for annotator in self.annotators)
        self.name = "+".join(names) if name is None else name
        # Members with the same preprocessing share their pixels.
        self._inputs: list[Tensor] = []
        self._input_of: list[int] = []
        for annotator in self.annotators:
            pixels = annotator.preprocess(_probe_image())
            known = [i for i, other in enumerate(self._inputs) if torch.equal(pixels, other)]
            self._input_of.append(known[0] if known else len(self._inputs))
            if not known:
                self._inputs.append(pixels)

    def preprocess(self, image: PIL.Image.Image) -> Tensor:
        """Preprocess an image for all members.

        Args:
            image: RGB image of any size.

        Returns:
            Concatenated pixels that the members expect, uint8 `[n]`.
        """
        owners = [self._input_of.index(i) for i in range(len(self._inputs))]
        return torch.cat([self.annotators[owner].preprocess(image).flatten() for owner in owners])

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Average the logits of the members.

        Args:
            images: Stacked results of `preprocess`, uint8 `[B, n]`.

        Returns:
            Mean logits, float32 `[B, C, H, W]`.

        Raises:
            ValueError: The images are not those that `preprocess` returns.
        """
        return mean_of_maps(self.maps(images))

    @torch.inference_mode()
    def maps(self, images: Tensor) -> list[Tensor]:
        """Compute the logits of each member, which the encoding multiscale stores.

        Args:
            images: Stacked results of `preprocess`, uint8 `[B, n]`.

        Returns:
            Logits of each member, float32 `[B, C, H, W]`, on the device of the first one.

        Raises:
            ValueError: The images are not those that `preprocess` returns.
        """
        inputs = self._split(images)
        maps = [annotator(inputs[i]) for annotator, i in zip(self.annotators, self._input_of, strict=True)]
        return [logits.to(maps[0].device) for logits in maps]

    def _split(self, images: Tensor) -> list[Tensor]:
        """Return the images in each size of the members."""
        sizes = [pixels.numel() for pixels in self._inputs]
        if images.dtype != torch.uint8 or images.ndim != 2 or images.shape[1] != sum(sizes):
            raise ValueError(
                f"images must be uint8 [B, {sum(sizes)}], as returned by preprocess, got {images.dtype} {list(images.shape)}"
            )
        parts = torch.split(_to_device(self, images), sizes, dim=1)
        return [part.reshape(len(images), *pixels.shape) for part, pixels in zip(parts, self._inputs, strict=True)]

    def classify(self, images: Tensor) -> Tensor:
        """Average the members' logits of whole images.

        Args:
            images: Stacked results of `preprocess`, uint8 `[B, n]`.

        Returns:
            Mean logits, float32 `[B, C]`.
        """
        inputs = self._split(images)
        members = [classify(annotator, inputs[i]) for annotator, i in zip(self.annotators, self._input_of, strict=True)]
        return torch.stack([logits.to(members[0].device) for logits in members]).mean(0)

    def describe(self) -> dict[str, Any]:
        """Describe everything that determines the maps.

        Returns:
            JSON values with the descriptions of all members in order.
        """
        members = [annotator.describe() for annotator in self.annotators]
        return {"kind": "ensemble", "name": self.name, "num_classes": self.num_classes, "annotators": members}


class FlipAveraged:
    """Annotator that averages another annotator's maps of an image and of its mirror image, mirrored back.

    Args:
        annotator: Annotator of uint8 images `[B, 3, h, w]`. For an ensemble, wrap its members.

    Raises:
        ValueError: The input of the annotator cannot be mirrored.

    Example:
        >>> FlipAveraged(TimmAnnotator("resnet50.a1_in1k", pretrained=True))
    """

    def __init__(self, annotator: Annotator) -> None:
        pixels = annotator.preprocess(_probe_image())
        if pixels.ndim != 3:
            raise ValueError(
                f"the annotator's preprocess must return images [3, h, w] to be mirrored, got {list(pixels.shape)}: "
                "wrap the members of an ensemble, not the ensemble"
            )
        self.annotator = annotator
        self.classes = annotator.classes
        self.num_classes = annotator.num_classes

    def preprocess(self, image: PIL.Image.Image) -> Tensor:
        """Preprocess an image with the inner annotator.

        Args:
            image: RGB image of any size.

        Returns:
            Pixels that the inner annotator expects.
        """
        return self.annotator.preprocess(image)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Average the logits of both images.

        Args:
            images: Stacked results of `preprocess`, uint8 `[B, ...]`.

        Returns:
            Mean logits, float32 `[B, C, H, W]`.
        """
        images = _to_device(self.annotator, images)
        return (self.annotator(images) + self.annotator(images.flip(-1)).flip(-1)) / 2

    def classify(self, images: Tensor) -> Tensor:
        """Average the logits of whole images and of their mirror images.

        Args:
            images: Stacked results of `preprocess`, uint8 `[B, ...]`.

        Returns:
            Mean logits, float32 `[B, C]`.
        """
        images = _to_device(self.annotator, images)
        return (classify(self.annotator, images) + classify(self.annotator, images.flip(-1))) / 2

    def describe(self) -> dict[str, Any]:
        """Describe everything that determines the maps.

        Returns:
            Description of the inner annotator with `flip_averaged`.
        """
        return {**self.annotator.describe(), "flip_averaged": True}


def models_of(annotator: Annotator) -> list[Annotator]:
    """Return the annotators that an ensemble or a flip average consists of, or the annotator itself."""
    if isinstance(annotator, Ensemble):
        return [model for member in annotator.annotators for model in models_of(member)]
    return models_of(annotator.annotator) if isinstance(annotator, FlipAveraged) else [annotator]


def _to_device(annotator: Annotator, images: Tensor) -> Tensor:
    """Return images on the device of the first model. Parts and mirror images of a batch are not in pinned memory: their copies would wait."""
    models = models_of(annotator)
    devices = [model.device for model in models if isinstance(model, ModuleAnnotator)]
    return images.to(devices[0], non_blocking=True) if len(devices) == len(models) else images


def _probe_image() -> PIL.Image.Image:
    """Return a noise image, for which any two different preprocessings give different pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (61, 47, 3), np.uint8)
    return PIL.Image.fromarray(noise)


def _describe_classes(annotator: Annotator) -> str:
    if annotator.classes is None:
        return f"{annotator.num_classes} without names"
    shown = ", ".join(annotator.classes[:3])
    return f"{annotator.num_classes} ({shown}{', ...' if annotator.num_classes > 3 else ''})"
