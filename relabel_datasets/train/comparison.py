"""Compare annotators and kinds of labels: score label maps, and train students on them."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..analysis.metrics import Metrics
from ..annotate.annotator import Annotator
from ..data.datasets import RelabelDataset
from ..data.store import LabelMaps
from ..keywords import checked_keywords
from ..labels.crop_labels import CropLabels
from ..labels.pooling import pool_label_map
from ..labels.reading import Labels
from ..labels.view import WHOLE
from ..storage.folders import local_path
from ..storage.local import write_atomically
from .evaluation import LabeledImages
from .loop import train_student
from .recipe import Recipe, RuntimeConfig

logger = logging.getLogger(__name__)

_MAX_SCORED_MAPS = 50_000


@dataclass(frozen=True)
class ComparisonEntry:
    """One row of a comparison.

    Attributes:
        name: Name of the row.
        recipe: Recipe of the students. Its seed is replaced by each seed of the comparison.
        load: Function that returns the training dataset and the validation images.
        annotator: Function that returns the annotator of a recipe with distilled labels. Default: none.
    """

    name: str
    recipe: Recipe
    load: Callable[[], tuple[RelabelDataset, LabeledImages | None]]
    annotator: Callable[[], Annotator] | None = None


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`.

    Attributes:
        metrics: Metrics by name of the entry, one dict per seed, see `Metrics`.
        seconds: Training time of an epoch in seconds by name of the entry, one value per seed.
    """

    metrics: Mapping[str, Sequence[Mapping[str, float]]]
    seconds: Mapping[str, Sequence[float]]

    def to_markdown(self) -> str:
        """Return a table of means and standard deviations over seeds in per cent, and of times relative to the first row."""
        first = next(iter(self.metrics.values()))[0]
        names = [name for name in ("top1", "top5", "real", "multi_label", "map", "ece") if name in first]
        lines = [
            "| labels | " + " | ".join(f"{name}, %" for name in names) + " | s / epoch | relative to the first |",
            "| --- |" + " ---: |" * (len(names) + 2),
        ]
        baseline = statistics.median(next(iter(self.seconds.values())))
        for entry, runs in self.metrics.items():
            cells = [_percent([run[name] for run in runs]) for name in names]
            seconds = statistics.median(self.seconds[entry])
            lines.append("| " + " | ".join([entry, *cells, f"{seconds:.1f}", f"{seconds / baseline:.2f}"]) + " |")
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """Return all metrics and times as JSON."""
        return json.dumps({"metrics": dict(self.metrics), "seconds_per_epoch": dict(self.seconds)}, indent=1)


@checked_keywords()
def compare(
    entries: Sequence[ComparisonEntry], out: Path | str, *, seeds: int = 3, runtime: RuntimeConfig = RuntimeConfig()
) -> Comparison:
    """Train one student per entry and seed. Existing runs are resumed.

    All entries are trained with seed 0, then all with seed 1, and so on, so that a machine that slows down affects all of them.

    Args:
        entries: Rows of the comparison, with unique names.
        out: Folder of the runs. Each run is in `<name>/seed-<seed>`.
        seeds: Number of seeds per entry, at least 1. Default: 3.
        runtime: Use of the machine. Default: `RuntimeConfig()`.

    Returns:
        The metrics and times of all runs.

    Raises:
        ValueError: There are no entries or no seeds, or names are repeated.
    """
    names = [entry.name for entry in entries]
    if seeds < 1:
        raise ValueError(f"seeds= must be at least 1, got {seeds}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"entries= must be at least one entry, each with a unique name, got the names {names}")
    metrics: dict[str, list[Mapping[str, float]]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(seeds):
        for position, entry in enumerate(entries, start=seed * len(entries) + 1):
            logger.info("student %d of %d: %s, seed %d", position, seeds * len(entries), entry.name, seed)
            result = _run(entry, local_path(out, "out=") / entry.name / f"seed-{seed}", seed, runtime)
            metrics[entry.name].append(result["metrics"])
            seconds[entry.name].append(result["seconds_per_epoch"])
    return Comparison(metrics, seconds)


def check_validation(validation: LabeledImages | None) -> None:
    """Raise ValueError if there are no validation images."""
    if validation is None:
        raise ValueError("students are compared on validation images, but there are none: give validation_images=")


def _run(entry: ComparisonEntry, folder: Path, seed: int, runtime: RuntimeConfig) -> dict[str, Any]:
    """Train a student, unless its result exists."""
    recipe = entry.recipe.changed(seed=seed)
    path = folder / "result.json"
    recipe_values = dict(vars(recipe))
    if path.is_file():
        previous: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if previous["recipe"] == recipe_values:
            return previous
    dataset, validation = entry.load()
    check_validation(validation)
    annotator = None if entry.annotator is None else entry.annotator()
    trained = train_student(dataset, folder, recipe, validation=validation, annotator=annotator, runtime=runtime)
    result = {
        "recipe": recipe_values,
        "metrics": dict(trained.metrics),
        "seconds_per_epoch": trained.seconds / recipe.epochs,
    }
    write_atomically(path, json.dumps(result, indent=1).encode())
    return result


def score_label_maps(label_maps: LabelMaps) -> dict[str, float]:
    """Evaluate label maps, pooled over the whole image, against the classes of their images; for stored crops, mean labels.

    Args:
        label_maps: Label maps to score. If there are more than 50,000, only 50,000 evenly spaced ones are scored.

    Returns:
        The metrics of a classifier that predicts the pooled labels, see `Metrics`.
    """
    metrics = Metrics(len(label_maps.manifest.classes))
    rows = np.unique(np.linspace(0, len(label_maps) - 1, min(len(label_maps), _MAX_SCORED_MAPS)).astype(int))
    for batch in np.array_split(rows, -(-len(rows) // 1024)):
        soft_labels = torch.stack([_label_of_image(label_maps.at(int(row))) for row in batch])
        class_indices = torch.as_tensor(label_maps.index.labels[batch].astype(np.int64))
        metrics.update(soft_labels.clamp_min(1e-30).log(), class_indices)
    return metrics.compute()


def _label_of_image(labels: Labels) -> Tensor:
    """Return the soft label `[C]` of a whole image."""
    return labels.mean_label() if isinstance(labels, CropLabels) else pool_label_map(labels, WHOLE)


def _percent(values: Sequence[float]) -> str:
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"
