"""Image files: which there are in a folder, what their keys are, and how their bytes become RGB pixels.

The builder and the datasets read images with the same `decode_image`, so that a label map fits its image.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps

IMAGE_EXTENSIONS = (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
KEY_RULES = ("stem", "path")
_ORIENTATION = 0x0112  # EXIF tag


class ImageError(ValueError):
    """Bytes that cannot be read as an image."""


def decode_image(data: bytes, name: str = "image") -> PIL.Image.Image:
    """Return the RGB image in `data`, upright, whatever its file is called.

    The format is told by the bytes. EXIF rotation is applied; grey, palette, CMYK and 16-bit images become 8-bit RGB
    (16 bits by their upper 8), alpha is dropped, and of an animation the first frame is taken.

    Args:
        data: the bytes of an image file.
        name: what the error calls it.

    Raises:
        ImageError: the bytes are no image, are damaged or truncated, or have pixels without a known range (float).
    """
    return decode_reduced(data, None, name)[0]


def decode_reduced(
    data: bytes, target: tuple[int, int] | None, name: str = "image"
) -> tuple[PIL.Image.Image, tuple[int, int]]:
    """Return the image as `decode_image` does, but maybe smaller, and its true (height, width).

    A large JPEG that will be resized is decoded at 1/2, 1/4 or 1/8 of its size, in a fraction of the time, as long as that
    leaves twice the pixels of the target in each direction: so the result of resizing is nearly the same.

    Args:
        data: the bytes of an image file.
        target: (height, width) that the image will be resized to; None decodes at full size.
        name: what the error calls it.

    Raises:
        ImageError: as `decode_image`.
    """
    try:
        opened = PIL.Image.open(io.BytesIO(data))
        stored_size = opened.size
        if target is not None and opened.format == "JPEG":
            height, width = target if opened.getexif().get(_ORIENTATION, 1) < 5 else target[::-1]  # else on its side
            opened.draft(None, (2 * width, 2 * height))
        is_reduced = opened.size != stored_size
        image = to_rgb(opened)
        orientation = opened.getexif().get(_ORIENTATION, 1)  # not before: a TIFF is turned as it is loaded
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    except Exception as error:  # decoders of damaged files raise nearly anything
        if isinstance(error, PIL.UnidentifiedImageError):
            raise ImageError(f"{name}: cannot be read as an image: its format is unknown") from None
        raise ImageError(f"{name}: cannot be read as an image: {error or type(error).__name__}") from error
    if orientation != 1:
        image.getexif()[_ORIENTATION] = orientation  # conversions may have dropped it
        PIL.ImageOps.exif_transpose(image, in_place=True)
    if is_reduced:
        return image, stored_size[::-1] if orientation < 5 else stored_size
    return image, (image.height, image.width)


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return an opened image as 8-bit RGB, see `decode_image`.

    Raises:
        ImageError: its pixels have no known range.
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
        image = image.convert("RGBA")  # Pillow warns of palettes with transparency that go straight to RGB
    return image.convert("RGB")


class ImageFile(NamedTuple):
    """One image of a folder."""

    path: str  # relative to the folder, with forward slashes
    label: int  # index of its class


def scan_image_folder(root: str | os.PathLike[str]) -> tuple[tuple[str, ...], list[ImageFile]]:
    """Return the classes and the images of `<root>/<class>/**/<image>`, both sorted: torchvision's ImageFolder.

    Files whose extension is not an image's are not images and are left out.

    Raises:
        FileNotFoundError: there is no such folder, it has no class folders, or some of them hold no image.
    """
    base = Path(root)
    if not base.is_dir():
        raise FileNotFoundError(f"no image folder at {base}")
    classes = tuple(sorted(entry.name for entry in os.scandir(base) if entry.is_dir()))
    if not classes:
        raise FileNotFoundError(f"{base} has no class folders: expected {base.name}/<class>/<image>")
    files = [ImageFile(path, label) for label, name in enumerate(classes) for path in sorted(_images_below(base, name))]
    empty = sorted(set(classes) - {classes[file.label] for file in files})
    if empty:
        raise FileNotFoundError(
            f"{base}: no images in {len(empty)} class folders, such as {empty[:5]}. Images end in "
            f"{', '.join(IMAGE_EXTENSIONS)}; remove folders that are not classes"
        )
    return classes, files


def _images_below(base: Path, folder: str) -> Iterable[str]:
    for directory, _, names in os.walk(base / folder, followlinks=True):
        relative = PurePosixPath(folder, *Path(directory).relative_to(base / folder).parts)
        for name in names:
            if name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith("."):
                yield str(relative / name)


def key_of(path: str, rule: str) -> str:
    """Return the sample key of an image path: its stem or, by the rule "path", the whole path without extension.

    A key must not hold a dot, since readers of WebDataset shards cut it there: dots become `%2E`, and `%` `%25`.
    """
    pure = PurePosixPath(path)
    name = pure.stem if rule == "stem" else str(pure.with_suffix(""))
    return name.replace("%", "%25").replace(".", "%2E")


def sample_keys(paths: Sequence[str]) -> tuple[str, list[str]]:
    """Return the key rule of a dataset and its keys: stems where they are unique, else paths.

    Raises:
        ValueError: two paths differ only by their extension.
    """
    for rule in KEY_RULES:
        keys = [key_of(path, rule) for path in paths]
        if len(set(keys)) == len(keys):
            return rule, keys
    repeated = [key for key, count in Counter(keys).items() if count > 1]
    raise ValueError(
        f"{len(repeated)} images have the name of another but for the extension, such as {repeated[0]!r}: rename them"
    )


def common_extension(paths: Sequence[str]) -> str:
    """Return the extension that images get in a shard: their own if all have the same, else `jpg`.

    One for all, since readers take members of different names as different fields; decoders go by the bytes anyway.
    """
    extensions = {PurePosixPath(path).suffix.lower().lstrip(".") for path in paths}
    extension = extensions.pop() if len(extensions) == 1 else "jpg"
    return {"jpeg": "jpg", "jpe": "jpg", "jfif": "jpg", "tif": "tiff", "": "jpg"}.get(extension, extension)
