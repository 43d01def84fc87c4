"""Batches of label maps: collated in loader workers, pooled together on the training device.

A soft label of ImageNet-21k takes 87 KB, but its label map only 20 KB. With that many classes, workers should send the map.
The base of all classes therefore stays packed until it is on the device.

Shapes as in `pooling`: B images, K logits stored at each of H x W locations, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data._utils.collate import collate as torch_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from .blending import blend_labels, label_tensor
from .label_map import LabelMap, View
from .packed_base import PackedBaseBatch
from .pooling import pool_views
from .pooling_checks import check_label_weight


@dataclass(frozen=True)
class LabelMapBatch:
    """The label maps of a batch, each with the view that its image shows.

    Attributes:
        logits: Stored logits `[B, K, H, W]`.
        classes: Class indices of the logits, `[B, K, H, W]` or `[B, K, 1, 1]`.
        base: Logits `[B, C]` of the classes that are not stored, as floats or packed; None means 0.
        num_classes: Number of classes C.
        views: View of each image, B in total.
        labels: Original class index of each image, or None for an image without one.
        keys: Key of each image, or None for an image without one.
    """

    logits: Tensor
    classes: Tensor
    base: Tensor | PackedBaseBatch | None
    num_classes: int
    views: tuple[View, ...]
    labels: tuple[int | None, ...]
    keys: tuple[str | None, ...]

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
        return cls(
            torch.stack([label_map.logits for label_map in label_maps]),
            torch.stack([label_map.classes for label_map in label_maps]),
            _bases(label_maps),
            label_maps[0].num_classes,
            tuple(label_map.view for label_map in label_maps),
            tuple(label_map.label for label_map in label_maps),
            tuple(label_map.key for label_map in label_maps),
        )

    def __len__(self) -> int:
        return len(self.views)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> LabelMapBatch:
        """Return the batch with its tensors on a device."""
        return self._changed(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> LabelMapBatch:
        """Return the batch in pinned memory. DataLoader calls this if its `pin_memory` is set."""
        return self._changed(lambda tensor: tensor.pin_memory())

    def pool(
        self, output_size: int | Sequence[int] = 1, temperature: float = 1.0, *, label_weight: float = 0.0
    ) -> Tensor:
        """Return the soft labels `[B, C]`, or `[B, C, h, w]` for a grid; see `LabelPooling` for the arguments.

        Raises:
            ValueError: An argument is out of range, or `label_weight` is above 0 and an image has no label.
        """
        check_label_weight(label_weight)
        labels = label_tensor(self.labels, self.keys, self.num_classes) if label_weight else None
        soft = pool_views(
            self.logits, self.classes, self.views, num_classes=self.num_classes, base=self.dense_base(),
            output_size=output_size, temperature=temperature,
        )  # fmt: skip
        return soft if labels is None else blend_labels(soft, labels, label_weight)

    def dense_base(self) -> Tensor | None:
        """Return the base `[B, C]` as floats, or None for 0."""
        base = self.base
        return base.dense(self.classes.flatten(1)) if isinstance(base, PackedBaseBatch) else base

    def _changed(self, change: Callable[[Tensor], Tensor]) -> LabelMapBatch:
        base = self.base
        if base is not None:
            base = base.changed(change) if isinstance(base, PackedBaseBatch) else change(base)
        return replace(self, logits=change(self.logits), classes=change(self.classes), base=base)


def collate(samples: list[Any]) -> Any:
    """Collate samples that hold label maps: a `collate_fn` for DataLoader.

    Label maps become a `LabelMapBatch`. Everything else is collated by torch's `default_collate`.

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
    return torch_collate(samples, collate_fn_map={LabelMap: _collate_label_maps, **default_collate_fn_map})


def _collate_label_maps(label_maps: Sequence[LabelMap], *, collate_fn_map: Any = None) -> LabelMapBatch:
    return LabelMapBatch.of(label_maps)


def _bases(label_maps: Sequence[LabelMap]) -> Tensor | PackedBaseBatch | None:
    packed = [base for base in (label_map.packed_base for label_map in label_maps) if base is not None]
    if len(packed) == len(label_maps) and len({base.levels.shape for base in packed}) == 1:
        return PackedBaseBatch.of(packed)
    dense = [base for base in (label_map.base for label_map in label_maps) if base is not None]
    return torch.stack(dense) if dense else None


def batch_key(label_map: LabelMap) -> tuple[Any, ...]:
    """Return the attributes that all label maps of a batch must share."""
    return label_map.logits.shape, label_map.classes.shape, label_map.encoding, label_map.num_classes


def _described(label_map: LabelMap) -> str:
    count, height, width = label_map.logits.shape
    return f"{label_map.encoding} {count}x{height}x{width} of {label_map.num_classes} classes"
