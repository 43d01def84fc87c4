"""Annotators made of annotators: the mean of several, and of an image and its mirror image.

Shapes: B images, C classes, H x W locations of the map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from .annotator import Annotator
from .resample import resample_area


class Ensemble:
    """Annotator that gives the mean logits of several, of other models, or of one model at several input sizes.

    Maps are brought to the grid of the most locations by `resample_area`, which does not change their means: the mean
    over the ensemble's map is the mean of the means over its members' maps. Logits are averaged as they are, so models
    of other temperatures count by the spread of their logits.

    Args:
        annotators: of the same classes in the same order, see `ClassSubset`. They may take images of other sizes.
        name: what the manifest calls the ensemble. Default: the members' names, each once, joined by `+`.

    Raises:
        ValueError: there is no annotator, or their classes differ.

    Example:
        >>> sizes = (224, 288)
        >>> Ensemble([TimmAnnotator("resnet50.a1_in1k", pretrained=True, input_size=size) for size in sizes])
    """

    def __init__(self, annotators: Sequence[Annotator], name: str | None = None) -> None:
        if not annotators:
            raise ValueError("an ensemble must have annotators, got none")
        self.annotators = tuple(annotators)
        first = self.annotators[0]
        for other in self.annotators[1:]:
            if other.num_classes != first.num_classes or other.classes != first.classes:
                raise ValueError(
                    f"annotators of an ensemble must have the same classes in the same order, got "
                    f"{_describe_classes(first)} and {_describe_classes(other)}: reorder them with ClassSubset"
                )
        self.classes = first.classes
        self.num_classes = first.num_classes
        names = dict.fromkeys(str(annotator.describe()["name"]) for annotator in self.annotators)
        self.name = "+".join(names) if name is None else name
        # Members that see an image in the same way share its pixels.
        seen = [annotator.preprocess(_probe_image()) for annotator in self.annotators]
        self._inputs: list[Tensor] = []
        self._input_of: list[int] = []
        for pixels in seen:
            known = [i for i, other in enumerate(self._inputs) if torch.equal(pixels, other)]
            self._input_of.append(known[0] if known else len(self._inputs))
            if not known:
                self._inputs.append(pixels)

    def preprocess(self, image: PIL.Image.Image) -> Tensor:
        """Return an RGB image as uint8 `[n]`: what each of the annotators takes, one after the other."""
        owners = [self._input_of.index(i) for i in range(len(self._inputs))]
        return torch.cat([self.annotators[owner].preprocess(image).flatten() for owner in owners])

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Return float32 logits `[B, C, H, W]` of uint8 `[B, n]`, the mean over the annotators.

        Raises:
            ValueError: `images` are not what `preprocess` returns.
        """
        sizes = [pixels.numel() for pixels in self._inputs]
        if images.dtype != torch.uint8 or images.ndim != 2 or images.shape[1] != sum(sizes):
            raise ValueError(
                f"images must be uint8 [B, {sum(sizes)}], as preprocess makes them, got {images.dtype} "
                f"{list(images.shape)}"
            )
        inputs = [
            part.reshape(len(images), *pixels.shape)
            for part, pixels in zip(torch.split(images, sizes, dim=1), self._inputs, strict=True)
        ]
        maps = [annotator(inputs[i]) for annotator, i in zip(self.annotators, self._input_of, strict=True)]
        height, width = max((logits.shape[2:] for logits in maps), key=lambda grid: grid[0] * grid[1])
        total = resample_area(maps[0], (height, width))
        for logits in maps[1:]:
            total = total + resample_area(logits.to(total.device), (height, width))
        return total / len(maps)

    def describe(self) -> dict[str, Any]:
        """Return what decides the maps, as JSON values: what all the annotators say, in their order."""
        members = [annotator.describe() for annotator in self.annotators]
        return {"kind": "ensemble", "name": self.name, "num_classes": self.num_classes, "annotators": members}


class FlipAveraged:
    """Annotator that gives the mean of another's logits of an image and of its mirror image, mirrored back.

    Args:
        annotator: takes uint8 images `[B, 3, h, w]`. For an ensemble, wrap its members.

    Raises:
        ValueError: what the annotator takes cannot be mirrored.

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
        """Return what the inner annotator takes."""
        return self.annotator.preprocess(image)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Return float32 logits `[B, C, H, W]`, the mean over both."""
        return (self.annotator(images) + self.annotator(images.flip(-1)).flip(-1)) / 2

    def describe(self) -> dict[str, Any]:
        """Return what the inner annotator says, and that it is averaged over mirror images."""
        return {**self.annotator.describe(), "flip_averaged": True}


def _probe_image() -> PIL.Image.Image:
    """Return an image that any two ways to preprocess make something else of."""
    noise = np.random.default_rng(0).integers(0, 256, (61, 47, 3), np.uint8)
    return PIL.Image.fromarray(noise)


def _describe_classes(annotator: Annotator) -> str:
    if annotator.classes is None:
        return f"{annotator.num_classes} without names"
    shown = ", ".join(annotator.classes[:3])
    return f"{annotator.num_classes} ({shown}{', ...' if annotator.num_classes > 3 else ''})"
