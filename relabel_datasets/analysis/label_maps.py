"""What label maps say of whole images, of random crops of them, and of where objects are.

Shapes: B images, C classes, K stored logits, H x W locations.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from ..data.store import LabelMaps
from ..labels.batch import LabelMapBatch
from ..labels.crops import random_resized_crops
from ..labels.encoding import Encoded
from ..labels.pooling import pool_labels
from ..labels.statistics import confident_classes
from .objects import Objects, find_objects
from .overlap import Floats, overlaps

logger = logging.getLogger(__name__)

Column = npt.NDArray[Any]
SHARE = 0.1  # of a crop's label, from which on a class counts as one of the crop's
IOU_LEVELS = (0.3, 0.5, 0.7)
_THRESHOLDS = np.linspace(0, 1, 21)[1:]  # of heatmaps, from their least value to their greatest
_BATCH_CROPS = 4096
_BATCH_MAPS = 1024


@dataclass(frozen=True)
class MapMeasures:
    """Measures of label maps, in columns of equal length each.

    Attributes:
        images: of N images: `key`; `label`, its original class; `best`, the class that the whole map ranks first; the
            probabilities `p_label` and `p_best` of these; `entropy` of the whole label in nats; `num_confident`, classes with a
            probability of at least one half at some location where they are stored.
        crops: of random crops: `image`, its place in `images`; `best`; `confidence`, the probability of `best`; `agrees`,
            whether `best` is the original class; `entropy`; `num_classes` with a share of at least 0.1; and, where objects were
            given, `best_iou`, the greatest overlap with one of the image's own class.
        places: of images with objects: `image`; `pointed`, whether the highest place of the original class's heatmap lies in an
            object of it; and `iou`, `[n, 20]`, the best overlap of an object with the box around all locations above a threshold.
    """

    images: Mapping[str, Column]
    crops: Mapping[str, Column]
    places: Mapping[str, Column]


def measure_maps(
    label_maps: LabelMaps,
    *,
    objects: Mapping[str, Objects] | None = None,
    num_crops: int = 100_000,
    num_samples: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> MapMeasures:
    """Pool whole images and random crops (`RandomResizedCrop`, 8 % to 100 % of the area) and measure their labels.

    Args:
        label_maps: of a split.
        objects: By file name without extension, see `find_objects`. Images that have none are then left out.
        num_crops: over all images, rounded up to as many of each.
        num_samples: look at this many images only, spread evenly. Default: all.
        seed: decides the crops.
        progress: whether to show a progress bar on stderr.

    Raises:
        ValueError: none of the images has objects, two that have some are called the same, or the split is empty.

    The highest place is the pointing game's (Zhang et al., "Top-down neural attention by excitation backprop", 2016), without
    its tolerance of 15 pixels: a location is larger. The overlap is that of MaxBoxAccV2 (Choe et al., "Evaluating weakly
    supervised object localization methods right", 2020), but the box is around all locations above a threshold and not around
    the largest connected ones.
    """
    if not len(label_maps):
        raise ValueError(f"split {label_maps.split.name!r} has no samples")
    by_row = {} if objects is None else _objects_by_row(label_maps, objects)
    rows = _spread(range(len(label_maps)) if objects is None else list(by_row), num_samples)
    per_image = math.ceil(num_crops / len(rows))
    size = max(1, min(256, _BATCH_CROPS // per_image))
    generator = np.random.default_rng(seed)
    images, crops, places = _Columns(), _Columns(), _Columns()
    with tqdm(total=len(rows), desc="pool", unit="img", disable=not progress) as bar:
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            encoded, keys, labels, sizes = _stack(label_maps, batch)
            images.add(key=np.array(keys), **_of_images(encoded, labels))
            boxes = random_resized_crops(np.repeat(sizes, per_image, 0), generator)
            owner = np.repeat(np.arange(len(batch)), per_image)
            found = dict(image=start + owner, **_of_crops(encoded, labels, boxes, owner))
            if objects is not None:
                names = [label_maps.manifest.classes[label] for label in labels.tolist()]
                theirs = [by_row[row].of_class(name) for row, name in zip(batch, names, strict=True)]
                found["best_iou"] = overlaps(boxes, [theirs[i] for i in owner]).best
                places.add(image=start + np.arange(len(batch)), **_of_places(encoded, labels, theirs))
            crops.add(**found)
            bar.update(len(batch))
    return MapMeasures(images.joined(), crops.joined(), places.joined())


def suspects(images: Mapping[str, Column]) -> npt.NDArray[np.int_]:
    """Return the places in `images` of those whose map ranks another class than their own first: perhaps labelled wrongly.

    By falling odds of that class against their own.
    """
    odds = np.log(np.maximum(images["p_best"], 1e-30)) - np.log(np.maximum(images["p_label"], 1e-30))
    wrong = np.flatnonzero(images["best"] != images["label"])
    return wrong[np.argsort(-odds[wrong], kind="stable")]


class _Columns:
    """Columns that grow."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Column]] = {}

    def add(self, **columns: Column) -> None:
        for name, values in columns.items():
            self._parts.setdefault(name, []).append(values)

    def joined(self) -> dict[str, Column]:
        return {name: np.concatenate(parts) for name, parts in self._parts.items()}


def _spread(rows: Sequence[int], num_samples: int | None) -> list[int]:
    if num_samples is None or num_samples >= len(rows):
        return list(rows)
    return [rows[i] for i in np.linspace(0, len(rows) - 1, num_samples).round().astype(int)]


def _objects_by_row(label_maps: LabelMaps, objects: Mapping[str, Objects]) -> dict[int, Objects]:
    """Return the objects of each sample that has any, by row, without those that were measured on an unturned image."""
    keys = list(label_maps)
    found = find_objects(keys, objects)
    by_row = {row: found[key] for row, key in enumerate(keys) if key in found}
    rows = list(by_row)
    turned = []
    for start in range(0, len(rows), _BATCH_MAPS):
        batch = rows[start : start + _BATCH_MAPS]
        for row, label_map in zip(batch, label_maps.at_rows(batch), strict=True):
            size = by_row[row].size
            if label_map.canvas_size != size and label_map.canvas_size == size[::-1]:
                turned.append(row)
    if turned:
        logger.warning(
            "%d of %d images with boxes, such as %r, are left out: EXIF turns the image, and its boxes were measured before",
            len(turned), len(rows), keys[turned[0]],
        )  # fmt: skip
        by_row = {row: each for row, each in by_row.items() if row not in set(turned)}
    if not by_row:
        raise ValueError(f"all {len(rows)} images with boxes are turned by EXIF, and their boxes were measured before")
    return by_row


def _stack(label_maps: LabelMaps, rows: list[int]) -> tuple[Encoded, list[str], Tensor, list[tuple[int, int]]]:
    """Return maps as one batch, with their keys, labels `[B]`, and sizes (height, width)."""
    maps = label_maps.at_rows(rows)
    batch = LabelMapBatch.of(maps)
    encoded = Encoded(batch.logits, batch.classes, batch.dense_base(), batch.num_classes)
    labels = torch.tensor(label_maps.index.labels[rows].astype(np.int64))
    return encoded, [label_maps.index.key(row) for row in rows], labels, [each.canvas_size for each in maps]


def _of_images(encoded: Encoded, labels: Tensor) -> dict[str, Column]:
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(labels), -1)
    soft = _pool(encoded, whole)
    p_best, best = soft.max(1)
    return {
        "label": labels.numpy(),
        "best": best.numpy(),
        "p_label": soft.gather(1, labels[:, None])[:, 0].numpy(),
        "p_best": p_best.numpy(),
        "entropy": _entropy(soft),
        "num_confident": confident_classes(encoded).sum(1).numpy(),
    }


def _of_crops(encoded: Encoded, labels: Tensor, boxes: Floats, owner: npt.NDArray[np.int_]) -> dict[str, Column]:
    """Return measures of boxes `[M, 4]`, each of the image that `owner` `[M]` says."""
    columns = _Columns()
    for start in range(0, len(boxes), _BATCH_CROPS):
        whose = torch.from_numpy(owner[start : start + _BATCH_CROPS])
        base = None if encoded.base is None else encoded.base[whose]
        some = Encoded(encoded.logits[whose], encoded.classes[whose], base, encoded.num_classes)
        soft = _pool(some, torch.from_numpy(boxes[start : start + _BATCH_CROPS]).float())
        confidence, best = soft.max(1)
        columns.add(
            best=best.numpy(),
            confidence=confidence.numpy(),
            agrees=(best == labels[whose]).numpy(),
            entropy=_entropy(soft),
            num_classes=(soft >= SHARE).sum(1).numpy(),
        )
    return columns.joined()


def _of_places(encoded: Encoded, labels: Tensor, boxes: list[Floats]) -> dict[str, Column]:
    heatmaps, is_stored = _heatmaps(encoded, labels)
    height, width = heatmaps.shape[1:]
    y, x = np.divmod(heatmaps.reshape(len(heatmaps), -1).argmax(1), width)
    points = np.stack([(x + 0.5) / width, (y + 0.5) / height], 1)
    pointed = [
        stored and bool(((theirs[:, :2] <= point) & (point <= theirs[:, 2:])).all(1).any())
        for stored, point, theirs in zip(is_stored, points, boxes, strict=True)
    ]
    found = _boxes_above(heatmaps)
    found[~is_stored] = 0
    count = len(_THRESHOLDS)
    iou = overlaps(found.reshape(-1, 4), [theirs for theirs in boxes for _ in range(count)]).best
    return {"pointed": np.array(pointed), "iou": np.where(is_stored[:, None], iou.reshape(-1, count), 0)}


def _heatmaps(encoded: Encoded, labels: Tensor) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Return `[B, H, W]` logits of the images' own classes, in 0..1 from least to greatest; and `[B]`: which vary."""
    logits, own = encoded.logits.float(), labels[:, None, None, None]
    base = logits.new_zeros(len(labels)) if encoded.base is None else encoded.base.gather(1, labels[:, None])[:, 0]
    base = base[:, None, None, None].float()
    heatmaps = (base + ((logits - base) * (encoded.classes == own)).sum(1, keepdim=True))[:, 0].double().numpy()
    low = heatmaps.min((1, 2), keepdims=True)
    spread = heatmaps.max((1, 2), keepdims=True) - low
    varies = spread.ravel() > 0
    return (heatmaps - low) / np.where(spread > 0, spread, 1), varies


def _boxes_above(heatmaps: Floats) -> Floats:
    """Return `[B, 20, 4]`: the box around all locations at or above each threshold, in 0..1."""
    above = heatmaps[:, None] >= _THRESHOLDS[:, None, None] - 1e-9
    sides = []
    for axis, length in ((2, heatmaps.shape[2]), (3, heatmaps.shape[1])):  # columns, then rows
        line = np.asarray(above.any(axis))
        sides += [line.argmax(-1) / length, 1 - line[..., ::-1].argmax(-1) / length]
    return np.stack([sides[0], sides[2], sides[1], sides[3]], -1)


def _pool(encoded: Encoded, boxes: Tensor) -> Tensor:
    return pool_labels(
        encoded.logits, encoded.classes, boxes, num_classes=encoded.num_classes, base=encoded.base
    )  # fmt: skip


def _entropy(soft: Tensor) -> Column:
    """Return `[B]` entropies in nats."""
    entropy: Column = torch.special.entr(soft).sum(1).numpy()
    return entropy
