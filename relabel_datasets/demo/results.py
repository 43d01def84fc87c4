"""Results of the demo: a table, and one sentence of conclusion computed from its numbers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .scoring import Score

BASELINE, METHOD = "single label", "ReLabel"
_MEASURES = ("the main object", "any object", "random crops")  # in the order of `Score`


@dataclass(frozen=True)
class DemoResult:
    """Result of `run_demo`.

    Attributes:
        scores: Scores of the students by kind of label, one per seed. It has the keys "single label" and "ReLabel".
        annotator: Score of the label maps, pooled over whole scenes and under crops.
        dataset: Folder of the scenes with their label maps.
        overlays: Paths of the figures of label maps.
        report: Path of the HTML report of the validation scenes.
        seconds: Duration of the demo in seconds.
    """

    scores: Mapping[str, Sequence[Score]]
    annotator: Score
    dataset: Path
    overlays: Sequence[Path]
    report: Path
    seconds: float

    def to_markdown(self) -> str:
        """Return a Markdown table with mean and standard deviation over the seeds, and the conclusion below it."""
        lines = ["| labels | main object | any object | random crops |", "| --- | ---: | ---: | ---: |"]
        for name, scores in [*self.scores.items(), ("the annotator", [self.annotator])]:
            lines.append("| " + " | ".join([name, *map(_percent, zip(*scores, strict=True))]) + " |")
        return "\n".join([*lines, "", self.conclusion(), ""])

    def conclusion(self) -> str:
        """Return a sentence: what ReLabel gains or costs compared with single labels, and whether the annotator is better."""
        return f"{_comparison(self.scores[BASELINE], self.scores[METHOD])}; {_annotator_clause(self.scores, self.annotator)}."


def _comparison(baseline: Sequence[Score], method: Sequence[Score]) -> str:
    differences = [
        [100 * (after - before) for before, after in zip(*pair, strict=True)]
        for pair in zip(zip(*baseline, strict=True), zip(*method, strict=True), strict=True)
    ]
    if len(baseline) == 1:
        points = [f"{values[0]:+.1f} points on {name}" for name, values in zip(_MEASURES, differences, strict=True)]
        return (
            f"{METHOD} differs from {BASELINE} by {_listed(points)}, but one seed cannot tell a difference from chance"
        )
    gains: list[str] = []
    losses: list[str] = []
    unclear: list[str] = []
    for name, values in zip(_MEASURES, differences, strict=True):
        mean, spread = statistics.mean(values), statistics.stdev(values)
        if abs(mean) > 2 * spread:
            (gains if mean > 0 else losses).append(f"{abs(mean):.1f} ± {spread:.1f} points on {name}")
        else:
            unclear.append(f"{name} ({mean:+.1f} ± {spread:.1f} points)")
    parts = [f"gains {_listed(gains)}"] if gains else []
    parts += [f"loses {_listed(losses)}"] if losses else []
    parts += [f"makes no difference beyond two standard deviations on {_listed(unclear)}"] if unclear else []
    return f"Compared with {BASELINE}, {METHOD} {_listed(parts)}"


def _annotator_clause(scores: Mapping[str, Sequence[Score]], annotator: Score) -> str:
    """Return whether the annotator is better than every student of every kind."""
    best = [max(values) for values in zip(*(score for row in scores.values() for score in row), strict=True)]
    is_above = [value > student for value, student in zip(annotator, best, strict=True)]
    above, below = (
        [name for name, flag in zip(_MEASURES, is_above, strict=True) if flag is wanted] for wanted in (True, False)
    )
    if not below:
        return f"the annotator is above every student on {_listed(above)}"
    start = f"above every student on {_listed(above)}, but not" if above else "not above every student"
    return f"the annotator is {start} on {_listed(below, 'or')}, where its label maps are a weak teacher"


def _listed(items: Sequence[str], word: str = "and") -> str:
    """Return "a", "a and b", or "a, b and c"."""
    return f" {word} ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def _percent(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.1%}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"
