"""Rows of the students of `students.py`, and their results as tables and a figure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LABELS: Mapping[str, Mapping[str, Any]] = {  # values of the recipe by kind of labels
    "single label": {"labels": "single"},
    "label smoothing": {"labels": "smoothed"},
    "ReLabel": {"labels": "relabel"},
    "ReLabel + CutMix": {"labels": "relabel", "cutmix": 1.0},
    "ReLabel, temperature 3": {"labels": "relabel", "temperature": 3.0},
    "ReLabel, calibrated": {"labels": "relabel", "calibrated": True},
    "ReLabel, two scales": {"labels": "relabel", "calibrated": True},
    "stored crops": {"labels": "relabel"},
    "global multi-label": {"labels": "global-multi"},
    "localized single label": {"labels": "localized-single"},
    "online distillation": {"labels": "distilled"},
}
CONFIGS = {"ReLabel, two scales": "scales", "stored crops": "crops"}  # by kind of labels; all others: maps
FROM_DATASET = ("single label", "label smoothing")  # learn from the labels of the dataset, which can be wrong
_COLORS = ("#D55E00", "#CC79A7", "#0072B2", "#009E73")  # Okabe and Ito, "Color Universal Design", 2008


class Table(NamedTuple):
    """Students of a table."""

    images: str  # name of the images and of the file of results
    labels: Sequence[str]
    noise: Sequence[int] = (0,)  # wrong labels in per cent

    @property
    def rows(self) -> list[tuple[str, int]]:
        """Kinds of labels with the share of wrong labels in per cent, in the order of training."""
        return [(name, n) for name in self.labels for n in self.noise if n == 0 or name in FROM_DATASET]


_FOUR = ("single label", "ReLabel", "ReLabel + CutMix", "label smoothing")
TABLES = {
    "noise": Table("few", _FOUR, (0, 40, 20)),
    "few": Table("few", tuple(LABELS)),
    "mosaics": Table("mosaics", _FOUR),
    "all": Table("all", tuple(LABELS)),
}


def read_results(path: Path) -> dict[str, Any]:
    """Return the content of a file of results."""
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return results


def runs_of(results: Mapping[str, Any], labels: str, noise: int) -> list[dict[str, Any]]:
    """Return the results of a row, one per seed. Labels from label maps are not affected by noise."""
    noise = noise if labels in FROM_DATASET else 0
    return [run for run in results["runs"] if (run["labels"], run["noise"]) == (labels, noise)]


def to_markdown(results: Mapping[str, Any], table: Table) -> str:
    """Return the rows of a table that have results."""
    lines = [
        "| labels | wrong labels | accuracy | seeds | on the training photos | wrong labels learned | training loss | ms per step |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for labels in sorted(table.labels, key=list(LABELS).index):
        for noise in sorted(table.noise) if labels in FROM_DATASET else [0]:
            if runs := runs_of(results, labels, noise):
                any_noise = len(table.noise) > 1 and labels not in FROM_DATASET
                cells = [labels, "any" if any_noise else f"{noise} %", *_cells(runs)]
                seconds = results.get("seconds_per_step", {}).get(labels)  # measured when all students are trained
                cells.append("" if seconds is None else f"{1000 * seconds:.0f}")
                lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| labels of random crops, from the label maps | |", "| --- | ---: |"]
    lines += [f"| {name} | {value:.3f} |" for name, value in results["label_maps"].items()]
    return "\n".join(lines)


def _cells(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    learned = [run["wrong_labels_learned"] for run in runs if run["wrong_labels_learned"] is not None]
    return [
        _mean_and_spread([run["accuracy"] for run in runs]),
        str(len(runs)),
        _mean_and_spread([run["accuracy_on_training_photos"] for run in runs]),
        _mean_and_spread(learned) if learned else "",
        f"{statistics.mean(run['training_loss'][-1] for run in runs):.2f}",
    ]


def _mean_and_spread(values: Sequence[float]) -> str:
    """Return the mean and the sample standard deviation in per cent."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def draw(results: Mapping[str, Any], table: Table, path: Path) -> None:
    """Draw the accuracy against the share of wrong labels, with the standard deviation as a band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.subplots()
    for labels, color, marker in zip(
        sorted(table.labels, key=list(LABELS).index), _COLORS, ("o", "s", "", ""), strict=True
    ):
        points = {noise: runs_of(results, labels, noise) for noise in sorted(table.noise)}
        values = {noise: [100 * run["accuracy"] for run in runs] for noise, runs in points.items() if runs}
        if not values:
            continue
        means = np.array([statistics.mean(accuracies) for accuracies in values.values()])
        spread = np.array([statistics.stdev(both) if len(both) > 1 else 0.0 for both in values.values()])
        name = labels if labels in FROM_DATASET else f"{labels}, which does not use these labels"
        axes.plot(list(values), means, color=color, marker=marker, label=name)
        axes.fill_between(list(values), means - spread, means + spread, color=color, alpha=0.2, linewidth=0)
    axes.set_xlabel("wrong training labels, %")
    axes.set_ylabel("accuracy on validation photos, %")
    axes.set_xticks(sorted(table.noise))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120, facecolor="white", metadata={"Software": None})
