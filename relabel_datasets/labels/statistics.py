"""Statistics of label maps and stored crops, measured while they are made.

Shapes: B images, C classes, K logits kept at each location, H x W locations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..devices import copy_to_cpu
from .batch import LabelMapBatch
from .crop_labels import CropLabels
from .crops import random_resized_crops
from .encodings.base import Encoded
from .encodings.grid_pooling import pool_scales
from .encodings.registry import get_map_encoding
from .encodings.sparse import SparseEncoding
from .label_map import LabelMap
from .view import rows_of_boxes
from .windows import measure_stored_crops, measure_windows

_NUM_OLD = 5  # values that early versions stored, the second of them by another definition


class Statistics(NamedTuple):
    """Sums over images with label maps or stored crops. The sums of two sets of images add up to those of their union.

    Attributes:
        agreeing: Number of images whose map, pooled over the whole image, ranks the original class first. For stored crops, the
            mean label of the crops does.
        several: Number of images that show more than one class, see `windows.DEFINITION` and `CROPS_DEFINITION`. None if it was not
            measured.
        crops: Number of random crops on which stored and dense labels were compared, 0 if they were not. For stored crops, the
            labels are compared with the annotator's.
        kl: Sum over these crops of the divergence KL(dense || stored) in nats.
        same_best: Number of these crops for which both labels have the same top class.
        shown: Number of classes that the images show, summed over images. None if it was not measured.
    """

    agreeing: int = 0
    several: int | None = 0
    crops: int = 0
    kl: float = 0.0
    same_best: int = 0
    shown: int | None = 0

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> Statistics:
        """Read the values of a manifest.

        Args:
            values: Six values in the order of the attributes. In lists of five, which early versions wrote, the second value
                counts something else and is ignored.
        """
        read = cls(*values)
        return read._replace(several=None, shown=None) if len(values) == _NUM_OLD else read

    def to_list(self) -> list[float]:
        """Return the values for a manifest, so that `from_list` reads the same statistics."""
        if self.several is None or self.shown is None:
            return [self.agreeing, 0, self.crops, self.kl, self.same_best]
        return [self.agreeing, self.several, self.crops, self.kl, self.same_best, self.shown]


def add_up(parts: Iterable[Statistics]) -> Statistics:
    """Return the sum of partial statistics. What was not measured in one part is None in the sum."""
    columns = zip(Statistics(), *parts, strict=True)
    return Statistics(*(None if None in values else sum(values) for values in columns))  # type: ignore[arg-type]


def total(shard_statistics: Iterable[Sequence[float]]) -> Statistics:
    """Return the statistics of a split.

    Args:
        shard_statistics: Values of its shards, as in `shards.manifest.Split`.
    """
    return add_up(map(Statistics.from_list, shard_statistics))


def image_statistics(encoded: Encoded, labels: Sequence[int]) -> Statistics:
    """Count agreement with the original labels, and the classes that images show.

    Args:
        encoded: Encoded maps of B images.
        labels: Original class indices of the B images.

    Returns:
        Statistics with `agreeing`, `several` and `shown` set.
    """
    index = torch.tensor(labels, device=encoded.logits.device)
    windows = measure_windows(encoded, index)
    agreeing, num_shown = windows.whole.argmax(1) == index, windows.shown.sum(1)
    counts = torch.stack([agreeing.sum(), (num_shown > 1).sum(), num_shown.sum()]).tolist()
    return Statistics(agreeing=counts[0], several=counts[1], shown=counts[2])


def crop_fidelity(
    dense: Sequence[Tensor], blobs: Sequence[bytes], sizes: Sequence[tuple[int, int]], generator: np.random.Generator
) -> Statistics:
    """Compare labels pooled from stored maps with labels pooled from dense logits, on one random crop per image.

    Args:
        dense: Logits of the annotator `[B, C, H, W]` for each map of an image.
        blobs: Stored maps of the same images.
        sizes: Image sizes (height, width) in pixels.
        generator: Source of the random crops.

    Returns:
        Statistics with `crops`, `kl` and `same_best` set.
    """
    # One image at a time, so that the crops do not depend on the batch size.
    crops = [random_resized_crops([size], generator) for size in sizes]
    boxes = torch.from_numpy(np.concatenate(crops)).float()
    true = copy_to_cpu({"pooled": pool_dense(dense, boxes.numpy())})["pooled"]
    maps = LabelMapBatch.of([LabelMap.from_safetensors(blob) for blob in blobs]).encoded
    stored = maps.encoding.pool(maps, rows_of_boxes(boxes.numpy()))
    return _divergence(true, stored)


def pool_dense(dense: Sequence[Tensor], boxes_xyxy: npt.NDArray[np.float32]) -> Tensor:
    """Return the soft labels `[B, C]` of one box of each image from the dense logits `[B, C, H, W]` of its maps."""
    heatmaps, num_classes = get_map_encoding("heatmaps"), dense[0].shape[1]
    assert isinstance(heatmaps, SparseEncoding)
    scales = []
    for logits in dense:
        every = torch.arange(num_classes, device=logits.device)[None, :, None, None].expand(len(logits), -1, -1, -1)
        base = logits.new_zeros(len(logits), num_classes, dtype=torch.float32)
        scales.append(Encoded(heatmaps, {"logits": logits.float(), "classes": every, "base": base}, num_classes))
    return pool_scales(scales, rows_of_boxes(boxes_xyxy), heatmaps.mean_logits)


def stored_crop_statistics(soft_labels: Tensor, label: int) -> Statistics:
    """Count agreement of the stored crops of an image with its original label, and the classes that the image shows.

    Args:
        soft_labels: Stored soft labels of the crops `[N, C]`.
        label: Original class index.

    Returns:
        Statistics with `agreeing`, `several` and `shown` set.
    """
    measures = measure_stored_crops(soft_labels[None], torch.tensor([label]))
    num_shown, best = int(measures.shown.sum()), int(measures.whole[0].argmax())
    return Statistics(agreeing=int(best == label), several=int(num_shown > 1), shown=num_shown)


def stored_crop_fidelity(logits: Tensor, labels: CropLabels, crop: int) -> Statistics:
    """Compare the stored label of a crop with the annotator's.

    Args:
        logits: The annotator's logits of the crops of an image `[N, C]`.
        labels: Stored labels of the same crops.
        crop: Index of the crop.

    Returns:
        Statistics with `crops`, `kl` and `same_best` set.
    """
    return _divergence(logits[crop : crop + 1].float().softmax(1), labels.soft_labels([crop]))


def _divergence(true: Tensor, stored: Tensor) -> Statistics:
    """Compare stored soft labels with true ones, `[B, C]` each."""
    least = torch.finfo(true.dtype).tiny
    kl = (true * (true.clamp_min(least).log() - stored.clamp_min(least).log())).sum(1)
    same = true.argmax(1) == stored.argmax(1)
    return Statistics(crops=len(true), kl=sum(round(value, 4) for value in kl.tolist()), same_best=int(same.sum()))
