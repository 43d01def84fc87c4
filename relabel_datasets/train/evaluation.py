"""Evaluate classifiers on images with known classes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import PIL.Image
import torch
import torch.distributed as dist
from torch import Tensor

from ..analysis.boxes import read_boxes
from ..analysis.metrics import Metrics, real_labels
from ..analysis.objects import Objects, find_objects, match_object_classes, short
from ..annotate.classes import match_classes
from ..data.loading import load_dataset
from ..data.sources import ImageSource, open_source
from ..errors import DatasetError
from ..keywords import checked_keywords
from ..shards.images import decode_image
from ..storage.folders import MANIFEST_NAME
from .classifier import Classifier, load_classifier
from .loaders import CenterCrops


class LabeledImages(Protocol):
    """Images with keys and classes, such as a `RelabelDataset`."""

    @property
    def classes(self) -> Sequence[str] | None:
        """Class names by index, or None if there are only indices."""
        ...

    @property
    def keys(self) -> Sequence[str]:
        """Key of each image."""
        ...

    @property
    def targets(self) -> Any:
        """Class index of each image."""
        ...

    def image(self, index: int) -> PIL.Image.Image:
        """Return the RGB image of a row."""
        ...


class SourceImages:
    """Images of a source, see `open_source`.

    Args:
        source: Source of images, all of which have a class.

    Raises:
        DatasetError: An image has no class.
    """

    def __init__(self, source: ImageSource) -> None:
        self.classes, self.keys, self.targets = source.classes, source.keys, source.labels
        self._source = source
        if min(self.targets, default=0) < 0:
            first = list(self.targets).index(min(self.targets))
            raise DatasetError(
                f"{source.name(first)} has no class, so it cannot be evaluated: remove it from the images"
            )

    def image(self, index: int) -> PIL.Image.Image:
        """Return the RGB image of a row."""
        return decode_image(self._source.read(index), self._source.name(index))


def open_images(
    path: str | os.PathLike[str],
    config: str | None = None,
    split: str = "validation",
    *,
    image_column: str | None = None,
    label_column: str | None = None,
) -> LabeledImages:
    """Open images with classes for `evaluate`.

    Args:
        path: ImageFolder, WebDataset tars or Hugging Face dataset, see `open_source`, or a dataset with label maps, see
            `load_dataset`. URLs and names without a local file are datasets with label maps.
        config: Config of a dataset with label maps. Default: the only one.
        split: Split of a dataset. Default: "validation".
        image_column: Column of the images in a Hugging Face dataset, or extension of the images in tars, see `open_source`.
        label_column: Column of the classes in a Hugging Face dataset, or member with the class index in tars.

    Returns:
        The images, a `SourceImages` or a `RelabelDataset`.

    Raises:
        FileNotFoundError: The path does not exist.
        DatasetError: (a ValueError) The split does not exist, files are corrupt, or an image has no class.
        ValueError: Columns are given for a dataset with label maps or an ImageFolder.
    """
    local = Path(path)
    has_label_maps = (local / MANIFEST_NAME).is_file() or any(local.glob(f"*/{MANIFEST_NAME}"))
    if not has_label_maps and (local.exists() or os.fspath(path).startswith("hf:") or local.suffix == ".tar"):
        return SourceImages(open_source(path, split, image_column=image_column, label_column=label_column))
    if image_column is not None or label_column is not None:
        raise ValueError(
            "image_column= and label_column= only apply to Hugging Face datasets and tars, but the images are those of a "
            "dataset with label maps: leave them out"
        )
    return load_dataset(path, config, split)


@checked_keywords()
@torch.inference_mode()
def evaluate(
    model: Classifier | str | os.PathLike[str],
    images: LabeledImages | str | os.PathLike[str],
    *,
    boxes: Mapping[str, Objects] | str | os.PathLike[str] | None = None,
    among: bool = False,
    batch_size: int = 64,
    num_workers: int = 0,
) -> dict[str, float]:
    """Compute the metrics of a classifier.

    Classes are matched by name, see `match_classes`. Images of ImageNet's validation set are recognized by their names and are
    also compared with their ReaL labels. Under torch.distributed, all ranks must call this function and share the images.

    Args:
        model: Classifier from `load_classifier`, or path of a checkpoint of `train_student`.
        images: Images with classes, or their path, see `open_images`.
        boxes: All objects in the images with their classes, or the path of a file with them, see `read_boxes`. Required for
            the metrics of several true classes. Objects of classes that do not compete are ignored and logged. Default: none.
        among: Whether only the classes of the images compete, instead of all classes of the model. Default: False.
        batch_size: Images per batch and rank. Default: 64.
        num_workers: Worker processes that read images. Default: 0, which reads in this process.

    Returns:
        The metrics by name, see `Metrics`.

    Raises:
        FileNotFoundError: The checkpoint, the images or the boxes do not exist.
        ValueError: The model does not know a class of the images, no image has boxes, or files are corrupt.

    Example:
        >>> evaluate("run/model_best.pth.tar", "path/to/validation", boxes="path/to/annotations")
        {'top1': 0.78, 'top5': 0.94, 'ece': 0.05, 'multi_label': 0.84, 'set_recall': 0.7, 'map': 0.66}
    """
    classifier = model if isinstance(model, Classifier) else load_classifier(model)
    dataset = open_images(images) if isinstance(images, str | os.PathLike) else images
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model_rows, competing = competing_classes(classifier, dataset.classes, among)
    labels = torch.arange(len(model_rows)) if among else torch.tensor(model_rows)
    metrics = Metrics(len(model_rows) if among else classifier.num_classes)
    present = None if boxes is None else _present_classes(boxes, dataset.keys, competing)
    real = _real_labels(dataset.keys, competing)
    center_crops = CenterCrops(
        dataset,
        classifier.image_size,
        classifier.crop_pct,
        classifier.interpolation,
        range(rank, len(dataset.keys), world_size),
    )
    was_training = classifier.model.training
    classifier.model.eval()
    for batch, rows in center_crops.loader(batch_size, num_workers):
        keys = [dataset.keys[row] for row in rows.tolist()]
        logits = classifier(batch)
        metrics.update(
            logits[:, model_rows] if among else logits,
            labels[_targets(dataset, rows, len(model_rows))],
            present=None if present is None else [present.get(key, ()) for key in keys],
            real=None if real is None else [real.get(key, ()) for key in keys],
        )
    classifier.model.train(was_training)
    return metrics.gather().compute()


def competing_classes(
    classifier: Classifier, classes: Sequence[str] | None, among: bool
) -> tuple[list[int], Sequence[str] | None]:
    """Return the model's index of each class of the images, and the names of all competing classes."""
    if classes is None:  # there are only indices
        if among:
            raise ValueError("among=True needs class names, but the classes of the images have no names: leave it out")
        return list(range(classifier.num_classes)), classifier.classes
    model_rows = match_classes(classifier.classes, classes, None, classifier.num_classes)
    return model_rows, classes if among or classifier.classes is None else classifier.classes


def _targets(dataset: LabeledImages, rows: Tensor, num_classes: int) -> Tensor:
    targets = torch.tensor([int(dataset.targets[row]) for row in rows.tolist()])
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < num_classes:
        raise ValueError(
            f"the images have class indices {int(targets.min())} to {int(targets.max())}, but the model has {num_classes} "
            f"classes: use images with indices from 0 to {num_classes - 1}, or another model"
        )
    return targets


def _present_classes(
    boxes: Mapping[str, Objects] | str | os.PathLike[str], keys: Sequence[str], classes: Sequence[str] | None
) -> dict[str, list[int]]:
    """Return the class indices of the objects in each image that has objects, by key."""
    objects = read_boxes(boxes) if isinstance(boxes, str | os.PathLike) else boxes
    by_key = find_objects(keys, objects)
    if classes is None or not any(image_objects.names for image_objects in by_key.values()):
        nameless = "objects in boxes=" if classes else "classes of the images and of the model"
        raise ValueError(f"the {nameless} have no class names, which are needed to match them: add names")
    index = match_object_classes(by_key.values(), classes, "objects of these do not count")
    if not index:
        names = sorted({name for image_objects in by_key.values() for name in image_objects.names})
        raise ValueError(
            f"none of the {len(names)} object classes, such as {short(names[0])}, is one of the {len(classes)} classes, such "
            f"as {short(classes[0])}: rename the classes of the objects, so that names are equal"
        )
    return {
        key: sorted({index[name] for name in image_objects.names if name in index})
        for key, image_objects in by_key.items()
    }


def _real_labels(keys: Sequence[str], classes: Sequence[str] | None) -> dict[str, list[int]] | None:
    """Return ReaL labels by key, or None if no image belongs to ImageNet's validation set."""
    imagenet_keys = [key for key in keys if "ILSVRC2012_val_" in key]
    if not imagenet_keys or classes is None:
        return None
    try:
        return dict(zip(imagenet_keys, real_labels(imagenet_keys, classes), strict=True))
    except ValueError:  # the classes are not ImageNet's
        return None
