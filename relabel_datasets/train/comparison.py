"""Which annotator, and which kind of labels, teaches best: label maps scored, and students trained on them, side by side."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..analysis.metrics import Metrics
from ..annotate.annotator import Annotator
from ..data.datasets import RelabelDataset
from ..data.store import LabelMaps
from ..labels.label_map import View
from ..labels.pooling import pool_label_map
from ..storage.folders import local_path
from ..storage.local import write_atomically
from .loop import train_student
from .recipe import Recipe, RuntimeConfig

_MOST = 50_000  # label maps that a score looks at


@dataclass(frozen=True)
class ComparisonEntry:
    """One row of a comparison.

    Attributes:
        name: of the row.
        recipe: how it is trained; its seed is replaced by each of the comparison's.
        load: returns the images to learn from and those to validate on.
        annotator: makes the annotator that answers to crops, where the recipe distils.
    """

    name: str
    recipe: Recipe
    load: Callable[[], tuple[RelabelDataset, RelabelDataset]]
    annotator: Callable[[], Annotator] | None = None


@dataclass(frozen=True)
class Comparison:
    """What students came to.

    Attributes:
        metrics: for each student, by name, one dict of metrics a seed, see `Metrics`.
        seconds: for each student, of training an epoch, by seed.
    """

    metrics: Mapping[str, Sequence[Mapping[str, float]]]
    seconds: Mapping[str, Sequence[float]]

    def to_markdown(self) -> str:
        """Return a table: mean and standard deviation over seeds, and the time of an epoch against the first row's."""
        names = [name for name in ("top1", "top5", "real", "multi_label", "map", "ece") if name in self._first]
        lines = [
            "| labels | " + " | ".join(names) + " | s / epoch | over the first |",
            "| --- |" + " ---: |" * (len(names) + 2),
        ]
        baseline = statistics.median(next(iter(self.seconds.values())))
        for student, runs in self.metrics.items():
            cells = [_percent([run[name] for run in runs]) for name in names]
            seconds = statistics.median(self.seconds[student])
            lines.append("| " + " | ".join([student, *cells, f"{seconds:.1f}", f"{seconds / baseline:.2f}"]) + " |")
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """Return all of it as JSON."""
        return json.dumps({"metrics": dict(self.metrics), "seconds_per_epoch": dict(self.seconds)}, indent=1)

    @property
    def _first(self) -> Mapping[str, float]:
        return next(iter(self.metrics.values()))[0]


def compare(
    students: Sequence[ComparisonEntry], out: Path | str, *, seeds: int = 3, runtime: RuntimeConfig = RuntimeConfig()
) -> Comparison:
    """Train each student with seeds 0, 1, ... and return what came out; runs that are there are gone on with.

    Students come one after another within a seed, so that a machine that slows down slows all of them.

    Args:
        students: the rows; all names differ.
        out: folder, with a run in `<name>/seed-<n>` for each.
        seeds: how many of each.
        runtime: how the machine is used.

    Raises:
        ValueError: no seeds, or names that are not unique.
    """
    names = [student.name for student in students]
    if seeds < 1 or not names or len(set(names)) < len(names):
        raise ValueError(f"expected at least one seed, and students of different names, got {seeds} and {names}")
    metrics: dict[str, list[Mapping[str, float]]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(seeds):
        for student in students:
            result = _run(student, local_path(out, "out=") / student.name / f"seed-{seed}", seed, runtime)
            metrics[student.name].append(result["metrics"])
            seconds[student.name].append(result["seconds_per_epoch"])
    return Comparison(metrics, seconds)


def _run(student: ComparisonEntry, folder: Path, seed: int, runtime: RuntimeConfig) -> dict[str, Any]:
    """Train a student, unless its result is there."""
    recipe = student.recipe.changed(seed=seed)
    path = folder / "result.json"
    described = dict(vars(recipe))
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["recipe"] == described:
            return found
    dataset, validation = student.load()
    annotator = None if student.annotator is None else student.annotator()
    trained = train_student(dataset, folder, recipe, validation=validation, annotator=annotator, runtime=runtime)
    result = {
        "recipe": described,
        "metrics": dict(trained.metrics),
        "seconds_per_epoch": trained.seconds / recipe.epochs,
    }
    write_atomically(path, json.dumps(result, indent=1).encode())
    return result


def score_label_maps(label_maps: LabelMaps) -> dict[str, float]:
    """Return how well label maps, pooled whole, know their images' own labels: the metrics of `Metrics` with labels.

    Of more than 50,000 maps, as many are looked at, spread evenly.
    """
    metrics = Metrics(len(label_maps.manifest.classes))
    rows = np.unique(np.linspace(0, len(label_maps) - 1, min(len(label_maps), _MOST)).astype(int))
    for batch in np.array_split(rows, -(-len(rows) // 1024)):
        maps = [label_maps.at(int(row)) for row in batch]
        soft = torch.stack([pool_label_map(each, View()) for each in maps])
        metrics.update(soft.clamp_min(1e-30).log(), torch.as_tensor(label_maps.index.labels[batch].astype(np.int64)))
    return metrics.compute()


def _percent(values: Sequence[float]) -> str:
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"
