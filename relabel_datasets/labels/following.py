"""Label maps that follow their images after all images of a batch have been decoded.

Between two images the processor's caches are cold, and everything takes several times as long. So the transforms that move an image
are only recorded there. The random numbers that they draw do not depend on label maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import PIL.Image
from torch import Tensor
from torchvision.transforms import v2

from .batch import LabelMapBatch, MapRow, batch_key, to_label_map
from .encoded import EncodedImage, box_of, size_of
from .label_map import LabelMap
from .transforms import box_view
from .v2_hooks import TRANSFORM
from .view import View

Size = tuple[int, int]  # (height, width) in pixels


class Following:
    """Label map of an image with the moves of the image that it must still follow.

    Args:
        label_map: Label map.
    """

    __slots__ = ("_moves", "label_map")

    def __init__(self, label_map: LabelMap | MapRow) -> None:
        self.label_map = label_map
        self._moves: list[tuple[Any, dict[str, Any], Size]] = []

    def record(self, transform: Any, params: dict[str, Any], size: Size) -> None:
        """Record that a transform was applied to the image.

        Args:
            transform: Transform of v2.
            params: Its random parameters.
            size: Size of the image before the transform.
        """
        if type(transform) in _MOVES:
            self._moves.append((transform, params, size))

    def view(self) -> View:
        """Return the view of the current image."""
        label_map = self.label_map
        view = label_map.view
        for transform, params, size in self._moves:
            view = _MOVES[type(transform)](label_map, view, transform, params, size)
        return view

    def resolve(self, canvas_size: Size) -> LabelMap:
        """Return the label map of the current image, whose size is `canvas_size`."""
        label_map: LabelMap = to_label_map(self.label_map)
        if not self._moves:
            return label_map
        return LabelMap.wrap(label_map.logits, like=label_map, view=self.view(), canvas_size=canvas_size)

    def batch_key(self) -> tuple[Any, ...]:
        """Return what label maps of one batch must share."""
        label_map = self.label_map
        return (id(label_map.batch),) if isinstance(label_map, MapRow) else batch_key(label_map)


def follow(label_map: Any, image: Any) -> Following | None:
    """Return the label map so that it can follow the image later, or None if it must follow each transform at once."""
    is_image = isinstance(image, (EncodedImage, PIL.Image.Image)) or (isinstance(image, Tensor) and image.ndim > 2)
    if not is_image or type(label_map) not in (LabelMap, MapRow) or label_map.canvas_size != size_of(image):
        return None
    return Following(label_map)


def can_wait(transform: Any) -> bool:
    """Return whether label maps can follow a transform later. A subclass may do something else than its base."""
    if type(transform) is v2.ToDtype and isinstance(
        transform.dtype, dict
    ):  # raises an error for types that it does not name
        return False
    return type(transform) in _MOVES or type(transform) in _STILL


def stack(followed: Sequence[Following], views: Sequence[View]) -> LabelMapBatch:
    """Return the batch of label maps that all have the same `batch_key`, with other views."""
    first = followed[0].label_map
    if isinstance(first, MapRow):
        rows: list[int] = [one.label_map.row for one in followed]
        return first.batch.select(rows).with_views(views)
    return LabelMapBatch.stack([to_label_map(one.label_map) for one in followed]).with_views(views)


def _same(_map: Any, view: View, *_of_transform: Any) -> View:
    return view


def _mirror(inner: View) -> Callable[..., View]:
    return lambda _map, view, *_of_transform: view.compose(inner)


def _crop(label_map: LabelMap | MapRow, view: View, transform: Any, params: dict[str, Any], size: Size) -> View:
    if not params.get("needs_crop", True) and not params.get("needs_pad"):
        return view
    box = box_of(transform, params, size)
    if box is None:  # padded
        return _other(label_map, view, transform, params, size)
    return view.compose(box_view(size, *box))


def _other(label_map: LabelMap | MapRow, view: View, transform: Any, params: dict[str, Any], size: Size) -> View:
    whole: LabelMap = to_label_map(label_map)
    moved: LabelMap = getattr(transform, TRANSFORM)(
        LabelMap.wrap(whole.logits, like=whole, view=view, canvas_size=size), params
    )
    return moved.view


# Types of transforms that move images, with the function that returns the view after the transform.
_MOVES: dict[type, Callable[..., View]] = {
    v2.CenterCrop: _crop,
    v2.Pad: _other,
    v2.RandomAffine: _other,
    v2.RandomCrop: _crop,
    v2.RandomHorizontalFlip: _mirror(View(xx=-1.0, x0=1.0)),
    v2.RandomResizedCrop: _crop,
    v2.RandomRotation: _other,
    v2.RandomVerticalFlip: _mirror(View(yy=-1.0, y0=1.0)),
    v2.Resize: _same,
}
# Types of transforms that change only the values of pixels.
_STILL = frozenset(
    [
        v2.ColorJitter,
        v2.GaussianBlur,
        v2.Grayscale,
        v2.Identity,
        v2.Normalize,
        v2.PILToTensor,
        v2.RandomAdjustSharpness,
        v2.RandomAutocontrast,
        v2.RandomEqualize,
        v2.RandomErasing,
        v2.RandomGrayscale,
        v2.RandomInvert,
        v2.RandomPosterize,
        v2.RandomSolarize,
        v2.ToDtype,
        v2.ToImage,
    ]
)
