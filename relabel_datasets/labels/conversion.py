"""Convert the images of a batch to tensors together, after all of them have been decoded and cropped.

Most pipelines end by converting an 8-bit image to a float tensor and normalizing it. These transforms draw no random numbers and
treat every pixel alike, so they can wait for the other images of the batch. Between two decodes the processor's caches are cold
and every intermediate tensor needs new pages of memory. Together, images are converted in-place in one tensor, which takes a
quarter of the time. The arithmetic is that of the transforms, operation by operation, so the results have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from .batch_memory import BatchMemory, rows_of
from .encoded import size_of
from .threads import in_one_thread

_NUM_CHANNELS = 3
_memory = BatchMemory()


class Conversion(NamedTuple):
    """What the last transforms of a pipeline do with an 8-bit RGB image.

    Attributes:
        kind: Type of the image: `PIL.Image.Image`, `tv_tensors.Image` or `Tensor`.
        dtype: Data type of the image.
        steps: In-place operations on the values: the name of a method of tensors, and its operand for each channel.
    """

    kind: type
    dtype: torch.dtype = torch.uint8
    steps: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def then(self, method: str, *operand: float) -> Conversion:
        """Return the conversion that is followed by an operation."""
        return self._replace(steps=(*self.steps, (method, operand)))


Step = Callable[[Conversion, Any], Conversion | None]


def _identity(before: Conversion, _transform: v2.Identity) -> Conversion:
    return before


def _to_image(before: Conversion, _transform: v2.ToImage) -> Conversion:
    return before._replace(kind=tv_tensors.Image)


def pil_to_tensor(before: Conversion, _transform: Any) -> Conversion:
    """Return the conversion that is followed by one from a PIL image to a tensor, which leaves tensors as they are."""
    return before._replace(kind=Tensor) if before.kind is PIL.Image.Image else before


def _to_pure_tensor(before: Conversion, _transform: v2.ToPureTensor) -> Conversion | None:
    return None if before.kind is PIL.Image.Image else before._replace(kind=Tensor)


def _to_dtype(before: Conversion, transform: v2.ToDtype) -> Conversion | None:
    dtype = transform.dtype
    if before.kind is PIL.Image.Image or before.dtype != torch.uint8:
        return None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return None
    converted = before._replace(dtype=dtype)
    return converted.then("mul_", 1 / 255) if transform.scale else converted


def normalize(before: Conversion, transform: Any) -> Conversion | None:
    """Return the conversion that is followed by a `Normalize` of torchvision, or None if it would raise an error."""
    mean, std = (tuple(float(value) for value in values) for values in (transform.mean, transform.std))
    if not before.dtype.is_floating_point or len(mean) != _NUM_CHANNELS or len(std) != _NUM_CHANNELS:
        return None
    if not torch.tensor(std, dtype=before.dtype, device="cpu").all():  # small values are 0 in float16
        return None
    return before.then("sub_", *mean).then("div_", *std)


V2_STEPS: Mapping[type, Step] = {
    v2.Identity: _identity,
    v2.Normalize: normalize,
    v2.PILToTensor: pil_to_tensor,
    v2.ToDtype: _to_dtype,
    v2.ToImage: _to_image,
    v2.ToPureTensor: _to_pure_tensor,
}


class Conversions:
    """The transforms at the end of a pipeline that can wait until all images of a batch have been decoded.

    Args:
        transforms: All transforms of the pipeline, in order.
        steps: Function for each type of transform that can wait. It returns the conversion with the transform, or None if it
            cannot be expressed.
        ignored: Types of transforms that do not change images.
        kinds: Types of images that can wait. Default: PIL images and `tv_tensors.Image`.

    Attributes:
        start: Number of transforms before the conversion.
    """

    def __init__(
        self,
        transforms: Sequence[Any],
        steps: Mapping[type, Step],
        ignored: Sequence[type] = (),
        kinds: Sequence[type] = (PIL.Image.Image, tv_tensors.Image),
    ) -> None:
        known = [type(transform) in steps or type(transform) in ignored for transform in transforms]
        self.start = len(known) - next((i for i, is_known in enumerate(reversed(known)) if not is_known), len(known))
        waiting = [transform for transform in transforms[self.start :] if type(transform) in steps]
        self._by_kind = {kind: _combine(kind, waiting, steps) for kind in (kinds if waiting else ())}

    def of(self, image: Any) -> Conversion | None:
        """Return the conversion of an image that the other transforms have processed, or None if it cannot wait."""
        if isinstance(image, PIL.Image.Image):  # torchvision converts it on the default device
            is_usual = image.mode == "RGB" and torch.empty(0).device.type == "cpu"  # in torch 2.4, only this tells it
            return self._by_kind.get(PIL.Image.Image) if is_usual else None
        is_usual = isinstance(image, Tensor) and image.dtype == torch.uint8 and image.device.type == "cpu"
        return self._by_kind.get(type(image)) if is_usual and image.shape[:-2] == (_NUM_CHANNELS,) else None


def _combine(kind: type, transforms: Sequence[Any], steps: Mapping[type, Step]) -> Conversion | None:
    conversion: Conversion | None = Conversion(kind)
    for transform in transforms:
        if conversion is not None:
            conversion = steps[type(transform)](conversion, transform)
    return None if conversion is None or conversion.kind is PIL.Image.Image else conversion


def convert(images: Sequence[PIL.Image.Image | Tensor], conversion: Conversion) -> list[Tensor]:
    """Return 8-bit RGB images of one size as tensors `[3, H, W]`, which are the rows of one tensor `[B, 3, H, W]`.

    Args:
        images: PIL images or tensors, whose `Conversions.of` is `conversion`.
        conversion: Conversion of each image.
    """
    shape = (_NUM_CHANNELS, *size_of(images[0]))
    batch = _memory.empty((len(images), *shape), conversion.dtype)
    pixels = torch.empty(shape, dtype=torch.uint8, device="cpu")
    operands = [
        (
            method,
            torch.tensor(operand, dtype=conversion.dtype, device="cpu").view(-1, 1, 1)
            if len(operand) > 1
            else operand[0],
        )
        for method, operand in conversion.steps
    ]
    with in_one_thread(pixels.numel()):
        for row, image in zip(batch, images, strict=True):
            if isinstance(image, PIL.Image.Image):
                _read(image, pixels.numpy())
            row.copy_(pixels if isinstance(image, PIL.Image.Image) else image)
            for method, value in operands:
                getattr(row, method)(value)
    return rows_of(batch, conversion.kind)


def _read(image: PIL.Image.Image, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    """Copy an RGB image to `[3, H, W]`. Pillow separates the channels faster than NumPy or torch would."""
    for channel, name in zip(pixels, image.mode, strict=True):
        channel.reshape(-1)[:] = np.frombuffer(image.tobytes("raw", name), np.uint8)
