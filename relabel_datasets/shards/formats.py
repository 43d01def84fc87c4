"""Image formats: which files are images, and the names of images in shards."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

# Raster formats of Pillow, except those that start another program (EPS), whose pixels have no known range (FITS, HDF5, GRIB,
# BUFR), and documents and videos. JPEG and PNG come first: Pillow tries the formats in this order. JPEG includes MPO.
FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "DIB", "DDS", "ICO", "PCX", "PSD", "QOI",
    "SGI", "SUN", "TGA",
)  # fmt: skip
IMAGE_EXTENSIONS = (
    ".apng", ".avif", ".bmp", ".dds", ".dib", ".gif", ".ico", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf",
    ".jpg", ".jpx", ".mpo", ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".qoi", ".ras", ".sgi", ".tga", ".tif",
    ".tiff", ".webp",
)  # fmt: skip
FIELDS = ("jpg", "png", "webp")  # names of images in shards; timm reads no others, `datasets` and webdataset read these
HEAD_BYTES = 12  # first bytes of a file that identify these formats

_CHUNK = 1024  # number of heads that are requested at once


@cache
def readable_formats() -> tuple[str, ...]:
    """Return the `FORMATS` that the installed Pillow reads. Some builds lack AVIF or JPEG 2000."""
    import PIL.Image  # not needed for checking hashes

    PIL.Image.init()
    return tuple(name for name in FORMATS if name in PIL.Image.OPEN)


def field_of(head: bytes) -> str | None:
    """Detect the format of an image, which is its field in shards.

    Args:
        head: First bytes of the file, at least `HEAD_BYTES`.

    Returns:
        `"jpg"`, `"png"` or `"webp"`; None for other formats and for bytes that are not an image.
    """
    if head.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if head[:4] == b"RIFF" and head[8:12] == b"WEBP" else None


def common_field(count: int, read_head: Callable[[int], bytes | None]) -> str:
    """Choose the field of the images of a split in its shards.

    All images of a split have the same field, since readers treat members with different extensions as different fields.
    Readers detect the format from the content, so an image of any format may be stored as `jpg`.

    Args:
        count: Number of images.
        read_head: Function that returns the first `HEAD_BYTES` bytes of image `i`, or None if it is missing. It is called from
            several threads.

    Returns:
        `"png"` or `"webp"` if all images have this format, else `"jpg"`.
    """
    field: str | None = None
    for head in _heads(count, read_head):
        if head is None:
            continue
        image_field = field_of(head)
        if image_field is None or image_field == "jpg" or field not in (None, image_field):
            return "jpg"
        field = image_field
    return field or "jpg"


def _heads(count: int, read_head: Callable[[int], bytes | None]) -> Iterator[bytes | None]:
    if count:
        yield read_head(0)  # most datasets are JPEG: the first image decides
    with ThreadPoolExecutor(8, thread_name_prefix="head") as pool:
        for start in range(1, count, _CHUNK):
            yield from pool.map(read_head, range(start, min(count, start + _CHUNK)))


def check_refuses_truncated(work: str) -> None:
    """Raise an error if Pillow is set to decode truncated images, whose lower part is then gray.

    Args:
        work: Name of the operation, for the error message.

    Raises:
        ValueError: `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` is set.
    """
    image_file = sys.modules.get("PIL.ImageFile")  # if nothing has imported it, nothing has set it
    if image_file is not None and image_file.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            f"PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, so truncated images would count as complete: set it to False before "
            f"{work}; truncated images are then reported by name"
        )
