"""Fit the gains of pooled logits to the annotator's answers to random crops.

A build annotates random crops of some of its images. For each crop it records the divergence of the pooled label from the answer
at a fixed list of gains, which is all that the fit needs. The records are small, so any process can annotate any shard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..data.skipped import Skipped
from ..data.sources import ImageSource
from ..labels.calibration import Calibration
from ..labels.crops import seeded_crops
from ..labels.encodings.crops import seed_of
from ..labels.label_map import LabelMap
from ..labels.view import Rows, rows_of_boxes
from .annotator import Annotator
from .crop_shard import annotate_crops, preprocess_crops
from .prefetch import load_images

Floats = npt.NDArray[np.float64]
CROPS_PER_IMAGE = 4
_SHARES = np.geomspace(0.08, 1, 4)  # knots: the smallest to the largest crop of RandomResizedCrop
_GAINS = np.geomspace(1 / 4, 8, 41)  # at which divergences are recorded; the 17th is 1
_MAX_IMAGES, _IMAGES_PER_CROPPED = 500, 20  # at most one in 20 images, so that builds of any size stay fast
_SMOOTHNESS = 0.5  # weight of the squared differences of neighboring log gains, in nats summed over crops
_FLAT = 16.0  # temperature at which no probability underflows, so that its logarithm has all logits


def num_calibrated_images(num_images: int) -> int:
    """Return the number of images of which random crops are annotated: 5 %, at most 500. None of fewer than 20 images."""
    return min(_MAX_IMAGES, num_images // _IMAGES_PER_CROPPED)


def measure_images(
    source: ImageSource, blobs: Mapping[int, bytes], annotator: Annotator, batch_size: int, num_threads: int
) -> list[list[float]]:
    """Annotate random crops of images, and measure the divergence of pooled labels from the annotator's answers.

    The crops are the first that a build of stored crops would annotate, see `labels.crops.seeded_crops`.

    Args:
        source: Source of the images.
        blobs: Stored label maps, by the index of their image in the source.
        annotator: Annotator with the classes of the dataset.
        batch_size: Number of crops per batch.
        num_threads: Number of threads that decode images.

    Returns:
        Results of `measure_crops` of all images, in order.
    """
    images = load_images(
        source,
        list(blobs),
        lambda image, key, size: preprocess_crops(annotator, image, key, size, CROPS_PER_IMAGE),
        target=None,
        num_threads=num_threads,
        num_ahead=num_threads + -(-2 * batch_size // CROPS_PER_IMAGE),
    )
    records = []
    with closing(images):
        for result in annotate_crops(images, annotator, batch_size):
            if not isinstance(result, Skipped):
                image, answers = result
                boxes, _ = seeded_crops([seed_of(source.keys[image.position])], [image.size], CROPS_PER_IMAGE)
                records += measure_crops(blobs[image.position], boxes[0], answers)
    return records


def measure_crops(blob: bytes, boxes_xyxy: Floats, answers: Tensor) -> list[list[float]]:
    """Measure the divergence of labels pooled from a label map from answers, at each gain of a fixed list.

    Args:
        blob: Stored label map.
        boxes_xyxy: Boxes of n crops `[n, 4]` in units of the whole image.
        answers: Logits of the annotator for the crops, `[n, C]`.

    Returns:
        For each crop with finite answers: its share of the image area, then the divergences in nats.
    """
    x1, y1, x2, y2 = boxes_xyxy.T
    curves = _divergences(pooled_logits(blob, rows_of_boxes(boxes_xyxy)), answers)
    records: list[list[float]] = np.column_stack([(x2 - x1) * (y2 - y1), curves]).round(5).tolist()
    return [record for record in records if np.isfinite(record).all()]


def pooled_logits(blob: bytes, views: Rows) -> Tensor:
    """Return the mean logits `[n, C]` of a stored map under views `[n, 10]`, up to a constant per view."""
    label_map = LabelMap.from_safetensors(blob)
    encoding = label_map._metadata.encoding
    encoded = label_map._encoded().changed(lambda tensor: tensor.expand(len(views), *tensor.shape[1:]))
    return encoding.pool(encoded, views, temperature=_FLAT).double().log() * _FLAT


def _divergences(pooled: Tensor, answers: Tensor) -> Floats:
    """Return KL(answer || label) in nats of labels from pooled logits `[n, C]`, at each gain, `[n, G]`."""
    log_answers = answers.double().log_softmax(1)
    probabilities = log_answers.exp()
    entropies = (probabilities * log_answers).sum(1)
    means = (probabilities * pooled).sum(1)
    norms = torch.stack([(pooled * gain).logsumexp(1) for gain in _GAINS], 1)
    divergences: Floats = (entropies[:, None] - means[:, None] * torch.from_numpy(_GAINS) + norms).numpy()
    return divergences


def fit_calibration(records: Sequence[Sequence[float]]) -> Calibration | None:
    """Fit a gain to each knot, minimizing the mean divergence.

    A small penalty on the first gain's distance from 1 and on the differences between neighboring gains keeps those of few crops
    plausible.

    Args:
        records: Results of `measure_crops`, over all shards in order.

    Returns:
        The calibration, or None without crops.
    """
    if not records:
        return None
    table = np.array(records)
    shares, curves = table[:, 0], table[:, 1:]
    positions = np.interp(np.log(shares), np.log(_SHARES), np.arange(len(_SHARES)))
    # Weight of each knot in the gain of each crop.
    weights = np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(len(_SHARES))))

    def mean_divergence(gains: Floats) -> float:
        place = np.interp(np.log(weights @ gains), np.log(_GAINS), np.arange(len(_GAINS)))
        low = np.minimum(place.astype(int), len(_GAINS) - 2)
        rows, fraction = np.arange(len(curves)), place - low
        return float((curves[rows, low] * (1 - fraction) + curves[rows, low + 1] * fraction).mean())

    def loss(gains: Floats) -> float:
        return mean_divergence(gains) + _SMOOTHNESS / len(curves) * float(
            (np.diff(np.log(gains), prepend=0) ** 2).sum()
        )

    gains = _search(loss, np.ones(len(_SHARES)))
    return Calibration(
        shares=tuple(_SHARES.round(4).tolist()),
        gains=tuple(gains.round(4).tolist()),
        num_crops=len(curves),
        kl_before=round(mean_divergence(np.ones(len(_SHARES))), 4),
        kl_after=round(mean_divergence(gains), 4),
    )


def _search(loss: Callable[[Floats], float], gains: Floats) -> Floats:
    """Minimize a loss by steps of single gains and of all gains, which are halved when none of them helps."""
    directions = [*np.eye(len(gains)), np.ones(len(gains))]
    best, step = loss(gains), 0.5
    while step > 1e-4:
        improved = False
        for direction in (sign * direction for direction in directions for sign in (1, -1)):
            candidate = np.clip(gains * np.exp(step * direction), _GAINS[0], _GAINS[-1])
            value = loss(candidate)
            if value < best:
                gains, best, improved = candidate, value, True
        step = step if improved else step / 2
    return gains
