"""Decode image files to uint8 tensors: usual JPEGs with the fastest installed decoder, everything else with Pillow."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from functools import cache

import PIL.Image
import PIL.JpegImagePlugin
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from .encoded_jpeg import box_size, decode_pixels
from .images import decode_image, orientation_of, within_pixel_limit

_Decode = Callable[[bytes], Tensor]  # bytes of a JPEG -> uint8 [3, H, W]; raises an Exception for damaged files


def decode_tensor(data: bytes, name: str = "image") -> tv_tensors.Image:
    """Decode an image file to an upright RGB image, uint8 `[3, H, W]`, see `images.decode_image`.

    Args:
        data: Content of an image file.
        name: Name of the image in error messages. Default: "image".

    Raises:
        ImageError: As for `decode_image`.
    """
    if (size := box_size(data)) is not None:
        pixels = decode_pixels(data, (0, 0, *size), "tensor")
        if pixels is not None:
            return pixels
    elif is_plain_jpeg(data):
        with contextlib.suppress(Exception):  # Pillow decides whether the image is damaged, as with PIL images
            return tv_tensors.Image(jpeg_decoder()(data))
    return to_tensor(decode_image(data, name))


def to_tensor(image: PIL.Image.Image) -> tv_tensors.Image:
    """Return the pixels of an RGB image, uint8 `[3, H, W]`."""
    tensor: tv_tensors.Image = F.to_image(image)
    return tensor


@cache
def jpeg_decoder() -> _Decode:
    """Return the fastest installed decoder of whole JPEGs other than the C extension. It raises an error for what it cannot decode."""
    for make in (_simplejpeg, _torchvision):
        with contextlib.suppress(ImportError):  # later releases of torchvision have no decoder
            return make()
    return lambda data: to_tensor(decode_image(data))


def _simplejpeg() -> _Decode:
    from simplejpeg import decode_jpeg  # the extra "fast"

    return lambda data: torch.from_numpy(decode_jpeg(data, "RGB")).permute(2, 0, 1)


def _torchvision() -> _Decode:
    from torchvision.io import ImageReadMode, decode_jpeg

    def decode(data: bytes) -> Tensor:
        pixels: Tensor = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        return pixels

    return decode


def is_plain_jpeg(data: bytes) -> bool:
    """Return whether a file is an upright RGB JPEG with usual subsampling, within the pixel limit of Pillow."""
    if not data.startswith(b"\xff\xd8\xff"):
        return False
    try:
        opened = PIL.JpegImagePlugin.JpegImageFile(io.BytesIO(data))
        _, horizontal, vertical, _ = opened.layer[0]
    except Exception:  # noqa: BLE001  decoders of damaged files raise nearly anything
        return False
    if vertical > horizontal:  # 4:4:0, which older releases of libjpeg-turbo upsample in another way
        return False
    return opened.mode == "RGB" and within_pixel_limit(opened.height, opened.width) and orientation_of(opened) == 1
