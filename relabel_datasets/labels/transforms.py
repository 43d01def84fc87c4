"""Kernels of torchvision's v2 transforms for LabelMap, and `LabelPooling`, which turns a map into a soft label.

Every geometric functional has a kernel here. A kernel updates the view, with the same pixel arithmetic as torchvision, and
the canvas size. It leaves the logits unchanged. Arguments that concern only pixels, such as interpolation, are ignored.
tests/labels/test_transforms.py covers torchvision's own list of functionals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import PIL.Image
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from ..keywords import checked_keywords
from .blending import blend_labels, label_tensor
from .crop_labels import CropLabels
from .label_map import LabelMap
from .pooling import pool_label_map
from .pooling_checks import check_label_weight, check_temperature, resolve_grid
from .v2_hooks import Transform
from .view import WHOLE, View

Size = Sequence[int] | int
FiveLabelMaps = tuple[LabelMap, LabelMap, LabelMap, LabelMap, LabelMap]
Kernel = TypeVar("Kernel", bound=Callable[..., object])


def _kernel_of(functional: Callable[..., Any]) -> Callable[[Kernel], Kernel]:
    register: Callable[[Kernel], Kernel] = F.register_kernel(functional, LabelMap)
    return register


def _follow(label_map: LabelMap, inner: View, canvas_size: tuple[int, int]) -> LabelMap:
    """Return the map for an image of `canvas_size` that shows the part `inner` of the current image."""
    metadata = label_map._metadata
    return LabelMap._wrap(
        label_map.logits, metadata._replace(view=metadata.view.compose(inner), canvas_size=canvas_size)
    )


@_kernel_of(F.get_size)
def get_size_label_map(label_map: LabelMap) -> list[int]:
    return list(label_map.canvas_size)


@_kernel_of(F.horizontal_flip)
def horizontal_flip_label_map(label_map: LabelMap) -> LabelMap:
    return _follow(label_map, View(xx=-1.0, x0=1.0), label_map.canvas_size)


@_kernel_of(F.vertical_flip)
def vertical_flip_label_map(label_map: LabelMap) -> LabelMap:
    return _follow(label_map, View(yy=-1.0, y0=1.0), label_map.canvas_size)


@_kernel_of(F.crop)
def crop_label_map(label_map: LabelMap, top: int, left: int, height: int, width: int) -> LabelMap:
    return _follow(label_map, box_view(label_map.canvas_size, top, left, height, width), (height, width))


def box_view(canvas_size: tuple[int, int], top: int, left: int, height: int, width: int) -> View:
    """Return the view of an image of `canvas_size` that shows a box, all in pixels."""
    canvas_height, canvas_width = canvas_size
    return View(width / canvas_width, 0.0, left / canvas_width, 0.0, height / canvas_height, top / canvas_height)


@_kernel_of(F.resize)
def resize_label_map(
    label_map: LabelMap, size: Size | None, max_size: int | None = None, **_pixels: object
) -> LabelMap:
    return label_map.with_canvas_size(resized_canvas(label_map.canvas_size, size, max_size))


def resized_canvas(canvas_size: tuple[int, int], size: Size | None, max_size: int | None) -> tuple[int, int]:
    """Return the size (height, width) of a resized image, by torchvision's own rule."""
    if isinstance(size, Sequence) and len(size) == 2:
        return size[0], size[1]
    nothing = tv_tensors.BoundingBoxes(torch.empty(0, 4), format="XYXY", canvas_size=canvas_size)
    height, width = F.resize(nothing, size, max_size=max_size).canvas_size
    return height, width


@_kernel_of(F.resized_crop)
def resized_crop_label_map(
    label_map: LabelMap, top: int, left: int, height: int, width: int, size: Size, **_pixels: object
) -> LabelMap:
    if not isinstance(size, Sequence) or len(size) != 2:
        return resize_label_map(crop_label_map(label_map, top, left, height, width), size)
    return _follow(label_map, box_view(label_map.canvas_size, top, left, height, width), (size[0], size[1]))


@_kernel_of(F.pad)
def pad_label_map(label_map: LabelMap, padding: Size, **_pixels: object) -> LabelMap:
    """Extend the view beyond the image. Padding counts as outside the image in every padding mode."""
    sides = [padding] if isinstance(padding, int) else list(padding)
    if len(sides) not in (1, 2, 4):
        raise ValueError(f"padding must be an int or 1, 2 or 4 of them, got {padding}")
    left, top, right, bottom = sides * (4 // len(sides))
    height, width = label_map.canvas_size
    return crop_label_map(label_map, -top, -left, height + top + bottom, width + left + right)


@_kernel_of(F.center_crop)
def center_crop_label_map(label_map: LabelMap, output_size: Size) -> LabelMap:
    height, width = _height_width(output_size)
    top, left = (
        # torchvision rounds the corner of a crop to even, but that of a padding down
        round((canvas - side) / 2) if side <= canvas else -((side - canvas) // 2)
        for canvas, side in zip(label_map.canvas_size, (height, width), strict=True)
    )
    return crop_label_map(label_map, top, left, height, width)


@_kernel_of(F.five_crop)
def five_crop_label_map(label_map: LabelMap, size: Size) -> FiveLabelMaps:
    height, width = _height_width(size)
    bottom, right = label_map.canvas_size[0] - height, label_map.canvas_size[1] - width
    if bottom < 0 or right < 0:
        raise ValueError(f"crops of size {(height, width)} do not fit an image of size {label_map.canvas_size}")
    top_left, top_right, bottom_left, bottom_right = (
        crop_label_map(label_map, top, left, height, width) for top in (0, bottom) for left in (0, right)
    )
    return top_left, top_right, bottom_left, bottom_right, center_crop_label_map(label_map, [height, width])


@_kernel_of(F.ten_crop)
def ten_crop_label_map(label_map: LabelMap, size: Size, vertical_flip: bool = False) -> tuple[LabelMap, ...]:
    flip = vertical_flip_label_map if vertical_flip else horizontal_flip_label_map
    return five_crop_label_map(label_map, size) + five_crop_label_map(flip(label_map), size)


def _height_width(size: Size) -> tuple[int, int]:
    sides = [size] if isinstance(size, int) else list(size)
    return sides[0], sides[-1]


@_kernel_of(F.affine)
def affine_label_map(
    label_map: LabelMap,
    angle: float,
    translate: Sequence[float],
    scale: float,
    shear: Sequence[float] | float,
    center: Sequence[float] | None = None,
    **_pixels: object,
) -> LabelMap:
    shears = [shear, 0.0] if isinstance(shear, (int, float)) else list(shear)
    shear_x, shear_y = shears[0], shears[-1]
    linear = _inverse_linear(angle, scale, shear_x, shear_y)
    return _warp(label_map, linear, translate, center, label_map.canvas_size)


@_kernel_of(F.rotate)
def rotate_label_map(
    label_map: LabelMap, angle: float, expand: bool = False, center: Sequence[float] | None = None, **_pixels: object
) -> LabelMap:
    linear = _inverse_linear(-angle, 1.0, 0.0, 0.0)  # torchvision's rotate and affine have opposite directions
    height, width = canvas_size = label_map.canvas_size
    if expand and center is None and angle % 180 == 90:  # torchvision turns quarter rotations exactly
        canvas_size = (width, height)
    elif expand:
        canvas_size = _expanded_size(canvas_size, linear, center)
    return _warp(label_map, linear, (0.0, 0.0), center, canvas_size)


def _inverse_linear(angle: float, scale: float, shear_x: float, shear_y: float) -> View:
    """Return the inverse of rotation, scale and shear about the origin: a map from output to input pixels."""
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    unshear_x = View(xy=math.tan(math.radians(shear_x)))
    unshear_y = View(yx=math.tan(math.radians(shear_y)))
    unrotate = View(cos / scale, sin / scale, 0.0, -sin / scale, cos / scale, 0.0)
    return unshear_x.compose(unshear_y).compose(unrotate)


def _about_center(linear: View, canvas_size: tuple[int, int], center: Sequence[float] | None) -> View:
    """Return `linear` applied about `center`, in pixels relative to the middle of the canvas."""
    if center is None:
        return linear
    x, y = center[0] - canvas_size[1] / 2, center[1] - canvas_size[0] / 2
    return View(x0=x, y0=y).compose(linear).compose(View(x0=-x, y0=-y))


def _warp(
    label_map: LabelMap,
    linear: View,
    translate: Sequence[float],
    center: Sequence[float] | None,
    canvas_size: tuple[int, int],
) -> LabelMap:
    (old_height, old_width), (height, width) = label_map.canvas_size, canvas_size
    from_unit = View(width, 0.0, -width / 2 - translate[0], 0.0, height, -height / 2 - translate[1])
    to_unit = View(1 / old_width, 0.0, 0.5, 0.0, 1 / old_height, 0.5)
    inner = to_unit.compose(_about_center(linear, label_map.canvas_size, center)).compose(from_unit)
    return _follow(label_map, inner, canvas_size)


def _expanded_size(canvas_size: tuple[int, int], linear: View, center: Sequence[float] | None) -> tuple[int, int]:
    """Return the size of the canvas that holds the whole rotated image, by the rule of torchvision and Pillow.

    They rotate the corners with the map from output to input, whose bounding box has the same size, and round outwards.
    """
    height, width = canvas_size
    to_input = _about_center(linear, canvas_size, center)
    corners = [to_input.compose(View(x0=x, y0=y)) for x in (-width / 2, width / 2) for y in (-height / 2, height / 2)]
    sides = []
    for side, positions in ((height, [corner.y0 for corner in corners]), (width, [corner.x0 for corner in corners])):
        low, high = min(positions) + side / 2, max(positions) + side / 2
        sides.append(math.ceil(round(high, 4)) - math.floor(round(low, 4)))
    return sides[0], sides[1]


def _refuse(functional: Callable[..., Any], because: str) -> None:
    @_kernel_of(functional)
    def kernel(label_map: LabelMap, *args: object, **kwargs: object) -> LabelMap:
        raise TypeError(
            f"{functional.__name__} cannot be followed by a LabelMap: {because}. Remove it, apply it to the image "
            "alone after LabelPooling, or use affine transforms"
        )


_refuse(F.perspective, "the result is not an affine view of the image")
_refuse(F.elastic, "the result is not an affine view of the image")
_refuse(F.uniform_temporal_subsample, "a label map belongs to one image, not to a video")


class LabelPooling(Transform):
    """Pool each `LabelMap` of a sample over its view into the soft label of what the image now shows.

    Place it after the geometric transforms of a `v2.Compose`. The soft label is a plain float32 tensor of probabilities, so
    `v2.CutMix` and `v2.MixUp` accept batches of it, and timm's `Mixup` (timm 1.0.31 or later) does with
    `multi_label=True, label_smoothing=0`.

    The target is `(1 - w) * soft + w * one_hot(label)` with `soft = softmax(pooled logits / temperature)`, w = `label_weight`
    and the original class label of the image. In a grid, this holds for each cell.

    Args:
        output_size: Grid of labels per image. 1 returns `[C]`. (h, w), or n for (n, n), returns one label per cell,
            `[C, h, w]`, as used for token labels. Default: 1.
        temperature: Divisor of the pooled logits before the softmax. Values above 1 soften the label. Default: 1.
        label_weight: Weight of the one-hot label of the original class, 0 to 1. Default: 0.
        calibrated: Whether to multiply the pooled logits of each cell by the gain that the build fitted for the share of the
            image that the cell covers, so that the label is closer to the annotator's answer to the crop. Default: False, as in
            the paper.
        localized: Whether to pool the view. False pools the whole image regardless of the view. Default: True.
        multi_label: Whether to keep all classes. False returns a one-hot label of the top class. With `localized=False`,
            that is a single label per image as in the original dataset. Default: True.

    Raises:
        ValueError: An argument is out of range. When called: the image size differs from the canvas size of the label map, or
            `label_weight` is above 0 and the label map has no label, or `calibrated` is True and it has no calibration.
        TypeError: When called: the sample holds no LabelMap.

    Example:
        >>> transform = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), LabelPooling()])
        >>> image, soft_label = transform(image, label_map)

    Reference: Yun et al., "Re-labeling ImageNet", 2021, section 3.2; table 2 is the ablation of the last two arguments.
    """

    _transformed_types = (LabelMap,)

    @checked_keywords()
    def __init__(
        self,
        output_size: int | Sequence[int] = 1,
        temperature: float = 1.0,
        *,
        label_weight: float = 0.0,
        calibrated: bool = False,
        localized: bool = True,
        multi_label: bool = True,
    ) -> None:
        super().__init__()
        grid = resolve_grid(output_size)
        check_temperature(temperature)
        check_label_weight(label_weight)
        self.output_size = output_size if isinstance(output_size, int) else grid
        self.temperature = temperature
        self.label_weight = label_weight
        self.calibrated = calibrated
        self.localized = localized
        self.multi_label = multi_label

    def check_inputs(self, flat_inputs: list[Any]) -> None:
        label_maps = [inpt for inpt in flat_inputs if isinstance(inpt, LabelMap)]
        if any(isinstance(inpt, CropLabels) for inpt in flat_inputs):
            hint = (
                "use RandomStoredCrop(size) instead of RandomResizedCrop, flips and LabelPooling, or a config of label maps"
                if self.output_size == 1
                else "stored crops have no labels of cells or tokens, use a config of label maps"
            )
            raise TypeError(f"{type(self).__name__} needs a LabelMap, but the sample has CropLabels: {hint}")
        if not label_maps:
            raise TypeError(
                "LabelPooling found no LabelMap in the sample: another LabelPooling or v2.ToPureTensor comes before it"
            )
        size = image_size(flat_inputs)
        for label_map in label_maps:
            if size is not None and label_map.canvas_size != size:
                raise ValueError(
                    f"the image is {size} high and wide, but its label map followed it to {label_map.canvas_size}: "
                    "use only torchvision.transforms.v2 transforms, and give them the image and the label map together"
                )

    def transform(self, inpt: LabelMap, params: dict[str, Any]) -> Tensor:
        view = inpt.view if self.localized else WHOLE
        soft = pool_label_map(inpt, view, self.output_size, self.temperature, calibrated=self.calibrated)
        return soft if self.multi_label and not self.label_weight else self.to_targets(soft[None], [inpt])[0]

    def to_targets(self, soft: Tensor, label_maps: Sequence[LabelMap]) -> Tensor:
        """Convert pooled soft labels to targets, as `multi_label` and `label_weight` say.

        Args:
            soft: Soft labels `[B, C, ...]`.
            label_maps: The B label maps, which have the original class labels.

        Returns:
            Targets of the same shape.

        Raises:
            ValueError: `label_weight` is above 0 and a label map has no label.
        """
        if not self.multi_label:
            soft = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
        if not self.label_weight:
            return soft
        labels, keys = zip(*((label_map.label, label_map.key) for label_map in label_maps), strict=True)
        return blend_labels(soft, label_tensor(labels, keys, soft.shape[1]), self.label_weight)


def image_size(flat_inputs: list[Any]) -> tuple[int, int] | None:
    """Return (height, width) of the sample's first image, by v2's rule for what an image is, or None."""
    for inpt in flat_inputs:
        if isinstance(inpt, PIL.Image.Image):
            return inpt.height, inpt.width
        if isinstance(inpt, (tv_tensors.Image, tv_tensors.Video)):
            return inpt.shape[-2], inpt.shape[-1]
    for inpt in flat_inputs:
        if isinstance(inpt, Tensor) and not isinstance(inpt, tv_tensors.TVTensor) and inpt.ndim >= 3:
            return inpt.shape[-2], inpt.shape[-1]
    return None
