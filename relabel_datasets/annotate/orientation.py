"""Which axis of published label maps is the height: found by comparing them with any annotator's maps of the images.

Shapes: C classes, P of them stored somewhere in a map, K at each location, H x W locations.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as nnf
from torch import Tensor

from .annotator import Annotator, ClassSubset
from .classes import match_classes
from .pairing import find_images
from .published import PublishedMaps

_MIN_IMAGES = 8  # for a statistic
_MIN_T = 5.0  # maps that have nothing to do with the images come so far once in a hundred thousand times
_MIN_ASYMMETRY = 0.02  # of a map's variation: below, both orders are nearly the same map
_BATCH = 16


class OrderCheck(NamedTuple):
    """What `detect_order` found."""

    order: str  # "hw" or "wh"
    hw: float  # mean correlation with the annotator's maps, read as [K, height, width]
    wh: float  # the same, read as [K, width, height]
    t: float  # paired t statistic over the images of hw - wh
    num_images: int  # that tell the two apart

    def __str__(self) -> str:
        return (
            f"correlation with the annotator's maps {self.hw:.3f} as hw and {self.wh:.3f} as wh, t = {self.t:.1f} over "
            f"{self.num_images} images"
        )


def detect_order(
    maps: PublishedMaps,
    images: str | os.PathLike[str],
    annotator: Annotator,
    *,
    split: str = "train",
    num_images: int = 64,
) -> OrderCheck:
    """Return whether files of label maps hold `[2, K, height, width]` ("hw") or `[2, K, width, height]` ("wh").

    Some images are annotated, and the annotator's logits, less their mean over all classes and resampled to the map's
    grid, are correlated with the published ones, over all locations of the classes that are stored, each class less its
    mean, in both orders. The order is decided by a paired t test over the images, at |t| >= 5, and must correlate
    positively itself. Maps that are nearly their own transpose tell nothing and are left out.

    Args:
        maps: the release's files.
        images: the ImageFolder that the maps are of, or the folder above it where that is named like the split.
        annotator: any that knows the same classes. It need not be the one that made the maps.
        split: name of the split.
        num_images: how many random images are looked at.

    Raises:
        ValueError: neither order is clearly better, with the figures; or the annotator's classes are others.
        LabelMapError: (a ValueError) a file is bad.
        ImageError: (a ValueError) an image is.
        FileNotFoundError: no such images.
        DatasetError: (a ValueError) the images are not those of the maps.

    Example:
        >>> detect_order(maps, "/path/to/imagenet", TimmAnnotator("resnet50.a1_in1k", pretrained=True)).order
        'hw'
    """
    if annotator.classes != maps.classes:
        rows = match_classes(annotator.classes, maps.classes, num_classes=annotator.num_classes)
        annotator = ClassSubset(annotator, rows, maps.classes)
    found = find_images(maps, images, split)
    candidates = np.random.default_rng(0).permutation(
        [i for i, image in enumerate(found.indices) if image is not None]
    )[:num_images]
    pairs = []
    for start in range(0, len(candidates), _BATCH):
        batch = [int(i) for i in candidates[start : start + _BATCH]]
        pixels = [annotator.preprocess(found.decode(i)) for i in batch]
        dense = annotator(torch.stack(pixels)).cpu()
        pairs += [_correlations(*maps.load(i), own) for i, own in zip(batch, dense, strict=True)]
    return _decide(np.array([pair for pair in pairs if pair is not None]).reshape(-1, 2))


def _correlations(logits: Tensor, classes: Tensor, dense: Tensor) -> tuple[float, float] | None:
    """Return how a stored map, read in both orders, correlates with `[C, h, w]`; None if both are nearly the same."""
    own = dense - dense.mean(0)
    kept = classes.unique()  # type: ignore[no-untyped-call]
    stored = torch.zeros(len(own), *logits.shape[1:]).scatter_(0, classes, logits)[kept]
    stored = stored - stored.mean((1, 2), keepdim=True)
    if stored.shape[1] == stored.shape[2] and (stored - stored.mT).norm() <= _MIN_ASYMMETRY**0.5 * stored.norm():
        return None
    return _correlation(stored, own[kept]), _correlation(stored.mT, own[kept])


def _correlation(stored: Tensor, own: Tensor) -> float:
    """Return the correlation of `[P, H, W]` with `[P, h, w]`, resampled."""
    own = nnf.interpolate(own[None], stored.shape[1:], mode="bilinear", antialias=True)[0]
    own = own - own.mean((1, 2), keepdim=True)
    scale = float(stored.norm() * own.norm())
    return float((stored * own).sum()) / scale if scale > 0 else 0.0


def _decide(pairs: npt.NDArray[np.float64]) -> OrderCheck:
    """Return the order by `[N, 2]` correlations, of hw and wh."""
    if len(pairs) < _MIN_IMAGES:
        raise ValueError(
            f"the order of the axes cannot be told: of {len(pairs)} images the two orders of the map differ, and at "
            f"least {_MIN_IMAGES} are needed. Look at more images, or say the order"
        )
    hw, wh = pairs.mean(0).tolist()
    difference = pairs[:, 0] - pairs[:, 1]
    spread = difference.std(ddof=1) / len(pairs) ** 0.5
    t = float(difference.mean() / max(spread, 1e-12))
    check = OrderCheck("hw" if t > 0 else "wh", hw, wh, t, len(pairs))
    if abs(t) < _MIN_T or max(hw, wh) <= 0:
        raise ValueError(
            f"the order of the axes cannot be told: {check}; |t| must be at least {_MIN_T:.0f} and the better "
            "correlation positive. Try more images or a stronger annotator, and look whether the maps are of these images"
        )
    return check
