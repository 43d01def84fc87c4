"""Find and read the images of an ImageFolder."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..errors import DatasetError, ImageError
from ..shards.formats import IMAGE_EXTENSIONS
from ..storage.regular_files import open_regular

logger = logging.getLogger(__name__)

_NUM_SHOWN = 10  # extensions of ignored files


class ImageFile(NamedTuple):
    """One image of a folder."""

    path: str  # relative to the folder, with forward slashes
    label: int  # index of its class


def scan_image_folder(root: str | os.PathLike[str]) -> tuple[tuple[str, ...], list[ImageFile]]:
    """Return the classes and the images of `<root>/<class>/**/<image>`, both sorted, as torchvision's ImageFolder does.

    Images are recognized by their extension, see `formats.IMAGE_EXTENSIONS`. Hidden files and folders, whose name starts with
    a dot, are skipped silently. One warning says how many other files are ignored, by extension.

    Raises:
        FileNotFoundError: There is no such folder, it has no class folders, or some of them contain no image.
    """
    base = Path(root)
    if not base.is_dir():
        raise FileNotFoundError(f"no image folder at {base}")
    entries = [entry for entry in os.scandir(base) if not entry.name.startswith(".")]
    classes = tuple(sorted(entry.name for entry in entries if entry.is_dir()))
    outside = sum(_is_image(entry.name) for entry in entries if not entry.is_dir())
    if not classes:
        found = f", but {outside} images outside of class folders" if outside else ""
        raise FileNotFoundError(f"{base} has no class folders{found}: expected {base.name}/<class>/<image>")
    ignored = Counter({"images outside of class folders": outside} if outside else {})
    files = [
        ImageFile(path, label)
        for label, name in enumerate(classes)
        for path in sorted(_images_below(base, name, ignored))
    ]
    empty = sorted(set(classes) - {classes[file.label] for file in files})
    if empty:
        raise FileNotFoundError(
            f"{base}: no images in {len(empty)} class folders, such as {empty[:5]}{_listed(ignored, '; there are ')}. "
            f"Images end in {', '.join(IMAGE_EXTENSIONS)}; remove folders that are not classes"
        )
    if ignored:
        logger.warning("%s: %d files are ignored: %s", base, ignored.total(), _listed(ignored))
    return classes, files


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS)


def _images_below(base: Path, folder: str, ignored: Counter[str]) -> Iterable[str]:
    """Yield the images of a class folder; count the other files by their extension."""
    for directory, folders, names in os.walk(base / folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = PurePosixPath(folder, *Path(directory).relative_to(base / folder).parts)
        for name in names:
            if name.startswith("."):
                continue
            if _is_image(name):
                yield str(relative / name)
            else:
                ignored[PurePosixPath(name).suffix.lower() or "files without extension"] += 1


def _listed(ignored: Counter[str], prefix: str = "") -> str:
    """Return numbers of ignored files by extension, most first; an empty text if there are none."""
    shown = [f"{count} {kind}" for kind, count in ignored.most_common(_NUM_SHOWN)]
    more = ignored.total() - sum(count for _, count in ignored.most_common(_NUM_SHOWN))
    return prefix + ", ".join(shown + [f"{more} others"] * (more > 0)) if ignored else ""


def read_image_file(path: Path) -> bytes:
    """Return the bytes of an image file.

    Raises:
        OSError: The file cannot be read.
        ImageError: The path is a folder, a device, a FIFO or a socket.
    """
    try:
        with open_regular(path) as file:
            return file.read()
    except DatasetError as error:
        raise ImageError(str(error)) from None
