"""Statistics of label maps, measured while the maps are made.

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

CONFIDENT = 0.5  # a class with at least this probability at a location is called confident there


class Statistics(NamedTuple):
    """Sums over label maps. The sums of two sets of maps add up to those of their union.

    Attributes:
        agreeing: Number of images whose map, pooled over the whole image, ranks the original class first.
        several: Number of images with more than one confident class at any location.
        crops: Number of random crops on which stored and dense labels were compared, 0 if they were not.
        kl: Sum over these crops of the divergence KL(dense || stored) in nats.
        same_best: Number of these crops for which both labels have the same top class.
    """

    agreeing: int = 0
    several: int = 0
    crops: int = 0
    kl: float = 0.0
    same_best: int = 0


def add_up(parts: Iterable[Sequence[float]]) -> Statistics:
    """Return the sum of partial statistics."""
    sums = [sum(values) for values in zip(*parts, strict=True)]
    return Statistics(*sums)


def image_statistics(encoded: Encoded, labels: Sequence[int]) -> Statistics:
    """Count agreement with the original labels and images with several confident classes.

    Args:
        encoded: Encoded maps of B images.
        labels: Original class indices of the B images.

    Returns:
        Statistics with `agreeing` and `several` set.
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
    """Find the classes that reach a probability at any location of a map.

    Args:
        encoded: Encoded maps of B images.
        threshold: Probability above 0. A class counts only at locations where its logit is stored.

    Returns:
        Mask `[B, C]` bool.
    """
    logits = encoded.logits.float()
    # Softmax at each location without a dense map: over the stored logits and the sum of all other classes. That sum is
    # computed directly. Subtracting the stored classes from the sum of all bases would lose it to rounding.
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
    """Compare labels pooled from stored maps with labels pooled from dense logits, on one random crop per image.

    Args:
        dense: Logits of the annotator `[B, C, H, W]`.
        blobs: Stored maps of the same images.
        sizes: Image sizes (height, width) in pixels.
        generator: Source of the random crops.

    Returns:
        Statistics with `crops`, `kl` and `same_best` set.
    """
    # One image at a time, so that the crops do not depend on the batch size.
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
    return Statistics(crops=len(maps), kl=sum(round(value, 4) for value in kl.tolist()), same_best=int(same.sum()))
