"""Join label maps with images stored elsewhere, by key: all at once for random access, or one by one as they stream.

An image's key is looked up as it is. If the label maps' keys come from file names, it is then looked up by the same rule, so
that `train/n01440764_10026` of a tar finds the label map of `n01440764_10026`. If no image finds a label map, other spellings of
the keys are compared, see `spellings`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import DatasetError
from ..shards.configs import SPLIT_ALIASES
from ..shards.index import Index
from ..shards.manifest import Split
from ..shards.packed import IndexedStrings
from ..storage.folders import local_path
from .flat_folder import FlatFolder, is_flat_folder
from .hf_source import HFSource
from .keys import is_escaped, key_from_path, key_of
from .sources import open_source, pick_split
from .spellings import (
    Spell,
    Spelling,
    is_running_number,
    match_spellings,
    show_key,
)
from .store import LabelMaps

logger = logging.getLogger(__name__)

ImageBytes = Callable[[int], bytes]  # row -> bytes of the image file
OnUnmatched = Literal["error", "skip"]
Rows = npt.NDArray[np.int64]
_UNMATCHED = ("error", "skip")
_ABOVE_SPLITS = ("", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")  # the latter in ImageNet as Kaggle has it


class KeyedImages(Protocol):
    """Images with keys, such as any `ImageSource`."""

    @property
    def keys(self) -> Sequence[str]:
        """The key of each image."""
        ...

    def read(self, index: int) -> bytes:
        """Return the bytes of an image file."""
        ...


# Or a datasets.Dataset or DatasetDict, which have no types.
Images = str | os.PathLike[str] | Mapping[str, bytes] | KeyedImages


class Unmatched(NamedTuple):
    """How many label maps and images were left out of a join."""

    missing: int = 0  # label maps without image
    extra: int = 0  # images without label map


class JoinResult(NamedTuple):
    """Images in the order of the label maps."""

    read: ImageBytes  # row of the label map -> bytes of its image
    rows: Rows | None  # of the label maps that have an image; None: all have
    unmatched: Unmatched


def check_unmatched(unmatched: str) -> None:
    """Raise ValueError unless this is one of the ways to treat what has no counterpart."""
    if unmatched not in _UNMATCHED:
        raise ValueError(f"unmatched must be one of {_UNMATCHED}, got {unmatched!r}")


def join_images(label_maps: LabelMaps, images: Images, unmatched: OnUnmatched) -> JoinResult:
    """Return the images of the label maps.

    Args:
        label_maps: of a split.
        images: see `RelabelDataset`. Of a mapping, only the keys of the label maps are looked at.
        unmatched: `"error"`, or `"skip"` to leave out what has no counterpart.

    Raises:
        FileNotFoundError: there are no images.
        DatasetError: (a ValueError) label maps or images without counterpart, none with one, or several images for one
            label map.
        TypeError: `images` is nothing that has images with keys.
    """
    read: ImageBytes | None = None
    extra, found = Extra(0, []), np.zeros(0, bool)
    where, hint = "the given mapping", "its keys must be those of LabelMaps"
    if isinstance(images, Mapping) and not _is_hugging_face(images):
        found = np.fromiter((key in images for key in label_maps), bool, len(label_maps))
        read = _ReadByKey(label_maps.index, images)
    if read is None or not found.any():
        where, source = _open(images, label_maps.split)
        places, extra = _match(label_maps, source, where)
        found, read, hint = places >= 0, _ReadByPlace(source, places), _why_no_match(label_maps.split, source)
    missing = np.flatnonzero(~found)
    counts = Unmatched(len(missing), extra.number)
    if any(counts):
        text = _describe(label_maps, where, missing, extra)
        if not found.any() and len(found):
            raise DatasetError(f"{text}. No key is in both: {hint}")
        if unmatched == "error":
            raise DatasetError(f"{text}. Give the images of this split, or unmatched='skip' to leave these out")
        logger.warning("%s: these are left out", text)
    return JoinResult(read, np.flatnonzero(found) if len(missing) else None, counts)


class Extra(NamedTuple):
    """Images without label map."""

    number: int
    examples: list[str]


class _ReadByKey:
    """Reads from a mapping from key to bytes."""

    def __init__(self, index: Index, images: Mapping[str, bytes]) -> None:
        self._index, self._images = index, images

    def __call__(self, row: int) -> bytes:
        return self._images[self._index.key(row)]


class _MappingSource:
    """The images of a mapping from key to bytes, in its order."""

    def __init__(self, images: Mapping[str, bytes]) -> None:
        self.keys: Sequence[str] = list(images)
        self._images = images

    def read(self, index: int) -> bytes:
        return self._images[self.keys[index]]


class IndexKeys(IndexedStrings):
    """The keys of an index, by row."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def _at(self, place: int) -> str:
        return self._index.key(place)


class _ReadByPlace:
    """Reads from a source; `places` `[N]` int32 says where in the source the image of each row is."""

    def __init__(self, source: KeyedImages, places: npt.NDArray[np.int32]) -> None:
        self._source, self._places = source, places

    def __call__(self, row: int) -> bytes:
        return self._source.read(int(self._places[row]))


def _is_hugging_face(images: object) -> bool:
    module = sys.modules.get("datasets")  # whoever has such an object has imported it, and it takes a second
    return module is not None and isinstance(images, (module.Dataset, module.DatasetDict))


def _open(images: Any, split: Split) -> tuple[str, KeyedImages]:
    """Return what messages call the images, and their source."""
    if isinstance(images, (str, os.PathLike)):
        root = split_folder(local_path(images, "images="), split.name)
        if is_flat_folder(root):
            return str(root), FlatFolder(root, split.key_rule or "stem")
        return str(root), open_source(root, split.name, key_rule=split.key_rule)
    if _is_hugging_face(images):
        where = "the given Hugging Face dataset"
        return where, HFSource(pick_split(images, split.name, where) if isinstance(images, Mapping) else images)
    if isinstance(images, Mapping):
        return "the given mapping", _MappingSource(images)
    if hasattr(images, "keys") and callable(getattr(images, "read", None)):
        return f"the given {type(images).__name__}", images
    raise TypeError(
        "images must be a path, a mapping from key to bytes, a Hugging Face dataset that is not streaming, or an object with "
        f"keys and read(index), such as WebDatasetSource, got {type(images).__name__}. Join what streams by "
        "relabel_datasets.join()"
    )


def split_folder(root: Path, split: str) -> Path:
    """Return the folder of the split below `root`, where there is one, as in imagenet/train and imagenet/val."""
    names = (split, *SPLIT_ALIASES.get(split, ()))
    folders = (root / above / name for above in _ABOVE_SPLITS for name in names)
    return next((folder for folder in folders if folder.is_dir()), root)


def _match(label_maps: LabelMaps, source: KeyedImages, where: str) -> tuple[npt.NDArray[np.int32], Extra]:
    """Return the place in the source of each label map's image, -1 where there is none, and what is left of the source."""
    split, keys = label_maps.split, source.keys
    rows = label_maps.index.rows(keys)
    left = np.flatnonzero(rows < 0)
    if split.key_rule is not None and len(left):
        rows[left] = label_maps.index.rows([by_rule(keys[place], split.key_rule) for place in left.tolist()])
        left = left[rows[left] < 0]
    spell = None
    if not (rows >= 0).any() and _name_files(label_maps, source):
        spell, rows = _match_spelled(label_maps, keys, rows, where)
        left = np.flatnonzero(rows < 0)
    matched = np.flatnonzero(rows >= 0)
    places = np.full(len(label_maps), -1, np.int32)
    places[rows[matched]] = matched
    if np.count_nonzero(places >= 0) < len(matched):
        _refuse_several(label_maps, keys, rows, where)
    if isinstance(source, HFSource) and source.key_rule is None:
        _check_numbers(label_maps, source, rows, where)
    if split.skipped:  # without label map since the builder could not read them
        skipped = skipped_keys(split, spell)
        left = np.array(
            [i for i in left.tolist() if skipped.isdisjoint(names_of(keys[i], split.key_rule, spell))], np.int64
        )
    return places, Extra(len(left), [keys[place] for place in left[:3].tolist()])


def _name_files(label_maps: LabelMaps, source: KeyedImages) -> bool:
    """Return whether keys on both sides come from names: running numbers of rows would match other images."""
    if not len(label_maps) or not len(source.keys):
        return False
    numbered = label_maps.split.key_rule is None and is_running_number(label_maps.index.key(0))
    return not numbered and not _has_running_numbers(source)


def _has_running_numbers(source: KeyedImages) -> bool:
    return isinstance(source, HFSource) and source.key_rule is None


def _match_spelled(label_maps: LabelMaps, keys: Sequence[str], rows: Rows, where: str) -> tuple[Spell | None, Rows]:
    """Return the spelling by which images find label maps, None if there is none, and the row of each image, -1 for none."""
    match = match_spellings(IndexKeys(label_maps.index), keys)
    if match is None:
        return None, rows
    spelling, found = match
    if found is None:
        raise DatasetError(
            f"{where}: no key is that of a label map. By {spelling.what} some would be, but then several images, or several "
            f"label maps, have the same name: rename the images like the label maps, such as {show_key(label_maps.index.key(0))}"
        )
    place = int(np.argmax(found >= 0))
    log_spelling(where, spelling, keys[place], label_maps.index.key(int(found[place])))
    return spelling.of, found


def log_spelling(where: str, spelling: Spelling, key: str, label_key: str) -> None:
    logger.warning(
        "%s: no key is that of a label map, so images are joined by %s, such as %s with the label map of %s",
        where, spelling.what, show_key(key), show_key(label_key),
    )  # fmt: skip


def skipped_keys(split: Split, spell: Spell | None) -> set[str]:
    keys = {entry["key"] for entry in split.skipped}
    return keys if spell is None else keys | set(map(spell, keys))


def by_rule(key: str, rule: str) -> str:
    """Return what a rule for file names makes of the key of an image: of its source, or as webdataset has it."""
    if "." in key:
        return key_of(key, rule)
    if rule == "stem":
        key = key.rpartition("/")[2]
    return key if is_escaped(key) else key_from_path(key)


def names_of(key: str, rule: str | None, spell: Spell | None) -> set[str]:
    """Return all that a key may be called in the list of skipped images."""
    names = {key} if rule is None else {key, by_rule(key, rule)}
    return names if spell is None else names | {spell(key)}


def _refuse_several(label_maps: LabelMaps, keys: Sequence[str], rows: Rows, where: str) -> None:
    repeated = np.flatnonzero(np.bincount(rows[rows >= 0], minlength=len(label_maps)) > 1)
    names = [keys[place] for place in np.flatnonzero(rows == repeated[0])[:3].tolist()]
    raise DatasetError(
        f"{where} has several images for {len(repeated)} label maps, such as {', '.join(map(repr, names))} for "
        f"{label_maps.index.key(int(repeated[0]))!r}: give the images that the label maps were made of"
    )


def _check_numbers(label_maps: LabelMaps, source: HFSource, rows: Rows, where: str) -> None:
    """Raise an error if keys that are running numbers stand for other images, as after a shuffle."""
    try:
        labels = np.asarray(source.labels)
    except (TypeError, ValueError):  # no column of classes, several, or gaps
        return
    matched = np.flatnonzero(rows >= 0)
    other = matched[labels[matched] != label_maps.index.labels[rows[matched]]]
    if len(other):
        raise DatasetError(
            f"{where} has no file names, so that its keys are running numbers, and {len(other)} images have another class "
            f"than their label maps, such as {source.keys[int(other[0])]!r}: it is in another order than the dataset that the "
            "label maps were made of, give that one"
        )


def _why_no_match(split: Split, source: KeyedImages) -> str:
    theirs = f"the images' are such as {show_key(source.keys[0])}" if len(source.keys) else "there are no images"
    if _has_running_numbers(source):
        theirs += (
            ", running numbers, since the Hugging Face dataset has no file names: give images with their file names"
        )
    made = {
        None: "the label maps' keys are those of WebDataset tars, or running numbers of a Hugging Face dataset without file "
        "names: give the source that they were made of",
        "stem": "the label maps' keys are the names of image files without folder and extension",
        "path": "the label maps' keys are class/image paths: give the root of that ImageFolder",
    }[split.key_rule]
    return f"{made}; {theirs}"


def _describe(label_maps: LabelMaps, where: str, missing: Rows, extra: Extra) -> str:
    examples = [label_maps.index.key(row) for row in missing[:3].tolist()]
    problems = [
        f"{count} {what}, such as {', '.join(map(show_key, keys))}"
        for count, keys, what in (
            (len(missing), examples, "label maps have no image"),
            (extra.number, extra.examples, "images have no label map"),
        )
        if count
    ]
    config = label_maps.manifest.config
    return f"{where} and config {config!r}, split {label_maps.split.name!r}, do not match: " + "; ".join(problems)
