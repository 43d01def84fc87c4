"""Image source for a Hugging Face dataset."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DatasetError, ImageError
from ..keywords import checked_keywords
from ..naming import is_key
from ..shards.formats import HEAD_BYTES, common_field
from ..shards.packed import PackedStrings
from .folder_scan import read_image_file
from .keys import key_of

if TYPE_CHECKING:
    import datasets

_STRINGS = ("string", "large_string", "string_view")
_BINARIES = ("binary", "large_binary", "binary_view")
_NO_CLASS = -1


class HFSource:
    """Images of a Hugging Face dataset (`datasets.Dataset`) and, if labels are requested, their class indices.

    Keys are the stems of the image files if the dataset has their names and they are unique, else row numbers.

    A build skips and lists rows with an empty image cell, and rows whose label is None or negative.

    Args:
        dataset: One split, not streaming.
        image_column: Name of the column with the images, of type `Image`, or with bytes or paths of image files. Default: The
            only column of type `Image`.
        label_column: Name of the column with the labels: a `ClassLabel`, class indices, or class names, which are numbered in
            sorted order. Default: The only `ClassLabel`.

    Attributes:
        keys: Sample keys.
        key_rule: `"stem"` if keys come from file names, else None.

    Raises:
        TypeError: The dataset is streaming, or a dict of splits.
        ValueError: The column does not exist, the default is ambiguous, or a column has the wrong type. The label column is
            checked when labels are first requested.
        DatasetError: (a ValueError) A label is not a class index. Checked when labels are first requested.
    """

    @checked_keywords()
    def __init__(
        self, dataset: datasets.Dataset, image_column: str | None = None, label_column: str | None = None
    ) -> None:
        import datasets  # slow to import

        if not isinstance(dataset, datasets.Dataset):
            raise TypeError(_not_a_dataset(dataset))
        self._image = image = _choose_column(dataset.features, datasets.Image, image_column, "image")
        _check_image_column(dataset.features[image], image)
        self._table = dataset.with_format("arrow")
        self._images = (
            dataset.with_format(None).select_columns([image]).cast_column(image, datasets.Image(decode=False))
        )
        if label_column is not None:
            _choose_column(dataset.features, datasets.ClassLabel, label_column, "label")
        self._label_column = label_column
        self.key_rule: str | None = None
        keys: Iterable[str] = (f"{i:08d}" for i in range(len(dataset)))
        paths = _image_paths(self._images, image)
        if all(paths):
            stems = [key_of(path, "stem") for path in paths]
            if len(set(stems)) == len(stems) and all(map(is_key, stems)):
                self.key_rule, keys = "stem", stems
        self.keys: Sequence[str] = PackedStrings(keys)

    @cached_property
    def extension(self) -> str:
        """Extension of the images in shards, see `formats.common_field`."""
        return common_field(len(self.keys), self._head)

    @cached_property
    def classes(self) -> Sequence[str] | None:
        """Class names by index, or None if the dataset only has indices or the label column is ambiguous."""
        import datasets  # see __init__

        name, features = self._label_column, self._table.features
        if name is None:
            labels = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
            name = labels[0] if len(labels) == 1 else None
        if name is None:
            return None
        if getattr(features[name], "dtype", None) in _STRINGS:
            return tuple(sorted({value for value in self._values(name) if value}))
        names = getattr(features[name], "names", None)
        return None if names is None else tuple(names)

    @cached_property
    def labels(self) -> Sequence[int]:
        """Class indices, read when first requested, -1 for rows without a class."""
        import datasets  # see __init__

        name = _choose_column(self._table.features, datasets.ClassLabel, self._label_column, "label")
        dtype = getattr(self._table.features[name], "dtype", "list")
        indices = None
        if dtype in _STRINGS:
            indices = {text: index for index, text in enumerate(self.classes or ())}
        elif not dtype.startswith(("int", "uint", "float", "bool")):
            raise ValueError(
                f"column {name!r} cannot be the labels: expected a ClassLabel, integers or class names, got "
                f"{self._table.features[name]}. {_options(self._table.features, 'label')}"
            )
        values = enumerate(self._values(name))
        return array("q", (self._class_index(row, value, name, indices) for row, value in values))

    def _values(self, column: str) -> list[Any]:
        values: list[Any] = self._table.select_columns([column])[:].column(column).to_pylist()
        return values

    def _class_index(self, row: int, value: Any, column: str, indices: Mapping[str, int] | None) -> int:
        if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
            return _NO_CLASS
        if indices is not None:
            return indices[value]
        if not math.isfinite(value) or value != int(value):
            raise DatasetError(f"row {row} of column {column!r} is {value}: expected a class index. {self._hint}")
        if self.classes is not None and value >= len(self.classes):
            raise DatasetError(
                f"row {row} of column {column!r} is {value}: expected a class index in 0 .. {len(self.classes) - 1}. Add the "
                "missing names to the ClassLabel"
            )
        if value > 2**31 - 1:
            raise DatasetError(f"row {row} of column {column!r} is {value}: expected a class index. {self._hint}")
        return max(int(value), _NO_CLASS)

    @property
    def _hint(self) -> str:
        return _options(self._table.features, "label")

    def read(self, index: int) -> bytes:
        """Return the bytes of an image file.

        Raises:
            ImageError: (a ValueError) The cell is empty, or its file cannot be read.
        """
        value: Mapping[str, Any] | None = self._images[index][self._image]
        if value is None or not (value["bytes"] or value["path"]):
            raise ImageError(f"{self.name(index)}: the cell is empty")
        data: bytes | None = value["bytes"]
        if data is not None:
            return data
        try:
            return read_image_file(Path(value["path"]))
        except (OSError, ImageError) as error:
            raise ImageError(f"{self.name(index)}: {error}") from None

    def _head(self, index: int) -> bytes | None:
        try:
            return self.read(index)[:HEAD_BYTES]
        except ImageError:
            return None

    def name(self, index: int) -> str:
        """Return the row, column and key of an image, for messages."""
        return f"row {index} of column {self._image!r} ({self.keys[index]})"


def _not_a_dataset(dataset: object) -> str:
    if isinstance(dataset, Mapping):
        return f"expected one split of a dataset, got a dict of splits: pass one of {sorted(dataset)}, such as splits[{min(dataset, default='train')!r}]"
    return (
        f"expected a datasets.Dataset, got {type(dataset).__name__}: images are read in random order, so load the dataset "
        "without streaming=True"
    )


def _choose_column(features: Mapping[str, Any], kind: type, name: str | None, what: str) -> str:
    """Return the column `name`, or by default the only column of a type."""
    if name is not None:
        if name not in features:
            raise ValueError(f"there is no {what} column {name!r}. {_options(features, what)}")
        return name
    names = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(names) != 1:
        problem = (
            f"several columns could be the {what} column: {names}"
            if names
            else f"no column has the type {kind.__name__}"
        )
        raise ValueError(f"{problem}. {_options(features, what)}")
    return names[0]


def _options(features: Mapping[str, Any], what: str) -> str:
    columns = ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items())
    return f"Pass the name of the {what} column as {what}_column=. The columns are {columns}"


def _type_name(feature: Any) -> str:
    return getattr(feature, "dtype", "list") if type(feature).__name__ == "Value" else type(feature).__name__


def _check_image_column(feature: Any, name: str) -> None:
    import datasets  # see HFSource

    if not isinstance(feature, datasets.Image) and getattr(feature, "dtype", None) not in _STRINGS + _BINARIES:
        raise ValueError(
            f"column {name!r} cannot be the images: expected one image per row, as Image, bytes or path, got {feature}"
        )


def _image_paths(images: datasets.Dataset, column: str) -> list[str]:
    """Return the names of the image files, in the order of the rows, "" for rows without a name."""
    flat = images.flatten()  # keeps select() and shuffle() and does not read the bytes of the images
    name = f"{column}.path"
    if name not in flat.column_names:
        return [""] * len(images)
    return [path or "" for path in flat.select_columns([name]).with_format("arrow")[:].column(name).to_pylist()]
