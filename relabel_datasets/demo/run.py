"""`run_demo`: Run the demo end to end: scenes, annotator, shards, students, figures, a table of results, and a report."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..data.datasets import RelabelDataset
from ..report.html_report import write_report
from ..report.overlay import save_overlays
from ..storage.local import write_atomically
from ..words import counted
from .dataset import CONFIG, PICTURES, make_scenes_relabel
from .scenes import read_objects
from .students import METHODS, DemoRecipe, PicturesInMemory, Score, train_demo_student

logger = logging.getLogger(__name__)

_COLUMNS = ("labels", "single-label accuracy", "multi-label accuracy", "recall of all classes", "s / epoch")
_NEXT = """
Figures of label maps: {overlays}
Load the scenes in a script:
    import relabel_datasets as rd
    dataset = rd.load_dataset({dataset!r}, split="train")   # or "scenes-relabel", generated in the cache on first use
Build label maps of your own images with any timm model:
    relabel build IMAGES OUT --annotator resnet50.a1_in1k
Open this report in a browser to see the pooled labels of crops:
{report}
"""


@dataclass(frozen=True)
class DemoResult:
    """Result of `run_demo`.

    Attributes:
        scores: Scores by method, one per seed.
        annotator: Single-label and multi-label accuracy of the label maps, pooled over whole pictures, in 0..1.
        dataset: Folder of the scenes with their label maps.
        overlays: Paths of the figures of label maps.
        report: Path of the HTML report of the validation scenes.
        seconds: Duration of the demo in seconds.
    """

    scores: Mapping[str, Sequence[Score]]
    annotator: tuple[float, float]
    dataset: Path
    overlays: Sequence[Path]
    report: Path
    seconds: float

    def next_steps(self) -> str:
        """Return a text with results to view and commands to run next. Its last line is the path of the report."""
        return _NEXT.format(overlays=self.overlays[0].parent, dataset=str(self.dataset), report=self.report.absolute())

    def to_markdown(self) -> str:
        """Return a Markdown table of all methods, with mean and standard deviation over the seeds on the validation scenes."""
        lines = ["| " + " | ".join(_COLUMNS) + " |", "| --- |" + " ---: |" * (len(_COLUMNS) - 1)]
        for name, scores in self.scores.items():
            accuracies = [_percent([score[i] for score in scores]) for i in range(3)]
            epoch = statistics.mean(score.seconds_per_epoch for score in scores)
            lines.append("| " + " | ".join([name, *accuracies, f"{epoch:.2f}"]) + " |")
        single, multi = self.annotator
        lines.append(f"| (the annotator itself) | {single:.1%} | {multi:.1%} | | |")
        return "\n".join(lines) + "\n"


def run_demo(
    out: Path,
    *,
    seeds: int = 3,
    recipe: DemoRecipe = DemoRecipe(),
    echo: Callable[[str], object] = logger.info,
) -> DemoResult:
    """Generate scenes with label maps, train students with and without label maps, and compare them.

    Takes less than 4 minutes on two cores. The students differ only in their labels. The scenes in `out/scenes-relabel` are
    reused if they exist.

    Args:
        out: Folder for the scenes, the figures (`overlays/`), the table (`table.md`) and the report (`report.html`).
        seeds: Number of students per method, with the seeds 0, 1, ... Default: 3.
        recipe: Training settings of the students.
        echo: Function that is called with progress messages. Default: log them.

    Returns:
        The scores of the students, and the paths of the files.

    Raises:
        ValueError: `seeds` is not positive.

    Example:
        >>> print(run_demo(Path("relabel-demo")).to_markdown())
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    start = time.perf_counter()
    root = out / "scenes-relabel"
    if not root.exists():
        make_scenes_relabel(root)
    train, validation = (RelabelDataset(root, CONFIG, split) for split in ("train", "validation"))
    overlays = save_overlays(validation, out / "overlays")
    boxes = root / PICTURES / "validation-boxes.csv"
    objects = read_objects(boxes)
    present = {key: [scene_object.label for scene_object in scene] for key, scene in objects.items()}
    echo(f"training {len(METHODS) * seeds} students: {len(METHODS)} methods, {counted(seeds, 'seed')} each")
    validation_pictures = PicturesInMemory(validation)
    scores = _train_all(PicturesInMemory(train), validation_pictures, present, seeds, recipe)
    annotator = _score_label_maps(validation_pictures, present)
    report = write_report(root, out / "report.html", CONFIG, "validation", boxes=boxes, progress=False)
    result = DemoResult(scores, annotator, root, overlays, report, time.perf_counter() - start)
    write_atomically(out / "table.md", result.to_markdown().encode())
    echo(f"done in {result.seconds:.0f} s")
    return result


def _train_all(
    train: PicturesInMemory,
    validation: PicturesInMemory,
    present: Mapping[str, Sequence[int]],
    seeds: int,
    recipe: DemoRecipe,
) -> dict[str, list[Score]]:
    scores: dict[str, list[Score]] = {method.name: [] for method in METHODS}
    with tqdm(total=len(METHODS) * seeds * recipe.epochs, desc="training students", unit="epoch", leave=False) as bar:
        for seed in range(
            seeds
        ):  # methods in the inner loop, so that changes in the speed of the machine affect all of them
            for method in METHODS:
                bar.set_postfix_str(f"{method.name}, seed {seed}")
                score = train_demo_student(train, validation, present, method, seed, recipe=recipe, on_epoch=bar.update)
                scores[method.name].append(score)
    return scores


def _score_label_maps(validation: PicturesInMemory, present: Mapping[str, Sequence[int]]) -> tuple[float, float]:
    single = multi = 0
    for _, label_map in validation.samples:
        assert label_map.key is not None
        best = int(label_map.dense().mean((1, 2)).argmax())
        single += best == label_map.label
        multi += best in present[label_map.key]
    return single / len(validation), multi / len(validation)


def _percent(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.1%}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"
