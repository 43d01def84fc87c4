"""The loaders of a training run: seeded random crops with what the student is told, and whole validation images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from ..data.datasets import RelabelDataset
from ..data.stream import RelabelLoader, RelabelStream
from ..labels.label_map import LabelMap
from ..labels.transforms import LabelPooling
from .recipe import LabelConfig, Recipe
from .seeds import SeededTransforms
from .timm_augmentation import TimmTransforms, timm_transforms
from .tokens import TokenLabelPooling


class ClassIndex(v2.Transform):
    """Replace each label map by its sample's class index, whatever the image shows.

    Raises:
        ValueError: in use, a label map without class index.
    """

    _transformed_types = (LabelMap,)

    def transform(self, inpt: LabelMap, params: dict[str, Any]) -> Tensor:
        """Return the class index, `[]` int64."""
        if inpt.label is None:
            raise ValueError(f"the label map of {inpt.key!r} has no class index")
        return torch.tensor(inpt.label)


def train_loader(
    dataset: RelabelDataset,
    recipe: Recipe,
    *,
    interpolation: str,
    grid: tuple[int, int] | None = None,
    rank: int,
    world_size: int,
    num_workers: int,
    window: int | None,
) -> tuple[RelabelLoader, SeededTransforms]:
    """Return a loader of batches (uint8 images `[B, 3, s, s]`, targets), and what must know its epoch.

    Targets are class indices `[B]`, soft labels `[B, C]`, or of tokens, see `tokens.TokenLabelPooling`.

    Raises:
        ValueError: the batch size does not divide by the number of ranks, there are fewer images than in a batch, or
            batches that are mixed have an odd size.
    """
    batch_size, rest = divmod(recipe.batch_size, world_size)
    if rest or not batch_size:
        raise ValueError(f"a batch of {recipe.batch_size} images cannot be dealt to {world_size} ranks")
    if batch_size % 2 and (recipe.mixup or recipe.cutmix):
        raise ValueError(f"images are mixed in pairs, so each rank needs an even number a batch, not {batch_size}")
    target = target_transform(recipe.label_config, grid)
    transforms = SeededTransforms(crops(recipe, interpolation, target), recipe.seed)
    dataset.transforms = transforms
    stream = RelabelStream(dataset, seed=recipe.seed, window=window, rank=rank, world_size=world_size)
    if len(stream) < batch_size:
        raise ValueError(f"each of {world_size} ranks has {len(stream)} images, fewer than a batch of {batch_size}")
    loader = RelabelLoader(
        stream,
        batch_size,
        num_workers=num_workers,
        drop_last=True,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=one_thread,
    )
    return loader, transforms


def crops(recipe: Recipe, interpolation: str, target: v2.Transform | None) -> TimmTransforms:
    """Return the transforms of training images and their label maps; images stay uint8, and are normalised later.

    Args:
        recipe: says what is drawn.
        interpolation: of resizing, as timm names it.
        target: what makes the target of a label map; None leaves the map.
    """
    return timm_transforms(
        recipe.image_size,
        pooling=target,
        scale=(recipe.min_area, 1.0),
        color_jitter=recipe.color_jitter or None,
        auto_augment=recipe.auto_augment,
        interpolation=interpolation,
        use_prefetcher=True,
    )


def target_transform(label_config: LabelConfig, grid: tuple[int, int] | None = None) -> v2.Transform:
    """Return what makes the target of a label map."""
    if label_config.tokens:
        assert grid is not None
        return TokenLabelPooling(grid)
    if label_config.pooled:
        return LabelPooling(localized=label_config.localized, multi_label=label_config.multi_label)
    return ClassIndex()


def one_thread(worker: int) -> None:
    """Keep a worker to one core, also in NumPy's and torch's loops."""
    torch.set_num_threads(1)


class WholeImages(Dataset[Any]):
    """The middle of each image of a dataset, as uint8 `[3, h, w]`, with its row.

    Args:
        dataset: with `__len__` and `image(index)`.
        size: (height, width) in pixels, or an int for both.
        crop_pct: share of a side that is left.
        interpolation: a name that timm knows.
        rows: which images; default all.
    """

    def __init__(
        self,
        dataset: Any,
        size: int | tuple[int, int],
        crop_pct: float,
        interpolation: str = "bicubic",
        rows: range | None = None,
    ) -> None:
        self.dataset = dataset
        self.rows = range(len(dataset)) if rows is None else rows
        self._transform = create_transform(
            size, crop_pct=crop_pct, interpolation=interpolation, use_prefetcher=True
        )  # uint8: the model's own normalisation follows on its device

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.rows[index]
        return torch.from_numpy(np.asarray(self._transform(self.dataset.image(row)))), row

    def loader(self, batch_size: int, num_workers: int) -> DataLoader[Any]:
        """Return batches of images `[B, 3, h, w]` and rows `[B]`."""
        return DataLoader(self, batch_size, num_workers=num_workers, worker_init_fn=one_thread)
