"""The demo's students: one small model, trained from scratch with four kinds of labels, all else being equal."""

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
from .annotator import MODEL, MODEL_ARGS, make_optimizer, normalize, step, to_tensor

Batch = tuple[Tensor, Tensor]  # images [B, 3, h, w] and labels [B] or soft labels [B, C]


@dataclass(frozen=True)
class Method:
    """What a student is told about the pictures."""

    name: str
    pooled: bool  # labels come from the label map, under the crop
    label_smoothing: float = 0.0
    cutmix: bool = False


METHODS = (
    Method("single label", pooled=False),
    Method("label smoothing", pooled=False, label_smoothing=0.1),
    Method("ReLabel", pooled=True),
    Method("ReLabel + CutMix", pooled=True, cutmix=True),
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How every student is trained.

    Attributes:
        epochs: passes over the training pictures.
        batch_size: pictures a step; those that do not fill a last batch are left out.
        learning_rate: the highest of AdamW's one cycle.
        crop_size: pixels of a side of a training crop.
        test_size: pixels of a side of a whole test picture; larger, as crops show objects larger than life.
        num_workers: processes that make the crops.
    """

    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 1e-2
    crop_size: int = 48
    test_size: int = 64
    num_workers: int = 1


class Score(NamedTuple):
    """How well a student names what is in the validation pictures."""

    single_label: float  # share of pictures whose best class is the main object's
    multi_label: float  # share of pictures whose best class is that of any object
    set_recall: float  # mean share of a picture's n classes among the n best
    seconds_per_epoch: float


class PicturesInMemory(Dataset[Any]):
    """Decoded pictures and label maps of a dataset, so that an epoch measures labels and not JPEG.

    Args:
        dataset: without transforms.
    """

    def __init__(self, dataset: RelabelDataset) -> None:
        self.samples: list[tuple[Image.Image, LabelMap]] = [dataset[i] for i in range(len(dataset))]
        self.transforms: Callable[..., Any] = lambda *sample: sample

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.transforms(*self.samples[index])


class _SingleLabel:
    """Replace the label map by the picture's class index, whatever the crop shows."""

    def __call__(self, image: Tensor, label_map: LabelMap) -> tuple[Tensor, int]:
        assert label_map.label is not None
        return image, label_map.label


def train_student(
    train: PicturesInMemory,
    validation: PicturesInMemory,
    present: Mapping[str, Sequence[int]],
    method: Method,
    seed: int,
    *,
    recipe: Recipe = Recipe(),
    on_epoch: Callable[[], object] = lambda: None,
) -> Score:
    """Train a student from scratch and return how well it does.

    Args:
        train: what it learns from.
        validation: what it is tested on.
        present: key of a validation picture -> classes of all objects in it.
        method: what it is told.
        seed: of its weights, the order and the crops; the same for all methods.
        recipe: how it is trained.
        on_epoch: called after each epoch.
    """
    with torch.random.fork_rng(devices=[]), _threads_beside(recipe.num_workers):
        torch.manual_seed(seed)
        model = timm.create_model(MODEL, **MODEL_ARGS).to(memory_format=torch.channels_last)
        seconds = _fit(model, train, method, seed, recipe, on_epoch)
        logits = _predict(model, validation, recipe)
    keys_and_labels = [(label_map.key, label_map.label) for _, label_map in validation.samples]
    return _score(logits, keys_and_labels, present, seconds / recipe.epochs)


def _fit(
    model: nn.Module,
    train: PicturesInMemory,
    method: Method,
    seed: int,
    recipe: Recipe,
    on_epoch: Callable[[], object],
) -> float:
    """Train the model in place; return the seconds it took."""
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
    mix = v2.CutMix(num_classes=MODEL_ARGS["num_classes"]) if method.cutmix else None
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
def _predict(model: nn.Module, validation: PicturesInMemory, recipe: Recipe) -> Tensor:
    """Return `[N, C]` logits of the whole pictures."""
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
def _threads_beside(num_workers: int) -> Iterator[None]:
    """Leave a core to each worker: threads that wait for each other on a busy core slow all of them down."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, (os.cpu_count() or 1) - num_workers)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
