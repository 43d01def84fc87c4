"""Steps of timm's pipeline for an image and its label map, or for a stored crop.

For each geometric transform, the random parameters are recorded and applied to the label map. Transforms of pixel values leave
the label map unchanged. All others are rejected when the pipeline is created. Automatic augmentation passes the image from
operation to operation, so the image is replaced by a pair of image and label map.

Steps accept PIL images and tensors. Automatic augmentation needs PIL images: from there on, the image is one.
"""

from __future__ import annotations

import copy
import functools
import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import PIL.Image
import timm.data.auto_augment as timm_ops
import timm.data.transforms as timm_tf
import torch
import torchvision.transforms as tv
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ..labels.encoded import EncodedImage
from ..labels.label_map import LabelMap
from ..labels.transforms import resized_crop_label_map
from ..labels.view import View

# Names in timm.data.auto_augment.NAME_TO_OP. Operations in neither set are rejected.
MOVING_OPS = frozenset(["Rotate", "ShearX", "ShearY", "TranslateX", "TranslateXRel", "TranslateY", "TranslateYRel"])
PIXEL_OPS = frozenset(
    [
        "AutoContrast",
        "Brightness",
        "BrightnessIncreasing",
        "Color",
        "ColorIncreasing",
        "Contrast",
        "ContrastIncreasing",
        "Desaturate",
        "Equalize",
        "GaussianBlur",
        "GaussianBlurRand",
        "Invert",
        "Posterize",
        "PosterizeIncreasing",
        "PosterizeOriginal",
        "Sharpness",
        "SharpnessIncreasing",
        "Solarize",
        "SolarizeAdd",
        "SolarizeIncreasing",
    ]
)
_PIXEL_STEPS = (
    tv.ColorJitter,
    tv.GaussianBlur,
    tv.Normalize,
    tv.RandomGrayscale,
    timm_tf.MaybePILToTensor,
    timm_tf.MaybeToTensor,
    RandomErasing,
)
Step = Callable[[Any, LabelMap], tuple[Any, LabelMap]]


def pixel_step(step: Any) -> Any:
    """Return a transform in timm's pipeline that changes only pixel values."""
    if type(step) in (timm_ops.RandAugment, timm_ops.AutoAugment):
        for op in _ops_of(step):
            if op.name not in PIXEL_OPS:
                raise ValueError(
                    f"timm's operation {op.name} moves the image, so the label of a stored crop would be wrong: leave out "
                    "auto_augment="
                )
            op.aug_fn = _posterize if op.aug_fn is timm_ops.posterize else op.aug_fn
        return functools.partial(_on_pil, step)
    if not _changes_pixels_only(step):
        raise ValueError(
            f"timm's {type(step).__name__} cannot follow a stored crop: leave out the argument that adds it"
        )
    return functools.partial(_change_image, step)


def _changes_pixels_only(step: Any) -> bool:
    return type(step) in _PIXEL_STEPS or (
        type(step) is tv.RandomApply and all(type(inner) in _PIXEL_STEPS for inner in step.transforms)
    )


def _ops_of(augment: Any) -> list[Any]:
    """Return the operations of timm's RandAugment or AutoAugment."""
    return augment.ops if type(augment) is timm_ops.RandAugment else [op for policy in augment.policy for op in policy]


def follow_step(step: Any) -> Step:
    """Return a transform of (image, label map) for a transform in timm's pipeline."""
    step_type = type(step)
    if step_type in (timm_ops.RandAugment, timm_ops.AutoAugment):
        _follow_ops(step)
        return functools.partial(_auto_augment, step)
    if _changes_pixels_only(step):
        return functools.partial(_pixels_only, step)
    if step_type is timm_ops.AugMixAugment:
        raise ValueError("AugMix mixes several views of an image, which a LabelMap cannot follow: leave it out")
    if step_type not in _GEOMETRIC_STEPS:
        raise ValueError(f"a LabelMap cannot follow timm's {step_type.__name__}: leave out the argument that adds it")
    random_steps = (timm_tf.RandomCropOrPad, timm_tf.ResizeKeepRatio)
    return functools.partial(
        _GEOMETRIC_STEPS[step_type], _ParameterRecorder(step) if step_type in random_steps else step
    )


def crops_first(step: Step) -> bool:
    """Return whether a step accepts an encoded image."""
    return isinstance(step, functools.partial) and step.func is _resized_crop


def plain_image(image: Any) -> Any:
    """Return a PIL image, or a tensor without its class, as the steps of timm return it."""
    return image.as_subclass(Tensor) if isinstance(image, Tensor) else image


def _on_pil(step: Any, image: Any) -> PIL.Image.Image:
    """Apply a step that needs a PIL image."""
    changed: PIL.Image.Image = step(F.to_pil_image(image) if isinstance(image, Tensor) else image)
    return changed


def _change_image(step: Any, image: Any) -> Any:
    if type(step) is timm_tf.MaybeToTensor and isinstance(image, Tensor):  # timm would not scale it
        return F.to_dtype(image, torch.float32, scale=True)
    return step(image)


def _pixels_only(step: Any, image: Any, label_map: LabelMap) -> tuple[Any, LabelMap]:
    return _change_image(step, image), label_map


def _flip(step: Any, image: Any, label_map: LabelMap) -> tuple[Any, LabelMap]:
    flip = F.horizontal_flip if type(step) is tv.RandomHorizontalFlip else F.vertical_flip
    flipped = step(image)
    return flipped, label_map if flipped is image else flip(label_map)  # the same object if not flipped


class _ParameterRecorder:
    """timm transform that also returns its random parameters. Thread-safe."""

    def __init__(self, step: Any) -> None:
        self.size: Any = getattr(step, "size", None)
        self._original, self._drawn = step, threading.local()
        self._step = copy.copy(step)
        self._step.get_params = self._get_params

    def __reduce__(self) -> tuple[type[_ParameterRecorder], tuple[Any]]:
        return _ParameterRecorder, (self._original,)

    def _get_params(self, *args: Any) -> Any:
        self._drawn.params = type(self._original).get_params(*args)
        return self._drawn.params

    def __call__(self, image: Any) -> tuple[Any, Any]:
        """Return (transformed image, random parameters)."""
        image = self._step(image)
        return image, vars(self._drawn).pop("params")


def _resized_crop(step: Any, image: Any, label_map: LabelMap) -> tuple[Any, LabelMap]:
    is_encoded = isinstance(image, EncodedImage)
    shown = image.placeholder() if is_encoded else image
    top, left, height, width = box = step.get_params(shown, step.scale, step.ratio)
    several = isinstance(step.interpolation, (tuple, list))
    interpolation = random.choice(step.interpolation) if several else step.interpolation
    if is_encoded:  # decode only the box
        image = F.resize(plain_image(image.decode_box(box)), step.size, interpolation=interpolation)
    else:
        image = F.resized_crop(image, top, left, height, width, step.size, interpolation=interpolation)
    if isinstance(image, Tensor):
        image = image.contiguous()  # the next steps are faster, see `encoded.planar`
    return image, resized_crop_label_map(label_map, top, left, height, width, step.size)


def _resize_keep_ratio(step: _ParameterRecorder, image: Any, label_map: LabelMap) -> tuple[Any, LabelMap]:
    image, size = step(image)
    return image, F.resize(label_map, size)


def _crop_or_pad(step: _ParameterRecorder, image: Any, label_map: LabelMap) -> tuple[Any, LabelMap]:
    image, (top, left) = step(image)  # negative for padding
    return image, F.crop(label_map, top, left, *step.size)


def _center_crop(step: Any, image: Any, label_map: LabelMap) -> tuple[Any, LabelMap]:
    return step(image), F.center_crop(label_map, step.size)


def _trim_border(step: Any, image: Any, label_map: LabelMap) -> tuple[Any, LabelMap]:
    border, (height, width) = step.border_size, label_map.canvas_size
    return step(image), F.crop(label_map, border, border, height - 2 * border, width - 2 * border)


def _resize(step: Any, image: Any, label_map: LabelMap) -> tuple[Any, LabelMap]:
    image = F.resize(image, step.size, interpolation=step.interpolation, max_size=step.max_size)
    return image, F.resize(label_map, step.size, max_size=step.max_size)


_GEOMETRIC_STEPS: dict[type, Callable[[Any, Any, LabelMap], tuple[Any, LabelMap]]] = {
    timm_tf.CenterCropOrPad: _center_crop,
    timm_tf.RandomCropOrPad: _crop_or_pad,
    timm_tf.RandomResizedCropAndInterpolation: _resized_crop,
    timm_tf.ResizeKeepRatio: _resize_keep_ratio,
    timm_tf.TrimBorder: _trim_border,
    tv.CenterCrop: _center_crop,
    tv.RandomHorizontalFlip: _flip,
    tv.RandomVerticalFlip: _flip,
    tv.Resize: _resize,
}


def _auto_augment(step: Any, image: Any, label_map: LabelMap) -> tuple[Any, LabelMap]:
    pair = step(_Pair(F.to_pil_image(image) if isinstance(image, Tensor) else image, label_map))
    return pair.image, pair.label_map


class _Pair:
    """Image with its label map. It has the methods of a PIL image that timm's geometric operations use."""

    def __init__(self, image: PIL.Image.Image, label_map: LabelMap) -> None:
        self.image = image
        self.label_map = label_map
        self.size = image.size

    def transform(
        self, size: tuple[int, int], method: PIL.Image.Transform, data: Sequence[float], **pixels: Any
    ) -> _Pair:
        """Apply an affine map from output pixels to input pixels, with the coefficients in PIL's order."""
        if method != PIL.Image.Transform.AFFINE or size != self.size:
            raise ValueError(
                f"a LabelMap cannot follow PIL's transform with method {method} from size {self.size} to {size}: choose another "
                "auto_augment="
            )
        (xx, xy, x0, yx, yy, y0), (width, height) = data, size
        inner = View(xx, xy * height / width, x0 / width, yx * width / height, yy, y0 / height)
        moved = LabelMap.wrap(self.label_map.logits, like=self.label_map, view=self.label_map.view.compose(inner))
        return _Pair(self.image.transform(size, method, data, **pixels), moved)

    def rotate(self, degrees: float, *, resample: PIL.Image.Resampling, fillcolor: Any) -> _Pair:
        """Rotate about the center, keeping the size."""
        image = self.image.rotate(degrees, resample=resample, fillcolor=fillcolor)
        return _Pair(image, F.rotate(self.label_map, degrees))

    def with_image(self, image: PIL.Image.Image) -> _Pair:
        """Return a pair with other pixel values and the same geometry."""
        return _Pair(image, self.label_map)


def _follow_ops(augment: Any) -> None:
    """Make the operations of RandAugment or AutoAugment accept a `_Pair` in place of an image, in-place."""
    for op in _ops_of(augment):
        if op.name in PIXEL_OPS:
            operation = _posterize if op.aug_fn is timm_ops.posterize else op.aug_fn
            op.aug_fn = functools.partial(_change_pixels, operation)
        elif op.name not in MOVING_OPS:
            raise ValueError(
                f"timm's operation {op.name} is not known to relabel_datasets, so a LabelMap cannot follow it: choose an "
                "auto_augment= without it, or another release of timm"
            )


def _change_pixels(operation: Callable[..., PIL.Image.Image], pair: _Pair, *args: Any, **kwargs: Any) -> _Pair:
    return pair.with_image(operation(pair.image, *args, **kwargs))


def _posterize(image: PIL.Image.Image, bits_to_keep: int, **pixels: Any) -> PIL.Image.Image:
    """Posterize as timm does. The result is black for 0 bits, which Pillow 13 rejects."""
    if bits_to_keep < 1:
        return PIL.Image.new(image.mode, image.size)
    posterized: PIL.Image.Image = timm_ops.posterize(image, bits_to_keep)  # type: ignore[no-untyped-call]
    return posterized
