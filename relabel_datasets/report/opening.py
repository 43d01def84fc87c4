"""Choose the sample and the crop that an HTML report opens on.

Shapes: B images, W windows or stored crops, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..data.store import LabelMaps
from ..labels.batch import LabelMapBatch
from ..labels.crop_labels import CropLabels
from ..labels.windows import SCALES, pool_box, window_boxes

# The windows of `labels.windows.DEFINITION`.
_BOXES = [(round(x1, 3), round(y1, 3), round(x2, 3), round(y2, 3)) for x1, y1, x2, y2 in window_boxes(*SCALES[-1])]
_BATCH_IMAGES = 64


class Opening(NamedTuple):
    """What a report opens on.

    Attributes:
        sample: Row of the sample among those of the report.
        crop: Number of the crop among the windows or the stored crops of the sample.
        box: Box of the window, xyxy in units of the whole image. None for a stored crop, which has a box in the page.
    """

    sample: int
    crop: int
    box: tuple[float, float, float, float] | None


def opening_view(label_maps: LabelMaps, images: Mapping[str, npt.NDArray[Any]]) -> Opening:
    """Choose the most instructive of some images: the one whose crops have the most different labels.

    The crops of an image with a label map are its windows, see `labels.windows.DEFINITION`. Otherwise, they are its stored crops.

    The image is the one with the largest `disagreement`, among those that show several classes and whose map, or mean label of
    the stored crops, agrees with their label. If there are none, it is chosen among all images. The first image wins a tie. The
    crop is the one in which a class other than the label has the highest probability.

    Args:
        label_maps: Label maps or stored crops of the split.
        images: Measures of at least one image, see `analysis.label_maps.measure_images`.

    Returns:
        The image and the crop.
    """
    candidates = np.flatnonzero((images["num_shown"] > 1) & (images["best"] == images["label"]))
    if not len(candidates):
        candidates = np.arange(len(images["key"]))
    rows = [row for key in images["key"][candidates].tolist() if (row := label_maps.index.row(key)) is not None]
    best = int(torch.cat([disagreement(soft) for soft in _crop_labels(label_maps, rows)]).argmax())
    other = next(_crop_labels(label_maps, [rows[best]]))[0]
    other[:, int(images["label"][candidates[best]])] = 0
    crop = int(other.amax(1).argmax())
    return Opening(int(candidates[best]), crop, _BOXES[crop] if label_maps.manifest.has_maps else None)


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


def _crop_labels(label_maps: LabelMaps, rows: Sequence[int]) -> Iterator[Tensor]:
    """Yield the soft labels `[B, W, C]` of the windows or of the stored crops of some images after the other."""
    for start in range(0, len(rows), _BATCH_IMAGES):
        stored = label_maps.at_rows(rows[start : start + _BATCH_IMAGES])
        if label_maps.manifest.has_maps:
            encoded = LabelMapBatch.of(stored).encoded
            encoded = encoded.encoding.unpacked(encoded)
            yield torch.stack([pool_box(encoded, box) for box in _BOXES], 1)
        else:  # one by one: images may have many crops
            yield from (labels.soft_labels()[None] for labels in stored if isinstance(labels, CropLabels))
