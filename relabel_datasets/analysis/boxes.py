"""Read boxes of objects from PASCAL VOC or ImageNet XML, COCO JSON, or CSV tables."""

from __future__ import annotations

import codecs
import csv
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO, TypeVar
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ..errors import DatasetError
from ..storage.folders import local_path
from ..words import counted
from .coco import read_coco
from .objects import Objects, image_name, short, to_unit

T = TypeVar("T", int, float)

# Names of the corner columns: those of ImageNet and PASCAL VOC, and those of the demo scenes.
_CORNERS = (("xmin", "ymin", "xmax", "ymax"), ("x1", "y1", "x2", "y2"))
_NUM_SHOWN = 8  # column names in an error message


def read_boxes(path: str | os.PathLike[str], *, difficult: bool = False, progress: bool = False) -> dict[str, Objects]:
    """Read the objects of images from a file or folder of boxes.

    Args:
        path: One of these:

            - A COCO JSON file with `images`, `annotations` and `categories`; see `read_coco`.
            - A PASCAL VOC or ImageNet XML file, or a folder with such files at any depth, each named like its image. Pixels
              are counted from 1, and the last one is inside the box.
            - A CSV table with the columns `image`, `width`, `height`, `xmin`, `ymin`, `xmax`, `ymax` (or `x1`, `y1`, `x2`,
              `y2`) in pixels from the image's edge and, optionally, `class`; one object per line. Columns are separated by
              commas, semicolons or tabs.
        difficult: Whether to include objects that XML marks as difficult. PASCAL's evaluation excludes them. Truncated
            objects are always included. Default: False.
        progress: Whether to show a progress bar on stderr while XML files are read. Default: False.

    Returns:
        The objects of each image that has any, by the image's file name without folder and extension.

    Raises:
        FileNotFoundError: The file does not exist, or the folder has no XML files.
        DatasetError: (a ValueError) A file is in none of these formats, two images have the same name, there are no objects,
            or a box is empty or leaves its image by more than a pixel. The message names the file and the line or object.

    Example:
        >>> objects = read_boxes("annotations/instances_val2017.json")
        >>> objects["000000000139"].boxes_xyxy.shape
        (20, 4)
    """
    path = local_path(path, "boxes=")
    if path.is_dir():
        files = sorted(path.rglob("*.xml"))
        if not files:
            raise FileNotFoundError(
                f"no boxes in {path}: expected XML files at any depth, one per image; to read a COCO JSON or a CSV file, give "
                "its path instead of its folder"
            )
        return _read_xml_files(path, tqdm(files, desc="read boxes", unit="file", disable=not progress), difficult)
    if not path.is_file():
        raise FileNotFoundError(
            f"no boxes at {path}: expected a COCO JSON file, a CSV table, an XML file, or a folder of XML files"
        )
    match path.suffix.lower(), _first_character(path):
        case (".json", _) | (_, b"{" | b"["):
            return read_coco(path)
        case (".xml", _) | (_, b"<"):
            return _read_xml_files(path, [path], difficult)
    return _read_table(path)


def _first_character(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()[:1]


def _read_xml_files(path: Path, files: Iterable[Path], difficult: bool) -> dict[str, Objects]:
    by_name: dict[str, Objects] = {}
    for file in files:
        if file.stem in by_name:
            raise DatasetError(
                f"{file}: another file has boxes of an image {file.stem!r}: the file names must be unique, so rename one"
            )
        by_name[file.stem] = _read_xml(file, difficult)
    non_empty = {name: objects for name, objects in by_name.items() if len(objects.boxes_xyxy)}
    if not non_empty:
        raise DatasetError(
            f"{path} has no objects in {counted(len(by_name), 'file')}; objects that are marked as difficult do not count"
        )
    return non_empty


def _read_table(path: Path) -> dict[str, Objects]:
    images: dict[str, tuple[str, tuple[int, int]]] = {}
    boxes: dict[str, list[npt.NDArray[np.float64]]] = {}
    names: dict[str, list[str]] = {}
    with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
        table = csv.DictReader(file, delimiter=_delimiter(file), skipinitialspace=True)
        corners = _corners_of(table, path)
        for where, row in _rows(table, path):
            try:
                size = int(row["height"]), int(row["width"])
                corner = [float(row[name]) for name in corners]
                key = image_name(row["image"])
            except (TypeError, ValueError, AttributeError):
                values = ", ".join(f"{name}={short(row.get(name))}" for name in ("image", "width", "height", *corners))
                raise DatasetError(
                    f"{where}: expected the name of an image, and its size and a box as numbers, got {values}"
                ) from None
            if images.setdefault(key, (row["image"], size)) != (row["image"], size):
                raise DatasetError(
                    f"{where}: image {short(row['image'])} with (height, width) {size} conflicts with an earlier line, which has "
                    f"{short(images[key][0])} with {images[key][1]}: names of images must be unique, and each image has one size"
                )
            boxes.setdefault(key, []).append(to_unit(corner, size, where))
            names.setdefault(key, []).append(row.get("class") or "")
    if not boxes:
        raise DatasetError(f"{path} has no boxes: expected one line per object below the header line")
    known = "class" in (table.fieldnames or ())
    return {key: Objects(images[key][1], np.array(boxes[key]), tuple(names[key]) if known else ()) for key in boxes}


def _delimiter(file: TextIO) -> str:
    """Return the separator of the columns in the first line of a table."""
    try:
        line = file.readline(10_000)
    except ValueError:  # not a text file: the CSV reader raises the error
        line = ""
    file.seek(0)
    return max(",;\t", key=line.count)


def _corners_of(table: csv.DictReader[str], path: Path) -> tuple[str, ...]:
    """Normalize the column names and return those of the corners."""
    try:
        table.fieldnames = columns = [name.strip().lower() for name in table.fieldnames or ()]
    except (csv.Error, ValueError) as error:
        raise DatasetError(f"{path} is not a CSV table: {error}") from None
    corners = next((names for names in _CORNERS if set(columns).issuperset(names)), None)
    missing = {"image", "width", "height"} - set(columns)
    if corners is None or missing:
        shown = ", ".join(short(name) for name in columns[:_NUM_SHOWN])
        more = f" and {len(columns) - _NUM_SHOWN} more" if len(columns) > _NUM_SHOWN else ""
        raise DatasetError(
            f"{path} has the columns {shown}{more} in its first line: expected image, width, height, xmin, ymin, xmax, ymax, "
            "and optionally class"
        )
    return corners


def _rows(table: csv.DictReader[str], path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the file and line of each row, and the row."""
    try:
        for row in table:
            yield f"{path}, line {table.line_num}", row
    except (csv.Error, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} is not a CSV table from line {table.line_num + 1} on: {error}") from None


def _read_xml(path: Path, difficult: bool) -> Objects:
    try:
        root = ElementTree.parse(path).getroot()  # noqa: S314  expat rejects entity expansion attacks
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the latter two: unknown encodings
        raise DatasetError(f"{path} is not an XML file, or is corrupt: {error}") from None
    if root.tag != "annotation":
        raise DatasetError(f"{path} has the root element <{root.tag[:60]}>: expected <annotation> of PASCAL VOC")
    size = _number(root, "size/height", int, path), _number(root, "size/width", int, path)
    boxes, names = [], []
    for number, element in enumerate(root.findall("object"), 1):
        where = f"{path}, object {number}"
        if (element.findtext("difficult") or "0").strip() == "1" and not difficult:
            continue
        name = (element.findtext("name") or "").strip()
        if not name:
            raise DatasetError(f"{where} has no <name>: expected the class of the object")
        x1, y1, x2, y2 = (_number(element, f"bndbox/{side}", float, where) for side in _CORNERS[0])
        boxes.append(to_unit((x1 - 1, y1 - 1, x2, y2), size, where))  # from pixels counted from 1, inclusive, to edges
        names.append(name)
    return Objects(size, np.array(boxes).reshape(-1, 4), tuple(names))


def _number(element: ElementTree.Element, name: str, to_number: Callable[[str], T], where: object) -> T:
    text = element.findtext(name)
    if text is None:
        raise DatasetError(f"{where} has no <{name.replace('/', '><')}>: annotations of PASCAL VOC must have it")
    try:
        return to_number(text)
    except ValueError:
        expected = "a whole number" if to_number is int else "a number"
        raise DatasetError(f"{where}: <{name.replace('/', '><')}> must be {expected}, got {short(text)}") from None
