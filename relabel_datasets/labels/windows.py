"""Labels of windows of an image: which classes an image shows, and where its original label is supported.

A softmax over few classes is confident even where it sees only background. There, its *lead* (log odds of the best class
against the second) is small compared with the lead where it sees an object. A lead does not change if a constant is added to
all logits of a location.

Shapes: B images, C classes, W windows of one scale.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from .encodings.base import Encoded
from .view import rows_of_boxes

SCALES = (
    (1.0, 1),
    (0.7, 2),
    (0.4, 5),
)  # side of a window as a share of the image's, and number of positions along each side
MIN_PROBABILITY = 0.5  # of a class that a window shows
MIN_LEAD = 0.15  # of a class that a window shows, as a share of the largest lead of any window of the image
_SIDE, _STEPS = SCALES[-1]
DEFINITION = (
    f"An image shows a class if one of {_STEPS**2} windows, each {_SIDE:.0%} of the image's width and height, gives it a "
    f"probability of at least {MIN_PROBABILITY:.0%}, and a lead over the second class (log odds) of at least {MIN_LEAD:.0%} of "
    "the largest lead in any window of the image."
)
MIN_CROPS = 0.05  # share of the stored crops of an image that show a class
CROPS_DEFINITION = f"An image shows a class if at least {MIN_CROPS:.0%} of its stored crops give it a probability of at least {MIN_PROBABILITY:.0%}."


def shown_definition(*, has_maps: bool) -> str:
    """Return what it means that an image shows a class, by its label map or by its stored crops."""
    return DEFINITION if has_maps else CROPS_DEFINITION


class WindowMeasures(NamedTuple):
    """Measures of the windows or stored crops of B images.

    Attributes:
        whole: Soft labels of the whole images, `[B, C]`. For stored crops, the mean of their labels.
        shown: Classes that the images show, see `DEFINITION` and `CROPS_DEFINITION`, `[B, C]` bool.
        p_label: Probability of the original label in the windows of each scale, from the whole image to the smallest windows,
            `[B, W]` float32 each. For stored crops, the probability in the label of the whole image is the only one.
    """

    whole: Tensor
    shown: Tensor
    p_label: tuple[Tensor, ...]


def measure_windows(encoded: Encoded, labels: Tensor) -> WindowMeasures:
    """Pool the labels of all windows, and measure them.

    Args:
        encoded: Encoded maps of B images.
        labels: Original class indices `[B]`.

    Returns:
        The measures of the windows.
    """
    index = labels.to(encoded.logits.device)[:, None]
    p_label: list[Tensor] = []
    whole = pool_box(encoded, (0, 0, 1, 1))
    top: list[tuple[Tensor, Tensor]] = []  # of the last scale
    for side, steps in SCALES:
        p_of_scale, top = [], []
        for box in window_boxes(side, steps):
            soft = whole if steps == 1 else pool_box(encoded, box)
            p_of_scale.append(soft.gather(1, index))
            top.append(soft.topk(2))
        p_label.append(torch.cat(p_of_scale, 1))
    values, indices = (torch.stack(parts, 1) for parts in zip(*top, strict=True))
    return WindowMeasures(whole, _shown_classes(values, indices, encoded.num_classes), tuple(p_label))


def measure_stored_crops(soft_labels: Tensor, labels: Tensor) -> WindowMeasures:
    """Measure the labels of stored crops.

    Args:
        soft_labels: Soft labels of the N crops of each of B images, `[B, N, C]`.
        labels: Original class indices `[B]`.

    Returns:
        The measures of the crops.
    """
    whole = soft_labels.mean(1)
    num_shown = (soft_labels >= MIN_PROBABILITY).sum(1)
    shown = num_shown >= max(1.0, MIN_CROPS * soft_labels.shape[1])
    return WindowMeasures(whole, shown, (whole.gather(1, labels[:, None]),))


def _shown_classes(p: Tensor, indices: Tensor, num_classes: int) -> Tensor:
    """Return the classes `[B, C]` that windows show, from the probabilities and indices `[B, W, 2]` of their best two classes."""
    log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log()
    lead = log_p[..., 0] - log_p[..., 1]
    is_shown = (p[..., 0] >= MIN_PROBABILITY) & (lead >= MIN_LEAD * lead.amax(1, keepdim=True))
    return p.new_zeros(len(p), num_classes).scatter_add(1, indices[..., 0], is_shown.to(p.dtype)) > 0


def window_boxes(side: float, steps: int) -> list[tuple[float, float, float, float]]:
    """Return the boxes of the windows of a scale, xyxy in units of the whole image, row by row.

    Args:
        side: Side of a window, as a share of the image's.
        steps: Number of positions along each side.
    """
    starts = [i * (1 - side) / max(1, steps - 1) for i in range(steps)]
    return [(x, y, x + side, y + side) for y, x in itertools.product(starts, starts)]


def pool_box(encoded: Encoded, box_xyxy: tuple[float, float, float, float]) -> Tensor:
    """Pool one box of all images.

    Args:
        encoded: Encoded maps of B images.
        box_xyxy: Box in units of the whole image, 0..1.

    Returns:
        Soft labels `[B, C]`.
    """
    return encoded.encoding.pool(encoded, rows_of_boxes([box_xyxy] * len(encoded.logits)))
