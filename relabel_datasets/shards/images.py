"""Decode image files to upright RGB pixels.

Builders and datasets use the same `decode_image`, so that every label map fits its image.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, BinaryIO, Literal, NamedTuple, overload

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.JpegImagePlugin

from ..errors import ImageError
from .formats import readable_formats

if TYPE_CHECKING:
    from torchvision import tv_tensors

ImageFormat = Literal["pil", "tensor"]
IMAGE_FORMATS = ("pil", "tensor")

_ORIENTATIONS = {number: number for number in range(1, 9)}  # a dict: EXIF also stores 6 as 6.0 and 6/1
_QUARTER_TURNED = (5, 6, 7, 8)  # orientations that swap height and width
_TRANSPOSES = {  # from the stored image to the upright one
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}


def check_image_format(image_format: str) -> None:
    """Raise ValueError unless `image_format` is `"pil"` or `"tensor"`."""
    if image_format not in IMAGE_FORMATS:
        raise ValueError(f"image_format must be one of {IMAGE_FORMATS}, got {image_format!r}")


@overload
def decode_image(data: bytes, name: str = ..., *, image_format: Literal["pil"] = ...) -> PIL.Image.Image: ...
@overload
def decode_image(data: bytes, name: str = ..., *, image_format: Literal["tensor"]) -> tv_tensors.Image: ...
@overload
def decode_image(
    data: bytes, name: str = ..., *, image_format: ImageFormat = ...
) -> PIL.Image.Image | tv_tensors.Image: ...
def decode_image(
    data: bytes, name: str = "image", *, image_format: ImageFormat = "pil"
) -> PIL.Image.Image | tv_tensors.Image:
    """Decode an image file to an upright RGB image.

    The format is detected from the bytes, not from the file name. The EXIF orientation is applied, see `orientation_of`. Gray,
    palette, CMYK and 16-bit images are converted to 8-bit RGB (the upper 8 of 16 bits). Alpha is dropped, and only the first
    frame of an animation is decoded.

    A JPEG with more than `2 * PIL.Image.MAX_IMAGE_PIXELS` pixels, which Pillow refuses to open, is decoded at 1/2, 1/4 or 1/8
    of its size: the largest size with at most `MAX_IMAGE_PIXELS` pixels.

    Args:
        data: Content of an image file.
        name: Name of the image in error messages. Default: "image".
        image_format: `"pil"` for a PIL image, or `"tensor"` for a `tv_tensors.Image`, uint8 `[3, H, W]`, which is faster for
            JPEGs. Default: "pil".

    Returns:
        The image.

    Raises:
        ImageError: The bytes are not an image, are damaged or truncated, have too many pixels, or have float pixels, whose
            range is unknown.
        ValueError: `image_format` is neither.
    """
    check_image_format(image_format)
    if image_format == "pil":
        return decode_reduced(data, None, name)[0]
    from .tensor_images import decode_tensor  # imports torch

    return decode_tensor(data, name)


def within_pixel_limit(height: int, width: int) -> bool:
    """Return whether an image is within the limit above which Pillow warns, `decode_image` decodes at a reduced size, or both refuse."""
    limit = PIL.Image.MAX_IMAGE_PIXELS
    return limit is None or height * width <= limit


def decode_reduced(
    data: bytes, target: tuple[int, int] | None, name: str = "image"
) -> tuple[PIL.Image.Image, tuple[int, int]]:
    """Decode an image as `decode_image` does, possibly at a reduced size.

    A large JPEG that will be resized is decoded at 1/2, 1/4 or 1/8 of its size, which is several times faster. The decoded
    image keeps at least twice the target's pixels in each direction, so the resized image is nearly the same.

    Args:
        data: Content of an image file.
        target: (height, width) to which the image will be resized. None decodes at full size.
        name: Name of the image in error messages. Default: "image".

    Returns:
        The image and its full (height, width).

    Raises:
        ImageError: As for `decode_image`.
    """
    try:
        opened = _open(io.BytesIO(data))
        width, height = opened.size
        if opened.format == "JPEG":
            _reduce(opened, target)
        is_reduced = opened.size != (width, height)
        image = to_rgb(opened)
        orientation = orientation_of(opened)  # after loading: Pillow turns a TIFF while it loads it
        image = _turn(image, orientation)
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise _image_error(name, error) from error
    if is_reduced:
        return image, (width, height) if orientation in _QUARTER_TURNED else (height, width)
    return image, (image.height, image.width)


class Header(NamedTuple):
    """Geometry of an image file.

    Attributes:
        size: (height, width) of the upright image.
        orientation: EXIF orientation, 1 to 8.
    """

    size: tuple[int, int]
    orientation: int


def read_size(file: BinaryIO, name: str) -> tuple[int, int]:
    """Read the size of an upright image from its header, see `read_header`."""
    return read_header(file, name).size


def read_header(file: BinaryIO, name: str) -> Header:
    """Read the size and the orientation of an image from its header.

    Args:
        file: Image file, open for reading.
        name: Name of the image in error messages.

    Returns:
        (height, width) of the upright image, and the orientation of the stored one.

    Raises:
        ImageError: The header is damaged, or the bytes are not an image.
    """
    try:
        with _open(file) as opened:
            if opened.format == "TIFF":
                opened.load()  # applies the orientation
            width, height = opened.size
            orientation = orientation_of(opened)
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise _image_error(name, error) from error
    return Header((width, height) if orientation in _QUARTER_TURNED else (height, width), orientation)


def orientation_of(image: PIL.Image.Image) -> int:
    """Return the EXIF orientation of an opened image, 1 to 8.

    Invalid values and EXIF that cannot be parsed count as 1. If EXIF has no orientation, that of XMP is used, as in Pillow.

    Args:
        image: Image from `PIL.Image.open`.
    """
    try:
        return _ORIENTATIONS.get(image.getexif().get(PIL.ExifTags.Base.Orientation, 1), 1)
    except Exception:  # noqa: BLE001  the parser of damaged EXIF raises nearly anything
        return 1


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert an opened image to upright 8-bit RGB, see `decode_image`.

    Args:
        image: Image from `PIL.Image.open`.

    Returns:
        The converted image.

    Raises:
        ImageError: The image has float pixels, whose range is unknown.
    """
    rgb = to_rgb(image)
    return _turn(rgb, orientation_of(image))


def _turn(image: PIL.Image.Image, orientation: int) -> PIL.Image.Image:
    if orientation == 1:
        return image
    turned = image.transpose(_TRANSPOSES[orientation])
    for name in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):
        turned.info.pop(name, None)  # otherwise the next reader would rotate it again
    return turned


def _open(file: BinaryIO) -> PIL.Image.Image:
    """Open an image. A JPEG may exceed Pillow's pixel limit; `_reduce` decides whether it can be decoded."""
    try:
        return PIL.Image.open(file, formats=readable_formats())
    except PIL.Image.DecompressionBombError:
        try:
            file.seek(0)
            return PIL.JpegImagePlugin.JpegImageFile(file)
        except SyntaxError:  # another format
            pass
        raise


def _reduce(opened: PIL.Image.Image, target: tuple[int, int] | None) -> None:
    """Set the size at which a JPEG is decoded: at least twice the target, and within Pillow's limit.

    Raises:
        DecompressionBombError: The image exceeds the limit at every size at which it can be decoded.
    """
    width, height = size = opened.size
    if target is not None:
        turned = orientation_of(opened) in _QUARTER_TURNED
        size = (2 * target[0], 2 * target[1]) if turned else (2 * target[1], 2 * target[0])
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit is None or width * height <= 2 * limit:
        opened.draft(None, size)
        return
    scale = next((scale for scale in (2, 4, 8) if -(-width // scale) * -(-height // scale) <= limit), 8)
    opened.draft(None, (min(size[0], max(1, width // scale)), min(size[1], max(1, height // scale))))
    if opened.width * opened.height > limit or _keeps_all_coefficients(opened):
        raise PIL.Image.DecompressionBombError(f"{width * height} pixels")


def _keeps_all_coefficients(opened: PIL.Image.Image) -> bool:
    """Return whether libjpeg keeps the whole JPEG in memory at any scale, because it has several scans."""
    assert isinstance(opened, PIL.JpegImagePlugin.JpegImageFile)
    assert opened.fp is not None
    end, layers = opened.fp.tell(), opened.layers  # after the header of the first scan
    whole_scan = (
        b"\xff\xda" + (6 + 2 * layers).to_bytes(2, "big") + bytes([layers])
    )  # header of a scan with all components
    opened.fp.seek(end - 8 - 2 * layers)
    header = opened.fp.read(5)
    opened.fp.seek(end)
    return "progressive" in opened.info or header != whole_scan


def _image_error(name: str, error: Exception) -> ImageError:
    if isinstance(error, ImageError):
        reason = str(error)
    elif isinstance(error, PIL.UnidentifiedImageError):
        reason = f"cannot be read as an image: its format is unknown or not one of {', '.join(readable_formats())}"
    elif isinstance(error, PIL.Image.DecompressionBombError):
        limit = 2 * (PIL.Image.MAX_IMAGE_PIXELS or 0)
        pixels = re.search(r"\d+", str(error))
        reason = (
            f"has {pixels[0] if pixels else 'too many'} pixels, more than the limit of {limit}, and cannot be decoded at a "
            "reduced size: resize the file or, if you trust it, raise PIL.Image.MAX_IMAGE_PIXELS"
        )
    else:
        reason = f"cannot be read as an image: {error or type(error).__name__}"
    return ImageError(f"{name}: {reason}")


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert an opened image to 8-bit RGB without applying its orientation, see `decode_image`.

    Args:
        image: Image from `PIL.Image.open`.

    Returns:
        The converted image.

    Raises:
        ImageError: The image has float pixels, whose range is unknown.
    """
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode == "F":
        raise ImageError("has float pixels, whose range is unknown: save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # Pillow would clip 16-bit values at 255
        values = np.asarray(image)
        image = PIL.Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8))
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # Pillow warns if a palette with transparency is converted directly to RGB
    return image.convert("RGB")
