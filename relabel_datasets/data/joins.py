"""Join label maps with images stored elsewhere, by key, for random access. `stream_joins` joins samples that stream.

An image's key is first looked up unchanged. If the label maps' keys come from file names, the key is then looked up by the same
rule, so that `train/n01440764_10026` in a tar matches the label map `n01440764_10026`. If no image has a match, other spellings
of the keys are compared, see `spellings`.
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
from ..words import counted
from .flat_folder import FlatFolder, is_flat_folder
from .hf_source import HFSource
from .keys import is_escaped, key_from_path, key_of
from .sources import open_source, pick_split
from .spellings import Spell, Spelling, is_row_number, match_spellings, show_key
from .store import LabelMaps

logger = logging.getLogger(__name__)

ImageBytes = Callable[[int], bytes]  # row -> bytes of the image file
OnUnmatched = Literal["error", "skip"]
Rows = npt.NDArray[np.int64]
_UNMATCHED = ("error", "skip")
_SPLIT_PARENTS = ("", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")  # the last two are in ImageNet's archive from Kaggle


class KeyedImages(Protocol):
    """Images with keys, such as any `ImageSource`."""

    @property
    def keys(self) -> Sequence[str]:
        """Sample keys of the images."""
        ...

    def read(self, index: int) -> bytes:
        """Return the bytes of an image file."""
        ...


# Also a datasets.Dataset or DatasetDict, which have no types.
Images = str | os.PathLike[str] | Mapping[str, bytes] | KeyedImages


class Unmatched(NamedTuple):
    """Numbers of label maps and images that a join left out."""

    missing: int = 0  # label maps without an image
    extra: int = 0  # images without a label map


class JoinResult(NamedTuple):
    """Images in the order of the label maps."""

    read: ImageBytes  # row of the label map -> bytes of its image
    rows: Rows | None  # of the label maps that have an image; None if all have one
    unmatched: Unmatched


def check_unmatched(unmatched: str) -> None:
    """Raise ValueError unless `unmatched` is `"error"` or `"skip"`."""
    if unmatched not in _UNMATCHED:
        raise ValueError(f"unmatched must be one of {_UNMATCHED}, got {unmatched!r}")


def join_images(label_maps: LabelMaps, images: Images, unmatched: OnUnmatched) -> JoinResult:
    """Find the image of each label map.

    Args:
        label_maps: Label maps of a split.
        images: Images with keys, see `RelabelDataset`. A mapping is first asked for the keys of the label maps only.
        unmatched: `"error"`, or `"skip"` to leave out label maps without an image and images without a label map.

    Returns:
        A reader of the images and the rows of the label maps that have one.

    Raises:
        FileNotFoundError: The images do not exist.
        DatasetError: (a ValueError) Some label maps or images have no counterpart and `unmatched` is `"error"`, none has a
            counterpart, or a label map has several images.
        TypeError: `images` has an unsupported type.
    """
    read: ImageBytes | None = None
    extra, has_image = Extra(0, []), np.zeros(0, bool)
    where, hint = "the given mapping", "its keys must be those of LabelMaps"
    if isinstance(images, Mapping) and not _is_hugging_face(images):
        has_image = np.fromiter((key in images for key in label_maps), bool, len(label_maps))
        read = _ReadByKey(label_maps.index, images)
    if read is None or not has_image.any():
        where, source = _open(images, label_maps.split)
        positions, extra = _match(label_maps, source, where)
        has_image, read = positions >= 0, _ReadByPosition(source, positions)
        hint = _why_no_match(label_maps.split, source)
    missing = np.flatnonzero(~has_image)
    counts = Unmatched(len(missing), extra.number)
    if any(counts):
        text = _describe(label_maps, where, missing, extra)
        if not has_image.any() and len(has_image):
            raise DatasetError(f"{text}. No key is in both: {hint}")
        if unmatched == "error":
            raise DatasetError(f"{text}. Pass the images of this split, or unmatched='skip' to leave these out")
        logger.warning("%s: these are left out", text)
    return JoinResult(read, np.flatnonzero(has_image) if len(missing) else None, counts)


class Extra(NamedTuple):
    """Images without a label map."""

    number: int
    examples: list[str]


class _ReadByKey:
    """Reader of a mapping from key to bytes."""

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

    def _at(self, position: int) -> str:
        return self._index.key(position)


class _ReadByPosition:
    """Reader of a source. `positions` `[N]` int32 holds the position in the source for each row."""

    def __init__(self, source: KeyedImages, positions: npt.NDArray[np.int32]) -> None:
        self._source, self._positions = source, positions

    def __call__(self, row: int) -> bytes:
        return self._source.read(int(self._positions[row]))


def _is_hugging_face(images: object) -> bool:
    module = sys.modules.get(
        "datasets"
    )  # such an object exists only if it was imported, and importing it takes a second
    return module is not None and isinstance(images, (module.Dataset, module.DatasetDict))


def _open(images: Any, split: Split) -> tuple[str, KeyedImages]:
    """Return the name of the images in messages, and their source."""
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
        f"keys and read(index), such as WebDatasetSource, got {type(images).__name__}. Use relabel_datasets.data.join() for "
        "samples that stream"
    )


def split_folder(root: Path, split: str) -> Path:
    """Return the folder of the split below `root` if it exists, such as imagenet/train, else `root`."""
    names = (split, *SPLIT_ALIASES.get(split, ()))
    folders = (root / parent / name for parent in _SPLIT_PARENTS for name in names)
    return next((folder for folder in folders if folder.is_dir()), root)


def _match(label_maps: LabelMaps, source: KeyedImages, where: str) -> tuple[npt.NDArray[np.int32], Extra]:
    """Return the position in the source of each label map's image (-1: none), and the images without a label map."""
    split, keys = label_maps.split, source.keys
    rows = label_maps.index.rows(keys)
    unmatched = np.flatnonzero(rows < 0)
    if split.key_rule is not None and len(unmatched):
        rows[unmatched] = label_maps.index.rows(
            [by_rule(keys[position], split.key_rule) for position in unmatched.tolist()]
        )
        unmatched = unmatched[rows[unmatched] < 0]
    spell = None
    if not (rows >= 0).any() and _name_files(label_maps, source):
        spell, rows = _match_spelled(label_maps, keys, rows, where)
        unmatched = np.flatnonzero(rows < 0)
    matched = np.flatnonzero(rows >= 0)
    positions = np.full(len(label_maps), -1, np.int32)
    positions[rows[matched]] = matched
    if np.count_nonzero(positions >= 0) < len(matched):
        _refuse_several(label_maps, keys, rows, where)
    if isinstance(source, HFSource) and source.key_rule is None:
        _check_numbers(label_maps, source, rows, where)
    if split.skipped:  # these have no label map because the build could not read them
        skipped = skipped_keys(split, spell)
        unmatched = np.array(
            [i for i in unmatched.tolist() if skipped.isdisjoint(names_of(keys[i], split.key_rule, spell))], np.int64
        )
    return positions, Extra(len(unmatched), [keys[position] for position in unmatched[:3].tolist()])


def _name_files(label_maps: LabelMaps, source: KeyedImages) -> bool:
    """Return whether the keys of both sides come from names. Row numbers would match unrelated images."""
    if not len(label_maps) or not len(source.keys):
        return False
    numbered = label_maps.split.key_rule is None and is_row_number(label_maps.index.key(0))
    return not numbered and not _has_row_numbers(source)


def _has_row_numbers(source: KeyedImages) -> bool:
    return isinstance(source, HFSource) and source.key_rule is None


def _match_spelled(label_maps: LabelMaps, keys: Sequence[str], rows: Rows, where: str) -> tuple[Spell | None, Rows]:
    """Return the spelling by which keys match (None: no spelling), and the row of the label map of each image (-1: none)."""
    match = match_spellings(IndexKeys(label_maps.index), keys)
    if match is None:
        return None, rows
    spelling, spelled_rows = match
    if spelled_rows is None:
        raise DatasetError(
            f"{where}: no key is that of a label map. Some match by {spelling.what}, but then several images, or several "
            f"label maps, have the same name. Rename the images like the label maps, such as {show_key(label_maps.index.key(0))}"
        )
    position = int(np.argmax(spelled_rows >= 0))
    log_spelling(where, spelling, keys[position], label_maps.index.key(int(spelled_rows[position])))
    return spelling.spell, spelled_rows


def log_spelling(where: str, spelling: Spelling, key: str, label_key: str) -> None:
    """Log by which spelling images are joined, with one example."""
    logger.warning(
        "%s: no key is that of a label map, so images are joined by %s, such as %s with the label map of %s",
        where, spelling.what, show_key(key), show_key(label_key),
    )  # fmt: skip


def skipped_keys(split: Split, spell: Spell | None) -> set[str]:
    """Return the keys of the images that the build skipped, also as spelled by `spell`."""
    keys = {entry["key"] for entry in split.skipped}
    return keys if spell is None else keys | set(map(spell, keys))


def by_rule(key: str, rule: str) -> str:
    """Return the key of an image by a rule for file names. The image's key is that of its source or of webdataset."""
    if "." in key:
        return key_of(key, rule)
    if rule == "stem":
        key = key.rpartition("/")[2]
    return key if is_escaped(key) else key_from_path(key)


def names_of(key: str, rule: str | None, spell: Spell | None) -> set[str]:
    """Return the names that an image may have in the list of skipped images."""
    names = {key} if rule is None else {key, by_rule(key, rule)}
    return names if spell is None else names | {spell(key)}


def _refuse_several(label_maps: LabelMaps, keys: Sequence[str], rows: Rows, where: str) -> None:
    repeated = np.flatnonzero(np.bincount(rows[rows >= 0], minlength=len(label_maps)) > 1)
    names = [keys[position] for position in np.flatnonzero(rows == repeated[0])[:3].tolist()]
    raise DatasetError(
        f"{where} has several images for {counted(len(repeated), 'label map')}, such as {', '.join(map(repr, names))} for "
        f"{label_maps.index.key(int(repeated[0]))!r}: pass the images that the label maps were made from"
    )


def _check_numbers(label_maps: LabelMaps, source: HFSource, rows: Rows, where: str) -> None:
    """Raise DatasetError if row numbers are those of other images, such as after a shuffle."""
    try:
        labels = np.asarray(source.labels)
    except (TypeError, ValueError):  # there is no label column, there are several, or it has gaps
        return
    matched = np.flatnonzero(rows >= 0)
    mismatched = matched[labels[matched] != label_maps.index.labels[rows[matched]]]
    if len(mismatched):
        raise DatasetError(
            f"{where} has no file names, so its keys are row numbers, and {counted(len(mismatched), 'image')} "
            f"{'has' if len(mismatched) == 1 else 'have'} another class than the label map of the same number, such as {source.keys[int(mismatched[0])]!r}: its rows are in another order "
            "than those that the label maps were made from. Pass the dataset in its original order"
        )


def _why_no_match(split: Split, source: KeyedImages) -> str:
    theirs = (
        f"the keys of the images are such as {show_key(source.keys[0])}" if len(source.keys) else "there are no images"
    )
    if _has_row_numbers(source):
        theirs += ", row numbers, since the Hugging Face dataset has no file names: pass images with file names"
    made = {
        None: "the label maps' keys are those of WebDataset tars, or row numbers of a Hugging Face dataset without file "
        "names: pass the source that they were made from",
        "stem": "the label maps' keys are the names of image files without folder and extension",
        "path": "the label maps' keys are class/image paths: pass the root of that ImageFolder",
    }[split.key_rule]
    return f"{made}; {theirs}"


def _describe(label_maps: LabelMaps, where: str, missing: Rows, extra: Extra) -> str:
    examples = [label_maps.index.key(row) for row in missing[:3].tolist()]
    problems = [
        f"{counted(count, noun)} {'has' if count == 1 else 'have'} {lack}, such as {', '.join(map(show_key, keys))}"
        for count, keys, noun, lack in (
            (len(missing), examples, "label map", "no image"),
            (extra.number, extra.examples, "image", "no label map"),
        )
        if count
    ]
    config = label_maps.manifest.config
    return f"{where} and config {config!r}, split {label_maps.split.name!r}, do not match: " + "; ".join(problems)
