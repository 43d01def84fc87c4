"""Find the classes of a dataset by those of its annotator and of its images."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..data.skipped import Skipped
from ..data.sources import ImageSource
from .classes import describe_pairs, match_classes
from .engines import Description

logger = logging.getLogger(__name__)


class DatasetClasses(NamedTuple):
    """Classes of the dataset."""

    names: Sequence[str]
    rows: list[int] | None  # class index of the annotator for each class; None for all classes of the annotator
    source: ImageSource  # labels are indices of `names`


def resolve_classes(
    annotator: Description, source: ImageSource, mapping: Mapping[str, str | int] | None, keep_all: bool
) -> DatasetClasses:
    """Return the classes of a dataset, see `build`.

    Raises:
        ValueError: Classes do not match, or a label of the source is out of range.
    """
    names: Sequence[str] = annotator.classes or tuple(map(str, range(annotator.num_classes)))
    classes = DatasetClasses(names, None, source)
    if source.classes is not None and (tuple(source.classes) != annotator.classes or mapping):
        rows = match_classes(annotator.classes, source.classes, mapping, annotator.num_classes)
        if annotator.classes is None and not mapping:
            logger.warning(
                "the classes of the annotator have no names; its rows are taken as the classes of the dataset in order: %s",
                describe_pairs(source.classes, rows),
            )
        classes = DatasetClasses(tuple(source.classes), rows, source)
        if keep_all:
            if annotator.classes is None:
                named = dict(zip(rows, source.classes, strict=True))
                names = tuple(named.get(row, name) for row, name in enumerate(names))
            classes = DatasetClasses(names, None, _RelabeledSource(source, rows))
    highest = max(source.labels, default=0)
    if highest >= len(classes.names):
        first = source.name(list(source.labels).index(highest))
        raise ValueError(
            f"{first} has class index {highest}, but the annotator has only {len(classes.names)} classes: use an annotator of "
            "the classes of the images, or correct the labels"
        )
    if len(classes.names) < 2:
        raise ValueError(
            f"the images have one class, {classes.names[0]!r}, but labels need at least two: add images of other classes, or keep all "
            "classes of the annotator with all_classes=True (--all-classes)"
        )
    return classes


class _RelabeledSource:
    """Source with class indices of the annotator instead of its own.

    Args:
        source: Source of the images.
        rows: Class index of the annotator for each class of the source.
    """

    def __init__(self, source: ImageSource, rows: Sequence[int]) -> None:
        self._source, self.classes, self.key_rule = source, None, source.key_rule
        self.keys, self.read, self.name = source.keys, source.read, source.name
        self.labels = array("i", (rows[label] if label >= 0 else label for label in source.labels))
        self.skipped: Sequence[Skipped] = getattr(source, "skipped", ())

    @property
    def extension(self) -> str:
        """Extension of the images in the shards."""
        return self._source.extension
