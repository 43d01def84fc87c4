"""timm's augmentation pipeline for an image and its label map. Images are bitwise equal to those of timm.

timm builds a list of transforms of images only. `timm_steps` lets the label map follow each of them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import PIL.Image
import timm.data.transforms as timm_tf
import torch
import torchvision.transforms as tv
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision import tv_tensors

from ..keywords import checked_keywords
from ..labels.batch import to_label_map
from ..labels.compose import Pending, Runner, Steps, run_together
from ..labels.conversion import Conversion, Conversions, normalize, pil_to_tensor
from ..labels.crop_labels import CropLabels
from ..labels.crop_transforms import RandomStoredCrop
from ..labels.encoded import EncodedImage, decode_for, decoded, size_of
from ..labels.label_map import LabelMap
from ..labels.transforms import LabelPooling
from .timm_steps import crops_first, follow_step, pixel_step, plain_image

_IMAGES = (PIL.Image.Image, tv_tensors.Image)


def _to_float_tensor(before: Conversion, _step: Any) -> Conversion:
    if before.kind is PIL.Image.Image:
        return Conversion(Tensor, torch.get_default_dtype()).then("div_", 255.0)
    return before._replace(dtype=torch.float32).then("mul_", 1 / 255)  # see `timm_steps`


_CONVERSIONS = {
    timm_tf.MaybePILToTensor: pil_to_tensor,
    timm_tf.MaybeToTensor: _to_float_tensor,
    tv.Normalize: normalize,
}
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

    The result is called with (image, `LabelMap`), as by a `RelabelDataset`. It returns the image that timm returns for the same
    random numbers, and the soft label pooled under the same crop, flips, shears, translations and rotations. For images that are
    tensors (`image_format="tensor"`), pixels are rounded differently, since torchvision resizes them.

    Args:
        image_size: Side of the output in pixels, (height, width), or (channels, height, width). Default: 224.
        is_training: Whether to create timm's training transforms instead of its validation transforms. Default: True.
        pooling: Transform from (image, label map) to (image, label). None leaves label maps for later pooling, see `collate`.
            Default: `LabelPooling()`.
        crop: Transform for datasets of stored crops that replaces timm's random crop and flips, and `pooling`. Its
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
        self.steps = [follow_step(step) for step in pipeline.transforms]
        self.pooling = pooling
        self._pipeline = pipeline
        self._conversions = _conversions_of(pipeline.transforms if _ignores_pixels(pooling) else [])

    def __call__(self, image: PIL.Image.Image | tv_tensors.Image, label_map: LabelMap) -> Any:
        """Return (image tensor, label), or the result of `pooling`.

        Raises:
            TypeError: The arguments are not an image and a LabelMap.
            ValueError: The label map belongs to an image of another size.
        """
        return run_together(self.batch_runner(), [(image, label_map)])[0]

    def batch_runner(self) -> Runner:
        """See `compose.runner_of`."""
        return functools.partial(self._run, Steps([] if self.pooling is None else [self.pooling]))

    def _run(self, pool: Runner, image: Any, labels: Any) -> tuple[Any, Pending]:
        label_map = to_label_map(labels)
        if isinstance(label_map, CropLabels):
            raise TypeError(
                "these transforms are for label maps, but the sample has CropLabels: pass crop=RandomStoredCrop(image_size) to "
                "timm_transforms"
            )
        if not isinstance(image, (*_IMAGES, EncodedImage)) or not isinstance(label_map, LabelMap):
            raise TypeError(
                "timm's transforms need an image and its LabelMap, got "
                f"{type(image).__name__} and {type(label_map).__name__}: call them on a sample of a dataset with decoded images"
            )
        size = size_of(image)
        if label_map.canvas_size != size:
            raise ValueError(
                f"the image has (height, width) {size}, but its label map belongs to an image of {label_map.canvas_size}: "
                "transform the image and its label map together, as they come from the dataset"
            )
        conversion = None
        if not (isinstance(image, EncodedImage) and crops_first(self.steps[0])):
            image = plain_image(decoded(image))
        for place, step in enumerate(self.steps):
            if place == self._conversions.start and (conversion := self._conversions.of(image)) is not None:
                break
            image, label_map = step(image, label_map)
        outputs, pending = pool(image, label_map)
        return outputs, pending._replace(conversion=conversion)

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
        steps = [step for step in steps[1:] if type(step) not in flips]
        self.steps = [pixel_step(step) for step in steps]
        self.crop = crop
        self._pipeline = pipeline
        self._conversions = _conversions_of(steps if crop.num_crops == 1 else [])

    def __call__(self, image: PIL.Image.Image | tv_tensors.Image, labels: CropLabels) -> Any:
        """Return (image tensor, soft label), or `[n, ...]` of both if the crop has `num_crops` n above 1.

        Raises:
            TypeError: The arguments are not an image and CropLabels.
            ValueError: The labels belong to an image of another size.
        """
        return run_together(self.batch_runner(), [(image, labels)])[0]

    def batch_runner(self) -> Runner:
        """See `compose.runner_of`."""
        return self._run

    def _run(self, image: Any, stored: Any) -> tuple[Any, Pending]:
        labels = to_label_map(stored)
        if not isinstance(image, (*_IMAGES, EncodedImage)):
            raise TypeError(f"timm's transforms need an image, got {type(image).__name__}")
        self.crop.check_inputs([image.placeholder() if isinstance(image, EncodedImage) else image, labels])
        params = self.crop.make_params([labels])
        soft, crops, conversion = params["soft"], [], None
        if isinstance(image, EncodedImage):
            image, params = decode_for(self.crop, image, params)
        for crop in self.crop.cut(plain_image(image), params):
            for place, step in enumerate(self.steps):
                if place == self._conversions.start and (conversion := self._conversions.of(crop)) is not None:
                    break
                crop = step(crop)
            crops.append(crop)
        outputs = (crops[0], soft[0]) if self.crop.num_crops == 1 else (torch.stack(crops), soft)
        return outputs, Pending(conversion=conversion)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._pipeline!r}, crop={self.crop!r})"


def _conversions_of(steps: Sequence[Any]) -> Conversions:
    return Conversions(steps, _CONVERSIONS, kinds=(PIL.Image.Image, Tensor))


def _ignores_pixels(pooling: Any) -> bool:
    """Return whether a pooling looks only at the size of images. Of those of other packages this is not known."""
    if pooling is None:
        return True
    package = type(pooling).__module__.partition(".")[0]
    return package == __name__.partition(".")[0] and getattr(pooling, "_transformed_types", None) == (LabelMap,)
