"""Data loaders of a training run: seeded random crops with their targets, and center crops for validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import torch
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from ..data.datasets import RelabelDataset
from ..data.stream import RelabelLoader, RelabelStream
from ..data.workers import check_temp_folder
from ..labels.batch import collate_crops
from ..labels.compose import Runner, runner_of
from ..labels.crop_labels import CropLabels
from ..labels.crop_transforms import RandomStoredCrop
from ..labels.label_map import LabelMap
from ..labels.transforms import LabelPooling
from ..labels.v2_hooks import Transform
from ..shards.manifest import Manifest
from .recipe import LabelConfig, Recipe
from .seeds import SeededTransforms
from .timm_augmentation import timm_transforms
from .tokens import TokenLabelPooling


class ClassIndex(Transform):
    """Replace each label map by the class index of its sample.

    Raises:
        ValueError: A label map has no class index. Raised in use.
    """

    _transformed_types = (LabelMap,)

    def transform(self, inpt: LabelMap, params: dict[str, Any]) -> Tensor:
        """Return the class index, `[]` int64."""
        if inpt.label is None:
            raise ValueError(
                f"the label map of {inpt.key!r} has no class index: choose labels= that are pooled from label maps"
            )
        return torch.tensor(inpt.label)


def train_loader(
    dataset: RelabelDataset,
    recipe: Recipe,
    *,
    interpolation: str,
    crop_size: tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
    rank: int,
    world_size: int,
    num_workers: int,
    window: int | None,
) -> tuple[RelabelLoader, SeededTransforms]:
    """Return the training loader of one rank, and its transforms, which need the epoch by `set_epoch`.

    Batches are (uint8 images `[B, 3, s, s]`, targets). Targets are class indices `[B]`, soft labels `[B, C]`, or labels of crops
    and tokens, see `tokens.TokenLabelPooling`.

    Args:
        dataset: Training dataset. Its transforms are replaced.
        recipe: Recipe of the run.
        interpolation: Name of the interpolation of the resize, as in timm.
        crop_size: (height, width) of the crops in pixels. Default: the image size of the recipe.
        grid: (h, w) of the tokens, for labels of tokens.
        rank: Rank of this process, from 0.
        world_size: Number of ranks.
        num_workers: Worker processes of this rank.
        window: Number of shards that the shuffle mixes at a time, see `RelabelStream`.

    Raises:
        ValueError: The batch size is not a multiple of the number of ranks, is larger than the dataset, is not a multiple of
            the number of crops per image, or is odd although images are mixed. Or the recipe needs label maps, but the dataset has stored crops.
    """
    batch_size, remainder = divmod(recipe.batch_size, world_size)
    if remainder or not batch_size:
        raise ValueError(f"batch_size={recipe.batch_size} must be a multiple of the number of ranks, {world_size}")
    num_images, remainder = divmod(batch_size, recipe.num_crops)
    if remainder or not num_images:
        raise ValueError(
            f"batch_size={recipe.batch_size} must be a multiple of num_crops={recipe.num_crops} times the number of ranks, {world_size}: "
            "it counts crops"
        )
    if batch_size % 2 and (recipe.mixup or recipe.cutmix):
        raise ValueError(
            f"mixup= and cutmix= mix images in pairs, so each rank needs an even batch size, not {batch_size}: change batch_size="
        )
    manifest = dataset.label_maps.manifest
    check_labels(recipe, manifest)
    transforms = SeededTransforms(_transforms(recipe, manifest, interpolation, crop_size, grid), recipe.seed)
    dataset.transforms = transforms
    stream = RelabelStream(dataset, seed=recipe.seed, window=window, rank=rank, world_size=world_size)
    if len(stream) < num_images:
        raise ValueError(
            f"each of {world_size} ranks has {len(stream)} images, fewer than its batch of {num_images}: lower batch_size="
        )
    loader = RelabelLoader(
        stream,
        num_images,
        collate_fn=collate_crops if recipe.num_crops > 1 else None,
        num_workers=num_workers,
        drop_last=True,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=use_one_thread,
    )
    return loader, transforms


def check_labels(recipe: Recipe, manifest: Manifest) -> None:
    """Raise ValueError if a recipe needs label maps, but a config has stored crops, or the reverse.

    Args:
        recipe: Recipe of a run.
        manifest: Manifest of the config.
    """
    labels = recipe.label_config
    if manifest.has_maps and recipe.num_crops > 1:
        raise ValueError(
            f"num_crops={recipe.num_crops} needs stored crops, but config {manifest.config!r} has label maps: leave out num_crops=, or "
            "use a config of the encoding crops"
        )
    if manifest.has_maps or not labels.pooled:
        return
    if labels.tokens or not (labels.localized and labels.multi_label):
        raise ValueError(
            f"labels={recipe.labels} needs label maps, but config {manifest.config!r} has stored crops: use labels=relabel, or a config "
            "of label maps"
        )
    if labels.calibrated:
        raise ValueError(
            f"calibrated=True has no effect on config {manifest.config!r}, whose labels are the annotator's own: leave out calibrated="
        )
    if recipe.min_area != Recipe.min_area:
        raise ValueError(
            f"min_area={recipe.min_area} has no effect on config {manifest.config!r}, whose crops are stored: leave out min_area="
        )


def _transforms(
    recipe: Recipe,
    manifest: Manifest,
    interpolation: str,
    crop_size: tuple[int, int] | None,
    grid: tuple[int, int] | None,
) -> Callable[..., Any]:
    """Return the transforms of training images and their label maps or crop labels."""
    label_config = recipe.label_config
    if manifest.has_maps:
        return crop_transforms(recipe, interpolation, target_transform(label_config, grid), crop_size)
    if not label_config.pooled:
        return _ClassOnly(crop_transforms(recipe, interpolation, ClassIndex(), crop_size))
    size = crop_size or (recipe.image_size, recipe.image_size)
    crop = RandomStoredCrop(
        size,
        interpolation,
        num_crops=recipe.num_crops,
        temperature=label_config.temperature,
        label_weight=label_config.label_weight,
    )
    return timm_transforms(
        size,
        crop=crop,
        color_jitter=recipe.color_jitter or None,
        auto_augment=recipe.auto_augment,
        interpolation=interpolation,
        use_prefetcher=True,
    )


class _ClassOnly:
    """Transforms of an image and the class index of its crop labels, for targets that need no stored crop.

    Args:
        transforms: Transforms of an image and a label map that end in `ClassIndex`.
    """

    def __init__(self, transforms: Callable[..., Any]) -> None:
        self._transforms = transforms

    def __call__(self, image: PIL.Image.Image, labels: CropLabels) -> Any:
        return self._transforms(image, _without_logits(labels))

    def batch_runner(self) -> Runner:
        """See `compose.runner_of`."""
        run = runner_of(self._transforms)
        return lambda image, labels: run(image, _without_logits(labels))


def _without_logits(labels: CropLabels) -> LabelMap:
    return LabelMap(
        torch.zeros(0, 1, 1), "topk", classes=torch.zeros(0, 1, 1, dtype=torch.long), num_classes=labels.num_classes,
        canvas_size=labels.canvas_size, key=labels.key, label=labels.label,
    )  # fmt: skip


def crop_transforms(
    recipe: Recipe, interpolation: str, target: v2.Transform | None, crop_size: tuple[int, int] | None = None
) -> Callable[..., Any]:
    """Return the transforms of training images and their label maps. Images stay uint8 and are normalized later.

    Args:
        recipe: Recipe with the parameters of the augmentation.
        interpolation: Name of the interpolation of the resize, as in timm.
        target: Transform from label maps to targets. None leaves the label maps.
        crop_size: (height, width) of the crops in pixels. Default: the image size of the recipe.
    """
    return timm_transforms(
        crop_size or recipe.image_size,
        pooling=target,
        scale=(recipe.min_area, 1.0),
        color_jitter=recipe.color_jitter or None,
        auto_augment=recipe.auto_augment,
        interpolation=interpolation,
        use_prefetcher=True,
    )


def target_transform(label_config: LabelConfig, grid: tuple[int, int] | None = None) -> v2.Transform:
    """Return the transform from label maps to targets.

    Args:
        label_config: Kind of targets.
        grid: (h, w) of the tokens. Required for labels of tokens.
    """
    if label_config.tokens:
        assert grid is not None
        return TokenLabelPooling(
            grid, label_config.temperature, label_weight=label_config.label_weight, calibrated=label_config.calibrated
        )
    if label_config.pooled:
        return LabelPooling(
            temperature=label_config.temperature, label_weight=label_config.label_weight,
            calibrated=label_config.calibrated, localized=label_config.localized, multi_label=label_config.multi_label,
        )  # fmt: skip
    return ClassIndex()


def use_one_thread(worker: int) -> None:
    """Limit a worker process to one thread, for `worker_init_fn=`."""
    torch.set_num_threads(1)


class CenterCrops(Dataset[Any]):
    """Center crop of each image of a dataset, uint8 `[3, h, w]`, with its row.

    Args:
        dataset: Dataset with `__len__` and `image(index)`.
        size: (height, width) of the crops in pixels, or an int for both.
        crop_pct: Share of each side that the crop keeps, 0 to 1.
        interpolation: Name of the interpolation of the resize, as in timm. Default: "bicubic".
        rows: Rows of the images. Default: all.
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
        )  # uint8: `Normalize` follows on the device of the model

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.rows[index]
        return torch.from_numpy(np.asarray(self._transform(self.dataset.image(row)))), row

    def loader(self, batch_size: int, num_workers: int) -> DataLoader[Any]:
        """Return a loader of batches (images `[B, 3, h, w]`, rows `[B]`)."""
        if num_workers:
            check_temp_folder()
        return DataLoader(self, batch_size, num_workers=num_workers, worker_init_fn=use_one_thread)
