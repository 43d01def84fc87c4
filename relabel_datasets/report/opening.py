"""Choose the sample and the crop that an HTML report opens on.

Shapes: B images, W windows, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..data.store import LabelMaps
from ..labels.batch import LabelMapBatch
from ..labels.windows import SCALES, pool_box, window_boxes

_BOXES = window_boxes(*SCALES[-1])  # the windows of `labels.windows.DEFINITION`
_BATCH_IMAGES = 64


class Opening(NamedTuple):
    """What a report opens on.

    Attributes:
        sample: Row of the sample among those of the report.
        box: Box of the crop, xyxy in units of the whole image.
    """

    sample: int
    box: tuple[float, float, float, float]


def opening_view(label_maps: LabelMaps, images: Mapping[str, npt.NDArray[Any]]) -> Opening:
    """Choose the most instructive of some images: the one whose crops have the most different labels.

    It is the image with the largest `disagreement`, among those that show several classes and whose map agrees with their
    label. If there are none, it is chosen among all images. The first image wins a tie. The box is the window of this image in
    which a class other than the label has the highest probability.

    Args:
        label_maps: Label maps of the split.
        images: Measures of at least one image, see `analysis.label_maps.measure_images`.

    Returns:
        The image and the box.
    """
    candidates = np.flatnonzero((images["num_shown"] > 1) & (images["best"] == images["label"]))
    if not len(candidates):
        candidates = np.arange(len(images["key"]))
    rows = [row for key in images["key"][candidates].tolist() if (row := label_maps.index.row(key)) is not None]
    batches = [rows[start : start + _BATCH_IMAGES] for start in range(0, len(rows), _BATCH_IMAGES)]
    best = int(torch.cat([disagreement(_window_labels(label_maps, batch)) for batch in batches]).argmax())
    other = _window_labels(label_maps, [rows[best]])[0]
    other[:, int(images["label"][candidates[best]])] = 0
    x1, y1, x2, y2 = (round(edge, 3) for edge in _BOXES[int(other.amax(1).argmax())])
    return Opening(int(candidates[best]), (x1, y1, x2, y2))


def disagreement(soft_labels: Tensor) -> Tensor:
    """Measure how different the labels of an image's crops are: the entropy of their mean, minus the mean of their entropies.

    The measure is 0 if all crops have the same label, and ln 2 if two halves of them are certain of two classes. Uncertain crops,
    such as those of background, add little.

    Args:
        soft_labels: Soft labels of the crops of B images, `[B, W, C]`.

    Returns:
        The disagreement of each image in nats, `[B]`.

    Reference: This is the generalized Jensen-Shannon divergence of Lin, "Divergence measures based on the Shannon entropy", 1991.
    """
    of_mean: Tensor = torch.special.entr(soft_labels.mean(1)).sum(1)
    mean_of: Tensor = torch.special.entr(soft_labels).sum(2).mean(1)
    return of_mean - mean_of


def _window_labels(label_maps: LabelMaps, rows: Sequence[int]) -> Tensor:
    """Return the soft labels `[B, W, C]` of the windows of images."""
    encoded = LabelMapBatch.of(label_maps.at_rows(list(rows))).encoded
    encoded = encoded.encoding.unpacked(encoded)
    return torch.stack([pool_box(encoded, box) for box in _BOXES], 1)
