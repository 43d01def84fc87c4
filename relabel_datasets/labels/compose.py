"""Run a v2 pipeline on pairs of image and label map without the overhead of nested samples.

`v2.Transform.forward` flattens a nested sample, selects the items to transform, and rebuilds the sample. For a pair of image
and label map this costs more than pooling the label. Here both items go directly through `make_params` and `transform` of
each transform, with the same results and the same random numbers. Anything else in the pipeline is called normally.

The label maps of a batch are pooled together after all images, and the images are converted together, see `conversion`. Between
two images the processor's caches are cold, and pooling a single map takes several times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import PIL.Image
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from .batch import LabelMapBatch, batch_key
from .conversion import V2_STEPS, Conversion, Conversions, convert
from .encoded import EncodedImage, crop_encoded, crops_first, decoded, planar, size_of
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
    """Run a pipeline on several pairs. Pool their label maps and convert their images together if possible.

    Images are those of the pipeline, bit by bit. Labels equal those of `run_pipeline` up to rounding.

    Args:
        pipeline: Pipeline, see `run_pipeline`.
        pairs: Pairs of image and label map. Each is fetched after the previous one has been transformed.

    Returns:
        The output of the pipeline for each pair.
    """
    return run_together(runner_of(pipeline), pairs)


def run_together(run: Runner, pairs: Iterable[tuple[Any, LabelMap]]) -> list[Any]:
    """Return the outputs of a runner for several pairs, after doing what it leaves to the caller, see `run_batch`."""
    outputs: list[Any] = []
    to_pool: dict[tuple[Any, ...], list[int]] = {}  # samples whose label maps can be pooled together, by key
    to_convert: dict[tuple[Any, ...], list[int]] = {}
    for image, label_map in pairs:
        output, pending = run(image, label_map)
        if pending.pooling is not None:
            to_pool.setdefault((pending.pooling, *batch_key(output[1])), []).append(len(outputs))
        if pending.conversion is not None:
            to_convert.setdefault((pending.conversion, size_of(output[0])), []).append(len(outputs))
        outputs.append(output)
    for (conversion, _), places in to_convert.items():
        images = convert([outputs[place][0] for place in places], conversion)
        for place, converted in zip(places, images, strict=True):
            outputs[place] = converted, outputs[place][1]
    for (pooling, *_), places in to_pool.items():
        labels = _pool_together([outputs[place][1] for place in places], pooling)
        for place, label in zip(places, labels, strict=True):
            outputs[place] = outputs[place][0], label
    return outputs


class Pending(NamedTuple):
    """What is left to do with the output of a `Runner`.

    Attributes:
        pooling: Pooling of the label map, or None.
        conversion: Conversion of the image, or None.
    """

    pooling: LabelPooling | None = None
    conversion: Conversion | None = None


Runner = Callable[[Any, LabelMap], tuple[Any, Pending]]  # runs a pipeline, but leaves its end to the caller


def runner_of(pipeline: Any) -> Runner:
    """Return the function that runs a pipeline on the samples of one batch.

    A pipeline with a method `batch_runner` decides for itself what is left to the caller. A subclass with its own `__call__` does not.

    Args:
        pipeline: Pipeline, see `run_pipeline`.
    """
    if type(pipeline) is v2.Compose:
        return Steps(pipeline.transforms)
    owner = _owner(pipeline, "batch_runner")
    if owner is not None and owner is _owner(pipeline, "__call__"):
        runner: Runner = pipeline.batch_runner()
        return runner
    return lambda image, label_map: (pipeline(decoded(image), label_map), Pending())


def _owner(pipeline: Any, method: str) -> type | None:
    """Return the class that defines a method of a pipeline."""
    return next((cls for cls in type(pipeline).__mro__ if method in vars(cls)), None)


class Steps:
    """Runner that applies v2 transforms in order. A final pooling and a final conversion are left to the caller.

    A crop that comes first decodes only its box of an encoded image.

    Args:
        transforms: The transforms.
    """

    def __init__(self, transforms: Sequence[Any]) -> None:
        self._transforms = transforms
        self._conversions = Conversions(transforms, V2_STEPS, [LabelPooling])

    def __call__(self, image: Any, label_map: LabelMap) -> tuple[Any, Pending]:
        """Return the output of the transforms for one sample, and what is left to do with it."""
        first = self._transforms[0] if self._transforms else None
        num_done = int(crops_first(first))
        outputs: Any
        if not num_done:
            outputs = decoded(image), label_map
        elif isinstance(image, EncodedImage):
            outputs = crop_encoded(first, image, label_map)
        else:
            outputs = run_transform(first, (image, label_map))
        if num_done:
            outputs = planar(outputs[0]), *outputs[1:]
        waiting: tuple[LabelMap, LabelPooling] | None = None
        conversion: Conversion | None = None
        for place, transform in enumerate(self._transforms[num_done:], num_done):
            is_plain = _is_plain(transform, outputs)
            if place == self._conversions.start and is_plain:
                conversion = self._conversions.of(outputs[0])
            if waiting is not None and not (is_plain and _ignores_labels(transform)):
                outputs, waiting = (outputs[0], _pool_one(*waiting)), None
            if type(transform) is LabelPooling and is_plain and isinstance(outputs[1], LabelMap):
                transform.check_inputs(list(outputs))
                waiting = outputs[1], transform
                outputs = outputs[0], _NO_LABEL
            elif conversion is None or type(transform) is LabelPooling:
                outputs = run_transform(transform, outputs)
            elif type(transform) is v2.ToPureTensor:  # the only one of them that changes label maps
                outputs = outputs[0], outputs[1].as_subclass(Tensor)
        if waiting is None:
            return outputs, Pending(conversion=conversion)
        return (outputs[0], waiting[0]), Pending(waiting[1], conversion)


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
