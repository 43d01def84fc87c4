"""Batches of label maps: collated in loader workers, pooled together on the training device.

A soft label of ImageNet-21k takes 87 KB, but its label map only 20 KB. With that many classes, workers should send the map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data._utils.collate import collate as torch_collate
from torch.utils.data._utils.collate import collate_tensor_fn, default_collate_fn_map

from .batch_memory import whole_of
from .blending import blend_labels, label_tensor
from .calibration import Calibration
from .crop_labels import CropLabels
from .eager import eagerly
from .encodings.base import Encoded, Temperature
from .label_map import LabelMap, _Metadata
from .pooling import calibrated_divisor
from .pooling_checks import check_label_weight
from .stored import StoredTensors
from .view import View, to_rows


@dataclass(frozen=True)
class LabelMapBatch:
    """The label maps of a batch, each with the view that its image shows.

    Attributes:
        encoded: Encoded logits of all images, with their encoding.
        views: View of each image, B in total.
        labels: Original class index of each image, or None for an image without one.
        keys: Key of each image, or None for an image without one.
        calibrations: Calibration of each image, or None for an image without one.
    """

    encoded: Encoded
    views: tuple[View, ...]
    labels: tuple[int | None, ...]
    keys: tuple[str | None, ...]
    calibrations: tuple[Calibration | None, ...]

    @classmethod
    def of(cls, label_maps: Sequence[LabelMap]) -> LabelMapBatch:
        """Return the batch of these label maps.

        Raises:
            ValueError: There are no maps, or their encodings or sizes differ, as those of different configs do.
        """
        if not label_maps:
            raise ValueError("a batch needs at least one label map")
        keys = [batch_key(label_map) for label_map in label_maps]
        if keys.count(keys[0]) < len(keys):
            first, other = label_maps[0], next(m for m, key in zip(label_maps, keys, strict=True) if key != keys[0])
            raise ValueError(
                f"label maps of one batch must have the same encoding and size, but {first.key!r} has {_described(first)} "
                f"and {other.key!r} has {_described(other)}: use one loader per config"
            )
        return cls.stack(label_maps)

    @classmethod
    def stack(cls, label_maps: Sequence[LabelMap]) -> LabelMapBatch:
        """Return the batch of label maps that all have the same `batch_key`."""
        metadata = [label_map._metadata for label_map in label_maps]
        encoding = metadata[0].encoding
        tensors = encoding.stack([label_map.logits for label_map in label_maps], [one.parts for one in metadata])
        return cls(
            Encoded(encoding, tensors, metadata[0].num_classes),
            tuple(one.view for one in metadata),
            tuple(one.label for one in metadata),
            tuple(one.key for one in metadata),
            tuple(one.calibration for one in metadata),
        )

    def __len__(self) -> int:
        return len(self.views)

    def select(self, rows: Sequence[int]) -> LabelMapBatch:
        """Return the batch of the label maps at some rows."""
        if list(rows) == list(range(len(self))):
            return self
        return LabelMapBatch(
            self.encoded.select(torch.tensor(rows)),
            tuple(self.views[row] for row in rows),
            tuple(self.labels[row] for row in rows),
            tuple(self.keys[row] for row in rows),
            tuple(self.calibrations[row] for row in rows),
        )

    def with_views(self, views: Sequence[View]) -> LabelMapBatch:
        """Return the batch with other views."""
        return replace(self, views=tuple(views))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> LabelMapBatch:
        """Return the batch with its tensors on a device."""
        return self._changed(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> LabelMapBatch:
        """Return the batch in pinned memory. DataLoader calls this if its `pin_memory` is set."""
        return self._changed(lambda tensor: tensor.pin_memory())

    def pool(
        self,
        output_size: int | Sequence[int] = 1,
        temperature: float = 1.0,
        *,
        label_weight: float = 0.0,
        calibrated: bool = False,
    ) -> Tensor:
        """Return the soft labels `[B, C]`, or `[B, C, h, w]` for a grid; see `LabelPooling` for the arguments.

        Raises:
            ValueError: An argument is out of range, `label_weight` is above 0 and an image has no label, or `calibrated` is True
                and an image has no calibration.
        """
        check_label_weight(label_weight)
        encoded = self.encoded
        labels = label_tensor(self.labels, self.keys, encoded.num_classes) if label_weight else None
        divisor: Temperature = self._calibrated(output_size, temperature) if calibrated else temperature
        soft = None
        if output_size == 1 and isinstance(encoded.tensors, StoredTensors):
            soft = encoded.tensors.pool(self.views, divisor)
        if soft is None:
            soft = encoded.encoding.pool(encoded, to_rows(self.views), output_size, divisor)
        return soft if labels is None else blend_labels(soft, labels, label_weight)

    @eagerly
    def _calibrated(self, output_size: int | Sequence[int], temperature: float) -> Temperature:
        """Return the divisor of the pooled logits in each cell."""
        return calibrated_divisor(self.calibrations, self.keys, self.views, output_size, temperature)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> LabelMapBatch:
        return replace(self, encoded=self.encoded.changed(change))


class MapRow:
    """Label map that was read with others of its batch. A `LabelMap` is made of it only when one is needed.

    Args:
        batch: Batch that it is a row of.
        row: Number of the row.
        canvas_size: Size (height, width) in pixels of the image.
    """

    __slots__ = ("batch", "canvas_size", "row")

    def __init__(self, batch: LabelMapBatch, row: int, canvas_size: tuple[int, int]) -> None:
        self.batch = batch
        self.row = row
        self.canvas_size = canvas_size

    @property
    def view(self) -> View:
        """Part of the original image that the image shows: all of it."""
        return self.batch.views[self.row]

    @property
    def key(self) -> str | None:
        """Key of the sample in its dataset, or None."""
        return self.batch.keys[self.row]

    @property
    def label(self) -> int | None:
        """Original class index of the sample, or None."""
        return self.batch.labels[self.row]

    def with_canvas_size(self, canvas_size: tuple[int, int]) -> MapRow:
        """Return the label map for the same image in another size (height, width)."""
        return MapRow(self.batch, self.row, canvas_size)

    def label_map(self) -> LabelMap:
        """Return the label map of the whole image."""
        batch, row = self.batch, self.row
        encoding, tensors, num_classes = batch.encoded
        parts = encoding.separate(tensors, row, num_classes)
        logits: Tensor = parts.pop("logits")
        metadata = _Metadata(
            encoding,
            parts,
            num_classes,
            self.canvas_size,
            batch.views[row],
            self.key,
            self.label,
            batch.calibrations[row],
        )
        return LabelMap._wrap(logits, metadata)


def to_label_map(labels: Any) -> Any:
    """Return the `LabelMap` of a `MapRow`. All else is returned unchanged."""
    return labels.label_map() if isinstance(labels, MapRow) else labels


def collate(samples: list[Any]) -> Any:
    """Collate samples that hold label maps: a `collate_fn` for DataLoader.

    Label maps become a `LabelMapBatch`. Everything else is collated as by torch's `default_collate`, but images that a
    dataset has converted together are not copied: samples that you keep share memory with the batch.

    Args:
        samples: Samples such as (image tensor, `LabelMap`), with any nesting.

    Returns:
        The batch, nested like a sample.

    Raises:
        ValueError: The encodings or sizes of the label maps differ.

    Example:
        >>> transforms = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), v2.PILToTensor()])
        >>> loader = DataLoader(dataset, 256, num_workers=8, collate_fn=collate, pin_memory=True)
        >>> for images, label_maps in loader:
        ...     soft_labels = label_maps.to("cuda", non_blocking=True).pool()
    """
    functions: dict[Any, Any] = {
        **default_collate_fn_map,
        LabelMap: _collate_label_maps,
        Tensor: _collate_tensors,
    }
    return torch_collate(samples, collate_fn_map=functions)


def collate_crops(samples: list[Any]) -> Any:
    """Collate samples with several crops each: a `collate_fn` for `RandomStoredCrop(num_crops=n)`.

    Each sample becomes n rows of the batch. Tensors are divided along their first dimension, which is n; everything else, such as
    a key or a class index, is repeated.

    Args:
        samples: Samples such as (images `[n, 3, h, w]`, soft labels `[n, C]`), with any nesting.

    Returns:
        The batch, nested like a sample: (images `[B * n, 3, h, w]`, soft labels `[B * n, C]`).

    Raises:
        ValueError: A sample has no tensor with a first dimension, or they differ in its size.

    Example:
        >>> transforms = v2.Compose([RandomStoredCrop(224, num_crops=4), v2.ToDtype(torch.float32, scale=True)])
        >>> loader = RelabelLoader(stream, 64, collate_fn=collate_crops)  # batches of 256 crops
    """
    return collate([row for sample in samples for row in _rows_of(sample)])


def _rows_of(sample: Any) -> list[Any]:
    leaves, structure = tree_flatten(sample)
    counts = {len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim}
    if len(counts) != 1:
        raise ValueError(
            f"collate_crops needs samples whose tensors have the number of crops as first dimension, got {sorted(counts)}: use "
            "RandomStoredCrop(num_crops=n) with n above 1, or collate"
        )
    (count,) = counts
    return [
        tree_unflatten([leaf[i] if isinstance(leaf, Tensor) and leaf.ndim else leaf for leaf in leaves], structure)
        for i in range(count)
    ]


def _refuse_crop_labels(labels: Sequence[CropLabels], *, collate_fn_map: Any = None) -> Any:
    raise TypeError("CropLabels cannot be collated: use RandomStoredCrop(size), which replaces them by soft labels")


def _collate_tensors(tensors: Sequence[Tensor], *, collate_fn_map: Any = None) -> Tensor:
    """Stack tensors. Images that were converted together are one tensor already."""
    whole = whole_of(tensors)
    return collate_tensor_fn(tensors, collate_fn_map=collate_fn_map) if whole is None else whole


def _refuse_label_maps(label_maps: Sequence[LabelMap], *, collate_fn_map: Any = None) -> Any:
    raise TypeError(
        "default_collate would stack the stored logits of label maps, which are no soft labels: end the geometric transforms with "
        "LabelPooling(), or pass collate_fn=relabel_datasets.collate to the DataLoader and pool each batch"
    )


def _collate_label_maps(label_maps: Sequence[LabelMap], *, collate_fn_map: Any = None) -> LabelMapBatch:
    return LabelMapBatch.of(label_maps)


def batch_key(label_map: LabelMap) -> tuple[Any, ...]:
    """Return the attributes that all label maps of a batch must share."""
    metadata = label_map._metadata
    return metadata.encoding, metadata.num_classes, metadata.encoding.batch_key(label_map.logits, metadata.parts)


def _described(label_map: LabelMap) -> str:
    sizes = " and ".join("x".join(map(str, size)) for size in label_map.map_sizes)
    return f"{label_map.encoding} {label_map.shape[0]}x{sizes} of {label_map.num_classes} classes"


default_collate_fn_map.update({LabelMap: _refuse_label_maps, CropLabels: _refuse_crop_labels})
