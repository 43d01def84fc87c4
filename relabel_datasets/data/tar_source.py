"""Image source for WebDataset tars."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, BinaryIO

import numpy as np

from ..compatibility import read_at
from ..errors import DatasetError
from ..keywords import checked_keywords
from ..shards.formats import HEAD_BYTES, common_field
from ..shards.packed import PackedStrings
from ..storage.folders import local_path
from ..words import counted
from .skipped import Skipped
from .tar_scan import scan_tar

logger = logging.getLogger(__name__)

_SCANNERS = 8  # number of tars scanned in parallel: headers are far apart, and disks are faster with parallel requests
_NO_CLASS = -1


class WebDatasetSource:
    """Images of WebDataset tars: one image per key and, if labels are requested, its class index in `.cls`.

    On opening, only the headers of the tars are read. Members are grouped as in webdataset, see `tar_scan.scan_tar`. Hidden
    files, files of file managers (see `clutter`) and files without an extension are ignored. Hard links are read as the member
    that they point to. Images that are symbolic links or sparse files are skipped.

    Args:
        tars: Paths of uncompressed tars.
        classes: Class names by index. Default: Unknown.
        image_column: Extension of the members with the images, such as `jpg`. Default: Any extension of an image.
        label_column: Extension of the members with the class index, or the name of a value in the `.json` members.
            Default: `cls`.

    Attributes:
        classes: Class names by index, or None.
        keys: Sample keys, in the order of the tars.
        skipped: Samples without an image, whose image is not stored as a plain file, or whose name makes no valid key.

    Raises:
        FileNotFoundError: `tars` is empty or a tar does not exist.
        DatasetError: (a ValueError) No sample has an image, a sample has several, a key is repeated, or a tar is truncated,
            compressed or corrupt. When labels are first requested: A class index is not a number, or no sample has one.
    """

    key_rule = None

    @checked_keywords()
    def __init__(
        self,
        tars: Sequence[str | os.PathLike[str]],
        classes: Sequence[str] | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        if not tars:
            raise FileNotFoundError("tars is empty: expected the paths of WebDataset tars")
        self.classes = classes
        self.skipped: list[Skipped] = []
        self._label_column = label_column
        self._tars = [local_path(tar, "a tar of images") for tar in tars]
        keys: dict[str, None] = {}  # an ordered set
        extents, self._ends = array("q"), []
        num_nameless = num_hidden = 0
        with ThreadPoolExecutor(_SCANNERS, thread_name_prefix="scan") as pool:
            scans = pool.map(lambda tar: scan_tar(tar, image_column, label_column), self._tars)
            for tar, scan in zip(self._tars, scans, strict=True):
                for key in scan.keys:
                    if key in keys:
                        raise DatasetError(
                            f"{tar}: key {key!r} is in more than one of the {len(tars)} tars: keys must be unique in a split, so "
                            "rename the members, or build one split per tar"
                        )
                    keys[key] = None
                extents += scan.extents
                num_nameless += scan.num_nameless
                num_hidden += scan.num_hidden
                self.skipped += scan.skipped
                self._ends.append(len(keys))
        self.keys: Sequence[str] = PackedStrings(keys)
        self._extents = np.frombuffer(extents, np.int64).reshape(-1, 4)
        self._report(num_nameless, num_hidden)

    def _report(self, num_nameless: int, num_hidden: int) -> None:
        where = f"{self._tars[0]}" if len(self._tars) == 1 else f"{len(self._tars)} tars, first {self._tars[0]}"
        nameless = f"{counted(num_nameless, 'file')} without an extension ignored"
        if not len(self.keys):
            reasons = [f"first {self.skipped[0].error}"] if self.skipped else []
            reasons += [nameless] if num_nameless else []
            reasons += [f"{counted(num_hidden, 'hidden file')} ignored"] if num_hidden else []
            raise DatasetError(f"{where}: no sample with an image: {'; '.join(reasons) or 'no files'}")
        if self.skipped:
            logger.warning(
                "%s: %s skipped, first %s", where, counted(len(self.skipped), "sample"), self.skipped[0].error
            )
        if num_hidden:
            logger.debug("%s: %s ignored", where, counted(num_hidden, "hidden file"))
        if num_nameless:
            logger.warning("%s: %s", where, nameless)

    @cached_property
    def extension(self) -> str:
        """Extension of the images in shards, see `formats.common_field`."""
        return common_field(len(self.keys), lambda index: self._read(index, HEAD_BYTES))

    @cached_property
    def labels(self) -> Sequence[int]:
        """Class indices, read when first requested, -1 for samples without a class."""
        labels = array("q")
        for tar, (start, end) in zip(self._tars, itertools.pairwise([0, *self._ends]), strict=True):
            with tar.open("rb") as file:
                labels.extend(self._label(file, index) for index in range(start, end))
        if max(labels) < 0:
            field = self._label_column or "cls"
            raise DatasetError(
                f"{self._tars[0]}: no sample has a class index in .{field}, such as sample {self.keys[0]!r}. If class "
                "indices are in members with another extension, or are values in .json, pass that name as label_column="
            )
        return labels

    def _label(self, file: BinaryIO, index: int) -> int:
        offset, size = self._extents[index, 2:].tolist()
        if offset < 0:
            return _NO_CLASS
        text = read_at(file.fileno(), size, offset)
        name = f"{file.name}: {self.keys[index]}"
        if self._label_column is not None and text.lstrip().startswith(b"{"):
            value, name = _json_value(text, self._label_column, name), f"{name}.json: {self._label_column}"
        else:
            value, name = text.strip(), f"{name}.{self._label_column or 'cls'}"
        if value is None:
            return _NO_CLASS
        number = (
            str(value) if isinstance(value, int) else value.decode(errors="replace") if isinstance(value, bytes) else ""
        )
        if isinstance(value, bool) or not re.fullmatch(r"[+-]?[0-9]{1,9}", number):
            raise DatasetError(f"{name} must be a class index, got {value!r:.60}")
        return max(int(number), _NO_CLASS)

    def read(self, index: int) -> bytes:
        """Return the bytes of an image file. Thread-safe."""
        return self._read(index, None)

    def _read(self, index: int, limit: int | None) -> bytes:
        offset, size = self._extents[index, :2].tolist()
        with self._tars[bisect_right(self._ends, index)].open("rb") as file:
            file.seek(offset)
            return file.read(size if limit is None else min(size, limit))

    def name(self, index: int) -> str:
        """Return the tar and the key of an image, for messages."""
        return f"{self._tars[bisect_right(self._ends, index)]}: {self.keys[index]}"


def _json_value(text: bytes, field: str, name: str) -> Any:
    try:
        return json.loads(text).get(field)
    except ValueError as error:
        raise DatasetError(f"{name}.json is not JSON: {error}") from None
