"""Run a v2 pipeline on pairs of image and label map without the overhead of nested samples.

`v2.Transform.forward` flattens a nested sample, selects the items to transform, and rebuilds the sample. For a pair of image
and label map this costs more than pooling the label. Here both items go directly through `make_params` and `transform` of
each transform, with the same results and the same random numbers. Anything else in the pipeline is called normally.

The label maps of a batch are pooled together after all images. Between two images the processor's caches are cold, and
pooling a single map takes several times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from .batch import LabelMapBatch, batch_key
from .encoded import EncodedImage, crop_encoded, crops_first, decoded, planar
from .label_map import LabelMap
from .transforms import LabelPooling
from .v2_hooks import CHECK_INPUTS, MAKE_PARAMS, TRANSFORM
from .view import View

_PLAIN_FORWARD = v2.Transform.forward
_RANDOM_APPLY_FORWARD = v2.RandomHorizontalFlip.forward  # shared by all random-apply transforms
_NO_LABEL = torch.empty(0)  # placeholder that transforms pass through unchanged, like any label


def run_pipeline(pipeline: Any, image: Any, label_map: LabelMap) -> Any:
    """Return `pipeline(image, label_map)`.

    Args:
        pipeline: A `v2.Compose`, or any other callable of the two.
        image: Image of the sample. An `EncodedImage` is decoded when its pixels are needed.
        label_map: Label map of the image.
    """
    return run_batch(pipeline, [(image, label_map)])[0]


def run_batch(pipeline: Any, pairs: Iterable[tuple[Any, LabelMap]]) -> list[Any]:
    """Run a pipeline on several pairs and pool their label maps together if possible.

    Labels equal those of `run_pipeline` up to rounding.

    Args:
        pipeline: Pipeline, see `run_pipeline`.
        pairs: Pairs of image and label map. Each is fetched after the previous one has been transformed.

    Returns:
        The output of the pipeline for each pair.
    """
    outputs: list[Any] = []
    waiting: dict[tuple[Any, ...], list[int]] = {}  # samples whose label maps can be pooled together, by key
    for image, label_map in pairs:
        output, pooling = run_until_pooling(pipeline, image, label_map)
        if pooling is not None:
            waiting.setdefault((pooling, *batch_key(output[1])), []).append(len(outputs))
        outputs.append(output)
    for (pooling, *_), places in waiting.items():
        labels = _pool_together([outputs[place][1] for place in places], pooling)
        for place, label in zip(places, labels, strict=True):
            outputs[place] = outputs[place][0], label
    return outputs


def run_until_pooling(pipeline: Any, image: Any, label_map: LabelMap) -> tuple[Any, LabelPooling | None]:
    """Run a pipeline, but leave a final pooling of the label map to the caller.

    A pipeline with a method of this name decides for itself what can be left.

    Returns:
        The output, and the pooling that is still pending for its label map, or None.
    """
    if type(pipeline) is v2.Compose:
        return run_steps(pipeline.transforms, image, label_map)
    method = getattr(pipeline, "run_until_pooling", None)
    return (pipeline(decoded(image), label_map), None) if method is None else method(image, label_map)


def run_steps(transforms: Sequence[Any], image: Any, label_map: LabelMap) -> tuple[Any, LabelPooling | None]:
    """Apply transforms in order, see `run_until_pooling`. A crop that comes first decodes only its box of an encoded image."""
    outputs: Any = image, label_map
    if len(transforms) and crops_first(transforms[0]):
        first, transforms = transforms[0], transforms[1:]
        outputs = crop_encoded(first, *outputs) if isinstance(image, EncodedImage) else run_transform(first, outputs)
        outputs = planar(outputs[0]), *outputs[1:]
    else:
        outputs = decoded(image), label_map
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
    if len(label_maps) == 1:  # faster without a batch
        return [_pool_one(label_maps[0], pooling)]
    batch = LabelMapBatch.stack(label_maps)
    if not pooling.localized:
        batch = replace(batch, views=(View(),) * len(batch))
    soft = batch.pool(pooling.output_size, pooling.temperature, calibrated=pooling.calibrated)
    return pooling.to_targets(soft, label_maps)


def _pool_one(label_map: LabelMap, pooling: LabelPooling) -> Tensor:
    label: Tensor = pooling.transform(label_map, {})
    return label


def run_transform(transform: Any, inputs: Any) -> Any:
    """Return `transform(*inputs)` for one transform of a pipeline."""
    if not _is_plain(transform, inputs):
        return transform(*inputs)
    getattr(transform, CHECK_INPUTS)(list(inputs))
    if type(transform).forward is _RANDOM_APPLY_FORWARD and torch.rand(1) >= transform.p:
        return inputs
    image, target = inputs
    kinds = transform._transformed_types
    # v2 treats the first plain tensor as an image only if there is no other image, so a pooled label passes through.
    uses_image, uses_target = _is_of(image, kinds), isinstance(target, tv_tensors.TVTensor) and _is_of(target, kinds)
    used = [inpt for inpt, is_used in ((image, uses_image), (target, uses_target)) if is_used]
    params = getattr(transform, MAKE_PARAMS)(used)
    apply = getattr(transform, TRANSFORM)
    return apply(image, params) if uses_image else image, apply(target, params) if uses_target else target


def _is_plain(transform: Any, inputs: Any) -> bool:
    """Return whether the transform treats image and target independently, as v2 transforms do."""
    return (
        getattr(type(transform), "forward", None) in (_PLAIN_FORWARD, _RANDOM_APPLY_FORWARD)
        and len(inputs) == 2
        and (isinstance(inputs[0], (PIL.Image.Image, tv_tensors.Image)) or type(inputs[0]) is Tensor)
        and isinstance(inputs[1], Tensor)
    )


def _ignores_labels(transform: Any) -> bool:
    """Return whether a plain transform never looks at labels. Only those whose `check_inputs` is torchvision's are known not to."""
    return bool(getattr(type(transform), CHECK_INPUTS).__module__.startswith("torchvision."))


def _is_of(value: object, kinds: tuple[type | Callable[[Any], bool], ...]) -> bool:
    return any(isinstance(value, kind) if isinstance(kind, type) else kind(value) for kind in kinds)
