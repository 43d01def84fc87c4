"""Read boxes of objects from COCO JSON files: `images`, `annotations` and `categories` (https://cocodataset.org/#format-data)."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DatasetError
from ..words import counted
from .objects import Objects, image_name, short, to_unit

logger = logging.getLogger(__name__)

_EXPECTED = "expected COCO annotations: an object with the fields images, annotations and categories"
_NUM_SHOWN = 5  # fields in an error message


def read_coco(path: Path) -> dict[str, Objects]:
    """Read the objects of images from a COCO JSON file.

    Crowds (`iscrowd` 1) are ignored, as in COCO's evaluation. An object without `bbox` gets the box around its polygons.
    COCO has a few boxes without width or height; they are skipped, and a warning states their number. An image without
    `file_name` is named by its `coco_url`, as in LVIS, or by its id.

    Args:
        path: The JSON file.

    Returns:
        The objects of each image that has any, by the image's file name without folder and extension.

    Raises:
        DatasetError: (a ValueError) The file has another format, or has no objects. The message names the file and the entry.
    """
    content = _load(path)
    if isinstance(content, list):
        raise DatasetError(f"{path} is a list, as in COCO results: {_EXPECTED}")
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        fields = [short(name) for name in content][:_NUM_SHOWN] if isinstance(content, dict) else []
        actual = f"the fields {', '.join(fields)}" if fields else f"{type(content).__name__} without fields"
        raise DatasetError(f"{path} is not a COCO file, got {actual}: {_EXPECTED}")
    categories = _categories(content, path)
    images = _images(content, path)
    boxes: dict[str, list[tuple[Any, str]]] = {}
    num_crowds = num_empty = 0
    for number, annotation in enumerate(_entries(content, "annotations", path)):
        where = _where(path, "annotation", annotation, number)
        if annotation.get("iscrowd") in (1, "1"):
            num_crowds += 1
            continue
        image_id = _id(annotation, "image_id", where)
        if image_id not in images:
            raise DatasetError(f"{where}: image_id {short(image_id)} must be the id of one of the {len(images)} images")
        name = _category_name(annotation, categories, where)
        x, y, width, height = _box(annotation, where)
        if 0 in (width, height):
            num_empty += 1
            continue
        _, size = images[image_id]
        boxes.setdefault(image_id, []).append((to_unit((x, y, x + width, y + height), size, where), name))
    if num_empty:
        logger.warning("%s: skipped %s without width or height", path, counted(num_empty, "box", "boxes"))
    if not boxes:
        raise DatasetError(
            f"{path} has no objects: {counted(len(images), 'image')}, {counted(num_crowds, 'crowd')}, "
            f"{counted(num_empty, 'box', 'boxes')} without width or height"
        )
    return _by_name(boxes, images, path, has_names=categories is not None)


def _load(path: Path) -> Any:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return json.load(file, object_hook=_without_outline)
    except RecursionError:
        raise DatasetError(f"{path} cannot be read as JSON: it is nested too deeply") from None
    except ValueError as error:
        raise DatasetError(f"{path} is not a JSON file, or is corrupt: {error}") from None


def _without_outline(entry: dict[str, Any]) -> dict[str, Any]:
    """Drop the outline of an object, which limits memory: outlines are most of a COCO file. Replace a missing box by its bounds."""
    outline = entry.pop("segmentation", None)
    if outline and not entry.get("bbox") and isinstance(outline, list):
        try:
            points = np.concatenate([np.asarray(polygon, float).reshape(-1, 2) for polygon in outline])
        except (ValueError, TypeError):
            return entry
        low, high = points.min(0), points.max(0)
        entry["bbox"] = [*low.tolist(), *(high - low).tolist()]
    return entry


def _entries(content: Mapping[str, Any], field: str, path: Path) -> list[dict[str, Any]]:
    entries = content[field]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DatasetError(f"{path}: {field!r} must be a list of objects: {_EXPECTED}")
    return entries


def _categories(content: Mapping[str, Any], path: Path) -> dict[str, str] | None:
    """Return the names of categories by id, or None if the file has no categories."""
    if not content.get("categories"):
        return None
    names = {}
    for number, entry in enumerate(_entries(content, "categories", path)):
        where = _where(path, "category", entry, number)
        name = entry.get("name")
        if not isinstance(name, str) or not name.strip():
            raise DatasetError(f"{where}: 'name' must be a string, got {short(name)}")
        names[_id(entry, "id", where)] = name.strip()
    return names


def _images(content: Mapping[str, Any], path: Path) -> dict[str, tuple[str, tuple[int, int]]]:
    """Return the names and the sizes of images by id."""
    images: dict[str, tuple[str, tuple[int, int]]] = {}
    for number, entry in enumerate(_entries(content, "images", path)):
        where = _where(path, "image", entry, number)
        image_id = _id(entry, "id", where)
        if image_id in images:
            raise DatasetError(f"{where}: another image has the same id {short(image_id)}")
        name = entry.get("file_name") or entry.get("coco_url") or image_id
        if not isinstance(name, str):
            raise DatasetError(f"{where}: 'file_name' must be a string, got {short(name)}")
        size = _side(entry, "height", where), _side(entry, "width", where)
        images[image_id] = image_name(name.replace("\\", "/")), size
    return images


def _side(entry: Mapping[str, Any], field: str, where: str) -> int:
    value = _number(entry.get(field))
    if value is None or value < 1 or value % 1:
        raise DatasetError(
            f"{where}: {field!r} must be the {field} of the image in pixels, got {short(entry.get(field))}"
        )
    return int(value)


def _box(annotation: Mapping[str, Any], where: str) -> tuple[float, float, float, float]:
    box = annotation.get("bbox")
    if box is None and "segments_info" in annotation:
        raise DatasetError(
            f"{where}: panoptic annotations have no boxes: give the file of instances, such as instances_val2017.json"
        )
    numbers = [_number(value) for value in box] if isinstance(box, list) else []
    if len(numbers) != 4 or None in numbers:
        hint = "" if box else " (or 'segmentation' must have polygons)"
        raise DatasetError(f"{where}: 'bbox' must be [x, y, width, height] in pixels{hint}, got {short(box)}")
    x, y, width, height = (float(number) for number in numbers if number is not None)
    return x, y, width, height


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond the range of float
        return None


def _category_name(annotation: Mapping[str, Any], categories: Mapping[str, str] | None, where: str) -> str:
    if categories is None:
        return ""
    category_id = _id(annotation, "category_id", where)
    if category_id not in categories:
        raise DatasetError(
            f"{where}: category_id {short(category_id)} must be the id of one of the {len(categories)} categories"
        )
    return categories[category_id]


def _id(entry: Mapping[str, Any], field: str, where: str) -> str:
    """Return an id as a string: some tools write numbers in one field and strings in another."""
    value = entry.get(field)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DatasetError(f"{where}: {field!r} must be an integer or a string, got {short(value)}")
    return str(value)


def _where(path: Path, noun: str, entry: Mapping[str, Any], number: int) -> str:
    value = entry.get("id")
    return f"{path}, {noun} {number if value is None else short(value)}"


def _by_name(
    boxes: Mapping[str, list[tuple[Any, str]]],
    images: Mapping[str, tuple[str, tuple[int, int]]],
    path: Path,
    *,
    has_names: bool,
) -> dict[str, Objects]:
    by_name: dict[str, Objects] = {}
    for image_id, named_boxes in boxes.items():
        name, size = images[image_id]
        if name in by_name:
            raise DatasetError(
                f"{path}: images {short(by_name[name].image_id)} and {short(image_id)} have the same name {short(name)} without "
                "folder and extension: samples are matched by this name, so names must be unique"
            )
        names = tuple(category for _, category in named_boxes) if has_names else ()
        by_name[name] = Objects(size, np.stack([box for box, _ in named_boxes]), names, image_id)
    return by_name
