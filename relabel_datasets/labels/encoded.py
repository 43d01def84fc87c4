"""Images that are decoded when a transform needs their pixels, so that a first crop decodes only its box."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import PIL.Image
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from .crop_transforms import RandomStoredCrop

Box = tuple[int, int, int, int]  # top, left, height, width in pixels


class EncodedImage(ABC):
    """Image file whose pixels are not decoded yet.

    Args:
        size: (height, width) of the image.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    @abstractmethod
    def decode(self) -> Any:
        """Return the image."""

    @abstractmethod
    def decode_box(self, box: Box) -> Any:
        """Return the pixels in a box that lies within the image, equal to those of a crop of the whole image."""

    def placeholder(self) -> torch.Tensor:
        """Return a tensor of the image's shape without memory for its pixels, to draw random boxes for."""
        return torch.empty((), dtype=torch.uint8).expand(3, *self.size)


def decoded(image: Any) -> Any:
    """Return an image with its pixels."""
    return image.decode() if isinstance(image, EncodedImage) else image


def size_of(image: EncodedImage | PIL.Image.Image | torch.Tensor) -> tuple[int, int]:
    """Return the (height, width) of an image."""
    if isinstance(image, EncodedImage):
        return image.size
    return (image.height, image.width) if isinstance(image, PIL.Image.Image) else (image.shape[-2], image.shape[-1])


def crops_first(transform: Any) -> bool:
    """Return whether a transform of v2 can be applied to an encoded image. A subclass may do something else than its base."""
    return type(transform) in _BOXES


def planar(image: Any) -> Any:
    """Return a tensor image with contiguous channels. Decoders and resizes interleave them, which slows later transforms down."""
    if not isinstance(image, tv_tensors.Image) or image.is_contiguous():
        return image
    return tv_tensors.wrap(image.contiguous(), like=image)


def decode_for(transform: Any, image: EncodedImage, params: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the part of an image that a transform needs, and the parameters of the transform for this part.

    Args:
        transform: Transform for which `crops_first` holds.
        image: Image.
        params: Parameters that the transform has drawn for the whole image.
    """
    box = box_of(transform, params, image.size)
    return (image.decode(), params) if box is None else (image.decode_box(box), _within(params, box))


def box_of(transform: Any, params: dict[str, Any], size: tuple[int, int]) -> Box | None:
    """Return the box that a transform cuts out, or None if it pads the image.

    Args:
        transform: Transform for which `crops_first` holds.
        params: Parameters that the transform has drawn.
        size: (height, width) of the image.
    """
    box: Box | None = _BOXES[type(transform)](transform, params, size)
    return box


def _within(params: dict[str, Any], box: Box) -> dict[str, Any]:
    """Return the parameters of a crop for an image that shows only `box`."""
    top, left, _, _ = box
    moved = dict(params)
    if "boxes" in params:
        moved["boxes"] = [(x1 - left, y1 - top, x2 - left, y2 - top) for x1, y1, x2, y2 in params["boxes"]]
    if "top" in params:
        moved["top"], moved["left"] = params["top"] - top, params["left"] - left
    return moved


def _given_box(transform: Any, params: dict[str, Any], size: tuple[int, int]) -> Box | None:
    """Return the box of RandomResizedCrop and RandomCrop, or None if the image is padded."""
    return None if params.get("needs_pad") else (params["top"], params["left"], params["height"], params["width"])


def _center_box(transform: v2.CenterCrop, params: dict[str, Any], size: tuple[int, int]) -> Box | None:
    """Return the box of CenterCrop, or None if the image is padded."""
    (height, width), (crop_height, crop_width) = size, transform.size
    if crop_height > height or crop_width > width:
        return None
    return round((height - crop_height) / 2), round((width - crop_width) / 2), crop_height, crop_width  # as torchvision


def _stored_boxes(transform: RandomStoredCrop, params: dict[str, Any], size: tuple[int, int]) -> Box:
    """Return the smallest box that holds all chosen crops."""
    x1, y1, x2, y2 = zip(*params["boxes"], strict=True)
    return min(y1), min(x1), max(y2) - min(y1), max(x2) - min(x1)


_BOXES: dict[type, Any] = {
    RandomStoredCrop: _stored_boxes,
    v2.CenterCrop: _center_box,
    v2.RandomCrop: _given_box,
    v2.RandomResizedCrop: _given_box,
}
