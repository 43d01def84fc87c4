"""Students of the demo: a small model, trained from scratch with four kinds of labels and otherwise equal settings."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as nnf
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from ..data.datasets import RelabelDataset
from ..labels.label_map import LabelMap
from ..labels.transforms import LabelPooling
from .annotator import MODEL, MODEL_KWARGS, make_optimizer, normalize, step, to_tensor

Batch = tuple[Tensor, Tensor]  # images [B, 3, h, w] and labels [B] or soft labels [B, C]


@dataclass(frozen=True)
class Method:
    """Labels and augmentation of a student."""

    name: str
    pooled: bool  # whether labels are pooled from the label map under the crop
    label_smoothing: float = 0.0
    cutmix: bool = False


METHODS = (
    Method("single label", pooled=False),
    Method("label smoothing", pooled=False, label_smoothing=0.1),
    Method("ReLabel", pooled=True),
    Method("ReLabel + CutMix", pooled=True, cutmix=True),
)


@dataclass(frozen=True, kw_only=True)
class DemoRecipe:
    """Training settings of the students.

    Attributes:
        epochs: Number of passes over the training pictures.
        batch_size: Number of pictures per step. An incomplete last batch is dropped.
        learning_rate: Highest learning rate of the one-cycle schedule of AdamW.
        crop_size: Side of a training crop in pixels.
        test_size: Side of a test picture in pixels. It is larger than `crop_size` because crops magnify objects.
        num_workers: Number of worker processes that load crops.
    """

    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 1e-2
    crop_size: int = 48
    test_size: int = 64
    num_workers: int = 1


class Score(NamedTuple):
    """Accuracy of a student on the validation pictures, in 0..1."""

    single_label: float  # share of pictures whose best class is that of the main object
    multi_label: float  # share of pictures whose best class is that of any object
    set_recall: float  # mean share of the n classes of a picture that are among the n best classes
    seconds_per_epoch: float


class PicturesInMemory(Dataset[Any]):
    """Decoded pictures and label maps of a dataset, so that the duration of an epoch excludes JPEG decoding.

    Args:
        dataset: Dataset without transforms.
    """

    def __init__(self, dataset: RelabelDataset) -> None:
        self.samples: list[tuple[Image.Image, LabelMap]] = [dataset[i] for i in range(len(dataset))]
        self.transforms: Callable[..., Any] = lambda *sample: sample

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.transforms(*self.samples[index])


class _SingleLabel:
    """Replace the label map by the class index of the picture, independent of the crop."""

    def __call__(self, image: Tensor, label_map: LabelMap) -> tuple[Tensor, int]:
        assert label_map.label is not None
        return image, label_map.label


def train_demo_student(
    train: PicturesInMemory,
    validation: PicturesInMemory,
    present: Mapping[str, Sequence[int]],
    method: Method,
    seed: int,
    *,
    recipe: DemoRecipe = DemoRecipe(),
    on_epoch: Callable[[], object] = lambda: None,
) -> Score:
    """Train a student from scratch and evaluate it.

    Args:
        train: Training pictures.
        validation: Validation pictures.
        present: Classes of all objects in each validation picture, by key.
        method: Labels and augmentation.
        seed: Seed of the weights, the order and the crops; the same for all methods.
        recipe: Training settings.
        on_epoch: Function that is called after each epoch.

    Returns:
        The accuracies of the student.
    """
    with torch.random.fork_rng(devices=[]), _limited_threads(recipe.num_workers):
        torch.manual_seed(seed)
        model = timm.create_model(MODEL, **MODEL_KWARGS).to(memory_format=torch.channels_last)
        seconds = _fit(model, train, method, seed, recipe, on_epoch)
        logits = _predict(model, validation, recipe)
    keys_and_labels = [(label_map.key, label_map.label) for _, label_map in validation.samples]
    return _score(logits, keys_and_labels, present, seconds / recipe.epochs)


def _fit(
    model: nn.Module,
    train: PicturesInMemory,
    method: Method,
    seed: int,
    recipe: DemoRecipe,
    on_epoch: Callable[[], object],
) -> float:
    """Train the model in-place, and return the duration in seconds."""
    train.transforms = v2.Compose([
        v2.RandomResizedCrop(recipe.crop_size, scale=(0.08, 1.0)),
        v2.RandomHorizontalFlip(),
        v2.PILToTensor(),
        LabelPooling() if method.pooled else _SingleLabel(),
    ])  # fmt: skip
    loader = DataLoader(
        train, recipe.batch_size, shuffle=True, drop_last=True, num_workers=recipe.num_workers,
        persistent_workers=recipe.num_workers > 0, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    mix = v2.CutMix(num_classes=MODEL_KWARGS["num_classes"]) if method.cutmix else None
    optimizer, schedule = make_optimizer(model, recipe.learning_rate, recipe.epochs * len(loader))
    model.train()
    start = time.perf_counter()
    for _ in range(recipe.epochs):
        for images, labels in loader:
            if mix is not None:
                images, labels = mix(images, labels)
            loss = nnf.cross_entropy(model(normalize(images)), labels, label_smoothing=method.label_smoothing)
            step(loss, optimizer, schedule)
        on_epoch()
    return time.perf_counter() - start


@torch.inference_mode()
def _predict(model: nn.Module, validation: PicturesInMemory, recipe: DemoRecipe) -> Tensor:
    """Return logits `[N, C]` of whole pictures."""
    model.eval()
    images = torch.stack([to_tensor(image, recipe.test_size) for image, _ in validation.samples])
    return torch.cat([model(normalize(batch)) for batch in torch.split(images, recipe.batch_size)])


def _score(
    logits: Tensor,
    keys_and_labels: Sequence[tuple[str | None, int | None]],
    present: Mapping[str, Sequence[int]],
    seconds_per_epoch: float,
) -> Score:
    single = multi = recall = 0.0
    for ranking, (key, label) in zip(logits.argsort(1, descending=True).tolist(), keys_and_labels, strict=True):
        assert key is not None
        classes = set(present[key])
        single += ranking[0] == label
        multi += ranking[0] in classes
        recall += len(classes.intersection(ranking[: len(classes)])) / len(classes)
    count = len(keys_and_labels)
    return Score(single / count, multi / count, recall / count, seconds_per_epoch)


@contextmanager
def _limited_threads(num_workers: int) -> Iterator[None]:
    """Reserve one core per worker: PyTorch threads that compete with workers for a core slow down all of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, (os.cpu_count() or 1) - num_workers)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
