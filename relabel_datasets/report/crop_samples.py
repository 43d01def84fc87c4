"""Content of the HTML report of stored crops: boxes, flips and the strongest classes of each label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ..data.store import LabelMaps
from ..labels.crop_labels import CropLabels
from ..labels.crops import to_pixels
from .html_samples import ReadImage, embedded_picture

NUM_STORED = 5  # classes of each label in the page


def crop_samples(
    label_maps: LabelMaps, keys: Sequence[str], read_image: ReadImage | None, *, progress: bool = True
) -> Iterator[dict[str, Any]]:
    """Yield the crops of each sample with the strongest classes of their labels, and a small JPEG in base64 or None (`image`).

    Args:
        label_maps: Crop labels of the split.
        keys: Keys of the samples.
        read_image: Function that reads the image of a row. None leaves images out.
        progress: Whether to show a progress bar on stderr. Default: True.
    """
    for key in tqdm(keys, desc="samples", unit="img", disable=not progress):
        row = label_maps.index.row(key)
        assert row is not None
        labels = label_maps.at(row)
        assert isinstance(labels, CropLabels)
        yield {**_describe(labels), "image": None if read_image is None else embedded_picture(read_image(row))}


def _describe(labels: CropLabels) -> dict[str, Any]:
    soft = labels.soft_labels()
    return {
        "size": list(labels.canvas_size),
        "boxes": to_pixels(labels.boxes_xyxy, labels.canvas_size).tolist(),
        "flips": labels.flips.int().tolist(),
        "labels": [_strongest(label) for label in soft],
        "mean": _strongest(soft.mean(0)),
    }


def _strongest(soft_label: Tensor) -> list[tuple[int, float]]:
    """Return the class indices and probabilities of the strongest classes of a label `[C]`, best first."""
    values, indices = soft_label.topk(min(NUM_STORED, len(soft_label)))
    return [(index, round(value, 4)) for value, index in zip(values.tolist(), indices.tolist(), strict=True)]
