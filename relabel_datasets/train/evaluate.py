"""How well a model does on images with known classes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import PIL.Image
import torch
from torch import Tensor, nn

from ..analysis.metrics import Metrics, real_labels
from .loaders import WholeImages


class LabelledImages(Protocol):
    """Images with keys and classes, such as a `RelabelDataset`."""

    @property
    def classes(self) -> Any:
        """Names, by index."""
        ...

    @property
    def keys(self) -> Any:
        """Keys, by row."""
        ...

    @property
    def targets(self) -> Any:
        """Class indices, by row."""
        ...

    def image(self, index: int) -> PIL.Image.Image:
        """Return the RGB image of a row."""
        ...


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    images: LabelledImages,
    *,
    size: int,
    crop_pct: float,
    normalize: Callable[[Tensor], Tensor],
    interpolation: str = "bicubic",
    present: Mapping[str, Collection[int]] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, float]:
    """Return the metrics of a model, see `Metrics`: on the same images on any number of ranks, all of which must call it.

    Args:
        model: takes what `normalize` gives.
        images: to predict.
        size: pixels of a side that it sees.
        crop_pct: share of a side that is left of an image.
        normalize: takes uint8 images `[B, 3, s, s]`.
        interpolation: of resizing, as timm names it.
        present: the classes of all objects in an image, by key, where these are known. ReaL labels are looked up where
            images are of ImageNet's validation set, by their names.
        batch_size: images a step on a rank.
        num_workers: processes that read images.
        rank: of this process.
        world_size: number of ranks.
    """
    metrics = Metrics(len(images.classes))
    rows = range(rank, len(images.keys), world_size)
    real = _real_labels(images)
    was_training = model.training
    model.eval()
    for batch, places in WholeImages(images, size, crop_pct, interpolation, rows).loader(batch_size, num_workers):
        keys = [images.keys[place] for place in places.tolist()]
        metrics.update(
            model(normalize(batch)).float(),
            torch.as_tensor([int(images.targets[place]) for place in places.tolist()]),
            present=None if present is None else [present.get(key, ()) for key in keys],
            real=None if real is None else [real.get(key, ()) for key in keys],
        )
    model.train(was_training)
    return metrics.gather().compute()


def _real_labels(images: LabelledImages) -> dict[str, list[int]] | None:
    """Return ReaL labels by key, or None where no image is of ImageNet's validation set."""
    keys = [key for key in images.keys if "ILSVRC2012_val_" in key]
    if not keys:
        return None
    try:
        return dict(zip(keys, real_labels(keys, images.classes), strict=True))
    except ValueError:  # the classes are not ImageNet's
        return None
