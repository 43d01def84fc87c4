"""Image formats: which files are images, and the name that an image has in shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import PIL.Image

# Raster formats of Pillow. Left out are those that start another program (EPS), contain no pixels of known range (FITS,
# HDF5, GRIB, BUFR) or are documents and films. JPEG and PNG first: Pillow tries them in this order. JPEG includes MPO.
FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "DIB", "DDS", "ICO", "PCX", "PSD", "QOI",
    "SGI", "SUN", "TGA",
)  # fmt: skip
IMAGE_EXTENSIONS = (
    ".apng", ".avif", ".bmp", ".dds", ".dib", ".gif", ".ico", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf",
    ".jpg", ".jpx", ".mpo", ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".qoi", ".ras", ".sgi", ".tga", ".tif",
    ".tiff", ".webp",
)  # fmt: skip
FIELDS = (
    "jpg",
    "png",
    "webp",
)  # names of images in shards: timm reads no others, `datasets` and webdataset read these too
HEAD_BYTES = 12  # of a file, to tell these formats apart

_CHUNK = 1024  # heads that are requested at a time


@cache
def readable_formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that the installed Pillow reads; some builds of it lack AVIF or JPEG 2000."""
    PIL.Image.init()
    return tuple(name for name in FORMATS if name in PIL.Image.OPEN)


def field_of(head: bytes) -> str | None:
    """Return the field that images of a format have in shards, by the first `HEAD_BYTES` of a file.

    Returns:
        `"jpg"`, `"png"` or `"webp"`. None for other formats, and bytes that are not an image.
    """
    if head.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if head[:4] == b"RIFF" and head[8:12] == b"WEBP" else None


def common_field(count: int, read_head: Callable[[int], bytes | None]) -> str:
    """Return the field that the images of a split have in its shards.

    `"png"` or `"webp"` if all are of this format, else `"jpg"`. All images of a split have one field, since readers treat
    members with different extensions as different fields. They decode by content, so an image of any format may be in `jpg`.

    Args:
        count: Number of images.
        read_head: Returns the first `HEAD_BYTES` of an image; None if it is missing. Called from several threads.
    """
    field: str | None = None
    for head in _heads(count, read_head):
        if head is None:
            continue
        of_image = field_of(head)
        if of_image is None or of_image == "jpg" or field not in (None, of_image):
            return "jpg"
        field = of_image
    return field or "jpg"


def _heads(count: int, read_head: Callable[[int], bytes | None]) -> Iterator[bytes | None]:
    if count:
        yield read_head(0)  # most datasets are JPEG: the first image decides
    with ThreadPoolExecutor(8, thread_name_prefix="head") as pool:
        for start in range(1, count, _CHUNK):
            yield from pool.map(read_head, range(start, min(count, start + _CHUNK)))
