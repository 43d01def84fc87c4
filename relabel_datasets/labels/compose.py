"""Run a v2 pipeline on pairs of image and label map without the overhead of nested samples.

`v2.Transform.forward` flattens a nested sample, selects the items to transform, and rebuilds the sample. For a pair of image
and label map this costs more than pooling the label. Here both items go directly through `make_params` and `transform` of
each transform, with the same results and the same random numbers. Anything else in the pipeline is called normally.

The label maps of a batch follow their images and are pooled together after all images, see `following`, and the images are
converted together, see `conversion`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import PIL.Image
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from .batch import to_label_map
from .conversion import V2_STEPS, Conversion, Conversions, convert
from .encoded import EncodedImage, crops_first, decode_for, decoded, planar, size_of
from .following import Following, can_wait, follow, stack
from .label_map import LabelMap
from .transforms import LabelPooling
from .v2_hooks import CHECK_INPUTS, MAKE_PARAMS, TRANSFORM
from .view import WHOLE

_PLAIN_FORWARD = v2.Transform.forward
_RANDOM_APPLY_FORWARD = v2.RandomHorizontalFlip.forward  # shared by all random-apply transforms
_NO_LABEL = torch.empty(0)  # placeholder that transforms pass through unchanged, like any label


def run_pipeline(pipeline: Any, image: Any, label_map: Any) -> Any:
    """Return `pipeline(image, label_map)`.

    Args:
        pipeline: A `v2.Compose`, or any other callable of the two.
        image: Image of the sample. An `EncodedImage` is decoded when its pixels are needed.
        label_map: Label map of the image.
    """
    return run_batch(pipeline, [(image, label_map)])[0]


def run_batch(pipeline: Any, pairs: Iterable[tuple[Any, Any]]) -> list[Any]:
    """Run a pipeline on several pairs. Their label maps follow and are pooled, and their images are converted, together if possible.

    Images are those of the pipeline, bit by bit. Labels equal those of `run_pipeline` up to rounding.

    Args:
        pipeline: Pipeline, see `run_pipeline`.
        pairs: Pairs of image and label map, which may be a `MapRow`. Each is fetched after the previous one has been transformed.

    Returns:
        The output of the pipeline for each pair.
    """
    return run_together(runner_of(pipeline), pairs)


def run_together(run: Runner, pairs: Iterable[tuple[Any, Any]]) -> list[Any]:
    """Return the outputs of a runner for several pairs, after doing what it leaves to the caller, see `run_batch`."""
    outputs: list[Any] = []
    to_pool: dict[tuple[Any, ...], list[int]] = {}  # samples whose label maps can be pooled together, by key
    to_convert: dict[tuple[Any, ...], list[int]] = {}
    followed: dict[int, Following] = {}
    for place, (image, label_map) in enumerate(pairs):
        output, pending = run(image, label_map)
        if pending.label_map is not None:
            followed[place] = pending.label_map
            to_pool.setdefault((pending.pooling, *pending.label_map.batch_key()), []).append(place)
        if pending.conversion is not None:
            to_convert.setdefault((pending.conversion, size_of(output[0])), []).append(place)
        outputs.append(output)
    for (conversion, _), places in to_convert.items():
        images = convert([outputs[place][0] for place in places], conversion)
        for place, converted in zip(places, images, strict=True):
            outputs[place] = converted, outputs[place][1]
    for (pooling, *_), places in to_pool.items():
        images = [outputs[place][0] for place in places]
        labels = _labels_of([followed[place] for place in places], pooling, images)
        for place, image, label in zip(places, images, labels, strict=True):
            outputs[place] = image, label
    return outputs


class Pending(NamedTuple):
    """What is left to do with the output of a `Runner`.

    Attributes:
        label_map: Label map that must still follow the image and replaces the second output, or None.
        pooling: Pooling of this label map, or None.
        conversion: Conversion of the image, or None.
    """

    label_map: Following | None = None
    pooling: LabelPooling | None = None
    conversion: Conversion | None = None


Runner = Callable[[Any, Any], tuple[Any, Pending]]  # runs a pipeline, but leaves its end to the caller


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
    return lambda image, label_map: (pipeline(decoded(image), to_label_map(label_map)), Pending())


def _owner(pipeline: Any, method: str) -> type | None:
    """Return the class that defines a method of a pipeline."""
    return next((cls for cls in type(pipeline).__mro__ if method in vars(cls)), None)


class Steps:
    """Runner that applies v2 transforms in order. A final pooling and a final conversion are left to the caller.

    A crop that comes first decodes only its box of an encoded image. A label map follows the image when a transform looks at it, or
    after the last image of the batch.

    Args:
        transforms: The transforms.
    """

    def __init__(self, transforms: Sequence[Any]) -> None:
        self._crops_first = bool(transforms) and crops_first(transforms[0])
        self._steps = [_Step.of(transform) for transform in transforms]
        self._conversions = Conversions(transforms, V2_STEPS, [LabelPooling])

    def __call__(self, image: Any, label_map: Any) -> tuple[Any, Pending]:
        """Return the output of the transforms for one sample, and what is left to do with it."""
        label = follow(label_map, image)
        if not self._crops_first:
            image = decoded(image)
        outputs: Any = image, to_label_map(label_map) if label is None else _NO_LABEL
        pooling: LabelPooling | None = None
        conversion: Conversion | None = None
        for place, (transform, is_plain_step, can_wait_before, can_wait_after) in enumerate(self._steps):
            is_plain = is_plain_step and _is_pair(outputs)
            if place == self._conversions.start and is_plain:
                conversion = self._conversions.of(outputs[0])
            if label is not None and not (is_plain and (can_wait_before if pooling is None else can_wait_after)):
                outputs = outputs[0], *_labels_of([label], pooling, outputs[:1])
                label = pooling = None
            if type(transform) is LabelPooling and is_plain and (label is not None or isinstance(outputs[1], LabelMap)):
                if label is None:
                    transform.check_inputs(list(outputs))
                    label, outputs = Following(outputs[1]), (outputs[0], _NO_LABEL)
                pooling = transform
            elif conversion is None or type(transform) is LabelPooling:
                following = label if pooling is None else None
                outputs = _run_plain(transform, outputs, following) if is_plain else transform(*outputs)
            elif type(transform) is v2.ToPureTensor:  # the only one of them that changes label maps
                outputs = outputs[0], outputs[1].as_subclass(Tensor)
            if place == 0 and self._crops_first:
                outputs = planar(outputs[0]), *outputs[1:]
        return outputs, Pending(label, pooling, conversion)


def _labels_of(
    followed: Sequence[Following], pooling: LabelPooling | None, images: Sequence[Any]
) -> Iterable[LabelMap | Tensor]:
    """Return the labels of images that have the same `Following.batch_key`."""
    if pooling is None or len(followed) == 1:  # a single one is pooled faster without a batch
        maps = [label.resolve(size_of(image)) for label, image in zip(followed, images, strict=True)]
        return maps if pooling is None else [pooling.transform(label_map, {}) for label_map in maps]
    batch = stack(followed, [label.view() if pooling.localized else WHOLE for label in followed])
    soft = batch.pool(pooling.output_size, pooling.temperature, calibrated=pooling.calibrated)
    of_samples: list[Any] = [label.label_map for label in followed]  # with their keys and original class indices
    return pooling.to_targets(soft, of_samples)


def _run_plain(transform: Any, inputs: tuple[Any, Tensor], following: Following | None) -> Any:
    """Return `transform(*inputs)` for a transform that is plain, see `_Step`.

    Args:
        transform: The transform.
        inputs: Image and target. If the transform `crops_first`, the image may be encoded.
        following: Label map that follows the image later.
    """
    image, target = inputs
    encoded = image if isinstance(image, EncodedImage) else None
    shown = image if encoded is None else encoded.placeholder()
    getattr(transform, CHECK_INPUTS)([shown, target])
    if type(transform).forward is _RANDOM_APPLY_FORWARD and torch.rand(1) >= transform.p:
        return inputs
    kinds = transform._transformed_types
    # v2 treats the first plain tensor as an image only if there is no other image, so a pooled label passes through.
    uses_image, uses_target = _is_of(shown, kinds), isinstance(target, tv_tensors.TVTensor) and _is_of(target, kinds)
    used = [inpt for inpt, is_used in ((shown, uses_image), (target, uses_target)) if is_used]
    params = getattr(transform, MAKE_PARAMS)(used)
    if following is not None:
        following.record(transform, params, size_of(image))
    apply = getattr(transform, TRANSFORM)
    of_image = (image, params) if encoded is None else decode_for(transform, encoded, params)
    return apply(*of_image) if uses_image else image, apply(target, params) if uses_target else target


class _Step(NamedTuple):
    """A transform of a pipeline with what is known of it before it is called.

    Attributes:
        transform: The transform.
        is_plain: Whether it treats image and target independently, as v2 transforms do.
        can_wait_before: Whether a label map can follow it later.
        can_wait_after: Whether a label map whose pooling waits can be pooled after it.
    """

    transform: Any
    is_plain: bool
    can_wait_before: bool
    can_wait_after: bool

    @classmethod
    def of(cls, transform: Any) -> _Step:
        """Return the step of a transform."""
        is_plain = getattr(type(transform), "forward", None) in (_PLAIN_FORWARD, _RANDOM_APPLY_FORWARD)
        can_wait_before = type(transform) is LabelPooling or can_wait(transform)
        # A transform that checks its inputs in another way than torchvision's may look at labels.
        checks_as_v2 = is_plain and getattr(type(transform), CHECK_INPUTS).__module__.startswith("torchvision.")
        return cls(transform, is_plain, can_wait_before, checks_as_v2)


def _is_pair(inputs: Any) -> bool:
    """Return whether the inputs of a transform are an image and a target."""
    return (
        len(inputs) == 2
        and (isinstance(inputs[0], (PIL.Image.Image, tv_tensors.Image, EncodedImage)) or type(inputs[0]) is Tensor)
        and isinstance(inputs[1], Tensor)
    )


def _is_of(value: object, kinds: tuple[type | Callable[[Any], bool], ...]) -> bool:
    return any(isinstance(value, kind) if isinstance(kind, type) else kind(value) for kind in kinds)
