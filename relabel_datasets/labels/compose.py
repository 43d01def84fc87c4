"""Run a v2 pipeline on one image and its label map without the overhead of v2's general samples.

`v2.Transform.forward` flattens any nested sample, finds out what of it to transform, and builds it again: for a pair of an
image and a label map that costs more than pooling the label. Here the two go straight through each transform's own
`make_params` and `transform`, which draw and compute all there is. Results and random numbers are those of the
pipeline itself; what is not a plain transform of a pair is called as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from .label_map import LabelMap

_ALWAYS = v2.Transform.forward
_BY_CHANCE = v2.RandomHorizontalFlip.forward  # the one of all transforms that have a probability


def run_pipeline(pipeline: Any, image: PIL.Image.Image, label_map: LabelMap) -> Any:
    """Return `pipeline(image, label_map)`.

    Args:
        pipeline: a `v2.Compose`, or anything else that takes the two.
        image: of the sample.
        label_map: of the image.
    """
    if type(pipeline) is not v2.Compose:
        return pipeline(image, label_map)
    outputs: Any = image, label_map
    for transform in pipeline.transforms:
        outputs = run_transform(transform, outputs)
    return outputs


def run_transform(transform: Any, inputs: Any) -> Any:
    """Return `transform(*inputs)`, of one transform of a pipeline."""
    forward = getattr(type(transform), "forward", None)
    if (
        forward not in (_ALWAYS, _BY_CHANCE)
        or len(inputs) != 2
        or not (isinstance(inputs[0], (PIL.Image.Image, tv_tensors.Image)) or type(inputs[0]) is Tensor)
        or not isinstance(inputs[1], Tensor)
    ):
        return transform(*inputs)
    transform.check_inputs(list(inputs))
    if forward is _BY_CHANCE and torch.rand(1) >= transform.p:
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


def _is_of(value: object, kinds: tuple[type | Callable[[Any], bool], ...]) -> bool:
    return any(isinstance(value, kind) if isinstance(kind, type) else kind(value) for kind in kinds)
