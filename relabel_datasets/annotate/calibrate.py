"""Fit the gains of pooled logits to the annotator's answers to random crops.

A build annotates random crops of some of its images. For each crop it records what the divergence of the label from the answer
depends on, with classes of similar logits grouped. The records are small, so any process can annotate any shard.

Shapes: C classes, S label maps of an image, n crops, J groups of classes, Q knots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..data.sources import ImageSource
from ..labels.calibration import Calibration
from ..labels.crops import seeded_crops
from ..labels.encodings.crops import seed_of
from ..labels.label_map import LabelMap
from ..labels.view import Rows, rows_of_boxes
from .crop_shard import CropAnswers

if TYPE_CHECKING:
    from .prefetch import Batch

Floats = npt.NDArray[np.float64]
CROPS_PER_IMAGE = 4
_SHARES = np.geomspace(0.08, 1, 4)  # knots: the smallest to the largest crop of RandomResizedCrop
_LEAST, _MOST = 0.01, 8.0  # gains
_MAX_IMAGES, _IMAGES_PER_CROPPED = 500, 20  # at most one in 20 images, so that builds of any size stay fast
_SMOOTHNESS = 0.5  # weight of the squared differences of neighboring gains, in nats summed over crops
_FLAT = 16.0  # temperature at which no probability underflows, so that its logarithm has all logits
_ALONE, _GROUPS = 64, 32  # classes that are most probable in any of the maps, and groups of all others


def num_calibrated_images(num_images: int) -> int:
    """Return the number of images of which random crops are annotated: 5 %, at most 500. None of fewer than 20 images."""
    return min(_MAX_IMAGES, num_images // _IMAGES_PER_CROPPED)


class CropMeasures:
    """Measures the divergence of labels pooled from stored maps from the annotator's answers to random crops.

    The crops are the first that a build of stored crops would annotate, see `labels.crops.seeded_crops`.

    Args:
        source: Source of the images.
        blobs: Stored label maps, by the index of their image in the source. Images without a map are left out.

    Attributes:
        records: Results of `measure_crops` of all images, in order.
    """

    def __init__(self, source: ImageSource, blobs: Mapping[int, bytes]) -> None:
        self._source, self._blobs, self._answers = source, blobs, CropAnswers()
        self.records: list[list[float]] = []

    def take(self, batch: Batch[Any], logits: list[Tensor]) -> None:
        """Measure the images that a batch completes, see `CropAnswers.add`."""
        for image, answers in self._answers.add(batch, logits):
            if image.position in self._blobs:
                boxes, _ = seeded_crops([seed_of(self._source.keys[image.position])], [image.size], CROPS_PER_IMAGE)
                self.records += measure_crops(self._blobs[image.position], boxes[0], answers)


def measure_crops(blob: bytes, boxes_xyxy: Floats, answers: Tensor) -> list[list[float]]:
    """Record how labels pooled from a label map diverge from answers.

    The divergence at the gains g `[S]` is `log sum_j exp(offset_j + sum_s g_s z_sj) - sum_s g_s m_s - entropy` nats. Group j of classes
    has the mean pooled logits `z_sj`, and `m_s` is the mean of the pooled logits over classes, weighted by the answer.

    Args:
        blob: Stored label map.
        boxes_xyxy: Boxes of n crops `[n, 4]` in units of the whole image.
        answers: Logits of the annotator for the crops, `[n, C]`.

    Returns:
        For each crop with finite answers: its share of the image area, S, the entropy, m `[S]`, offsets `[J]` and z `[S, J]`.
    """
    x1, y1, x2, y2 = boxes_xyxy.T
    pooled = pooled_logits(blob, rows_of_boxes(boxes_xyxy)).numpy()
    pooled -= pooled.mean(2, keepdims=True)
    log_answers = answers.double().log_softmax(1).numpy()
    with np.errstate(invalid="ignore"):  # of answers that are not finite
        probabilities = np.exp(log_answers)
        entropies = -(probabilities * log_answers).sum(1)
        means = np.einsum("nc,nsc->ns", probabilities, pooled)
    records: list[list[float]] = []
    for share, entropy, mean, logits in zip((x2 - x1) * (y2 - y1), entropies, means, pooled, strict=True):
        record = np.concatenate([[share, len(logits), entropy], mean, _grouped(logits).ravel()]).round(5)
        if np.isfinite(record).all():
            records.append(record.tolist())
    return records


def pooled_logits(blob: bytes, views: Rows) -> Tensor:
    """Return the mean logits `[n, S, C]` of the maps of an image under views `[n, 10]`, up to a constant per view and map."""
    label_map = LabelMap.from_safetensors(blob)
    encoding = label_map._metadata.encoding
    encoded = label_map._encoded().changed(lambda tensor: tensor.expand(len(views), *tensor.shape[1:]))
    num_scales = len(label_map.map_sizes)
    scales = []
    for scale in range(num_scales):
        temperature = np.full((len(views), 1, num_scales), np.inf)
        temperature[:, :, scale] = _FLAT
        scales.append(encoding.pool(encoded, views, temperature=temperature).double().log() * _FLAT)
    return torch.stack(scales, 1)


def _grouped(logits: Floats) -> Floats:
    """Return the offsets and the mean logits of groups of classes, `[1 + S, J]`, from the pooled logits `[S, C]` of a crop.

    The offsets are such that the sum of the probabilities of a group is exact for labels from the mean of all maps.
    """
    reference, num_classes = logits.mean(0), logits.shape[1]
    highest = (logits - np.log(np.exp(logits - logits.max()).sum(1, keepdims=True))).max(0)
    alone, others = np.split(np.argsort(-highest, kind="stable"), [_ALONE])
    order = np.concatenate([alone, others[np.argsort(-reference[others], kind="stable")]])
    starts = np.arange(len(alone))
    if len(others):
        starts = np.append(starts, _ALONE - 1 + np.unique(np.geomspace(1, len(others), _GROUPS).astype(int)))
    means = np.add.reduceat(logits[:, order], starts, 1) / np.diff(starts, append=num_classes)
    sums = np.add.reduceat(np.exp(reference[order] - reference.max()), starts)
    offsets = np.log(np.maximum(sums, np.finfo(float).tiny)) + reference.max() - means.mean(0)
    return np.concatenate([offsets[None], means])


class _Crops(NamedTuple):
    """Records of n crops as arrays. The gains `[S, Q]` of all maps and knots are one vector of parameters."""

    entropies: Floats  # [n]
    means: Floats  # [n, S]
    offsets: Floats  # [n, J]
    logits: Floats  # [n, S, J]
    hats: Floats  # weight of each knot in the gains of each crop, [n, Q]

    @classmethod
    def of(cls, records: Sequence[Sequence[float]]) -> _Crops:
        table = np.array(records)
        num_scales = int(table[0, 1])
        entropies, means, groups = table[:, 2], table[:, 3 : 3 + num_scales], table[:, 3 + num_scales :]
        groups = groups.reshape(len(table), 1 + num_scales, -1)
        places = np.interp(np.log(table[:, 0]), np.log(_SHARES), np.arange(len(_SHARES)))
        hats = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(len(_SHARES))))
        return cls(entropies, means, groups[:, 0], groups[:, 1:], hats)

    def divergence(self, gains: Floats) -> float:
        """Return the mean divergence in nats."""
        return self._evaluate(gains)[0]

    def _evaluate(self, gains: Floats) -> tuple[float, Floats, Floats]:
        """Return the mean divergence, the gains `[n, S]` of the crops, and the probabilities `[n, J]` of the groups."""
        of_crops = self.hats @ gains.T
        exponents = self.offsets + np.einsum("ns,nsj->nj", of_crops, self.logits)
        highest = exponents.max(1, keepdims=True)
        p = np.exp(exponents - highest)
        sums = p.sum(1, keepdims=True)
        values = (highest + np.log(sums))[:, 0] - (of_crops * self.means).sum(1) - self.entropies
        return float(values.mean()), of_crops, p / sums

    def derivatives(self, gains: Floats) -> tuple[Floats, Floats]:
        """Return the gradient `[S * Q]` and the Hessian of the mean divergence."""
        _, _, p = self._evaluate(gains)
        mean = np.einsum("nj,nsj->ns", p, self.logits)
        centered = self.logits - mean[:, :, None]
        covariance = np.einsum("nj,nsj,ntj->nst", p, centered, centered)
        gradient = np.einsum("ns,nq->sq", mean - self.means, self.hats).ravel() / len(p)
        hessian = np.einsum("nst,nq,nr->sqtr", covariance, self.hats, self.hats) / len(p)
        return gradient, hessian.reshape(gains.size, gains.size)


def fit_calibration(records: Sequence[Sequence[float]]) -> Calibration | None:
    """Fit a gain to each knot of each map, minimizing the mean divergence.

    A small penalty on the first gain's distance from 1 / S and on the differences between neighboring gains keeps those of few crops
    plausible.

    Args:
        records: Results of `measure_crops`, over all shards in order.

    Returns:
        The calibration, or None without crops.
    """
    if not records:
        return None
    crops = _Crops.of(records)
    num_scales, num_knots = crops.means.shape[1], len(_SHARES)
    start = np.full((num_scales, num_knots), 1 / num_scales)
    differences = np.eye(num_knots) - np.eye(num_knots, k=-1)  # the first is the gain itself
    squares: Floats = differences.T @ differences * (2 * _SMOOTHNESS / len(records))
    penalty: Floats = np.kron(np.eye(num_scales), squares).astype(np.float64)
    gains = _minimize(crops, start, penalty)
    return Calibration(
        shares=tuple(_SHARES.round(4).tolist()),
        gains=tuple(map(tuple, gains.round(4).tolist())),
        num_crops=len(records),
        kl_before=round(crops.divergence(start), 4),
        kl_after=round(crops.divergence(gains), 4),
    )


def _minimize(crops: _Crops, start: Floats, penalty: Floats) -> Floats:
    """Minimize the divergence plus `offset @ penalty @ offset / 2`, where `offset` is the difference from the start.

    Newton's method within the range of gains. The function is convex.
    """

    def loss(gains: Floats) -> float:
        offset = (gains - start).ravel()
        return crops.divergence(gains) + float(offset @ penalty @ offset) / 2

    gains, best = start, loss(start)
    for _ in range(100):
        gradient, hessian = crops.derivatives(gains)
        gradient = gradient + penalty @ (gains - start).ravel()
        step = _bounded_step(gradient, hessian + penalty, _LEAST - gains.ravel(), _MOST - gains.ravel()).reshape(
            gains.shape
        )
        factor = 1.0
        while (value := loss(gains + factor * step)) >= best and factor > 1e-6:
            factor /= 2
        if value > best - 1e-9:
            break
        gains, best = gains + factor * step, value
    return gains


def _bounded_step(gradient: Floats, hessian: Floats, low: Floats, high: Floats) -> Floats:
    """Return the step between `low` and `high` that minimizes a quadratic function, by coordinate descent."""
    step = np.zeros_like(gradient)
    for _ in range(1000):
        largest = 0.0
        for i in range(len(step)):
            slope = gradient[i] + hessian[i] @ step
            new = min(max(step[i] - slope / hessian[i, i], low[i]), high[i])
            largest, step[i] = max(largest, abs(new - step[i])), new
        if largest < 1e-7:
            break
    return step
