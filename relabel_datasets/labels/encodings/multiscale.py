"""`multiscale`: S label maps of an image, one for each of several input sizes of the annotator, each encoded as `heatmaps`.

    stored tensor           dtype and shape
    logits                  as in `heatmaps`: [K, H, W], or half of the planes with 4 bits
    logits_1, logits_2 ...  the same for the second map, the third map, ..., with their own H and W
    classes, base, ranges   as in `heatmaps`, with a first dimension of size S

In memory, a label map has the tensors of `heatmaps` for its first map, and `logits_1`, `classes_1` and `base_1` for its second map,
and so on. Labels are pooled from all maps: their pooled logits are averaged, or multiplied by the gains of the dataset and added.

Shapes: B images, C classes, S maps per image, K heatmaps per map, H x W locations.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from ...errors import LabelMapError
from ..eager import eagerly
from ..limits import MAX_SCALES
from ..resample import mean_of_maps
from ..view import Rows, View
from .base import Array, Encoded, MapEncoding, Parts, StoredTensor, Temperature
from .grid_pooling import divisors_of, pool_scales
from .heatmaps import Heatmaps
from .registry import get_map_encoding

T = TypeVar("T")
_HEATMAPS = cast(Heatmaps, get_map_encoding("heatmaps"))
_NAME = re.compile(r"(.+?)(?:_(\d+))?")


class MultiScale(MapEncoding):
    """Heatmaps of S input sizes."""

    stored_tensors = (*_HEATMAPS.stored_tensors, *(f"logits_{scale}" for scale in range(1, MAX_SCALES)))
    optional_tensors = (*_HEATMAPS.optional_tensors, *stored_tensors[len(_HEATMAPS.stored_tensors) :])

    # Encode and store.

    def encode(self, dense: Tensor, k: int) -> dict[str, Tensor]:
        return self.encode_scales([dense], k)

    def encode_scales(self, dense: Sequence[Tensor], k: int) -> dict[str, Tensor]:
        if not 1 <= len(dense) <= MAX_SCALES:
            raise ValueError(f"{self.name} maps are made of the logits of 1 to {MAX_SCALES} sizes, got {len(dense)}")
        return _joined([_HEATMAPS.encode(logits, k) for logits in dense])

    def check_storable(self, encoded: Encoded) -> None:
        scales = _scales(encoded)
        for scale in scales:
            _HEATMAPS.check_storable(scale)
        nums_kept = {scale.logits.shape[1] for scale in scales}
        if len(nums_kept) > 1:
            raise ValueError(f"all maps of an image must have equally many heatmaps, got {sorted(nums_kept)}")

    def store(self, encoded: Encoded, storage_dtype: str) -> dict[str, Array]:
        scales = [_HEATMAPS.store(scale, storage_dtype) for scale in _scales(encoded)]
        logits = _joined([{"logits": arrays["logits"]} for arrays in scales])
        shared = {name: np.stack([arrays[name] for arrays in scales], 1) for name in scales[0] if name != "logits"}
        return {**logits, **shared}

    def num_bytes(self, num_classes: int, k: int, map_size: tuple[int, int], storage_dtype: str) -> int:
        """Return the size of the tensors of one of the maps of an image, in bytes."""
        return _HEATMAPS.num_bytes(num_classes, k, map_size, storage_dtype)

    def check_header(self, tensors: Mapping[str, StoredTensor], num_classes: int) -> str:
        logits = [name for name in tensors if name.startswith("logits")]
        expected = [f"logits{_suffix(scale)}" for scale in range(len(logits))]
        if set(logits) != set(expected):
            raise LabelMapError(f"the logits of {len(logits)} maps must be {', '.join(expected)}, got {sorted(logits)}")
        for name in tensors.keys() - set(logits):
            if not tensors[name].shape or tensors[name].shape[0] != len(logits):
                raise LabelMapError(
                    f"{name} must have a first dimension of size {len(logits)}, the number of maps, got {tensors[name].shape}"
                )
        of_map = {name: StoredTensor(shape[1:], dtype) for name, (shape, dtype) in _shared(tensors).items()}
        dtypes = [_HEATMAPS.check_header({**of_map, "logits": tensors[name]}, num_classes) for name in expected]
        return dtypes[0]

    def decode(self, arrays: Mapping[str, Array], num_classes: int, storage_dtype: str) -> dict[str, Tensor]:
        scales = []
        for scale in range(_num_scales(arrays)):
            of_scale = {name: values[:, scale] for name, values in _shared(arrays).items()}
            of_scale["logits"] = arrays[f"logits{_suffix(scale)}"]
            scales.append(_HEATMAPS.decode(of_scale, num_classes, storage_dtype))
        return _joined(scales)

    # One label map.

    def check(self, logits: Tensor, arguments: Mapping[str, Any], num_classes: int) -> Parts:
        num_scales = _num_scales(arguments)
        if num_scales > MAX_SCALES:
            raise ValueError(f"{self.name} maps are made of at most {MAX_SCALES} maps, got {num_scales}")
        names = [f"{name}{_suffix(scale)}" for scale in range(num_scales) for name in ("logits", *_HEATMAPS.parts)]
        if arguments.keys() != set(names[1:]):
            raise ValueError(f"{self.name} maps are made of {', '.join(names)}, got logits, {', '.join(arguments)}")
        scales = []
        for of_scale in _separated({**arguments, "logits": logits}):
            values = torch.as_tensor(of_scale.pop("logits"), dtype=logits.dtype, device=logits.device)
            scales.append({"logits": values, **_HEATMAPS.check(values, of_scale, num_classes)})
        parts = _joined(scales)
        del parts["logits"]
        return parts

    def plain(self, parts: Parts) -> dict[str, Tensor]:
        return _joined([_HEATMAPS.plain(of_scale) for of_scale in _separated(parts)])

    def like(self, parts: Parts, logits: Tensor) -> Parts:
        scales = _separated(parts)
        converted = [_HEATMAPS.like(of_scale, logits) for of_scale in scales]
        is_same = all(new is old for new, old in zip(converted, scales, strict=True))
        return parts if is_same else _joined(converted)

    def pool_one(
        self,
        logits: Tensor,
        parts: Parts,
        num_classes: int,
        view: View,
        output_size: int | Sequence[int] = 1,
        temperature: Temperature = 1.0,
    ) -> Tensor:
        scales = _separated({"logits": logits, **parts})
        means = [
            mean
            for of_scale in (scales if output_size == 1 else ())
            if (mean := _HEATMAPS.mean_of_box(of_scale.pop("logits"), of_scale, num_classes, view)) is not None
        ]
        if len(means) < len(scales):
            return super().pool_one(logits, parts, num_classes, view, output_size, temperature)
        pooled = np.zeros(num_classes, np.float32)
        for mean, divisor in zip(means, divisors_of(temperature, len(scales)), strict=True):
            pooled += mean / np.float32(np.asarray(divisor).item())
        return torch.from_numpy(pooled).softmax(0)

    def find_damage(self, logits: Tensor, parts: Parts) -> str | None:
        found = (_HEATMAPS.find_damage(logits, of_scale) for of_scale in _separated(parts))
        return next((damage for damage in found if damage is not None), None)

    def map_sizes(self, logits: Tensor, parts: Parts) -> list[list[int]]:
        return [list(of_scale["logits"].shape[-2:]) for of_scale in _separated({"logits": logits, **parts})]

    # Batches.

    def batch_key(self, logits: Tensor, parts: Parts) -> tuple[Any, ...]:
        return tuple(tuple(of_scale["logits"].shape) for of_scale in _separated({"logits": logits, **parts}))

    def stack(self, logits: Sequence[Tensor], parts: Sequence[Parts]) -> dict[str, Tensor]:
        images = [_separated({"logits": values, **part}) for values, part in zip(logits, parts, strict=True)]
        scales = []
        for of_scale in zip(*images, strict=True):
            maps = [one.pop("logits") for one in of_scale]
            scales.append(_HEATMAPS.stack(maps, of_scale))
        return _joined(scales)

    def separate(self, tensors: Mapping[str, Tensor], row: int, num_classes: int) -> Parts:
        return _joined([_HEATMAPS.separate(of_scale, row, num_classes) for of_scale in _separated(tensors)])

    @eagerly
    def pool(
        self, encoded: Encoded, views: Rows, output_size: int | Sequence[int] = 1, temperature: Temperature = 1.0
    ) -> Tensor:
        return pool_scales(_scales(encoded), views, _HEATMAPS.mean_logits, output_size, temperature)

    def dense(self, encoded: Encoded) -> Tensor:
        """Return the mean of the maps `[B, C, H, W]`, at the locations of the map with the most."""
        return mean_of_maps([_HEATMAPS.dense(scale) for scale in _scales(encoded)])

    def unpacked(self, encoded: Encoded) -> Encoded:
        return encoded._replace(tensors=_joined([_HEATMAPS.unpacked(scale).tensors for scale in _scales(encoded)]))

    def class_logits(self, encoded: Encoded, classes: Tensor) -> Tensor:
        return mean_of_maps([_HEATMAPS.class_logits(scale, classes) for scale in _scales(encoded)])


def _suffix(scale: int) -> str:
    """Return the suffix of the names of the tensors of one map."""
    return f"_{scale}" if scale else ""


def _joined(scales: Sequence[Mapping[str, T]]) -> dict[str, T]:
    """Return the tensors of all maps with suffixes."""
    return {f"{name}{_suffix(scale)}": value for scale, tensors in enumerate(scales) for name, value in tensors.items()}


def _separated(tensors: Mapping[str, T]) -> list[dict[str, T]]:
    """Return the tensors of each map without suffixes."""
    scales: list[dict[str, T]] = [{} for _ in range(_num_scales(tensors))]
    for name, value in tensors.items():
        of_scale, scale = _split(name)
        scales[scale][of_scale] = value
    return scales


@lru_cache(maxsize=256)
def _split(name: str) -> tuple[str, int]:
    """Return the name without the suffix, and the map of the suffix."""
    match = _NAME.fullmatch(name)
    assert match is not None
    return match[1], int(match[2] or 0)


def _num_scales(tensors: Mapping[str, Any]) -> int:
    return 1 + sum(name.startswith("logits_") for name in tensors)


def _shared(tensors: Mapping[str, T]) -> dict[str, T]:
    """Return the stored tensors that hold values of all maps."""
    return {name: value for name, value in tensors.items() if not name.startswith("logits")}


def _scales(encoded: Encoded) -> list[Encoded]:
    """Return the heatmaps of each input size."""
    return [Encoded(_HEATMAPS, tensors, encoded.num_classes) for tensors in _separated(encoded.tensors)]
