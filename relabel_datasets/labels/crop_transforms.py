"""`RandomStoredCrop`, which cuts out a stored crop of an image and returns its label, and v2 kernels for CropLabels.

Only a resize of the whole image keeps stored crops valid. All other geometric transforms raise an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ..keywords import checked_keywords
from .blending import blend_labels, label_tensor
from .crop_labels import CropLabels
from .crops import uniform
from .encodings.crops import seed_of
from .label_map import LabelMap
from .pooling_checks import check_label_weight, check_positive_int, check_temperature
from .transforms import Size, image_size, resized_canvas
from .v2_hooks import Transform


def _kernel_of(functional: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    register: Callable[[Callable[..., Any]], Callable[..., Any]] = F.register_kernel(functional, CropLabels)
    return register


@_kernel_of(F.get_size)
def _get_size(labels: CropLabels) -> list[int]:
    return list(labels.canvas_size)


@_kernel_of(F.resize)
def _resize(labels: CropLabels, size: Size | None, max_size: int | None = None, **_pixels: object) -> CropLabels:
    return labels.with_canvas_size(resized_canvas(labels.canvas_size, size, max_size))


def _refuse(functional: Callable[..., Any]) -> None:
    @_kernel_of(functional)
    def kernel(labels: CropLabels, *args: object, **kwargs: object) -> CropLabels:
        raise TypeError(
            f"{functional.__name__} cannot be followed by CropLabels: a stored label is valid for its own crop only. Use "
            "RandomStoredCrop(size) instead of RandomResizedCrop, flips and other transforms that move the image"
        )


for _functional in (
    F.affine, F.center_crop, F.crop, F.elastic, F.five_crop, F.horizontal_flip, F.pad, F.perspective, F.resized_crop, F.rotate,
    F.ten_crop, F.uniform_temporal_subsample, F.vertical_flip,
):  # fmt: skip
    _refuse(_functional)


def _is_pure_tensor(inpt: object) -> bool:
    return isinstance(inpt, Tensor) and not isinstance(inpt, tv_tensors.TVTensor)


class RandomStoredCrop(Transform):
    """Cut a stored crop out of the image, resize and mirror it as the annotator saw it, and return it with its soft label.

    It takes the place of RandomResizedCrop, flips and LabelPooling in a `v2.Compose` for datasets of stored crops. Transforms of
    pixel values may follow. The soft label is a plain float32 tensor, so `v2.CutMix` and `v2.MixUp` accept batches of it.

    A `RelabelStream` knows the epoch: there, each image shows its crops in a random order that depends on its key and the seed of
    the stream, without repetition until all were shown. Elsewhere, crops are drawn with the random numbers of torch.

    Args:
        size: (height, width) of the crops in pixels, or an int for both.
        interpolation: Interpolation of the resize. Default: bilinear.
        num_crops: Number of different crops per image. Above 1, the image becomes `[num_crops, 3, height, width]` and the label
            `[num_crops, C]`; `collate_crops` makes batches of them. The image is decoded only once. Transforms that follow get the
            crops of one image together and treat them alike. Default: 1.
        temperature: Divisor of the logits before the softmax. Values above 1 soften the label. Default: 1.
        label_weight: Weight w of the one-hot label of the original class, 0 to 1: the target is
            `(1 - w) * soft label + w * one-hot label`. Default: 0.

    Raises:
        ValueError: An argument is out of range. When called: the image has fewer stored crops than `num_crops`, its size differs
            from the canvas size of the labels, or `label_weight` is above 0 and the sample has no label.
        TypeError: When called: the sample holds no CropLabels.

    Example:
        >>> transforms = v2.Compose([RandomStoredCrop(224), v2.ColorJitter(0.4), v2.ToImage()])
        >>> crop, soft_label = transforms(image, crop_labels)

    Reference: Shen & Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", 2022, section 3.
    """

    _transformed_types = (PIL.Image.Image, tv_tensors.Image, _is_pure_tensor, CropLabels)

    @checked_keywords()
    def __init__(
        self,
        size: int | Sequence[int],
        interpolation: InterpolationMode | str = InterpolationMode.BILINEAR,
        *,
        num_crops: int = 1,
        temperature: float = 1.0,
        label_weight: float = 0.0,
    ) -> None:
        super().__init__()
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if len(sides) != 2:
            raise ValueError(f"size must be an int or (height, width), got {size}")
        for side in sides:
            check_positive_int("size", side)
        check_positive_int("num_crops", num_crops)
        check_temperature(temperature)
        check_label_weight(label_weight)
        self.size = list(sides)
        self.interpolation = InterpolationMode(interpolation)
        self.num_crops = num_crops
        self.temperature = temperature
        self.label_weight = label_weight

    def check_inputs(self, flat_inputs: list[Any]) -> None:
        """Raise an error unless a sample has crop labels of its image."""
        if any(isinstance(inpt, LabelMap) for inpt in flat_inputs):
            raise TypeError(
                "RandomStoredCrop needs CropLabels, but the sample has a LabelMap: use v2.RandomResizedCrop, v2.RandomHorizontalFlip "
                "and LabelPooling, or a config with the encoding 'crops'"
            )
        found = [inpt for inpt in flat_inputs if isinstance(inpt, CropLabels)]
        if len(found) != 1:
            raise TypeError(f"RandomStoredCrop needs one CropLabels in the sample, got {len(found)}")
        size = image_size(flat_inputs)
        if size is not None and found[0].canvas_size != size:
            raise ValueError(
                f"the image is {size} high and wide, but its stored crops are of an image of {found[0].canvas_size}: place "
                "RandomStoredCrop before all other transforms that move the image"
            )

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Choose crops and return their boxes, flips and soft labels."""
        labels = next(inpt for inpt in flat_inputs if isinstance(inpt, CropLabels))
        crops = self._choose(labels)
        soft = labels.soft_labels(crops, self.temperature)
        if self.label_weight:
            index = label_tensor([labels.label] * len(crops), [labels.key] * len(crops), labels.num_classes)
            soft = blend_labels(soft, index, self.label_weight)
        flips = labels.flips[crops].tolist()
        return {"boxes": [labels.pixel_box(crop) for crop in crops], "flips": flips, "soft": soft}

    def _choose(self, labels: CropLabels) -> list[int]:
        """Return the indices of `num_crops` stored crops."""
        count, total = self.num_crops, labels.num_crops
        if count > total:
            raise ValueError(f"num_crops={count} is more than the {total} stored crops of {labels.key!r}")
        if labels.epoch is None:
            return torch.randperm(total)[:count].tolist() if count > 1 else [int(torch.randint(total, ()))]
        numbers = range(labels.epoch * count, (labels.epoch + 1) * count)
        walks = {walk: self._walk(labels, walk) for walk in {number // total for number in numbers}}
        return [walks[number // total][number % total] for number in numbers]

    def _walk(self, labels: CropLabels, walk: int) -> list[int]:
        """Return the order in which the stored crops are shown for the `walk`-th time."""
        total = labels.num_crops
        order: list[int] = np.argsort(uniform(seed_of(f"{labels.key}/{labels.seed}/{walk}"), np.arange(total))).tolist()
        num_before = walk * total % self.num_crops  # crops of the last walk in the sample that this walk begins in
        if not num_before:
            return order
        before = self._walk(labels, walk - 1)[-num_before:]
        first = [crop for crop in order if crop not in before][: self.num_crops - num_before]
        return first + [crop for crop in order if crop not in first]

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Return the crops of an image, or the soft labels for its crop labels."""
        if isinstance(inpt, CropLabels):
            return params["soft"] if self.num_crops > 1 else params["soft"][0]
        crops = self.cut(inpt, params)
        if self.num_crops == 1:
            return crops[0]
        stacked = torch.stack([F.to_image(crop) if isinstance(crop, PIL.Image.Image) else crop for crop in crops])
        return tv_tensors.Image(stacked) if isinstance(inpt, (PIL.Image.Image, tv_tensors.Image)) else stacked

    def cut(self, image: Any, params: dict[str, Any]) -> list[Any]:
        """Return the crops of an image, for the result of `make_params`."""
        return [self._crop(image, *pair) for pair in zip(params["boxes"], params["flips"], strict=True)]

    def _crop(self, image: Any, box: tuple[int, int, int, int], flip: bool) -> Any:
        left, top, right, bottom = box
        crop = F.resized_crop(
            image, top, left, bottom - top, right - left, self.size, interpolation=self.interpolation, antialias=True
        )
        return F.horizontal_flip(crop) if flip else crop
