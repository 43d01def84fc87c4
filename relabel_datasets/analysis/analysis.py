"""`analyze`: Measure a dataset, boxes of objects, or both; return numbers and tables."""

from __future__ import annotations

import csv
import io
import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..data.store import LabelMaps
from ..keywords import checked_keywords
from ..labels.calibration import Calibration
from ..labels.crops import random_resized_crops
from ..labels.statistics import total
from ..labels.windows import shown_definition
from ..shards.manifest import Manifest, Split
from ..storage.folders import Folder
from ..storage.resolve import open_folder
from ..words import printable
from . import suspects
from .batches import SHARE
from .boxes import read_boxes
from .label_maps import IOU_LEVELS, MapMeasures, measure_maps
from .object_measures import ObjectMeasures
from .objects import Objects, in_classes
from .overlap import Overlaps, overlaps, share_above

_BINS = np.linspace(0, 1, 11)  # of intersection over union
SEVERAL = "images that show several classes, share"
SUSPECT = "images with a suspect label"
_FORMULA = ("=", "+", "-", "@")  # first characters of formulas in spreadsheets
_INDENT = " " * 6  # of definitions in text


@dataclass(frozen=True)
class Table:
    """Rows of values under column names.

    Attributes:
        columns: Names of the columns.
        rows: Rows, each with one value per column.
    """

    columns: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]

    def to_csv(self) -> str:
        """Return the table as CSV text.

        Names of a dataset are made safe for terminals and spreadsheets: control characters are escaped, see `printable`, and a
        name that a spreadsheet would compute as a formula (`=1+1`) starts with an apostrophe, as OWASP recommends.

        Returns:
            A header line and one line per row. NaN becomes an empty cell.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([[_csv_cell(value) for value in row] for row in self.rows])
        return text.getvalue()


@dataclass(frozen=True)
class Analysis:
    """Result of `analyze`.

    Attributes:
        summary: Values by topic and name. Shares are in 0..1, entropies in nats.
        tables: Tables by name.
        definitions: Definitions of values, by the name of the value.
    """

    summary: Mapping[str, Mapping[str, Any]]
    tables: Mapping[str, Table]
    definitions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the summary and the tables as JSON.

        Returns:
            An object with the fields `summary` and `tables`; each table is a list of objects, one per row.
        """
        tables = {
            name: [dict(zip(table.columns, map(_rounded, row), strict=True)) for row in table.rows]
            for name, table in self.tables.items()
        }
        summary = {
            topic: {name: _rounded(value) for name, value in values.items()} for topic, values in self.summary.items()
        }
        return json.dumps({"summary": summary, "tables": tables}, indent=1)

    def __str__(self) -> str:
        lines = []
        for topic, values in self.summary.items():
            lines.append(topic)
            for name, value in values.items():
                lines.append(f"  {name:<52} {_shown(name, value)}")
                definition = self.definitions.get(name, "")
                lines += textwrap.wrap(definition, 100, initial_indent=_INDENT, subsequent_indent=_INDENT)
        return "\n".join(lines)


@checked_keywords()
def analyze(
    path: str | os.PathLike[str] | Folder | None = None,
    config: str | None = None,
    split: str = "train",
    *,
    boxes: str | os.PathLike[str] | None = None,
    num_crops: int = 100_000,
    num_samples: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Analysis:
    """Measure crop-object overlap and statistics of label maps or stored crops.

    - Of a dataset: number of classes in images and crops, pairs of confused classes, images whose label may be wrong, fidelity of the
      stored labels to the annotator's output, and the gains of calibrated labels.
    - Of boxes: overlap of random crops (`RandomResizedCrop`, 8 % to 100 % of the area) with the objects.
    - Of both, for the images that have boxes: confidence and agreement by overlap, and how well heatmaps localize the objects. Stored
      crops have no heatmaps.

    Args:
        path: Dataset, as for `load_dataset`. Images are not read. Default: boxes only.
        config: Name of the config. Default: the only config of the dataset.
        split: Name of the split. Default: "train".
        boxes: File or folder of boxes, see `read_boxes`. Samples are matched by file name without extension, or by the id of a
            COCO image, see `find_objects`. Classes are matched by name; a warning lists object classes that match none.
        num_crops: Number of random crops over all images, rounded up to a multiple of the number of images. Of stored crops, the first
            ones of each image are measured, at most all. Default: 100,000.
        num_samples: Number of images to measure, spread evenly over the split. Default: all.
        seed: Seed of the random crops. Default: 0.
        progress: Whether to show progress bars on stderr. Default: True.

    Returns:
        The numbers by topic and the tables by name.

    Raises:
        FileNotFoundError: The dataset or the boxes do not exist.
        ValueError: Neither a dataset nor boxes are given, they have no image in common, a number is not positive, or a file is
            corrupt.

    Example:
        >>> print(analyze("scenes-relabel", split="validation"))
    """
    if path is None and boxes is None:
        raise ValueError("nothing to analyze: give a dataset, boxes, or both")
    for name, value in (("num_crops", num_crops), ("num_samples", num_samples)):
        if value is not None and value < 1:
            raise ValueError(f"{name}= must be at least 1, got {value}")
    objects = None if boxes is None else read_boxes(boxes, progress=progress)
    summary: dict[str, dict[str, Any]] = {}
    tables: dict[str, Table] = {}
    definitions: dict[str, str] = {}
    if objects is not None:
        crop_overlaps = _crop_overlaps(list(objects.values()), num_crops, seed)
        summary["crops and objects"] = {
            "images with boxes": len(objects),
            "boxes": sum(len(image_objects.boxes_xyxy) for image_objects in objects.values()),
            "crops": len(crop_overlaps.best),
            **{f"share above IoU 0.5, {name}": share_above(iou) for name, iou in crop_overlaps._asdict().items()},
        }
        tables["overlap"] = _histogram(crop_overlaps)
    if path is not None:
        folder = open_folder(path)
        label_maps = LabelMaps(folder, config, split)
        manifest, split_entry = label_maps.manifest, label_maps.split
        measures = measure_maps(
            label_maps,
            objects=None if objects is None else in_classes(objects, manifest.classes),
            num_crops=num_crops,
            num_samples=num_samples,
            seed=seed,
            progress=progress,
        )
        topic = "label maps" if manifest.has_maps else "stored crops"
        summary[topic] = {
            **_map_summary(measures),
            **_split_fidelity(split_entry, "dense" if manifest.has_maps else "annotated"),
            **_calibration_summary(split_entry.calibration),
        }
        definitions = {
            SEVERAL: shown_definition(has_maps=manifest.has_maps),
            SUSPECT: suspects.DEFINITION if manifest.has_maps else suspects.CROPS_DEFINITION,
        }
        tables.update(_map_tables(measures, manifest.classes))
        tables["fidelity"] = _fidelity_table(folder, label_maps)
        if split_entry.calibration is not None:
            tables["calibration"] = _calibration_table(split_entry.calibration, manifest.map_sizes)
        if measures.objects is not None:
            summary[f"{topic} and objects"] = _object_summary(measures.objects)
            tables["by_overlap"] = _overlap_table(measures.objects)
    return Analysis(summary, tables, definitions)


def _crop_overlaps(objects: Sequence[Objects], num_crops: int, seed: int) -> Overlaps:
    per_image = -(-num_crops // len(objects))
    sizes = np.repeat([image_objects.size for image_objects in objects], per_image, 0)
    crops = random_resized_crops(sizes, np.random.default_rng(seed))
    return overlaps(crops, [image_objects.boxes_xyxy for image_objects in objects for _ in range(per_image)])


def _histogram(crop_overlaps: Overlaps) -> Table:
    counts = [np.histogram(iou, _BINS)[0].tolist() for iou in crop_overlaps]
    rows = zip(_BINS[:-1].tolist(), _BINS[1:].tolist(), *counts, strict=True)
    return Table(("iou_from", "iou_to", *Overlaps._fields), list(rows))


def _map_summary(measures: MapMeasures) -> dict[str, Any]:
    images, crops = measures.images, measures.crops
    return {
        "images": len(images["key"]),
        "images that agree with their label, share": _mean(images["best"] == images["label"]),
        "classes that an image shows": _mean(images["num_shown"]),
        SEVERAL: _mean(images["num_shown"] > 1),
        SUSPECT: len(suspects.find_suspects(images)),
        "entropy of whole images": _mean(images["entropy"]),
        "crops": len(crops["best"]),
        "crops that agree with their image's label, share": _mean(crops["agrees"]),
        f"classes of at least {SHARE:.0%} in a crop's label": _mean(crops["num_classes"]),
        f"crops with several classes of at least {SHARE:.0%}, share": _mean(crops["num_classes"] > 1),
        "confidence of crops": _mean(crops["confidence"]),
        "entropy of crops": _mean(crops["entropy"]),
    }


def _split_fidelity(split: Split, reference: str = "dense") -> dict[str, Any]:
    """Return how well stored labels match those of `reference`; empty unless the build measured it."""
    statistics = total(split.shard_statistics)
    if not statistics.crops:
        return {}
    return {
        f"KL of {reference} from stored labels, nats": statistics.kl / statistics.crops,
        f"crops of the same best class as {reference}, share": statistics.same_best / statistics.crops,
    }


def _fidelity_table(folder: Folder, label_maps: LabelMaps) -> Table:
    """Return the fidelity of all configs of the dataset, so that encodings can be compared."""
    configs = folder.configs()
    manifests = [label_maps.manifest] if configs is None else [Manifest.read(folder.child(name)) for name in configs]
    rows = []
    for manifest in manifests:
        encoding = manifest.encoding
        for split in manifest.splits.values():
            if fidelity := _split_fidelity(split):
                kept = manifest.map_sizes if manifest.has_maps else [[encoding["num_crops"]]]
                size = "+".join("x".join(map(str, (*one, len(manifest.classes)))) for one in kept)
                encoded = encoding["name"], encoding["k"], encoding["dtype"]
                rows.append((manifest.config, split.name, size, *encoded, *fidelity.values()))
    return Table(("config", "split", "map", "encoding", "k", "dtype", "kl", "same_best"), rows)


def _calibration_summary(calibration: Calibration | None) -> dict[str, Any]:
    """Return how well pooled labels match the annotator's answers to crops; empty unless the build measured it."""
    if calibration is None:
        return {}
    return {
        "KL of answers to crops from pooled labels, nats": calibration.kl_before,
        "KL of answers to crops from calibrated labels, nats": calibration.kl_after,
        "crops annotated for calibration": calibration.num_crops,
    }


def _calibration_table(calibration: Calibration, map_sizes: Sequence[Sequence[int]]) -> Table:
    several = len(calibration.gains) > 1
    names = [f"gain_{height}x{width}" for height, width in map_sizes] if several else ["gain"]
    return Table(("area_share", *names), list(zip(calibration.shares, *calibration.gains, strict=True)))


def _object_summary(measures: ObjectMeasures) -> dict[str, Any]:
    iou, confidence = measures.crops["best_iou"], measures.crops["confidence"]
    return {
        "images": len(measures.keys),
        **_localization_summary(measures),
        "crops": len(iou),
        "share above IoU 0.5, best": share_above(iou),
        "confidence above IoU 0.5": _mean(confidence[iou > 0.5]),
        "confidence without overlap": _mean(confidence[iou == 0]),
    }


def _localization_summary(measures: ObjectMeasures) -> dict[str, Any]:
    if not measures.localization:
        return {"localization": "needs label maps"}
    accuracies = [_localized_share(measures.localization["iou"], level) for level in IOU_LEVELS]
    return {
        "pointing game, share": _mean(measures.localization["pointed"]),
        **{f"localised at IoU {level}, share": value for level, value in zip(IOU_LEVELS, accuracies, strict=True)},
        "localised, mean of these, share": float(np.mean(accuracies)),
    }


def _localized_share(iou: Any, level: float) -> float:
    """Return the share of images localized at an IoU level, with the heatmap threshold that is best over all images."""
    return float((iou >= level).mean(0).max())


def _overlap_table(measures: ObjectMeasures) -> Table:
    crops = measures.crops
    bins = np.clip(np.digitize(crops["best_iou"], _BINS) - 1, 0, len(_BINS) - 2)
    rows: list[tuple[Any, ...]] = []
    for i, (low, high) in enumerate(zip(_BINS[:-1].tolist(), _BINS[1:].tolist(), strict=True)):
        chosen = bins == i
        rows.append((low, high, int(chosen.sum()), _mean(crops["confidence"][chosen]), _mean(crops["agrees"][chosen])))
    return Table(("iou_from", "iou_to", "crops", "confidence", "agreement"), rows)


def _map_tables(measures: MapMeasures, classes: Sequence[str]) -> dict[str, Table]:
    images, crops = measures.images, measures.crops
    highest_count = int(max(images["num_shown"].max(), crops["num_classes"].max()))
    class_counts = [
        (count, _mean(images["num_shown"] == count), _mean(crops["num_classes"] == count))
        for count in range(highest_count + 1)
    ]
    per_class = []
    for label, name in enumerate(classes):
        chosen = images["label"] == label
        columns = (images["best"] == label, images["p_label"], images["entropy"], images["num_shown"])
        per_class.append((name, int(chosen.sum()), *(_mean(column[chosen]) for column in columns)))
    differs = images["label"] != images["best"]
    pairs, counts = np.unique(np.stack([images["label"][differs], images["best"][differs]]), axis=1, return_counts=True)
    confused = [
        (classes[label], classes[best], int(count))
        for label, best, count in sorted(zip(*pairs.tolist(), counts.tolist(), strict=True), key=lambda row: -row[2])
    ]
    suspect_rows = [
        (str(images["key"][i]), classes[images["label"][i]], classes[images["best"][i]], float(images["margin"][i]))
        for i in suspects.find_suspects(images).tolist()
    ]
    return {
        "num_classes": Table(("classes", "images_shown", f"crops_share_{SHARE}"), class_counts),
        "classes": Table(("class", "images", "agreement", "p_label", "entropy", "num_shown"), per_class),
        "confused": Table(("label", "best", "images"), confused),
        "suspects": Table(("key", "label", "suggestion", "margin"), suspect_rows),
    }


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return None if np.isnan(value) else round(value, 6)
    return value


def _csv_cell(value: Any) -> Any:
    if not isinstance(value, str):
        return _rounded(value)
    name = printable(value)
    return f"'{name}" if name.startswith(_FORMULA) else name


def _shown(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if np.isnan(value):  # no images or crops
        return "-"
    return f"{value:.1%}" if "share" in name or "confidence" in name else f"{value:.3f}"
