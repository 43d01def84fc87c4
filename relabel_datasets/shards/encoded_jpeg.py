"""JPEGs of which only a box is decoded, with the C extension `_jpeg` if it was built.

The pixels are those of a full decode with Pillow, bit by bit. What is not a usual JPEG is decoded as a whole.
"""

from __future__ import annotations

import io
from functools import cache
from types import ModuleType
from typing import Any

import PIL.features
import PIL.Image
import PIL.JpegImagePlugin
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from ..labels.encoded import Box, EncodedImage
from .images import ImageFormat, decode_image, orientation_of, within_pixel_limit

_END = b"\xff\xd9"  # the marker at the end of a JPEG: without it, the file is truncated


@cache
def jpeg_extension() -> ModuleType | None:
    """Return the extension, or None if it was not built or Pillow's decoder is not libjpeg-turbo, whose pixels it has."""
    if not PIL.features.check_feature("libjpeg_turbo"):
        return None
    try:
        from . import _jpeg
    except ImportError:
        return None
    module: ModuleType = _jpeg
    return module


def open_image(data: bytes, name: str, image_format: ImageFormat) -> EncodedImage | PIL.Image.Image | tv_tensors.Image:
    """Return an image that can be decoded in part, or else the decoded image.

    Args:
        data: Content of an image file.
        name: Name of the image in error messages.
        image_format: `"pil"` or `"tensor"`, see `decode_image`.

    Raises:
        ImageError: As for `decode_image`.
    """
    size = box_size(data)
    if size is None:
        return decode_image(data, name, image_format=image_format)
    return EncodedJpeg(data, name, image_format, size)


def box_size(data: bytes) -> tuple[int, int] | None:
    """Return (height, width) of a JPEG of which boxes can be decoded, or None for other files."""
    extension = jpeg_extension()
    if extension is None or type(data) is not bytes or not data.endswith(_END):
        return None
    header = extension.parse(data)
    if header is None:
        return None
    height, width, has_app1 = header
    if not within_pixel_limit(height, width) or (has_app1 and not _is_upright(data)):
        return None
    return height, width


def _is_upright(data: bytes) -> bool:
    try:
        return orientation_of(PIL.JpegImagePlugin.JpegImageFile(io.BytesIO(data))) == 1
    except Exception:  # noqa: BLE001  decoders of damaged files raise nearly anything
        return False


class EncodedJpeg(EncodedImage):
    """Upright RGB JPEG whose pixels are not decoded yet.

    Args:
        data: Content of the file, for which `box_size` returns a size.
        name: Name of the image in error messages.
        image_format: Format of the decoded image.
        size: (height, width) of the image.
    """

    def __init__(self, data: bytes, name: str, image_format: ImageFormat, size: tuple[int, int]) -> None:
        super().__init__(size)
        self._data = data
        self._name = name
        self._image_format: ImageFormat = image_format

    def decode(self) -> Any:
        """Return the image.

        Raises:
            ImageError: As for `decode_image`.
        """
        return self.decode_box((0, 0, *self.size))

    def decode_box(self, box: Box) -> Any:
        """Return the pixels in a box.

        Raises:
            ImageError: As for `decode_image`. Damage outside the box may not be noticed.
        """
        pixels = decode_pixels(self._data, box, self._image_format)
        if pixels is not None:
            return pixels
        return F.crop(decode_image(self._data, self._name, image_format=self._image_format), *box)


def decode_pixels(data: bytes, box: Box, image_format: ImageFormat) -> PIL.Image.Image | tv_tensors.Image | None:
    """Return the pixels in a box of a JPEG, or None if it is damaged.

    Args:
        data: Content of the file, for which `box_size` returns a size.
        box: Top, left, height and width in pixels, within the image.
        image_format: Format of the result.
    """
    extension = jpeg_extension()
    assert extension is not None
    height, width = box[2:]
    is_pil = image_format == "pil"
    pixels = extension.decode(data, *box, 4 if is_pil else 3)
    if pixels is None:
        return None
    if is_pil:  # Pillow stores 4 bytes per pixel
        return PIL.Image.frombytes("RGB", (width, height), pixels, "raw", "RGBX")
    return tv_tensors.Image(torch.frombuffer(pixels, dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1))
