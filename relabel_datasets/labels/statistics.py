"""What can be said of a set of label maps in a few numbers, measured as they are made.

Shapes: B images, C classes, K logits kept at each location, H x W locations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .batch import LabelMapBatch
from .crops import random_resized_crops
from .encoding import Encoded
from .label_map import LabelMap
from .pooling import pool_labels

CONFIDENT = 0.5  # probability at a location from which on a class is called confident there


class Statistics(NamedTuple):
    """Sums over label maps, so that those of shards add up.

    Attributes:
        agreeing: images whose map, pooled whole, ranks their own class first.
        several: images with more than one confident class, each at some location.
        crops: random crops whose label was compared with the one pooled from the dense logits; 0: not measured.
        kl: sum over these of the divergence KL(dense || stored), in nats.
        same_best: how many of these have the same best class.
    """

    agreeing: int = 0
    several: int = 0
    crops: int = 0
    kl: float = 0.0
    same_best: int = 0


def add_up(parts: Iterable[Sequence[float]]) -> Statistics:
    """Return the statistics of all, for those of some."""
    sums = [sum(values) for values in zip(*parts, strict=True)]
    return Statistics(*sums)


def image_statistics(encoded: Encoded, labels: Sequence[int]) -> Statistics:
    """Return what the maps of a batch say of their images.

    Args:
        encoded: of B images.
        labels: B class indices.
    """
    device = encoded.logits.device
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device).expand(len(labels), -1)
    pooled = pool_labels(
        encoded.logits, encoded.classes, whole, num_classes=encoded.num_classes, base=encoded.base
    )  # fmt: skip
    agreeing = pooled.argmax(1) == torch.tensor(labels, device=device)
    several = confident_classes(encoded).sum(1) > 1
    return Statistics(*torch.stack([agreeing.sum(), several.sum()]).tolist())


def confident_classes(encoded: Encoded, threshold: float = CONFIDENT) -> Tensor:
    """Return `[B, C]` bool: which classes have this probability, or more, at some location of the map.

    Args:
        encoded: of B images.
        threshold: above 0; a class that is not stored at a location is not looked at there.
    """
    logits = encoded.logits.float()
    # Softmax at each location without a dense map: over the stored logits and all other classes together. These are added
    # up by themselves: taken as all bases without those of the stored classes, they would drown in the rounding of a base
    # that is far above what its class has at the location.
    if encoded.base is None:
        rest = logits.new_full((len(logits),), encoded.num_classes - logits.shape[1]).log()
    else:
        rest = encoded.base.float().scatter(1, encoded.classes[:, :, 0, 0], -torch.inf).logsumexp(1)
    log_total = torch.logaddexp(logits.logsumexp(1, keepdim=True), rest[:, None, None, None])
    confident = logits >= log_total + math.log(threshold)
    found = logits.new_zeros(len(logits), encoded.num_classes)
    classes = encoded.classes.expand_as(logits).flatten(1)
    return found.scatter_reduce(1, classes, confident.flatten(1).float(), "amax") > 0


def crop_fidelity(
    dense: Tensor, blobs: Sequence[bytes], sizes: Sequence[tuple[int, int]], generator: np.random.Generator
) -> Statistics:
    """Return how close labels pooled from stored maps are to those from the dense logits, on a random crop of each image.

    Args:
        dense: `[B, C, H, W]` the annotator's logits.
        blobs: the maps as they are stored.
        sizes: (height, width) of the images.
        generator: decides the crops.
    """
    # One by one, so that they do not depend on how images are put into batches.
    crops = [random_resized_crops([size], generator) for size in sizes]
    boxes = torch.from_numpy(np.concatenate(crops)).float()
    num_classes = dense.shape[1]
    every = torch.arange(num_classes, device=dense.device)[None, :, None, None].expand(len(dense), -1, -1, -1)
    true = pool_labels(dense.float(), every, boxes, num_classes=num_classes).cpu()
    maps = LabelMapBatch.of([LabelMap.from_safetensors(blob) for blob in blobs])
    stored = pool_labels(maps.logits, maps.classes, boxes, num_classes=num_classes, base=maps.dense_base())
    least = torch.finfo(true.dtype).tiny
    kl = (true * (true.clamp_min(least).log() - stored.clamp_min(least).log())).sum(1)
    same = true.argmax(1) == stored.argmax(1)
    return Statistics(crops=len(maps), kl=sum(round(each, 4) for each in kl.tolist()), same_best=int(same.sum()))
