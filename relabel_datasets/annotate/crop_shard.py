"""Stored crops: the annotator's answer to each of N crops of every image.

Shapes: N crops of an image, C classes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch
from torch import Tensor

from ..data.skipped import Skipped
from ..data.sources import ImageSource
from ..labels.crop_labels import CropLabels
from ..labels.crops import seeded_crops, to_pixels
from ..labels.encodings.crops import seed_of
from ..labels.statistics import Statistics, add_up, stored_crop_fidelity, stored_crop_statistics

if TYPE_CHECKING:
    from .prefetch import Batch, LoadedImage

Add = Callable[["LoadedImage", bytes], object]
_FIDELITY_CROPS = 256  # images of a shard, of which one crop each is compared with the annotator's answer


def cut_crops(image: PIL.Image.Image, key: str, size: tuple[int, int], num_crops: int) -> Iterator[PIL.Image.Image]:
    """Yield the stored crops of an image, mirrored where they are flipped.

    Args:
        image: Image, decoded at full size or reduced.
        key: Key of the image, which determines the crops.
        size: Full (height, width) of the image, which determines the crops.
        num_crops: Number of crops.
    """
    boxes, flips = seeded_crops([seed_of(key)], [size], num_crops)
    pixels = to_pixels(boxes[0], (image.height, image.width)).tolist()
    for box, flip in zip(pixels, flips[0].tolist(), strict=True):
        crop = image.crop(box)
        yield crop.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop


class CropAnswers:
    """Collects the answers to the crops of each image, which may be in several batches."""

    def __init__(self) -> None:
        self._rows: deque[Tensor | None] = deque()  # of images that are not complete

    def add(self, batch: Batch[Any], answers: list[Tensor]) -> Iterator[tuple[LoadedImage, Tensor]]:
        """Yield each image that the batch completes with the logits of its crops, `[N, C]` on the CPU.

        Args:
            batch: Next batch of a stage of crops.
            answers: Logits of its rows `[B, C]`, the only element, or none if all rows belong to skipped images.
        """
        self._rows.extend(answers[0].float().cpu() if answers else [None] * batch.size)
        for image in batch.images:
            rows = [self._rows.popleft() for _ in range(batch.stage.rows_per_image)]
            if not isinstance(image, Skipped):
                yield image, torch.stack([row for row in rows if row is not None])


class CropWriter:
    """Stores the crops of the images of a shard.

    Args:
        add: Function that adds an image with its stored crops to the shard.
        source: Source of the images.
        k: Number of components of the labels of an image.
    """

    def __init__(self, add: Add, source: ImageSource, k: int | None) -> None:
        self._add, self._source, self._k = add, source, k
        self._answers, self._number = CropAnswers(), 0
        self.statistics = Statistics()

    def take(self, batch: Batch[Any], logits: list[Tensor]) -> None:
        """Store the images that a batch completes, see `CropAnswers.add`."""
        for image, answers in self._answers.add(batch, logits):
            key, label = self._source.keys[image.position], self._source.labels[image.position]
            labels = CropLabels.from_logits(answers, canvas_size=image.size, key=key, label=label, k=self._k)
            self._add(image, labels.to_safetensors())
            parts = [self.statistics, stored_crop_statistics(labels.soft_labels(), label)]
            if self._number < _FIDELITY_CROPS:
                parts.append(stored_crop_fidelity(answers, labels, self._number % len(answers)))
            self.statistics = add_up(parts)
            self._number += 1
