"""Find images whose original label may be wrong.

Shapes: B images, W windows of one scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

EXPONENT = 0.3  # of the power mean, compared with others in tests/benchmarks/README.md
_DEFINITION = (
    "A label is suspect if {ranking} another class, the suggestion, first, and the margin of the label is negative. The margin is the log "
    "odds log(s / (1 - s)) of the label's support s{support}: -4.6 means a support of 1%."
)
DEFINITION = _DEFINITION.format(ranking="the map ranks", support=" in the image and its parts")
CROPS_DEFINITION = _DEFINITION.format(
    ranking="the mean label of the stored crops ranks", support=", which is its probability in the mean label"
)


def label_margins(p_label: Sequence[Tensor]) -> Tensor:
    """Compute the margin of each image's label: log odds of its support in the image and its parts.

    Of stored crops, the label of the whole image is the mean of their labels, and the only window.

    The support is a power mean of the label's probabilities in windows of several scales, which have equal weights. The
    arithmetic mean (exponent 1) is high for any class that one window of background happens to prefer. The geometric mean
    (exponent 0) is low for an object that is present but small. The exponent is in between.

    Args:
        p_label: Probability of the label in the windows of each scale, `[B, W]` each, see `labels.windows.WindowMeasures`.

    Returns:
        The margins `[B]` float64. They are negative if the support is below 50 %.

    Reference: With the whole image as the only window, the order is that of self-confidence in Northcutt, Jiang and Chuang,
    "Confident learning: estimating uncertainty in dataset labels", 2021, section 3.
    """
    log_p = [p.double().clamp_min(torch.finfo(torch.float32).tiny).log() for p in p_label]
    log_means = [torch.logsumexp(EXPONENT * scale, 1) - math.log(scale.shape[1]) for scale in log_p]
    log_support = (torch.stack(log_means, 1).logsumexp(1) - math.log(len(log_means))) / EXPONENT
    return log_support - torch.log1p(-log_support.exp().clamp_max(1 - 1e-12))


def find_suspects(images: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.int_]:
    """Find images that may have a wrong label: the annotator ranks another class first, and no part supports the label.

    Args:
        images: Columns `label`, `best` and `margin` of images, see `MapMeasures.images`.

    Returns:
        Rows of these images, sorted by increasing margin of the label.
    """
    suspects = np.flatnonzero((images["best"] != images["label"]) & (images["margin"] < 0))
    return suspects[np.argsort(images["margin"][suspects], kind="stable")]
