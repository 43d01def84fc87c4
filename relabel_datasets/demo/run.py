"""`run_demo`: Run the demo end to end: scenes, label maps, figures, students, a table of results, and a report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from ..data.datasets import RelabelDataset
from ..errors import DatasetError
from ..report.html_report import write_report
from ..report.overlay import save_overlays
from ..storage.local import write_atomically
from ..train.recipe import Recipe
from ..words import counted
from .annotator import load_demo_annotator
from .dataset import CONFIG, PICTURES, make_scenes_relabel
from .results import DemoResult
from .scenes import read_objects
from .scoring import Score, ScoringScenes
from .students import KINDS, RECIPE, train_demo_student

logger = logging.getLogger(__name__)

Echo = Callable[[str], object]

_SCENES = """\
1. Draw scenes, and run an annotator over them. A scene shows a main object, its only label, and up to three smaller objects.
   The annotator is a small classifier that comes with this package, trained on other pictures. Its class scores at 8 x 8
   locations of a scene are the label map of the scene."""
_FIGURES = """\
2. Draw label maps over validation scenes: {folder}"""
_STUDENTS = """\
3. Train {students} from scratch, {epochs} each, on random crops. They differ only in their labels:
   single label: the main object, whatever the crop shows. Label smoothing: the same, with 10% spread over all classes.
   ReLabel: the label map under the crop, which says what the crop shows."""
_REPORT = """\
4. Write a report of the validation scenes, in which crops can be dragged: {report}"""
_SCORES = """\
5. Accuracy on {scenes} that no student has seen. Main object: the best class is the label of the scene. Any object:
   it is one of the objects in the scene. Random crops: it is the object that covers most of the crop."""


def run_demo(out: Path, *, seeds: int = 3, recipe: Recipe = RECIPE, echo: Echo = logger.info) -> DemoResult:
    """Draw scenes, annotate them, train students on different labels, and compare the students.

    Takes less than 3 minutes on two cores. An interrupted demo resumes when it is run again: the scenes and the epochs that are
    complete are kept. More seeds only add students.

    Args:
        out: Folder for the scenes (`scenes-relabel/`), the figures (`overlays/`), the runs of the students (`students/`), the
            table (`table.md`) and the report (`report.html`).
        seeds: Number of students per kind of label, with the seeds 0, 1, ... Default: 3.
        recipe: Recipe of the students, whose labels and seed are replaced.
        echo: Function that is called with lines that explain each step. Default: log them.

    Returns:
        The scores of the students and the annotator, and the paths of the files.

    Raises:
        ValueError: `seeds` is not positive, or `out` contains students with another recipe.
        DatasetError: (a ValueError) The scenes in `out` were annotated by another version of this package.

    Example:
        >>> print(run_demo(Path("relabel-demo")).to_markdown())
    """
    if seeds < 1:
        raise ValueError(f"seeds= must be at least 1, got {seeds}")
    start = time.perf_counter()
    root, report = out / "scenes-relabel", out / "report.html"
    echo(_SCENES)
    _make_scenes(root)
    train, validation = (RelabelDataset(root, CONFIG, split) for split in ("train", "validation"))
    echo(_FIGURES.format(folder=out / "overlays"))
    overlays = save_overlays(validation, out / "overlays")
    boxes = root / PICTURES / "validation-boxes.csv"
    scoring = ScoringScenes(
        validation,
        read_objects(boxes),
        image_size=recipe.eval_size or recipe.image_size,
        crop_size=recipe.image_size,
        min_area=recipe.min_area,
    )
    echo(_STUDENTS.format(students=counted(len(KINDS) * seeds, "student"), epochs=counted(recipe.epochs, "epoch")))
    scores = _train_all(train, scoring, out / "students", seeds, recipe, echo)
    echo(_REPORT.format(report=report))
    write_report(root, report, CONFIG, "validation", boxes=boxes, progress=False)
    echo(_SCORES.format(scenes=counted(len(validation), "scene")))
    result = DemoResult(scores, scoring.score_label_maps(), root, overlays, report, time.perf_counter() - start)
    write_atomically(out / "table.md", result.to_markdown().encode())
    return result


def _make_scenes(root: Path) -> None:
    """Make the scenes, or check that those that exist were annotated by this annotator."""
    if not root.exists():
        make_scenes_relabel(root)
    elif RelabelDataset(root, CONFIG, "train").label_maps.manifest.annotator != load_demo_annotator().describe():
        raise DatasetError(
            f"the scenes in {root} were annotated by another version of this package: delete {root.parent}, or choose another folder"
        )


def _train_all(
    train: RelabelDataset, scoring: ScoringScenes, folder: Path, seeds: int, recipe: Recipe, echo: Echo
) -> dict[str, list[Score]]:
    """Train and score all students: all kinds of labels with seed 0, then with seed 1, and so on."""
    scores: dict[str, list[Score]] = {name: [] for name in KINDS}
    for seed in range(seeds):
        for name, labels in KINDS.items():
            student = train_demo_student(
                train, folder / labels / f"seed-{seed}", recipe.changed(labels=labels, seed=seed)
            )
            score = scoring.score_student(student)
            scores[name].append(score)
            number = sum(map(len, scores.values()))
            echo(
                f"   {number} of {len(KINDS) * seeds}: {name}, seed {seed}: main object {score.main_object:.1%}, "
                f"any object {score.any_object:.1%}, random crops {score.crops:.1%}"
            )
    return scores
