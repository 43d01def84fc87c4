"""timm's augmentation pipeline for an image and its label map. Images are bitwise equal to those of timm.

timm builds a list of transforms of images only. For each geometric transform, the random parameters are recorded and applied to
the label map. Transforms of pixel values leave the label map unchanged. All others are rejected when the pipeline is created.
Automatic augmentation passes the image from operation to operation, so the image is replaced by a pair of image and label map.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any

import PIL.Image
import timm.data.auto_augment as timm_ops
import timm.data.transforms as timm_tf
import torch
import torchvision.transforms as tv
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import create_transform
from torchvision.transforms.v2 import functional as F

from ..keywords import checked_keywords
from ..labels.compose import run_pipeline, run_steps
from ..labels.crop_labels import CropLabels
from ..labels.crop_transforms import RandomStoredCrop
from ..labels.label_map import LabelMap
from ..labels.transforms import LabelPooling, resized_crop_label_map
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


_TIMM_KEYWORDS = inspect.signature(create_transform).parameters.keys() - {"input_size", "is_training"}


@checked_keywords(*sorted(_TIMM_KEYWORDS))
def timm_transforms(
    image_size: int | Sequence[int] = 224,
    *,
    is_training: bool = True,
    pooling: Callable[..., Any] | None = LabelPooling(),
    crop: RandomStoredCrop | None = None,
    **kwargs: Any,
) -> TimmTransforms | TimmStoredCrops:
    """Create timm's transforms for an image and its label map.

    The result is called with (PIL image, `LabelMap`), as by a `RelabelDataset`. It returns the image that timm returns for the
    same random numbers, and the soft label pooled under the same crop, flips, shears, translations and rotations.

    Args:
        image_size: Side of the output in pixels, (height, width), or (channels, height, width). Default: 224.
        is_training: Whether to create timm's training transforms instead of its validation transforms. Default: True.
        pooling: Transform from (image, label map) to (image, label). None leaves label maps for later pooling, see `collate`.
            Default: `LabelPooling()`.
        crop: Transform for datasets of stored crops that takes the place of timm's random crop and flips and of `pooling`. Its
            size must be `image_size`. Default: None, for label maps.
        kwargs: Keyword arguments of `timm.data.create_transform`, such as `scale`, `ratio`, `train_crop_mode`, `hflip`, `vflip`,
            `color_jitter`, `auto_augment`, `interpolation`, `mean`, `std` and `re_prob`.

    Returns:
        The transforms, for `transforms=` of a dataset.

    Raises:
        TypeError: `timm.data.create_transform` has no such argument.
        ValueError: A label map cannot follow a transform, such as AugMix, NaFlex or `separate`. With `crop`, a transform moves the
            image after the crop.

    Example:
        >>> transforms = timm_transforms(224, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25)
        >>> dataset = load_dataset("imagenette-relabel", split="train", transforms=transforms)
        >>> image, soft_label = dataset[0]
    """
    size: Any = image_size if isinstance(image_size, int) else tuple(image_size)
    pipeline = create_transform(size, is_training=is_training, **kwargs)
    return TimmTransforms(pipeline, pooling) if crop is None else TimmStoredCrops(pipeline, crop)


class TimmTransforms:
    """Transforms that `timm_transforms` returns.

    Args:
        pipeline: Result of `timm.data.create_transform`. Its automatic augmentation is modified in-place.
        pooling: Transform that is called with the image and the label map at the end. None leaves label maps.

    Raises:
        ValueError: A label map cannot follow one of the transforms.
    """

    def __init__(self, pipeline: Any, pooling: Callable[..., Any] | None) -> None:
        if type(pipeline) is not tv.Compose:
            raise ValueError(
                f"timm returns a {type(pipeline).__name__} for these arguments instead of one pipeline: leave out separate= and "
                "tf_preprocessing="
            )
        self.steps = [_follow_step(step) for step in pipeline.transforms]
        self.pooling = pooling
        self._pipeline = pipeline

    def __call__(self, image: PIL.Image.Image, label_map: LabelMap) -> Any:
        """Return (image tensor, label), or the result of `pooling`.

        Raises:
            TypeError: The arguments are not a PIL image and a LabelMap.
            ValueError: The label map belongs to an image of another size.
        """
        return run_pipeline(self, image, label_map)

    def run_until_pooling(self, image: PIL.Image.Image, label_map: LabelMap) -> tuple[Any, LabelPooling | None]:
        """See `compose.run_until_pooling`."""
        if isinstance(label_map, CropLabels):
            raise TypeError(
                "these transforms are for label maps, but the sample has CropLabels: pass crop=RandomStoredCrop(image_size) to "
                "timm_transforms"
            )
        if not isinstance(image, PIL.Image.Image) or not isinstance(label_map, LabelMap):
            raise TypeError(
                "timm's transforms need a PIL image and its LabelMap, got "
                f"{type(image).__name__} and {type(label_map).__name__}: call them on a sample of a dataset with decoded images"
            )
        size = image.height, image.width
        if label_map.canvas_size != size:
            raise ValueError(
                f"the image has (height, width) {size}, but its label map belongs to an image of {label_map.canvas_size}: "
                "transform the image and its label map together, as they come from the dataset"
            )
        for step in self.steps:
            image, label_map = step(image, label_map)
        return run_steps([] if self.pooling is None else [self.pooling], image, label_map)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._pipeline!r}, pooling={self.pooling!r})"


class TimmStoredCrops:
    """Transforms that `timm_transforms` returns for stored crops: the crop, then timm's transforms of pixel values.

    Args:
        pipeline: Result of `timm.data.create_transform`.
        crop: Transform that cuts out the crops.

    Raises:
        ValueError: A transform moves the image, other than timm's random crop and flips, or `crop` has another size.
    """

    def __init__(self, pipeline: Any, crop: RandomStoredCrop) -> None:
        steps = list(pipeline.transforms) if type(pipeline) is tv.Compose else [pipeline]
        if type(steps[0]) is not timm_tf.RandomResizedCropAndInterpolation:
            raise ValueError(
                "crop= takes the place of timm's random resized crop, which these arguments do not create: leave out "
                "is_training=False, train_crop_mode=, separate= and no_aug="
            )
        if list(steps[0].size) != crop.size:
            raise ValueError(f"crop= has size {crop.size}, but image_size= is {list(steps[0].size)}: make them equal")
        flips = (tv.RandomHorizontalFlip, tv.RandomVerticalFlip)
        self.steps = [_pixel_step(step) for step in steps[1:] if type(step) not in flips]
        self.crop = crop
        self._pipeline = pipeline

    def __call__(self, image: PIL.Image.Image, labels: CropLabels) -> Any:
        """Return (image tensor, soft label), or `[n, ...]` of both if the crop has `num_crops` n above 1.

        Raises:
            TypeError: The arguments are not a PIL image and CropLabels.
            ValueError: The labels belong to an image of another size.
        """
        if not isinstance(image, PIL.Image.Image):
            raise TypeError(f"timm's transforms need a PIL image, got {type(image).__name__}")
        self.crop.check_inputs([image, labels])
        params = self.crop.make_params([labels])
        crops = []
        for crop in self.crop.cut(image, params):
            for step in self.steps:
                crop = step(crop)
            crops.append(crop)
        return (crops[0], params["soft"][0]) if self.crop.num_crops == 1 else (torch.stack(crops), params["soft"])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._pipeline!r}, crop={self.crop!r})"


def _pixel_step(step: Any) -> Any:
    """Return a transform in timm's pipeline that changes only pixel values."""
    if type(step) in (timm_ops.RandAugment, timm_ops.AutoAugment):
        for op in _ops_of(step):
            if op.name not in PIXEL_OPS:
                raise ValueError(
                    f"timm's operation {op.name} moves the image, so the label of a stored crop would be wrong: leave out "
                    "auto_augment="
                )
            op.aug_fn = _posterize if op.aug_fn is timm_ops.posterize else op.aug_fn
        return step
    if not _changes_pixels_only(step):
        raise ValueError(
            f"timm's {type(step).__name__} cannot follow a stored crop: leave out the argument that adds it"
        )
    return step


def _changes_pixels_only(step: Any) -> bool:
    return type(step) in _PIXEL_STEPS or (
        type(step) is tv.RandomApply and all(type(inner) in _PIXEL_STEPS for inner in step.transforms)
    )


def _ops_of(augment: Any) -> list[Any]:
    """Return the operations of timm's RandAugment or AutoAugment."""
    return augment.ops if type(augment) is timm_ops.RandAugment else [op for policy in augment.policy for op in policy]


def _follow_step(step: Any) -> Step:
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
    random_steps = (timm_tf.RandomCropOrPad, timm_tf.RandomResizedCropAndInterpolation, timm_tf.ResizeKeepRatio)
    return functools.partial(
        _GEOMETRIC_STEPS[step_type], _ParameterRecorder(step) if step_type in random_steps else step
    )


def _pixels_only(step: Any, image: Any, label_map: LabelMap) -> tuple[Any, LabelMap]:
    return step(image), label_map


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


def _resized_crop(step: _ParameterRecorder, image: Any, label_map: LabelMap) -> tuple[Any, LabelMap]:
    image, (top, left, height, width) = step(image)
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
