"""timm's own augmentation pipeline for an image and its label map: every pixel is timm's, and the map follows.

timm builds a list of transforms of the image alone. Each is asked what it drew, or is known to change no position, and the
label map goes the same way; what is neither is refused when the pipeline is made. Automatic augmentation passes the image
from operation to operation, so a pair of image and label map takes its place there.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import PIL.Image
import timm.data.auto_augment as timm_ops
import timm.data.transforms as timm_tf
import torchvision.transforms as tv
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import create_transform
from torchvision.transforms.v2 import functional as F

from ..labels.compose import run_pipeline, run_steps
from ..labels.label_map import LabelMap, View
from ..labels.transforms import LabelPooling, resized_crop_label_map

# Of timm.data.auto_augment.NAME_TO_OP: a name that is in neither is refused.
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


def timm_transforms(
    input_size: int | Sequence[int] = 224,
    *,
    is_training: bool = True,
    pooling: Callable[..., Any] | None = LabelPooling(),
    **arguments: Any,
) -> TimmTransforms:
    """Return timm's transforms of an image, with the soft label of what the image then shows.

    Called with (PIL image, `LabelMap`), as a `RelabelDataset` does, it gives the image that timm gives for the same random
    numbers, and the map pooled under the same crop, flips, shears, translations and rotations.

    Args:
        input_size: pixels of a side, (height, width), or (channels, height, width).
        is_training: False for timm's transforms of validation, which are followed, too.
        pooling: what makes a label of the image and the map; None leaves the map to be pooled later, see `collate`.
        arguments: of `timm.data.create_transform`: `scale`, `ratio`, `train_crop_mode`, `hflip`, `vflip`, `color_jitter`,
            `auto_augment`, `interpolation`, `mean`, `std`, `re_prob` and so on.

    Raises:
        ValueError: AugMix, NaFlex, `separate`, or another transform that a label map cannot follow.

    Example:
        >>> transforms = timm_transforms(224, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25)
        >>> dataset = load_dataset("imagenette-relabel", split="train", transforms=transforms)
        >>> image, soft_label = dataset[0]
    """
    size: Any = input_size if isinstance(input_size, int) else tuple(input_size)
    pipeline = create_transform(size, is_training=is_training, **arguments)
    return TimmTransforms(pipeline, pooling)


class TimmTransforms:
    """What `timm_transforms` returns.

    Args:
        pipeline: made by `timm.data.create_transform`; it is taken over, and its automatic augmentation changed.
        pooling: called with the image and the label map at the end.

    Raises:
        ValueError: it has a transform that a label map cannot follow.
    """

    def __init__(self, pipeline: Any, pooling: Callable[..., Any] | None) -> None:
        if type(pipeline) is not tv.Compose:
            raise ValueError(
                f"timm gives a {type(pipeline).__name__} for these arguments, not one pipeline: leave out `separate` and "
                "`tf_preprocessing`"
            )
        self.steps = [_following(step) for step in pipeline.transforms]
        self.pooling = pooling
        self._pipeline = pipeline

    def __call__(self, image: PIL.Image.Image, label_map: LabelMap) -> Any:
        """Return (image tensor, label), or what `pooling` makes of the two.

        Raises:
            TypeError: not a PIL image and a LabelMap.
            ValueError: the label map belongs to an image of another size.
        """
        return run_pipeline(self, image, label_map)

    def run_until_pooling(self, image: PIL.Image.Image, label_map: LabelMap) -> tuple[Any, LabelPooling | None]:
        """See `compose.run_until_pooling`."""
        if not isinstance(image, PIL.Image.Image) or not isinstance(label_map, LabelMap):
            raise TypeError(
                "timm's transforms need a PIL image and its LabelMap, got "
                f"{type(image).__name__} and {type(label_map).__name__}"
            )
        size = image.height, image.width
        if label_map.canvas_size != size:
            raise ValueError(
                f"the image is {size} high and wide, but its label map belongs to one of {label_map.canvas_size}: give "
                "both as they come from the dataset, or set the map's canvas_size"
            )
        for step in self.steps:
            image, label_map = step(image, label_map)
        return run_steps([] if self.pooling is None else [self.pooling], image, label_map)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._pipeline!r}, pooling={self.pooling!r})"


def _following(step: Any) -> Step:
    """Return a transform of timm's pipeline that takes the label map along."""
    kind = type(step)
    if kind in (timm_ops.RandAugment, timm_ops.AutoAugment):
        _follow_ops(step)
        return functools.partial(_auto_augment, step)
    if kind in _PIXEL_STEPS or (kind is tv.RandomApply and all(type(each) in _PIXEL_STEPS for each in step.transforms)):
        return functools.partial(_pixels_only, step)
    if kind is timm_ops.AugMixAugment:
        raise ValueError("AugMix mixes several views of an image, which no LabelMap can follow: leave it out")
    if kind not in _GEOMETRIC_STEPS:
        raise ValueError(
            f"timm's {kind.__name__} cannot be followed by a LabelMap: leave out the argument that asks for it"
        )
    drawing = (timm_tf.RandomCropOrPad, timm_tf.RandomResizedCropAndInterpolation, timm_tf.ResizeKeepRatio)
    return functools.partial(_GEOMETRIC_STEPS[kind], _Telling(step) if kind in drawing else step)


def _pixels_only(step: Any, image: Any, label_map: LabelMap) -> tuple[Any, LabelMap]:
    return step(image), label_map


def _flip(step: Any, image: Any, label_map: LabelMap) -> tuple[Any, LabelMap]:
    flip = F.horizontal_flip if type(step) is tv.RandomHorizontalFlip else F.vertical_flip
    flipped = step(image)
    return flipped, label_map if flipped is image else flip(label_map)  # no other image: not flipped


class _Telling:
    """A transform of timm's that tells what it drew; threads may share it."""

    def __init__(self, step: Any) -> None:
        self.size: Any = getattr(step, "size", None)
        self._original, self._drawn = step, threading.local()
        self._step = copy.copy(step)
        self._step.get_params = self._get_params

    def __reduce__(self) -> tuple[type[_Telling], tuple[Any]]:
        return _Telling, (self._original,)

    def _get_params(self, *args: Any) -> Any:
        self._drawn.params = type(self._original).get_params(*args)
        return self._drawn.params

    def __call__(self, image: Any) -> tuple[Any, Any]:
        """Return the transformed image, and what was drawn for it."""
        image = self._step(image)
        return image, vars(self._drawn).pop("params")


def _resized_crop(step: _Telling, image: Any, label_map: LabelMap) -> tuple[Any, LabelMap]:
    image, (top, left, height, width) = step(image)
    return image, resized_crop_label_map(label_map, top, left, height, width, step.size)


def _resize_keep_ratio(step: _Telling, image: Any, label_map: LabelMap) -> tuple[Any, LabelMap]:
    image, size = step(image)
    return image, F.resize(label_map, size)


def _crop_or_pad(step: _Telling, image: Any, label_map: LabelMap) -> tuple[Any, LabelMap]:
    image, (top, left) = step(image)  # negative where it pads
    return image, F.crop(label_map, top, left, *step.size)


def _center_crop(step: Any, image: Any, label_map: LabelMap) -> tuple[Any, LabelMap]:
    return step(image), F.center_crop(label_map, step.size)


def _trim_border(step: Any, image: Any, label_map: LabelMap) -> tuple[Any, LabelMap]:
    border, (height, width) = step.border_size, label_map.canvas_size
    return step(image), F.crop(label_map, border, border, height - 2 * border, width - 2 * border)


def _resize(step: Any, image: Any, label_map: LabelMap) -> tuple[Any, LabelMap]:
    return step(image), F.resize(label_map, step.size, max_size=step.max_size)


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
    pair = step(_Pair(image, label_map))
    return pair.image, pair.label_map


class _Pair:
    """An image with its label map, for timm's operations: it can do what those that move an image do with it, and no more."""

    def __init__(self, image: PIL.Image.Image, label_map: LabelMap) -> None:
        self.image = image
        self.label_map = label_map
        self.size = image.size

    def transform(
        self, size: tuple[int, int], method: PIL.Image.Transform, data: Sequence[float], **pixels: Any
    ) -> _Pair:
        """Follow an affine map from the pixels of the output to those of the input, in the order that PIL takes."""
        if method != PIL.Image.Transform.AFFINE or size != self.size:
            raise ValueError(
                f"a LabelMap cannot follow PIL's transform of method {method} from size {self.size} to {size}"
            )
        (xx, xy, x0, yx, yy, y0), (width, height) = data, size
        inner = View(xx, xy * height / width, x0 / width, yx * width / height, yy, y0 / height)
        moved = LabelMap.wrap(self.label_map.logits, like=self.label_map, view=self.label_map.view.compose(inner))
        return _Pair(self.image.transform(size, method, data, **pixels), moved)

    def rotate(self, degrees: float, *, resample: PIL.Image.Resampling, fillcolor: Any) -> _Pair:
        """Follow a rotation about the centre that keeps the size."""
        image = self.image.rotate(degrees, resample=resample, fillcolor=fillcolor)
        return _Pair(image, F.rotate(self.label_map, degrees))

    def with_image(self, image: PIL.Image.Image) -> _Pair:
        """Return another picture at the same positions."""
        return _Pair(image, self.label_map)


def _follow_ops(augment: Any) -> None:
    """Make the operations of RandAugment or AutoAugment take a `_Pair` for an image."""
    ops = augment.ops if type(augment) is timm_ops.RandAugment else [op for policy in augment.policy for op in policy]
    for op in ops:
        if op.name in PIXEL_OPS:
            operation = _posterize if op.aug_fn is timm_ops.posterize else op.aug_fn
            op.aug_fn = functools.partial(_change_pixels, operation)
        elif op.name not in MOVING_OPS:
            raise ValueError(
                f"timm's operation {op.name} is not known to relabel_datasets, so that a LabelMap cannot follow it: "
                "choose other operations in auto_augment, or another release of timm"
            )


def _change_pixels(operation: Callable[..., PIL.Image.Image], pair: _Pair, *args: Any, **kwargs: Any) -> _Pair:
    return pair.with_image(operation(pair.image, *args, **kwargs))


def _posterize(image: PIL.Image.Image, bits_to_keep: int, **pixels: Any) -> PIL.Image.Image:
    """Return what timm's operation gives, and black where it asks Pillow to keep no bits, which Pillow 13 refuses."""
    if bits_to_keep < 1:
        return PIL.Image.new(image.mode, image.size)
    posterized: PIL.Image.Image = timm_ops.posterize(image, bits_to_keep)  # type: ignore[no-untyped-call]
    return posterized
