"""Measures in plain Python, with which those of the package are compared."""

import math


def iou(first, second):
    """Return the intersection over union of two boxes (x1, y1, x2, y2)."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return width * height / (sum(areas) - width * height)


def entropy(label):
    """Return the entropy of a soft label in nats."""
    return -sum(value * math.log(value) for value in label if value > 0)
