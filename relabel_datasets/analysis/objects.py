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
from ..data.spellings import is_running_number, match_spellings, show_key
from ..errors import DatasetError
from ..shards.formats import IMAGE_EXTENSIONS

logger = logging.getLogger(__name__)

_SLACK = 1.0  # pixels by which boxes of PASCAL VOC, ImageNet and COCO leave their images here and there
_NUM_SHOWN = 5  # names in a message
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


@dataclass(frozen=True)
class Objects:
    """The objects of one image.

    Attributes:
        size: (height, width) of the image in pixels, as the file of boxes states it.
        boxes_xyxy: `[N, 4]` float64, in units of the whole image, 0..1.
        names: N class names, or none where the classes are not known.
        image_id: The image's id in a COCO file.
    """

    size: tuple[int, int]
    boxes_xyxy: npt.NDArray[np.float64]
    names: tuple[str, ...] = ()
    image_id: str | None = None

    def of_class(self, name: str) -> npt.NDArray[np.float64]:
        """Return the boxes of a class; all boxes where classes are not known or no object is of this one."""
        chosen = self.boxes_xyxy[[each == name for each in self.names]] if self.names else self.boxes_xyxy
        return chosen if len(chosen) else self.boxes_xyxy


def short(value: object) -> str:
    """Return the repr of a value from a file, cut to 60 characters: an error message must not print the whole file."""
    return _SHORT.repr(value)


def image_name(image: str) -> str:
    """Return the name of an image file without folder and extension; what follows a dot may also be part of the name."""
    name = PurePath(image).name
    stem, _, extension = name.rpartition(".")
    return stem if f".{extension.lower()}" in IMAGE_EXTENSIONS else name


def key_name(key: str) -> str:
    """Return the name of a sample's image without folder and extension: keys may be paths, and have no dots."""
    return key.rpartition("/")[2].replace("%2E", ".").replace("%25", "%")


def to_unit(corners: Sequence[float], size: tuple[int, int], where: str) -> npt.NDArray[np.float64]:
    """Return a box in units of the whole image, clipped to the image.

    Args:
        corners: x1, y1, x2, y2 in pixels, counted from the image's edge.
        size: (height, width) of the image in pixels.
        where: File and line or object, for the error.

    Raises:
        DatasetError: The size is not positive, or the box is empty or leaves the image by more than a pixel.
    """
    height, width = size
    if height < 1 or width < 1:
        raise DatasetError(f"{where}: an image of height {height} and width {width}: expected its size in pixels")
    x1, y1, x2, y2 = corners
    inside = min(x1, y1) >= -_SLACK and x2 <= width + _SLACK and y2 <= height + _SLACK
    if not (inside and x1 < x2 and y1 < y2):
        raise DatasetError(
            f"{where}: the box {tuple(corners)} is empty or leaves the image of height {height} and width {width}: are these "
            "pixels (x1, y1, x2, y2) of the same image?"
        )
    box = np.array(corners, float) / (width, height, width, height)
    return np.clip(box, 0, 1)


def find_objects(keys: Iterable[str], objects: Mapping[str, Objects]) -> dict[str, Objects]:
    """Return the objects of each image that has any, by key.

    Keys are matched with the names of the image files, without folder and extension. If none matches, they are matched with
    the ids of a COCO file, as they are (`139`) or as COCO names its files (`000000000139`). If none matches these either, other
    spellings of the names are compared, see `data.spellings`.

    Args:
        keys: Keys of samples.
        objects: By image name, see `read_boxes`.

    Raises:
        ValueError: No image has objects, or two images with objects have the same name.
    """
    keys = list(keys)
    by_id = {name: each for each in objects.values() for name in _id_names(each.image_id)}
    for table in (objects, by_id):
        owners: dict[str, str] = {}
        for key in keys:
            name = key_name(key)
            if name in table and owners.setdefault(name, key) != key:
                raise ValueError(
                    f"samples {owners[name]!r} and {key!r} are of images of the same name: boxes are found by it, so rename "
                    "the images"
                )
        if owners:
            return {key: table[name] for name, key in owners.items()}
    if spelled := _find_spelled(keys, objects):
        return spelled
    some = next(iter(objects), None)
    some_id = None if some is None else objects[some].image_id
    raise ValueError(
        f"none of the {len(keys)} images, such as {next(iter(keys), None)!r}, has boxes among the {len(objects)} that have, "
        f"such as {some!r}{'' if some_id is None else f' with the id {some_id}'}"
    )


def _find_spelled(keys: Sequence[str], objects: Mapping[str, Objects]) -> dict[str, Objects]:
    """Return the objects of images whose names are spelled otherwise in the file of boxes, if that is unambiguous."""
    names = list(objects)
    if not keys or not names or any(map(is_running_number, keys)):
        return {}
    match = match_spellings(names, keys)
    if match is None or match.rows is None:
        return {}
    found = {keys[place]: objects[names[match.rows[place]]] for place in np.flatnonzero(match.rows >= 0).tolist()}
    key, each = next(iter(found.items()))
    name = next(name for name, other in objects.items() if other is each)
    logger.warning(
        "no image has the name of one with boxes, so boxes are found by %s, such as %s of %s",
        match.spelling.what, show_key(name), show_key(key),
    )  # fmt: skip
    return found


def _id_names(image_id: str | None) -> tuple[str, ...]:
    # Not padded to any other width: a dataset without file names has running numbers of 8 digits as keys.
    return () if image_id is None else (image_id, image_id.zfill(12))


def match_object_classes(objects: Iterable[Objects], classes: Sequence[str], consequence: str) -> dict[str, int]:
    """Return the index of each object class that is one of `classes`; log which are not.

    Names are compared as in `match_classes`: as they are, then regardless of case, `_`, `-` and spaces, then by the words of
    ImageNet's synsets. A name that fits several classes matches none.

    Args:
        objects: Of any number of images.
        classes: Names or synsets by index.
        consequence: What happens to objects of other classes, for the log message.
    """
    names = sorted({name for each in objects for name in each.names})
    first = {name: index for index, name in reversed(list(enumerate(classes)))}
    found = {name: first[name] for name in names if name in first}
    left = [name for name in names if name not in found]
    candidates = candidate_rows(classes, left) if left else {}
    found |= {name: rows[0] for name, rows in candidates.items() if len(rows) == 1}
    if unmatched := [name for name in names if name not in found]:
        shown = ", ".join(_explained(name, candidates[name], classes) for name in unmatched[:_NUM_SHOWN])
        more = f" and {len(unmatched) - _NUM_SHOWN} more" if len(unmatched) > _NUM_SHOWN else ""
        logger.warning(
            "%d of %d object classes match none of the %d classes, such as %s: %s%s; %s",
            len(unmatched), len(names), len(classes), short(classes[0]) if classes else None, shown, more, consequence,
        )  # fmt: skip
    return found


def _explained(name: str, rows: Sequence[int], classes: Sequence[str]) -> str:
    several = " or ".join(short(classes[row]) for row in rows[:2])
    return short(name) + (f" (may be {several})" if rows else "")


def in_classes(objects: Mapping[str, Objects], classes: Sequence[str]) -> dict[str, Objects]:
    """Return the objects with the dataset's names for their classes, where they match, see `match_object_classes`."""
    found = match_object_classes(
        objects.values(), classes, "their boxes count only where an image has no box of its own class"
    )
    return {
        key: replace(each, names=tuple(classes[found[name]] if name in found else name for name in each.names))
        for key, each in objects.items()
    }
