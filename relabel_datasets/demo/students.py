"""Students of the demo: a small model, trained from scratch with three kinds of labels and otherwise equal settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..cpus import num_cpus
from ..data.datasets import RelabelDataset
from ..train.checkpoints import LAST
from ..train.classifier import Classifier, load_classifier
from ..train.loop import train_student
from ..train.recipe import Recipe, RuntimeConfig
from .annotator import MODEL, MODEL_KWARGS

KINDS = {
    "single label": "single",
    "label smoothing": "smoothed",
    "ReLabel": "relabel",
}  # rows of the table, and `labels=`
RECIPE = Recipe(
    model=MODEL,
    model_kwargs=MODEL_KWARGS,
    image_size=48,
    eval_size=64,  # larger than `image_size`, because crops magnify objects
    epochs=8,
    batch_size=64,
    optimizer="adamw",
    learning_rate=1e-2,
    weight_decay=0.05,
    warmup_epochs=2,
    mix_off_epochs=0,
)


def train_demo_student(dataset: RelabelDataset, folder: Path, recipe: Recipe) -> Classifier:
    """Train a student from scratch, or resume its run.

    Args:
        dataset: Training scenes.
        folder: Folder of the run. A finished run is not repeated.
        recipe: Recipe with the kind of labels and the seed.

    Returns:
        The trained student.

    Raises:
        ValueError: `folder` contains a run with another recipe.
    """
    cores = num_cpus()
    num_workers = max(1, min(4, cores // 2))
    runtime = RuntimeConfig(device="cpu", num_workers=num_workers, window=None, save_every=0, progress=False)
    with _limited_threads(cores - num_workers):
        train_student(dataset, folder, recipe, runtime=runtime)
    return load_classifier(folder / LAST, device="cpu")


@contextmanager
def _limited_threads(count: int) -> Iterator[None]:
    """Reserve one core per worker: PyTorch threads that compete with workers for a core slow down all of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, count)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
