"""Detect the order of the axes of published label maps by comparing them with the maps of an annotator.

Shapes: C classes, P of them stored anywhere in a map, K stored per location, H x W locations.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as nnf
from torch import Tensor

from ..words import counted
from .annotator import Annotator
from .class_subset import ClassSubset
from .classes import match_classes
from .pairing import find_images
from .published import PublishedMaps

_MIN_IMAGES = 8  # minimum sample size of the test
_MIN_T = 5.0  # unrelated maps exceed it once in 100,000 cases
_MIN_ASYMMETRY = 0.02  # relative to the variation of a map; below, both orders are nearly the same map
_BATCH_SIZE = 16


class OrderCheck(NamedTuple):
    """Result of `detect_order`.

    Attributes:
        order: Detected order, `"hw"` or `"wh"`.
        hw: Mean correlation with the maps of the annotator if files are read as `[K, height, width]`.
        wh: Mean correlation with the maps of the annotator if files are read as `[K, width, height]`.
        t: Paired t statistic of hw - wh over the images.
        num_images: Number of images whose maps differ between both orders.
    """

    order: str
    hw: float
    wh: float
    t: float
    num_images: int

    def __str__(self) -> str:
        return (
            f"correlation with the annotator's maps {self.hw:.3f} as hw and {self.wh:.3f} as wh, t = {self.t:.1f} over "
            f"{counted(self.num_images, 'image')}"
        )


def detect_order(
    maps: PublishedMaps,
    images: str | os.PathLike[str],
    annotator: Annotator,
    *,
    split: str = "train",
    num_images: int = 64,
) -> OrderCheck:
    """Detect whether label map files store `[2, K, height, width]` ("hw") or `[2, K, width, height]` ("wh").

    The annotator computes maps of random images. Its logits, minus their mean over classes, are resampled to the grid of the
    published map. They are correlated with the published logits in both orders, over all locations of the stored classes, with
    the mean of each class subtracted. A paired t test over the images with |t| >= 5 selects the order, whose correlation must
    be positive. Maps that nearly equal their own transpose are ignored.

    Args:
        maps: Label map files of the release.
        images: ImageFolder with the images of the maps, or its parent folder if it is named like the split.
        annotator: Any annotator with the same classes. It need not be the one that made the maps.
        split: Name of the split. Default: `"train"`.
        num_images: Number of random images to compare. Default: 64.

    Returns:
        Detected order with its statistics.

    Raises:
        ValueError: Neither order is significantly better, or the classes of the annotator differ.
        LabelMapError: A file is damaged or not a label map of this format.
        ImageError: An image is unreadable.
        FileNotFoundError: The images do not exist.
        DatasetError: The images are not those of the maps.

    Example:
        >>> detect_order(maps, "/path/to/imagenet", TimmAnnotator("resnet50.a1_in1k", pretrained=True)).order
        'hw'
    """
    if annotator.classes != maps.classes:
        rows = match_classes(annotator.classes, maps.classes, num_classes=annotator.num_classes)
        annotator = ClassSubset(annotator, rows, maps.classes)
    paired = find_images(maps, images, split)
    candidates = np.random.default_rng(0).permutation(
        [i for i, image in enumerate(paired.indices) if image is not None]
    )[:num_images]
    correlations = []
    for start in range(0, len(candidates), _BATCH_SIZE):
        batch = [int(i) for i in candidates[start : start + _BATCH_SIZE]]
        pixels = [annotator.preprocess(paired.decode(i)) for i in batch]
        dense = annotator(torch.stack(pixels)).cpu()
        correlations += [_correlations(*maps.load(i), computed) for i, computed in zip(batch, dense, strict=True)]
    return _select_order(np.array([pair for pair in correlations if pair is not None]).reshape(-1, 2))


def _correlations(logits: Tensor, classes: Tensor, dense: Tensor) -> tuple[float, float] | None:
    """Return the correlations of a stored map in both orders with logits `[C, h, w]`, or None if both orders are alike."""
    computed = dense - dense.mean(0)
    kept = classes.unique()  # type: ignore[no-untyped-call]
    stored = torch.zeros(len(computed), *logits.shape[1:]).scatter_(0, classes, logits)[kept]
    stored = stored - stored.mean((1, 2), keepdim=True)
    if stored.shape[1] == stored.shape[2] and (stored - stored.mT).norm() <= _MIN_ASYMMETRY**0.5 * stored.norm():
        return None
    return _correlation(stored, computed[kept]), _correlation(stored.mT, computed[kept])


def _correlation(stored: Tensor, computed: Tensor) -> float:
    """Return the correlation of maps `[P, H, W]` with maps `[P, h, w]`, which are resampled."""
    computed = nnf.interpolate(computed[None], stored.shape[1:], mode="bilinear", antialias=True)[0]
    computed = computed - computed.mean((1, 2), keepdim=True)
    scale = float(stored.norm() * computed.norm())
    return float((stored * computed).sum()) / scale if scale > 0 else 0.0


def _select_order(pairs: npt.NDArray[np.float64]) -> OrderCheck:
    """Select the order by correlations `[N, 2]` of hw and wh."""
    if len(pairs) < _MIN_IMAGES:
        raise ValueError(
            f"the order of the axes cannot be detected: the two orders of the map differ for {counted(len(pairs), 'image')}, but "
            f"at least {_MIN_IMAGES} are needed. Compare more images (num_images=), or set the order"
        )
    hw, wh = pairs.mean(0).tolist()
    difference = pairs[:, 0] - pairs[:, 1]
    spread = difference.std(ddof=1) / len(pairs) ** 0.5
    t = float(difference.mean() / max(spread, 1e-12))
    check = OrderCheck("hw" if t > 0 else "wh", hw, wh, t, len(pairs))
    if abs(t) < _MIN_T or max(hw, wh) <= 0:
        raise ValueError(
            f"the order of the axes cannot be detected: {check}; |t| must be at least {_MIN_T:.0f} and the better "
            "correlation positive. Try more images or a better annotator, and check that the maps belong to these images"
        )
    return check
