"""Boxes of objects from the files that people have: PASCAL VOC or ImageNet XML, and tables in CSV."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ..errors import DatasetError
from ..shards.images import IMAGE_EXTENSIONS

T = TypeVar("T", int, float)

# Columns of a table: as ImageNet's and PASCAL's lists have them, or as those of the scenes do.
_CORNERS = (("xmin", "ymin", "xmax", "ymax"), ("x1", "y1", "x2", "y2"))
_SLACK = 1.0  # pixels by which boxes of both data sets leave their images here and there


@dataclass(frozen=True)
class Objects:
    """The objects of one image.

    Attributes:
        size: (height, width) of the image in pixels, as the file of boxes has it.
        boxes_xyxy: `[N, 4]` float64, in units of the whole image, 0..1.
        names: of their classes, N, or none where they are not known.
    """

    size: tuple[int, int]
    boxes_xyxy: npt.NDArray[np.float64]
    names: tuple[str, ...] = ()

    def of_class(self, name: str) -> npt.NDArray[np.float64]:
        """Return the boxes of a class; all where classes are not known or none is of this one."""
        chosen = self.boxes_xyxy[[each == name for each in self.names]] if self.names else self.boxes_xyxy
        return chosen if len(chosen) else self.boxes_xyxy


def read_boxes(path: str | os.PathLike[str], *, difficult: bool = False, progress: bool = False) -> dict[str, Objects]:
    """Return the objects of images that have any, by the images' file names without folder and extension.

    Args:
        path: a CSV table, an XML file, or a folder with XML files at any depth. A table has the columns `image`, `width`,
            `height`, `xmin`, `ymin`, `xmax`, `ymax` (or `x1`, `y1`, `x2`, `y2`) in pixels, 0 being the image's edge, and perhaps
            `class`; an object a line. XML is as the tools of PASCAL VOC write it: pixels counted from 1, the last one
            included; a file is called like its image.
        difficult: whether to take objects that XML marks as difficult; PASCAL's evaluation leaves them out. Those marked as
            truncated are taken: their boxes hold what is to be seen of them.
        progress: whether to show a progress bar on stderr while XML files are read.

    Raises:
        FileNotFoundError: no such file, or no XML in the folder.
        DatasetError: (a ValueError) a file is not of this form, two images have the same name, there is no object at all, or a
            box is empty or leaves its image by more than a pixel; the message names file and line or object.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.rglob("*.xml"))
        if not files:
            raise FileNotFoundError(f"no boxes in {path}: expected XML files, one an image, at any depth")
        return _read_xml_files(path, tqdm(files, desc="read boxes", unit="file", disable=not progress), difficult)
    if not path.is_file():
        raise FileNotFoundError(f"no boxes at {path}: expected a CSV table, an XML file, or a folder of XML files")
    if path.suffix.lower() == ".xml":
        return _read_xml_files(path, [path], difficult)
    return _read_table(path)


def _read_xml_files(path: Path, files: Iterable[Path], difficult: bool) -> dict[str, Objects]:
    by_name: dict[str, Objects] = {}
    for file in files:
        if file.stem in by_name:
            raise DatasetError(f"{file}: boxes of an image {file.stem!r} have been read before: names must differ")
        by_name[file.stem] = _read_xml(file, difficult)
    found = {name: objects for name, objects in by_name.items() if len(objects.boxes_xyxy)}
    if not found:
        raise DatasetError(
            f"{path} has no objects in {len(by_name)} files, but perhaps such as are marked as difficult"
        )
    return found


def _name_of(image: str) -> str:
    """Return an image's name without folder and extension; what follows a dot may also be part of its name."""
    name = Path(image).name
    stem, _, extension = name.rpartition(".")
    return stem if f".{extension.lower()}" in IMAGE_EXTENSIONS else name


def _read_table(path: Path) -> dict[str, Objects]:
    images: dict[str, tuple[str, tuple[int, int]]] = {}
    boxes: dict[str, list[npt.NDArray[np.float64]]] = {}
    names: dict[str, list[str]] = {}
    with path.open(newline="", encoding="utf-8-sig") as file:  # as spreadsheets write it
        table = csv.DictReader(file)
        corners = _corners_of(table, path)
        for where, row in _rows(table, path):
            try:
                size = int(row["height"]), int(row["width"])
                corner = [float(row[name]) for name in corners]
                key = _name_of(row["image"])
            except (TypeError, ValueError) as error:
                raise DatasetError(
                    f"{where}: expected an image's name, its size and a box in numbers: {error}"
                ) from None
            if images.setdefault(key, (row["image"], size)) != (row["image"], size):
                raise DatasetError(
                    f"{where}: image {row['image']!r} of (height, width) {size}, but before, {images[key][0]!r} of "
                    f"{images[key][1]}: images must differ in their names, and have one size"
                )
            boxes.setdefault(key, []).append(_to_unit(corner, size, where))
            names.setdefault(key, []).append(row.get("class") or "")
    if not boxes:
        raise DatasetError(f"{path} has no boxes: expected a line an object below that of the names")
    known = "class" in (table.fieldnames or ())
    return {key: Objects(images[key][1], np.array(boxes[key]), tuple(names[key]) if known else ()) for key in boxes}


def _corners_of(table: csv.DictReader[str], path: Path) -> tuple[str, ...]:
    """Return the names of the columns of corners."""
    try:
        columns = set(table.fieldnames or ())
    except (csv.Error, ValueError) as error:
        raise DatasetError(f"{path} is no CSV table: {error}") from None
    corners = next((each for each in _CORNERS if columns.issuperset(each)), None)
    if corners is None or not columns.issuperset(("image", "width", "height")):
        raise DatasetError(
            f"{path} has the columns {sorted(columns)}: expected image, width, height, xmin, ymin, xmax, ymax, and "
            "perhaps class, in the first line"
        )
    return corners


def _rows(table: csv.DictReader[str], path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the rows and where they stand."""
    try:
        for row in table:
            yield f"{path}, line {table.line_num}", row
    except (csv.Error, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} is no CSV table from line {table.line_num + 1} on: {error}") from None


def _read_xml(path: Path, difficult: bool) -> Objects:
    try:
        root = ElementTree.parse(path).getroot()  # noqa: S314  expat refuses entities that grow
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the latter two of unknown encodings
        raise DatasetError(f"{path} is no XML, or damaged: {error}") from None
    if root.tag != "annotation":
        raise DatasetError(f"{path} has a root <{root.tag}>: expected PASCAL VOC's <annotation>")
    size = _number(root, "size/height", int, path), _number(root, "size/width", int, path)
    boxes, names = [], []
    for number, element in enumerate(root.findall("object"), 1):
        where = f"{path}, object {number}"
        if (element.findtext("difficult") or "0").strip() == "1" and not difficult:
            continue
        name = (element.findtext("name") or "").strip()
        if not name:
            raise DatasetError(f"{where} has no <name>")
        x1, y1, x2, y2 = (_number(element, f"bndbox/{side}", float, where) for side in _CORNERS[0])
        boxes.append(_to_unit((x1 - 1, y1 - 1, x2, y2), size, where))  # from pixels counted from 1 to edges
        names.append(name)
    return Objects(size, np.array(boxes).reshape(-1, 4), tuple(names))


def _number(element: ElementTree.Element, name: str, kind: Callable[[str], T], where: object) -> T:
    text = element.findtext(name)
    if text is None:
        raise DatasetError(f"{where} has no <{name.replace('/', '><')}>, as PASCAL VOC's annotations have")
    try:
        return kind(text)
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        raise DatasetError(f"{where}: <{name.replace('/', '><')}> is {text!r}, not {expected}") from None


def _to_unit(corners: Sequence[float], size: tuple[int, int], where: str) -> npt.NDArray[np.float64]:
    """Return a box in units of the whole image, cut at its edges."""
    height, width = size
    if height < 1 or width < 1:
        raise DatasetError(f"{where}: an image of height {height} and width {width}: expected its size in pixels")
    x1, y1, x2, y2 = corners
    if min(x1, y1) < -_SLACK or x2 > width + _SLACK or y2 > height + _SLACK or not (x1 < x2 and y1 < y2):
        raise DatasetError(
            f"{where}: the box {tuple(corners)} is empty or leaves the image of height {height} and width {width}: are these "
            "pixels (x1, y1, x2, y2) of the same image?"
        )
    box = np.array(corners, float) / (width, height, width, height)
    return np.clip(box, 0, 1)
