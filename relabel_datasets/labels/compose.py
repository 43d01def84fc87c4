"""Run a v2 pipeline on images and their label maps without the overhead of v2's general samples.

`v2.Transform.forward` flattens any nested sample, finds out what of it to transform, and builds it again: for a pair of an
image and a label map that costs more than pooling the label. Here the two go straight through each transform's own
`make_params` and `transform`, which draw and compute all there is. Results and random numbers are those of the
pipeline itself; what is not a plain transform of a pair is called as it is.

Of a batch, the label maps are pooled together when all images are done. One by one, between images that empty the
processor's caches, each takes several times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from .batch import LabelMapBatch, kind_of
from .label_map import LabelMap, View
from .transforms import LabelPooling

_ALWAYS = v2.Transform.forward
_BY_CHANCE = v2.RandomHorizontalFlip.forward  # the one of all transforms that have a probability
_NO_LABEL = torch.empty(0)  # goes through transforms in place of a label, which they pass through as it is


def run_pipeline(pipeline: Any, image: PIL.Image.Image, label_map: LabelMap) -> Any:
    """Return `pipeline(image, label_map)`.

    Args:
        pipeline: a `v2.Compose`, or anything else that takes the two.
        image: of the sample.
        label_map: of the image.
    """
    return run_batch(pipeline, [(image, label_map)])[0]


def run_batch(pipeline: Any, pairs: Iterable[tuple[PIL.Image.Image, LabelMap]]) -> list[Any]:
    """Return `[run_pipeline(pipeline, image, label_map), ...]`, labels to rounding: they are pooled together where possible.

    Args:
        pipeline: see `run_pipeline`.
        pairs: of images and label maps; each is asked for when the one before it has been transformed.
    """
    outputs: list[Any] = []
    waiting: dict[tuple[Any, ...], list[int]] = {}  # samples whose label maps can be pooled together
    for image, label_map in pairs:
        output, pooling = run_until_pooling(pipeline, image, label_map)
        if pooling is not None:
            waiting.setdefault((pooling, *kind_of(output[1])), []).append(len(outputs))
        outputs.append(output)
    for (pooling, *_), places in waiting.items():
        labels = _pool_together([outputs[place][1] for place in places], pooling)
        for place, label in zip(places, labels, strict=True):
            outputs[place] = outputs[place][0], label
    return outputs


def run_until_pooling(pipeline: Any, image: PIL.Image.Image, label_map: LabelMap) -> tuple[Any, LabelPooling | None]:
    """Return what the pipeline gives, and what must yet be done to the label map in it: None where there is no such thing.

    A pipeline with a method of this name says for itself what can wait.
    """
    if type(pipeline) is v2.Compose:
        return run_steps(pipeline.transforms, image, label_map)
    method = getattr(pipeline, "run_until_pooling", None)
    return (pipeline(image, label_map), None) if method is None else method(image, label_map)


def run_steps(transforms: Iterable[Any], image: Any, label_map: LabelMap) -> tuple[Any, LabelPooling | None]:
    """Return what transforms give, one after the other, see `run_until_pooling`."""
    outputs: Any = image, label_map
    waiting: tuple[LabelMap, LabelPooling] | None = None
    for transform in transforms:
        if waiting is not None and not (_is_plain(transform, outputs) and _ignores_labels(transform)):
            outputs, waiting = (outputs[0], _pool_one(*waiting)), None
        if type(transform) is LabelPooling and _is_plain(transform, outputs) and isinstance(outputs[1], LabelMap):
            transform.check_inputs(list(outputs))
            waiting = outputs[1], transform
            outputs = outputs[0], _NO_LABEL
        else:
            outputs = run_transform(transform, outputs)
    return (outputs, None) if waiting is None else ((outputs[0], waiting[0]), waiting[1])


def _pool_together(label_maps: list[LabelMap], pooling: LabelPooling) -> Iterable[Tensor]:
    if len(label_maps) == 1:  # faster by itself
        return [_pool_one(label_maps[0], pooling)]
    batch = LabelMapBatch.of_one_kind(label_maps)
    if not pooling.localized:
        batch = replace(batch, views=(View(),) * len(batch))
    return pooling.told(batch.pool(pooling.output_size, pooling.temperature), 1)


def _pool_one(label_map: LabelMap, pooling: LabelPooling) -> Tensor:
    label: Tensor = pooling.transform(label_map, {})
    return label


def run_transform(transform: Any, inputs: Any) -> Any:
    """Return `transform(*inputs)`, of one transform of a pipeline."""
    if not _is_plain(transform, inputs):
        return transform(*inputs)
    transform.check_inputs(list(inputs))
    if type(transform).forward is _BY_CHANCE and torch.rand(1) >= transform.p:
        return inputs
    image, target = inputs
    kinds = transform._transformed_types
    # Beside an image, v2 passes plain tensors, such as a label that is already pooled, through; the first is an image.
    takes_image, takes_target = _is_of(image, kinds), isinstance(target, tv_tensors.TVTensor) and _is_of(target, kinds)
    params = transform.make_params([each for each, taken in ((image, takes_image), (target, takes_target)) if taken])
    return (
        transform.transform(image, params) if takes_image else image,
        transform.transform(target, params) if takes_target else target,
    )


def _is_plain(transform: Any, inputs: Any) -> bool:
    """Return whether it does to an image and a target what v2 does to each by itself."""
    return (
        getattr(type(transform), "forward", None) in (_ALWAYS, _BY_CHANCE)
        and len(inputs) == 2
        and (isinstance(inputs[0], (PIL.Image.Image, tv_tensors.Image)) or type(inputs[0]) is Tensor)
        and isinstance(inputs[1], Tensor)
    )


def _ignores_labels(transform: Any) -> bool:
    """Return whether a plain transform checks no labels: torchvision's own do not, those that they leave to others may."""
    return bool(type(transform).check_inputs.__module__.startswith("torchvision."))


def _is_of(value: object, kinds: tuple[type | Callable[[Any], bool], ...]) -> bool:
    return any(isinstance(value, kind) if isinstance(kind, type) else kind(value) for kind in kinds)
