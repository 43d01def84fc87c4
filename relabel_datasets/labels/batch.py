"""Label maps of a batch as one value: collated in the loader's workers, pooled at once on the training device.

A soft label of ImageNet-21k takes 87 KB, its label map 20: with so many classes it is the map that should travel. For
that the base of all classes stays packed until it is on the device.
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

from .label_map import LabelMap, View
from .packed_base import PackedBases
from .pooling import pool_views


@dataclass(frozen=True)
class LabelMapBatch:
    """The label maps of a batch, each with the view that its image shows.

    Attributes:
        logits: `[B, K, H, W]` stored logits.
        classes: `[B, K, H, W]` or `[B, K, 1, 1]` their classes.
        base: `[B, C]` logits of the classes that are not stored, as floats or packed as maps store them; None for 0.
        num_classes: C.
        views: B views.
        labels: original class index of each image, B, or None where it has none.
    """

    logits: Tensor
    classes: Tensor
    base: Tensor | PackedBases | None
    num_classes: int
    views: tuple[View, ...]
    labels: tuple[int | None, ...]

    @classmethod
    def of(cls, label_maps: Sequence[LabelMap]) -> LabelMapBatch:
        """Return the batch of some label maps.

        Raises:
            ValueError: none, or maps of different encodings or sizes, as of different configs.
        """
        if not label_maps:
            raise ValueError("a batch needs at least one label map")
        kinds = [kind_of(each) for each in label_maps]
        if kinds.count(kinds[0]) < len(kinds):
            first, other = label_maps[0], next(each for each in label_maps if kind_of(each) != kinds[0])
            raise ValueError(
                f"label maps of one batch must be of one kind, but {first.key!r} has {_described(first)}, and "
                f"{other.key!r} has {_described(other)}: batch the samples of each config by themselves"
            )
        return cls.of_one_kind(label_maps)

    @classmethod
    def of_one_kind(cls, label_maps: Sequence[LabelMap]) -> LabelMapBatch:
        """Return the batch of maps that are known to have the same `kind_of`."""
        return cls(
            torch.stack([each.logits for each in label_maps]),
            torch.stack([each.classes for each in label_maps]),
            _bases(label_maps),
            label_maps[0].num_classes,
            tuple(each.view for each in label_maps),
            tuple(each.label for each in label_maps),
        )

    def __len__(self) -> int:
        return len(self.views)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> LabelMapBatch:
        """Return the batch on a device."""
        return self._changed(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> LabelMapBatch:
        """Return the batch in memory that a GPU copies from; torch's DataLoader calls it where it is to pin memory."""
        return self._changed(lambda tensor: tensor.pin_memory())

    def pool(self, output_size: int | Sequence[int] = 1, temperature: float = 1.0) -> Tensor:
        """Return the soft labels `[B, C]`, or `[B, C, h, w]`, that `LabelPooling` gives one by one, see there."""
        return pool_views(
            self.logits, self.classes, self.views, num_classes=self.num_classes, base=self.dense_base(),
            output_size=output_size, temperature=temperature,
        )  # fmt: skip

    def dense_base(self) -> Tensor | None:
        """Return the base as floats, `[B, C]`, or None for 0."""
        base = self.base
        return base.dense(self.classes.flatten(1)) if isinstance(base, PackedBases) else base

    def _changed(self, change: Callable[[Tensor], Tensor]) -> LabelMapBatch:
        base = self.base
        if base is not None:
            base = base.changed(change) if isinstance(base, PackedBases) else change(base)
        return replace(self, logits=change(self.logits), classes=change(self.classes), base=base)


def collate(samples: list[Any]) -> Any:
    """Return a batch of samples: what a DataLoader's `collate_fn` is.

    Label maps become a `LabelMapBatch`; all else is as torch's `default_collate` has it.

    Args:
        samples: such as (image tensor, `LabelMap`), in any nesting.

    Raises:
        ValueError: label maps of different kinds.

    Example:
        >>> transforms = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), v2.PILToTensor()])
        >>> loader = DataLoader(dataset, 256, num_workers=8, collate_fn=collate, pin_memory=True)
        >>> for images, label_maps in loader:
        ...     soft_labels = label_maps.to("cuda", non_blocking=True).pool()
    """
    return torch_collate(samples, collate_fn_map={LabelMap: _collate_label_maps, **default_collate_fn_map})


def _collate_label_maps(label_maps: Sequence[LabelMap], *, collate_fn_map: Any = None) -> LabelMapBatch:
    return LabelMapBatch.of(label_maps)


def _bases(label_maps: Sequence[LabelMap]) -> Tensor | PackedBases | None:
    packed = [each for each in (label_map.packed_base for label_map in label_maps) if each is not None]
    if len(packed) == len(label_maps) and len({base.levels.shape for base in packed}) == 1:
        return PackedBases.of(packed)
    dense = [each for each in (label_map.base for label_map in label_maps) if each is not None]
    return torch.stack(dense) if dense else None


def kind_of(label_map: LabelMap) -> tuple[Any, ...]:
    """Return what is the same of all label maps of a batch."""
    return label_map.logits.shape, label_map.classes.shape, label_map.encoding, label_map.num_classes


def _described(label_map: LabelMap) -> str:
    count, height, width = label_map.logits.shape
    return f"{label_map.encoding} {count}x{height}x{width} of {label_map.num_classes} classes"
