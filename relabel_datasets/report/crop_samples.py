"""Content of the HTML report of stored crops: boxes, flips and the strongest classes of each label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ..data.store import LabelMaps
from ..labels.crop_labels import CropLabels
from ..labels.crops import to_pixels
from ..labels.statistics import total
from .html_content import Fact
from .html_samples import ReadImage, embedded_picture

NUM_STORED = 5  # classes of each label in the page


def crop_content(
    label_maps: LabelMaps,
    rows: Sequence[int],
    names: Sequence[str],
    read_image: ReadImage | None,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Return the template variables of the samples and their statistics.

    Args:
        label_maps: Crop labels of the split.
        rows: Rows of the samples in the page.
        names: Legible names of the classes, by index.
        read_image: Function that reads the image of a row. None leaves images out.
        progress: Whether to show a progress bar on stderr. Default: True.
    """
    samples, best = [], []
    for row in tqdm(rows, desc="samples", unit="img", disable=not progress):
        labels = label_maps.at(row)
        assert isinstance(labels, CropLabels)
        mean = labels.mean_label()
        best.append(int(mean.argmax()))
        image = None if read_image is None else embedded_picture(read_image(row))
        samples.append({**_describe(labels), "mean": _strongest(mean), "image": image})
    index = {"key": [label_maps.index.key(row) for row in rows], "label": label_maps.index.labels[rows].tolist()}
    return {
        "index": {"classes": list(names), "samples": {**index, "best": best}},
        "samples": samples,
        "num_stored": NUM_STORED,
        "about_labels": list(_facts(label_maps)),
    }


def _describe(labels: CropLabels) -> dict[str, Any]:
    soft = labels.soft_labels()
    return {
        "size": list(labels.canvas_size),
        "boxes": to_pixels(labels.boxes_xyxy, labels.canvas_size).tolist(),
        "flips": labels.flips.int().tolist(),
        "labels": [_strongest(label) for label in soft],
    }


def _strongest(soft_label: Tensor) -> list[tuple[int, float]]:
    """Return the class indices and probabilities of the strongest classes of a label `[C]`, best first."""
    values, indices = soft_label.topk(min(NUM_STORED, len(soft_label)))
    return [(index, round(value, 4)) for value, index in zip(values.tolist(), indices.tolist(), strict=True)]


def _facts(label_maps: LabelMaps) -> Iterator[Fact]:
    split = label_maps.split
    if split.agreement is not None:
        yield Fact("Mean labels agree with labels", f"{split.agreement:.1%}")
    statistics = total(split.shard_statistics)
    if statistics.crops:
        kl, same = statistics.kl / statistics.crops, statistics.same_best / statistics.crops
        yield Fact("KL from the annotator's labels", f"{kl:.3f} nats", f"same top class in {same:.1%} of the crops")
