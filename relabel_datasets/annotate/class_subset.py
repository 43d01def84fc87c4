"""Annotator that selects classes of another annotator.

Shapes: B images, C classes, H x W locations of the map.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from .annotator import Annotator, annotate_scales, classify


class ClassSubset:
    """Annotator that selects and reorders classes of another annotator, so that its maps are over the classes of a dataset.

    Args:
        annotator: Annotator with logits of all its classes.
        rows: Class index of `annotator` for each class of the dataset, see `match_classes`.
        classes: Names of the classes of the dataset.

    Raises:
        ValueError: The numbers of rows and classes differ, or a row is out of range.
    """

    def __init__(self, annotator: Annotator, rows: Sequence[int], classes: Sequence[str]) -> None:
        if len(rows) != len(classes):
            raise ValueError(f"expected one row per class, got {len(rows)} rows and {len(classes)} classes")
        outside = [row for row in rows if not 0 <= row < annotator.num_classes]
        if outside:
            raise ValueError(f"rows must be in 0 .. {annotator.num_classes - 1}, got {outside[:5]}")
        self.annotator = annotator
        self.classes = tuple(classes)
        self.num_classes = len(classes)
        self._rows = torch.tensor(rows, dtype=torch.long, device="cpu")

    def preprocess(self, image: PIL.Image.Image) -> Tensor:
        """Preprocess an image with the inner annotator.

        Args:
            image: RGB image of any size.

        Returns:
            Pixels that the inner annotator expects.
        """
        return self.annotator.preprocess(image)

    def __call__(self, images: Tensor) -> Tensor:
        """Compute the label maps of a batch and select the classes of the dataset.

        Args:
            images: Stacked results of `preprocess`, uint8 `[B, ...]`.

        Returns:
            Logits of the C classes of the dataset, float32 `[B, C, H, W]`.
        """
        return self._select(self.annotator(images))

    def classify(self, images: Tensor) -> Tensor:
        """Compute the logits of whole images and select the classes of the dataset.

        Args:
            images: Stacked results of `preprocess`, uint8 `[B, ...]`.

        Returns:
            Logits of the C classes of the dataset, float32 `[B, C]`.
        """
        return self._select(classify(self.annotator, images))

    def maps(self, images: Tensor) -> list[Tensor]:
        """Compute the label maps of each input size and select the classes of the dataset.

        Args:
            images: Stacked results of `preprocess`, uint8 `[B, ...]`.

        Returns:
            Logits of the C classes of the dataset, float32 `[B, C, H, W]` for each map of the inner annotator.
        """
        return [self._select(logits) for logits in annotate_scales(self.annotator, images)]

    @torch.inference_mode()
    def _select(self, logits: Tensor) -> Tensor:
        self._rows = self._rows.to(logits.device)  # copied once
        return logits.index_select(1, self._rows)

    def describe(self) -> dict[str, Any]:
        """Describe everything that determines the maps.

        Returns:
            Description of the inner annotator with a hash of the rows, of which there may be thousands.
        """
        inner = self.annotator.describe()
        digest = hashlib.sha256(inner.get("rows_sha256", "").encode())  # the inner annotator may be a subset as well
        digest.update(self._rows.cpu().numpy().astype("<i8").tobytes())
        return {**inner, "num_classes": self.num_classes, "rows_sha256": digest.hexdigest()}
