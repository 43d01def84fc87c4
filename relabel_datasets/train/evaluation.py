"""How well a classifier does on images with known classes."""

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
from ..shards.images import decode_image
from ..storage.folders import MANIFEST_NAME
from .classifier import Classifier, load_classifier
from .loaders import WholeImages


class LabeledImages(Protocol):
    """Images with keys and classes, such as a `RelabelDataset`; all sequences are in the order of its rows."""

    @property
    def classes(self) -> Sequence[str] | None:
        """Names by index; None where there are only indices."""
        ...

    @property
    def keys(self) -> Sequence[str]:
        """Keys."""
        ...

    @property
    def targets(self) -> Any:
        """Class indices."""
        ...

    def image(self, index: int) -> PIL.Image.Image:
        """Return the RGB image of a row."""
        ...


class SourceImages:
    """The images of a source, see `open_source`."""

    def __init__(self, source: ImageSource) -> None:
        self.classes, self.keys, self.targets = source.classes, source.keys, source.labels
        self._source = source
        if min(self.targets, default=0) < 0:
            first = list(self.targets).index(min(self.targets))
            raise DatasetError(f"{source.name(first)} has no class, so the images cannot be evaluated: leave it out")

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
    """Return the images of a folder, tars or a Hugging Face dataset, see `open_source`, or of a dataset with label maps.

    Args:
        path: Any of these. A URL, or a path at which there is nothing, is a dataset with label maps, see `load_dataset`.
        config: Config of a dataset with label maps. Default: the only one.
        split: Split of a dataset.
        image_column: Column of a Hugging Face dataset with the images, or their extension in tars, see `open_source`.
        label_column: Where the classes are, as `image_column`.

    Raises:
        FileNotFoundError: There is nothing at the path.
        DatasetError: (a ValueError) There is no such split, files are damaged, or an image has no class.
        ValueError: Columns are given for a dataset with label maps or an ImageFolder.
    """
    place = Path(path)
    is_ours = (place / MANIFEST_NAME).is_file() or any(place.glob(f"*/{MANIFEST_NAME}"))
    if not is_ours and (place.exists() or os.fspath(path).startswith("hf:") or place.suffix == ".tar"):
        return SourceImages(open_source(path, split, image_column=image_column, label_column=label_column))
    if image_column is not None or label_column is not None:
        raise ValueError(
            "image_column= and label_column= (--image-column, --label-column) are for Hugging Face datasets and tars; "
            "the images are those of a dataset with label maps"
        )
    return load_dataset(path, config, split)


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
    """Return the metrics of a classifier, see `Metrics`; under torch.distributed, all ranks share the images and must call it.

    Classes are matched by name, see `match_classes`. Images of ImageNet's validation set are known by their names, and also
    compared with their ReaL labels.

    Args:
        model: a checkpoint of `train_student`, or what `load_classifier` returns.
        images: to predict, or their path, see `open_images`.
        boxes: All objects in the images with their classes, or the path of a file with them, see `read_boxes`. Required for
            the metrics of several true classes. Objects of classes that do not compete are left out; the log lists these.
        among: whether only the images' own classes compete, and not all that the model knows.
        batch_size: images a step.
        num_workers: processes that read images.

    Raises:
        FileNotFoundError: no such checkpoint, images or boxes.
        ValueError: the model does not know a class of the images, no image has boxes, or files are bad.

    Example:
        >>> evaluate("run/model_best.pth.tar", "path/to/validation", boxes="path/to/annotations")
        {'top1': 0.78, 'top5': 0.94, 'ece': 0.05, 'multi_label': 0.84, 'set_recall': 0.7, 'map': 0.66}
    """
    classifier = model if isinstance(model, Classifier) else load_classifier(model)
    dataset = open_images(images) if isinstance(images, str | os.PathLike) else images
    place, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows, competing = _compete(classifier, dataset.classes, among)
    labels = torch.arange(len(rows)) if among else torch.tensor(rows)
    metrics = Metrics(len(rows) if among else classifier.num_classes)
    present = None if boxes is None else _present(boxes, dataset.keys, competing)
    real = _real_labels(dataset.keys, competing)
    whole = WholeImages(
        dataset,
        classifier.image_size,
        classifier.crop_pct,
        classifier.interpolation,
        range(place, len(dataset.keys), world_size),
    )
    was_training = classifier.model.training
    classifier.model.eval()
    for batch, found in whole.loader(batch_size, num_workers):
        keys = [dataset.keys[row] for row in found.tolist()]
        logits = classifier(batch)
        metrics.update(
            logits[:, rows] if among else logits,
            labels[_targets(dataset, found, len(rows))],
            present=None if present is None else [present.get(key, ()) for key in keys],
            real=None if real is None else [real.get(key, ()) for key in keys],
        )
    classifier.model.train(was_training)
    return metrics.gather().compute()


def _compete(
    classifier: Classifier, classes: Sequence[str] | None, among: bool
) -> tuple[list[int], Sequence[str] | None]:
    """Return the model's index of each class of the images, and the names of all that compete."""
    if classes is None:  # indices are all there is
        if among:
            raise ValueError("the images' classes have no names, so they cannot be found among the model's")
        return list(range(classifier.num_classes)), classifier.classes
    rows = match_classes(classifier.classes, classes, None, classifier.num_classes)
    return rows, classes if among or classifier.classes is None else classifier.classes


def _targets(dataset: LabeledImages, rows: Tensor, num_classes: int) -> Tensor:
    targets = torch.tensor([int(dataset.targets[row]) for row in rows.tolist()])
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < num_classes:
        raise ValueError(
            f"the images have class indices {int(targets.min())} .. {int(targets.max())}, the model {num_classes} classes"
        )
    return targets


def _present(
    boxes: Mapping[str, Objects] | str | os.PathLike[str], keys: Sequence[str], classes: Sequence[str] | None
) -> dict[str, list[int]]:
    """Return the indices of the classes of all objects in each image that has any, by key."""
    objects = read_boxes(boxes) if isinstance(boxes, str | os.PathLike) else boxes
    by_key = find_objects(keys, objects)
    if classes is None or not any(each.names for each in by_key.values()):
        raise ValueError(f"the {'boxes' if classes else 'classes'} have no names, so objects cannot be told apart")
    index = match_object_classes(by_key.values(), classes, "objects of these do not count")
    if not index:
        names = sorted({name for each in by_key.values() for name in each.names})
        raise ValueError(
            f"none of the {len(names)} object classes, such as {short(names[0])}, is one of the {len(classes)} classes, such "
            f"as {short(classes[0])}: names must be the same"
        )
    return {key: sorted({index[name] for name in each.names if name in index}) for key, each in by_key.items()}


def _real_labels(keys: Sequence[str], classes: Sequence[str] | None) -> dict[str, list[int]] | None:
    """Return ReaL labels by key, or None where no image is of ImageNet's validation set."""
    ours = [key for key in keys if "ILSVRC2012_val_" in key]
    if not ours or classes is None:
        return None
    try:
        return dict(zip(ours, real_labels(ours, classes), strict=True))
    except ValueError:  # the classes are not ImageNet's
        return None
