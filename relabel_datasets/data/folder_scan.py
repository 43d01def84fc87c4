"""Find and read the images of an ImageFolder."""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple, NoReturn

from ..errors import DatasetError, ImageError
from ..shards.formats import IMAGE_EXTENSIONS
from ..storage.regular_files import open_regular
from ..words import counted
from .clutter import is_clutter_name

logger = logging.getLogger(__name__)

_NUM_SHOWN = 10  # largest number of extensions of ignored files in a message
_LOOPS = "link to a parent folder"
_OUTSIDE = "image outside of class folders"
_NAMELESS = "file without extension"
_FOREIGN = (
    ".heic",
    ".heif",
    ".hif",
    ".dng",
    ".cr2",
    ".cr3",
    ".nef",
    ".arw",
    ".raf",
    ".jxl",
)  # photos that Pillow cannot read
_NOUNS = (_LOOPS, _OUTSIDE, _NAMELESS)  # other keys are extensions


class ImageFile(NamedTuple):
    """Image file in a folder."""

    path: str  # relative to the folder, with forward slashes
    label: int  # index of its class


def scan_image_folder(path: str | os.PathLike[str]) -> tuple[tuple[str, ...], list[ImageFile]]:
    """List the classes and images of `<path>/<class>/**/<image>` in the order of torchvision's ImageFolder.

    Images are recognized by their extension, see `formats.IMAGE_EXTENSIONS`. Hidden files and folders and those of file
    managers are ignored silently, see `clutter`. One warning counts the other ignored files by extension. Symbolic links to
    folders are followed, except to a parent folder, which would never end.

    Args:
        path: Folder with one folder per class.

    Returns:
        The class names and the images, both sorted.

    Raises:
        FileNotFoundError: There is no such folder, it has no class folders, or some of them contain no image.
        OSError: A folder cannot be read.
        DatasetError: (a ValueError) Python reads names of files in an encoding other than UTF-8, see `check_file_names`.
    """
    base = Path(path)
    if not base.is_dir():
        raise FileNotFoundError(f"no image folder at {base}")
    parents = _with_parents(os.path.realpath(base))
    with os.scandir(base) as scanned:
        entries = [entry for entry in scanned if not is_clutter_name(entry.name)]
    folders = {entry.name: os.path.realpath(entry) for entry in entries if entry.is_dir()}
    classes = tuple(sorted(name for name, real in folders.items() if real not in parents))
    outside = sum(_is_image(entry.name) for entry in entries if not entry.is_dir())
    if not classes:
        hint = f", but {counted(outside, 'image')} outside of them" if outside else ""
        raise FileNotFoundError(f"{base} has no class folders{hint}: expected {base.name}/<class>/<image>")
    ignored = Counter({_OUTSIDE: outside, _LOOPS: len(folders) - len(classes)})
    ignored = +ignored  # drops zeros
    files = [
        ImageFile(image, label)
        for label, name in enumerate(classes)
        for image in sorted(_images_below(base, name, parents, ignored))
    ]
    check_file_names(base, [file.path for file in files])
    empty = sorted(set(classes) - {classes[file.label] for file in files})
    if empty:
        raise FileNotFoundError(
            f"{base}: no images in {counted(len(empty), 'class folder')}, such as {empty[:5]}{_listed(ignored, '; ignored: ')}.{_advice(ignored)} "
            f"Images end in {', '.join(IMAGE_EXTENSIONS)}; remove folders that are not classes"
        )
    if ignored:
        logger.warning(
            "%s: %s ignored: %s.%s", base, counted(ignored.total(), "file"), _listed(ignored), _advice(ignored)
        )
    return classes, files


def check_file_names(base: Path, names: Iterable[str]) -> None:
    """Check that keys made from the names of files are those of every other machine.

    Args:
        base: Folder of the files.
        names: Names of the files.

    Raises:
        DatasetError: (a ValueError) A name is not ASCII, and the locale's encoding of file names is not UTF-8.
    """
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8" and not all(map(str.isascii, names)):
        raise DatasetError(
            f"{base} has file names that are not ASCII, and the encoding of file names is {encoding} in this locale, so their keys "
            "would differ from those of other machines: set the environment variable PYTHONUTF8 to 1"
        )


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS)


def _with_parents(real: str) -> frozenset[str]:
    return frozenset(map(str, (Path(real), *Path(real).parents)))


def _images_below(base: Path, folder: str, parents: frozenset[str], ignored: Counter[str]) -> Iterable[str]:
    """Yield the images of a class folder and count the other files by extension.

    Args:
        base: Root of the ImageFolder.
        folder: Name of the class folder.
        parents: Real paths of the ImageFolder and of all its parent folders.
        ignored: Counts of ignored files by extension, which this function increases.
    """
    top = str(base / folder)
    chains = {top: parents | {os.path.realpath(top)}}  # real paths of each folder and of the folders on the way to it
    for directory, folders, names in os.walk(top, followlinks=True, onerror=_raise):
        chain = chains.pop(directory)
        folders[:] = [name for name in folders if not is_clutter_name(name)]
        for name in list(folders):
            path = os.path.join(directory, name)  # noqa: PTH118  os.walk yields strings
            real = os.path.realpath(path)
            if real in chain:
                folders.remove(name)
                ignored[_LOOPS] += 1
            else:
                chains[path] = chain | {real}
        relative = PurePosixPath(folder, *Path(directory).relative_to(top).parts)
        for name in names:
            if is_clutter_name(name):
                continue
            if _is_image(name):
                yield str(relative / name)
            else:
                ignored[PurePosixPath(name).suffix.lower() or _NAMELESS] += 1


def _raise(error: OSError) -> NoReturn:
    raise error  # by default, os.walk skips a folder that it cannot read


def _listed(ignored: Counter[str], prefix: str = "") -> str:
    """Return the counts of ignored files by extension, the largest first, or an empty text if there are none."""
    shown = [_counted_kind(count, kind) for kind, count in ignored.most_common(_NUM_SHOWN)]
    more = ignored.total() - sum(count for _, count in ignored.most_common(_NUM_SHOWN))
    return prefix + ", ".join(shown + [f"{more} more"] * (more > 0)) if ignored else ""


def _advice(ignored: Counter[str]) -> str:
    """Return what to do with ignored photos, or an empty text if there are none."""
    photos = [extension for extension in _FOREIGN if extension in ignored]
    return f" Convert {', '.join(photos)} photos to JPEG to use them." if photos else ""


def _counted_kind(count: int, kind: str) -> str:
    if kind not in _NOUNS:
        return f"{count} {kind}"
    noun, rest = kind.split(" ", 1)
    return f"{counted(count, noun)} {rest}"


def read_image_file(path: Path) -> bytes:
    """Return the bytes of an image file. Thread-safe.

    Raises:
        OSError: The file cannot be read.
        ImageError: The path is a folder, a device, a FIFO or a socket.
    """
    try:
        with open_regular(path) as file:
            return file.read()
    except DatasetError as error:
        raise ImageError(str(error)) from None
