"""`analyze`: all that can be counted of a dataset, of boxes, or of both, as numbers and tables."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.store import LabelMaps
from ..labels.crops import random_resized_crops
from ..labels.statistics import CONFIDENT, Statistics, add_up
from ..shards.manifest import Manifest, Split
from ..storage.folders import Folder
from ..storage.resolve import open_folder
from .boxes import read_boxes
from .label_maps import IOU_LEVELS, SHARE, MapMeasures, measure_maps, suspects
from .objects import Objects, in_classes
from .overlap import Overlaps, overlaps, share_above

_BINS = np.linspace(0, 1, 11)  # of intersection over union


@dataclass(frozen=True)
class Table:
    """Rows of numbers and texts, under names."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]

    def to_csv(self) -> str:
        """Return it as CSV, the names first; what is not a number there (NaN) is empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([[_rounded(value) for value in row] for row in self.rows])
        return text.getvalue()


@dataclass(frozen=True)
class Analysis:
    """What was counted.

    Attributes:
        summary: numbers by topic and name; shares are 0..1, entropies in nats.
        tables: by name.
    """

    summary: Mapping[str, Mapping[str, Any]]
    tables: Mapping[str, Table]

    def to_json(self) -> str:
        """Return all of it as JSON."""
        tables = {
            name: [dict(zip(table.columns, map(_rounded, row), strict=True)) for row in table.rows]
            for name, table in self.tables.items()
        }
        summary = {
            topic: {name: _rounded(value) for name, value in each.items()} for topic, each in self.summary.items()
        }
        return json.dumps({"summary": summary, "tables": tables}, indent=1)

    def __str__(self) -> str:
        lines = []
        for topic, numbers in self.summary.items():
            lines.append(topic)
            lines += [f"  {name:<52} {_shown(name, value)}" for name, value in numbers.items()]
        return "\n".join(lines)


def analyze(
    dataset: str | os.PathLike[str] | Folder | None = None,
    name: str | None = None,
    split: str = "train",
    *,
    boxes: str | os.PathLike[str] | None = None,
    num_crops: int = 100_000,
    num_samples: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Analysis:
    """Count what crops, label maps and objects have to do with each other.

    Of a dataset: how many classes images and crops show, which classes are taken for each other, which images' maps disagree
    with their labels, and how close the stored maps are to the annotator's. Of boxes: how much random crops overlap the objects
    (`RandomResizedCrop` of 8 % to 100 % of the area). Of both, for the images that have boxes: how confidence and agreement
    follow the overlap, and how well the heatmaps find the objects.

    Args:
        dataset: as `load_dataset` takes it; images are not read. Default: boxes alone.
        name: the config; may be left out where there is only one.
        split: of the dataset.
        boxes: File or folder of boxes, see `read_boxes`. Samples are found by file name without extension, or by the id of a
            COCO image, see `find_objects`. Classes are found by name; the log lists those that are not.
        num_crops: over all images, rounded up to as many of each.
        num_samples: look at this many images only, spread evenly. Default: all.
        seed: decides the crops.
        progress: whether to show progress bars on stderr.

    Raises:
        FileNotFoundError: no such dataset or boxes.
        ValueError: neither is given, they have no image in common, numbers are not positive, or a file is bad.
    """
    if dataset is None and boxes is None:
        raise ValueError("nothing to analyse: give a dataset, boxes, or both")
    if num_crops < 1 or (num_samples is not None and num_samples < 1):
        raise ValueError(f"num_crops and num_samples must be at least 1, got {num_crops} and {num_samples}")
    objects = None if boxes is None else read_boxes(boxes, progress=progress)
    summary: dict[str, dict[str, Any]] = {}
    tables: dict[str, Table] = {}
    if objects is not None:
        found = _overlaps_of(list(objects.values()), num_crops, seed)
        summary["crops and objects"] = {
            "images with boxes": len(objects),
            "boxes": sum(len(each.boxes_xyxy) for each in objects.values()),
            "crops": len(found.best),
            **{f"share above IoU 0.5, {key}": share_above(values) for key, values in found._asdict().items()},
        }
        tables["overlap"] = _histogram(found)
    if dataset is not None:
        folder = open_folder(dataset)
        label_maps = LabelMaps(folder, name, split)
        options: dict[str, Any] = {
            "num_crops": num_crops,
            "num_samples": num_samples,
            "seed": seed,
            "progress": progress,
        }
        measures = measure_maps(label_maps, **options)
        summary["label maps"] = {**_summary(measures), **_fidelity_of(label_maps.split)}
        tables.update(_tables(measures, label_maps.manifest.classes))
        tables["fidelity"] = _fidelity(folder, label_maps)
        if objects is not None:
            objects = in_classes(objects, label_maps.manifest.classes)
            measures = measure_maps(label_maps, objects=objects, **options)
            summary["label maps and objects"] = _summary_of_places(measures)
            tables["by_overlap"] = _by_overlap(measures)
    return Analysis(summary, tables)


def _overlaps_of(objects: Sequence[Objects], num_crops: int, seed: int) -> Overlaps:
    per_image = -(-num_crops // len(objects))
    sizes = np.repeat([each.size for each in objects], per_image, 0)
    crops = random_resized_crops(sizes, np.random.default_rng(seed))
    return overlaps(crops, [each.boxes_xyxy for each in objects for _ in range(per_image)])


def _histogram(found: Overlaps) -> Table:
    counts = [np.histogram(values, _BINS)[0].tolist() for values in found]
    rows = zip(_BINS[:-1].tolist(), _BINS[1:].tolist(), *counts, strict=True)
    return Table(("iou_from", "iou_to", *Overlaps._fields), list(rows))


def _summary(measures: MapMeasures) -> dict[str, Any]:
    images, crops = measures.images, measures.crops
    return {
        "images": len(images["key"]),
        "images that agree with their label, share": _mean(images["best"] == images["label"]),
        "confident classes an image": _mean(images["num_confident"]),
        "images of several confident classes, share": _mean(images["num_confident"] > 1),
        "entropy of whole images": _mean(images["entropy"]),
        "crops": len(crops["best"]),
        "crops that agree with their image's label, share": _mean(crops["agrees"]),
        "classes a crop": _mean(crops["num_classes"]),
        "crops of several classes, share": _mean(crops["num_classes"] > 1),
        "confidence of crops": _mean(crops["confidence"]),
        "entropy of crops": _mean(crops["entropy"]),
    }


def _fidelity_of(split: Split) -> dict[str, Any]:
    """Return what was measured against the dense logits as the maps of a split were made, if it was."""
    found = add_up([Statistics(), *split.shard_statistics])
    if not found.crops:
        return {}
    return {
        "KL of dense from stored labels, nats": found.kl / found.crops,
        "crops of the same best class as dense, share": found.same_best / found.crops,
    }


def _fidelity(folder: Folder, label_maps: LabelMaps) -> Table:
    """Return the same of all configs beside the one of the maps, so that encodings can be compared."""
    configs = folder.configs()
    manifests = [label_maps.manifest] if configs is None else [Manifest.read(folder.child(name)) for name in configs]
    rows = []
    for manifest in manifests:
        encoding = manifest.encoding
        for split in manifest.splits.values():
            if found := _fidelity_of(split):
                size = "x".join(map(str, (*encoding["map_size"], len(manifest.classes))))
                encoded = encoding["name"], encoding["k"], encoding["dtype"]
                rows.append((manifest.config, split.name, size, *encoded, *found.values()))
    return Table(("config", "split", "map", "encoding", "k", "dtype", "kl", "same_best"), rows)


def _summary_of_places(measures: MapMeasures) -> dict[str, Any]:
    accuracies = [_mean_above(measures.places["iou"], level) for level in IOU_LEVELS]
    return {
        "images": len(measures.images["key"]),
        "pointing game, share": _mean(measures.places["pointed"]),
        **{f"localised at IoU {level}, share": value for level, value in zip(IOU_LEVELS, accuracies, strict=True)},
        "localised, mean of these, share": float(np.mean(accuracies)),
        "crops": len(measures.crops["best"]),
        "share above IoU 0.5, best": share_above(measures.crops["best_iou"]),
        "confidence above IoU 0.5": _mean(measures.crops["confidence"][measures.crops["best_iou"] > 0.5]),
        "confidence without overlap": _mean(measures.crops["confidence"][measures.crops["best_iou"] == 0]),
    }


def _mean_above(iou: Any, level: float) -> float:
    """Return the share of images localised at a level, with the threshold of heatmaps that is best for all of them."""
    return float((iou >= level).mean(0).max())


def _by_overlap(measures: MapMeasures) -> Table:
    crops = measures.crops
    place = np.clip(np.digitize(crops["best_iou"], _BINS) - 1, 0, len(_BINS) - 2)
    rows: list[tuple[Any, ...]] = []
    for i, (low, high) in enumerate(zip(_BINS[:-1].tolist(), _BINS[1:].tolist(), strict=True)):
        chosen = place == i
        rows.append((low, high, int(chosen.sum()), _mean(crops["confidence"][chosen]), _mean(crops["agrees"][chosen])))
    return Table(("iou_from", "iou_to", "crops", "confidence", "agreement"), rows)


def _tables(measures: MapMeasures, classes: Sequence[str]) -> dict[str, Table]:
    images, crops = measures.images, measures.crops
    most = int(max(images["num_confident"].max(), crops["num_classes"].max()))
    numbers = [
        (count, _mean(images["num_confident"] == count), _mean(crops["num_classes"] == count))
        for count in range(most + 1)
    ]
    per_class = []
    for label, name in enumerate(classes):
        chosen = images["label"] == label
        columns = (images["best"] == label, images["p_label"], images["entropy"], images["num_confident"])
        per_class.append((name, int(chosen.sum()), *(_mean(column[chosen]) for column in columns)))
    found = suspects(images)
    pairs, counts = np.unique(np.stack([images["label"][found], images["best"][found]]), axis=1, return_counts=True)
    confused = [
        (classes[label], classes[best], int(count))
        for label, best, count in sorted(zip(*pairs.tolist(), counts.tolist(), strict=True), key=lambda row: -row[2])
    ]
    listed = [
        (str(images["key"][i]), classes[images["label"][i]], classes[images["best"][i]], float(images["p_label"][i]),
         float(images["p_best"][i]))
        for i in found.tolist()
    ]  # fmt: skip
    return {
        "num_classes": Table(("classes", f"images_confident_{CONFIDENT}", f"crops_share_{SHARE}"), numbers),
        "classes": Table(("class", "images", "agreement", "p_label", "entropy", "num_confident"), per_class),
        "confused": Table(("label", "best", "images"), confused),
        "suspects": Table(("key", "label", "best", "p_label", "p_best"), listed),
    }


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return None if np.isnan(value) else round(value, 6)
    return value


def _shown(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1%}" if "share" in name or "confidence" in name else f"{value:.3f}"
