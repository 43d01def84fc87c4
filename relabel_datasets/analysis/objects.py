"""Objects of images: their boxes in units of the whole image, matched to samples by key and to classes by name."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath

import numpy as np
import numpy.typing as npt

from ..annotate.classes import candidate_rows
from ..data.spellings import is_row_number, match_spellings, show_key
from ..errors import DatasetError
from ..shards.formats import IMAGE_EXTENSIONS
from ..words import counted

logger = logging.getLogger(__name__)

_SLACK = 1.0  # some boxes of PASCAL VOC, ImageNet and COCO leave their image by up to a pixel
_NUM_SHOWN = 5  # names in a message
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


@dataclass(frozen=True)
class Objects:
    """The objects of one image.

    Attributes:
        size: Image size (height, width) in pixels, from the file of boxes.
        boxes_xyxy: Boxes `[N, 4]`, float64, in units of the whole image, 0..1.
        names: Class names of the N objects; empty if the classes are unknown.
        image_id: Id of the image in a COCO file; None for other formats.
    """

    size: tuple[int, int]
    boxes_xyxy: npt.NDArray[np.float64]
    names: tuple[str, ...] = ()
    image_id: str | None = None

    def of_class(self, name: str) -> npt.NDArray[np.float64]:
        """Return the boxes of a class, or all boxes if classes are unknown or no object has this class.

        Args:
            name: Class name.

        Returns:
            Boxes `[n, 4]` in units of the whole image.
        """
        chosen = self.boxes_xyxy[[own == name for own in self.names]] if self.names else self.boxes_xyxy
        return chosen if len(chosen) else self.boxes_xyxy


def short(value: object) -> str:
    """Return the repr of a value from a file, cut to 60 characters, so that an error message does not print the whole file."""
    return _SHORT.repr(value)


def image_name(image: str) -> str:
    """Return the name of an image file without folder and extension. Only known image extensions are removed."""
    name = PurePath(image).name
    stem, _, extension = name.rpartition(".")
    return stem if f".{extension.lower()}" in IMAGE_EXTENSIONS else name


def key_name(key: str) -> str:
    """Return the name of a sample's image without folder and extension. Keys may be paths; their dots are escaped."""
    return key.rpartition("/")[2].replace("%2E", ".").replace("%25", "%")


def to_unit(corners: Sequence[float], size: tuple[int, int], where: str) -> npt.NDArray[np.float64]:
    """Convert a box from pixels to units of the whole image, and clip it to the image.

    Args:
        corners: Corners x1, y1, x2, y2 in pixels from the image's edge.
        size: Image size (height, width) in pixels.
        where: File and line or object, for the error message.

    Returns:
        The box `[4]` in 0..1.

    Raises:
        DatasetError: The size is not positive, or the box is empty or leaves the image by more than a pixel.
    """
    height, width = size
    if height < 1 or width < 1:
        raise DatasetError(
            f"{where}: image size (height {height}, width {width}) is not positive: expected the size in pixels"
        )
    x1, y1, x2, y2 = corners
    inside = min(x1, y1) >= -_SLACK and x2 <= width + _SLACK and y2 <= height + _SLACK
    if not (inside and x1 < x2 and y1 < y2):
        raise DatasetError(
            f"{where}: the box {tuple(corners)} is empty or leaves the image of height {height} and width {width}: expected "
            "corners (x1, y1, x2, y2) in pixels of this image"
        )
    box = np.array(corners, float) / (width, height, width, height)
    return np.clip(box, 0, 1)


def find_objects(keys: Iterable[str], objects: Mapping[str, Objects]) -> dict[str, Objects]:
    """Match samples with the objects of their images.

    Keys are compared with the names of the image files, without folder and extension. If none matches, they are compared with
    the ids of a COCO file, as numbers (`139`) and as COCO names its files (`000000000139`). If no id matches either, other
    spellings of the names are compared, see `data.spellings`.

    Args:
        keys: Keys of samples.
        objects: Objects by image name, see `read_boxes`.

    Returns:
        The objects of each image that has any, by key.

    Raises:
        ValueError: No image has objects, or two images with objects have the same name.
    """
    keys = list(keys)
    by_id = {name: image_objects for image_objects in objects.values() for name in _id_names(image_objects.image_id)}
    for table in (objects, by_id):
        owners: dict[str, str] = {}
        for key in keys:
            name = key_name(key)
            if name in table and owners.setdefault(name, key) != key:
                raise ValueError(
                    f"samples {owners[name]!r} and {key!r} have images of the same name {name!r}: boxes are matched by image "
                    "name, so rename one image and its boxes"
                )
        if owners:
            return {key: table[name] for name, key in owners.items()}
    if spelled := _find_spelled(keys, objects):
        return spelled
    example = next(iter(objects), None)
    example_id = None if example is None else objects[example].image_id
    raise ValueError(
        f"none of the {counted(len(keys), 'image')} of the dataset, such as {next(iter(keys), None)!r}, matches any of the "
        f"{counted(len(objects), 'image')} with boxes, such as "
        f"{example!r}{'' if example_id is None else f' with the id {example_id}'}: expected the same file names"
    )


def _find_spelled(keys: Sequence[str], objects: Mapping[str, Objects]) -> dict[str, Objects]:
    """Return the objects of images whose names are spelled differently in the file of boxes, if the match is unambiguous."""
    names = list(objects)
    if not keys or not names or any(map(is_row_number, keys)):
        return {}
    match = match_spellings(names, keys)
    if match is None or match.rows is None:
        return {}
    matched = {keys[i]: objects[names[match.rows[i]]] for i in np.flatnonzero(match.rows >= 0).tolist()}
    key, image_objects = next(iter(matched.items()))
    name = next(name for name, other in objects.items() if other is image_objects)
    logger.warning(
        "no sample has exactly the name of an image with boxes: samples are matched by %s, such as %s with %s",
        match.spelling.what, show_key(key), show_key(name),
    )  # fmt: skip
    return matched


def _id_names(image_id: str | None) -> tuple[str, ...]:
    # No other padding: keys of a dataset without file names are consecutive numbers of 8 digits.
    return () if image_id is None else (image_id, image_id.zfill(12))


def match_object_classes(objects: Iterable[Objects], classes: Sequence[str], consequence: str) -> dict[str, int]:
    """Match object classes with the classes of the dataset, and log a warning that lists those that match none.

    Names are compared as in `match_classes`: exactly, then regardless of case, `_`, `-` and spaces, then by the words of
    ImageNet's synsets. A name that fits several classes matches none.

    Args:
        objects: Objects of any number of images.
        classes: Names or synsets of the dataset's classes, by index.
        consequence: Consequence for objects of other classes, for the warning.

    Returns:
        The class index of each object class that matches.
    """
    names = sorted({name for image_objects in objects for name in image_objects.names})
    first_index = {name: index for index, name in reversed(list(enumerate(classes)))}
    indices = {name: first_index[name] for name in names if name in first_index}
    remaining = [name for name in names if name not in indices]
    candidates = candidate_rows(classes, remaining) if remaining else {}
    indices |= {name: rows[0] for name, rows in candidates.items() if len(rows) == 1}
    if unmatched := [name for name in names if name not in indices]:
        shown = ", ".join(_name_with_candidates(name, candidates[name], classes) for name in unmatched[:_NUM_SHOWN])
        more = f" and {len(unmatched) - _NUM_SHOWN} more" if len(unmatched) > _NUM_SHOWN else ""
        logger.warning(
            "%d of %d object classes match none of the %d classes, such as %s: %s%s; %s",
            len(unmatched), len(names), len(classes), short(classes[0]) if classes else None, shown, more, consequence,
        )  # fmt: skip
    return indices


def _name_with_candidates(name: str, rows: Sequence[int], classes: Sequence[str]) -> str:
    candidates = " or ".join(short(classes[row]) for row in rows[:2])
    return short(name) + (f" (may be {candidates})" if rows else "")


def in_classes(objects: Mapping[str, Objects], classes: Sequence[str]) -> dict[str, Objects]:
    """Rename the classes of objects to those of the dataset where they match, see `match_object_classes`.

    Args:
        objects: Objects by image name or key.
        classes: Names or synsets of the dataset's classes, by index.

    Returns:
        The same objects; names that match no class are unchanged.
    """
    indices = match_object_classes(
        objects.values(), classes, "their boxes count only for images that have no box of their own class"
    )
    renamed = {name: classes[index] for name, index in indices.items()}
    return {
        key: replace(image_objects, names=tuple(renamed.get(name, name) for name in image_objects.names))
        for key, image_objects in objects.items()
    }
