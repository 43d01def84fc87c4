"""Find and read the images of an ImageFolder."""

from __future__ import annotations

import logging
import os
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

_NUM_SHOWN = 10  # extensions of ignored files
_LOOPS = "link to a folder above"
_OUTSIDE = "image outside of class folders"
_NAMELESS = "file without extension"
_NOUNS = (_LOOPS, _OUTSIDE, _NAMELESS)  # other keys are extensions


class ImageFile(NamedTuple):
    """One image of a folder."""

    path: str  # relative to the folder, with forward slashes
    label: int  # index of its class


def scan_image_folder(root: str | os.PathLike[str]) -> tuple[tuple[str, ...], list[ImageFile]]:
    """Return the classes and the images of `<root>/<class>/**/<image>`, both sorted, as torchvision's ImageFolder does.

    Images are recognized by their extension, see `formats.IMAGE_EXTENSIONS`. Hidden files and folders and those of file
    managers are ignored silently, see `clutter`. One warning says how many other files are ignored, by extension. Symbolic links
    to folders are followed, except to a folder above, which would lead in circles.

    Raises:
        FileNotFoundError: There is no such folder, it has no class folders, or some of them contain no image.
        OSError: A folder cannot be read.
    """
    base = Path(root)
    if not base.is_dir():
        raise FileNotFoundError(f"no image folder at {base}")
    above = _with_parents(os.path.realpath(base))
    with os.scandir(base) as scanned:
        entries = [entry for entry in scanned if not is_clutter_name(entry.name)]
    folders = {entry.name: os.path.realpath(entry) for entry in entries if entry.is_dir()}
    classes = tuple(sorted(name for name, real in folders.items() if real not in above))
    outside = sum(_is_image(entry.name) for entry in entries if not entry.is_dir())
    if not classes:
        found = f", but {counted(outside, 'image')} outside of them" if outside else ""
        raise FileNotFoundError(f"{base} has no class folders{found}: expected {base.name}/<class>/<image>")
    ignored = Counter({_OUTSIDE: outside, _LOOPS: len(folders) - len(classes)})
    ignored = +ignored  # without zeros
    files = [
        ImageFile(path, label)
        for label, name in enumerate(classes)
        for path in sorted(_images_below(base, name, above, ignored))
    ]
    empty = sorted(set(classes) - {classes[file.label] for file in files})
    if empty:
        raise FileNotFoundError(
            f"{base}: no images in {counted(len(empty), 'class folder')}, such as {empty[:5]}{_listed(ignored, '; ignored: ')}. "
            f"Images end in {', '.join(IMAGE_EXTENSIONS)}; remove folders that are not classes"
        )
    if ignored:
        logger.warning("%s: %s ignored: %s", base, counted(ignored.total(), "file"), _listed(ignored))
    return classes, files


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS)


def _with_parents(real: str) -> frozenset[str]:
    return frozenset(map(str, (Path(real), *Path(real).parents)))


def _images_below(base: Path, folder: str, above: frozenset[str], ignored: Counter[str]) -> Iterable[str]:
    """Yield the images of a class folder; count the other files by their extension.

    Args:
        base: The ImageFolder.
        folder: Name of the class folder.
        above: Real paths of the ImageFolder and all folders above it.
        ignored: Numbers of ignored files, to be increased.
    """
    top = str(base / folder)
    chains = {top: above | {os.path.realpath(top)}}  # real paths of each folder and all that lead to it
    for directory, folders, names in os.walk(top, followlinks=True, onerror=_raise):
        chain = chains.pop(directory)
        folders[:] = [name for name in folders if not is_clutter_name(name)]
        for name in list(folders):
            path = os.path.join(directory, name)  # noqa: PTH118  a string, as os.walk makes it
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
    raise error  # os.walk would go on without the folder


def _listed(ignored: Counter[str], prefix: str = "") -> str:
    """Return numbers of ignored files by extension, most first; an empty text if there are none."""
    shown = [_counted_kind(count, kind) for kind, count in ignored.most_common(_NUM_SHOWN)]
    more = ignored.total() - sum(count for _, count in ignored.most_common(_NUM_SHOWN))
    return prefix + ", ".join(shown + [f"{more} more"] * (more > 0)) if ignored else ""


def _counted_kind(count: int, kind: str) -> str:
    if kind not in _NOUNS:
        return f"{count} {kind}"
    noun, rest = kind.split(" ", 1)
    return f"{counted(count, noun)} {rest}"


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
