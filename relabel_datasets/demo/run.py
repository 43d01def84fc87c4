"""The demo from end to end: scenes, annotator, shards, students, figures, a table of what came out, and a report."""

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
from .dataset import CONFIG, PICTURES, make_scenes_relabel
from .scenes import read_objects
from .students import METHODS, PicturesInMemory, Recipe, Score, train_student

logger = logging.getLogger(__name__)

_COLUMNS = ("labels", "single-label accuracy", "multi-label accuracy", "recall of all classes", "s / epoch")
_NEXT = """
Look at the label maps: {overlays}
Use the scenes in a script:
    import relabel_datasets as rd
    dataset = rd.load_dataset({dataset!r}, split="train")   # or "scenes-relabel", made in the cache on first use
Make label maps of your own images with any timm model:
    relabel build IMAGES OUT --annotator resnet50.a1_in1k
Drag a crop over the scenes and see its label, in a browser:
{report}
"""


@dataclass(frozen=True)
class DemoResult:
    """What the demo made and found.

    Attributes:
        scores: for each method, one score a seed.
        annotator: (single-label, multi-label) accuracy of the label maps themselves, pooled over whole pictures.
        dataset: folder of the scenes with their label maps.
        overlays: figures of label maps.
        report: a page to look at the validation scenes with.
        seconds: how long all of it took.
    """

    scores: Mapping[str, Sequence[Score]]
    annotator: tuple[float, float]
    dataset: Path
    overlays: Sequence[Path]
    report: Path
    seconds: float

    def next_steps(self) -> str:
        """Return what to look at and to run next; the last line is the path of the report."""
        return _NEXT.format(overlays=self.overlays[0].parent, dataset=str(self.dataset), report=self.report.absolute())

    def to_markdown(self) -> str:
        """Return the table of all methods: mean and standard deviation over the seeds, on the validation scenes."""
        lines = ["| " + " | ".join(_COLUMNS) + " |", "| --- |" + " ---: |" * (len(_COLUMNS) - 1)]
        for name, scores in self.scores.items():
            accuracies = [_percent([score[i] for score in scores]) for i in range(3)]
            epoch = statistics.mean(score.seconds_per_epoch for score in scores)
            lines.append("| " + " | ".join([name, *accuracies, f"{epoch:.2f}"]) + " |")
        single, multi = self.annotator
        lines.append(f"| (the annotator itself) | {single:.1%} | {multi:.1%} | | |")
        return "\n".join(lines) + "\n"


def run_demo(
    output: Path,
    *,
    seeds: int = 3,
    recipe: Recipe = Recipe(),
    echo: Callable[[str], object] = logger.info,
) -> DemoResult:
    """Make scenes with label maps, train students with and without them, and return what came out.

    Takes under 4 minutes on two cores. The students differ in their labels alone; seeds are 0, 1, ... and every run
    counts. The scenes in `output/scenes-relabel` are used again if they are there.

    Args:
        output: folder for the scenes, the figures (`overlays/`), the table (`table.md`) and the report (`report.html`).
        seeds: students a method.
        recipe: how each is trained.
        echo: called with messages.

    Raises:
        ValueError: no seeds.

    Example:
        >>> print(run_demo(Path("relabel-demo")).to_markdown())
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    start = time.perf_counter()
    root = output / "scenes-relabel"
    if not root.exists():
        make_scenes_relabel(root)
    train, validation = (RelabelDataset(root, CONFIG, split) for split in ("train", "validation"))
    overlays = save_overlays(validation, output / "overlays")
    boxes = root / PICTURES / "validation-boxes.csv"
    objects = read_objects(boxes)
    present = {key: [each.label for each in in_picture] for key, in_picture in objects.items()}
    echo(f"training {len(METHODS) * seeds} students: {len(METHODS)} kinds of labels, {seeds} seeds each")
    validation_pictures = PicturesInMemory(validation)
    scores = _train_all(PicturesInMemory(train), validation_pictures, present, seeds, recipe)
    annotator = _score_label_maps(validation_pictures, present)
    report = write_report(root, output / "report.html", CONFIG, "validation", boxes=boxes, progress=False)
    result = DemoResult(scores, annotator, root, overlays, report, time.perf_counter() - start)
    write_atomically(output / "table.md", result.to_markdown().encode())
    echo(f"done in {result.seconds:.0f} s")
    return result


def _train_all(
    train: PicturesInMemory,
    validation: PicturesInMemory,
    present: Mapping[str, Sequence[int]],
    seeds: int,
    recipe: Recipe,
) -> dict[str, list[Score]]:
    scores: dict[str, list[Score]] = {method.name: [] for method in METHODS}
    with tqdm(total=len(METHODS) * seeds * recipe.epochs, desc="training students", unit="epoch", leave=False) as bar:
        for seed in range(seeds):  # methods inside, so that a machine that slows down slows all of them
            for method in METHODS:
                bar.set_postfix_str(f"{method.name}, seed {seed}")
                score = train_student(train, validation, present, method, seed, recipe=recipe, on_epoch=bar.update)
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
