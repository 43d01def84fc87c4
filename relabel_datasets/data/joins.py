"""Label maps joined with images that live elsewhere, by key: all at once for random access, or one by one as they stream.

An image's key is looked up as it is. Where the label maps' keys were made from file names, it is then looked up by the same
rule, so that `train/n01440764_10026` of somebody's tar finds the label map of `n01440764_10026`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import DatasetError
from ..shards.configs import SPLIT_ALIASES
from ..shards.index import Index
from ..shards.manifest import Split
from ..storage.folders import local_path
from .hf_source import HFSource
from .keys import key_from_member, key_of
from .sources import open_source, pick_split
from .store import LabelMaps

logger = logging.getLogger(__name__)

ImageBytes = Callable[[int], bytes]  # row -> bytes of the image file
OnUnmatched = Literal["error", "skip"]
Rows = npt.NDArray[np.int64]
_UNMATCHED = ("error", "skip")


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


class Joined(NamedTuple):
    """Images in the order of the label maps."""

    read: ImageBytes  # row of the label map -> bytes of its image
    rows: Rows | None  # of the label maps that have an image; None: all have
    unmatched: Unmatched


def check_unmatched(unmatched: str) -> None:
    """Raise ValueError unless this is one of the ways to treat what has no counterpart."""
    if unmatched not in _UNMATCHED:
        raise ValueError(f"unmatched must be one of {_UNMATCHED}, got {unmatched!r}")


def join_images(label_maps: LabelMaps, images: Images, unmatched: OnUnmatched) -> Joined:
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
    if isinstance(images, Mapping) and not _is_hugging_face(images):
        found = np.fromiter((key in images for key in label_maps), bool, len(label_maps))
        read: ImageBytes = _ReadByKey(label_maps.index, images)
        where, extra = "the given mapping", _Extra(0, [])
        hint = "its keys must be those of LabelMaps"
    else:
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
    return Joined(read, np.flatnonzero(found) if len(missing) else None, counts)


class _Extra(NamedTuple):
    number: int
    examples: list[str]


class _ReadByKey:
    """Reads from a mapping from key to bytes."""

    def __init__(self, index: Index, images: Mapping[str, bytes]) -> None:
        self._index, self._images = index, images

    def __call__(self, row: int) -> bytes:
        return self._images[self._index.key(row)]


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
        root = _split_folder(local_path(images, "images="), split.name)
        return str(root), open_source(root, split.name, key_rule=split.key_rule)
    if _is_hugging_face(images):
        where = "the given Hugging Face dataset"
        return where, HFSource(pick_split(images, split.name, where) if isinstance(images, Mapping) else images)
    if hasattr(images, "keys") and callable(getattr(images, "read", None)):
        return f"the given {type(images).__name__}", images
    raise TypeError(
        "images must be a path, a mapping from key to bytes, a Hugging Face dataset that is not streaming, or an object with "
        f"keys and read(index), such as WebDatasetSource, got {type(images).__name__}. Join what streams by "
        "relabel_datasets.join()"
    )


def _split_folder(root: Path, split: str) -> Path:
    """Return the folder of the split below `root`, where there is one, as in imagenet/train and imagenet/val."""
    names = (split, *SPLIT_ALIASES.get(split, ()))
    return next((root / name for name in names if (root / name).is_dir()), root)


def _match(label_maps: LabelMaps, source: KeyedImages, where: str) -> tuple[npt.NDArray[np.int32], _Extra]:
    """Return the place in the source of each label map's image, -1 where there is none, and what is left of the source."""
    split, keys = label_maps.split, source.keys
    rows = label_maps.index.rows(keys)
    left = np.flatnonzero(rows < 0)
    if split.key_rule is not None and len(left):
        rows[left] = label_maps.index.rows([_by_rule(keys[place], split.key_rule) for place in left.tolist()])
        left = left[rows[left] < 0]
    matched = np.flatnonzero(rows >= 0)
    places = np.full(len(label_maps), -1, np.int32)
    places[rows[matched]] = matched
    if np.count_nonzero(places >= 0) < len(matched):
        _refuse_several(label_maps, keys, rows, where)
    if isinstance(source, HFSource) and source.key_rule is None:
        _check_numbers(label_maps, source, rows, where)
    if split.skipped:  # without label map since the builder could not read them
        skipped = {entry["key"] for entry in split.skipped}
        left = np.array([i for i in left.tolist() if skipped.isdisjoint(_names(keys[i], split.key_rule))], np.int64)
    return places, _Extra(len(left), [keys[place] for place in left[:3].tolist()])


def _by_rule(key: str, rule: str) -> str:
    if rule == "stem" and "." not in key and "%" not in key:
        return key.rpartition("/")[2]  # the same, in a tenth of the time: there may be a million
    return key_of(key, rule) if key else key


def _names(key: str, rule: str | None) -> tuple[str, ...]:
    return (key,) if rule is None else (key, _by_rule(key, rule))


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
    theirs = f"the images' are such as {source.keys[0]!r}" if len(source.keys) else "there are no images"
    made = {
        None: "the label maps' keys are those of WebDataset tars, or running numbers of a Hugging Face dataset without file "
        "names: give the source that they were made of",
        "stem": "the label maps' keys are the names of image files without folder and extension",
        "path": "the label maps' keys are class/image paths: give the root of that ImageFolder",
    }[split.key_rule]
    return f"{made}; {theirs}"


def _describe(label_maps: LabelMaps, where: str, missing: Rows, extra: _Extra) -> str:
    examples = [label_maps.index.key(row) for row in missing[:3].tolist()]
    problems = [
        f"{count} {what}, such as {', '.join(map(repr, keys))}"
        for count, keys, what in (
            (len(missing), examples, "label maps have no image"),
            (extra.number, extra.examples, "images have no label map"),
        )
        if count
    ]
    config = label_maps.manifest.config
    return f"{where} and config {config!r}, split {label_maps.split.name!r}, do not match: " + "; ".join(problems)


def join(
    samples: Iterable[Mapping[str, Any]],
    label_maps: LabelMaps,
    *,
    key: str = "__key__",
    unmatched: OnUnmatched = "error",
    complete: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield samples that stream with their label maps: new dicts, with `"label_map"` added.

    Images that were skipped when the label maps were made are left out.

    Args:
        samples: dicts, such as those of a `webdataset` pipeline or of a `datasets.IterableDataset`.
        label_maps: of the split that the samples are of.
        key: name of the field with the key.
        unmatched: `"error"`, or `"skip"` to leave out samples without label map and log their count at the end.
        complete: whether every label map must come exactly once, as in one pass of one process over a whole epoch.

    Raises:
        DatasetError: (a ValueError) a sample without key or without label map; with `complete`, a key that comes twice or
            label maps that did not come.

    Example:
        >>> label_maps = LabelMaps("imagenet-relabel", split="train")
        >>> pipeline = webdataset.WebDataset("imagenet-train-{0000..1023}.tar", shardshuffle=100)
        >>> for sample in join(pipeline, label_maps):
        ...     image = decode_image(sample["jpg"])  # upright, as the annotator saw it
        ...     image, soft_label = transforms(image, sample["label_map"])
        >>> # As a stage of the pipeline, for DataLoader workers:
        >>> pipeline = pipeline.compose(functools.partial(join, label_maps=label_maps))

        >>> stream = datasets.load_dataset("timm/imagenet-1k-wds", split="train", streaming=True)
        >>> for sample in join(stream.cast_column("jpg", datasets.Image(decode=False)), label_maps):
        ...     image = decode_image(sample["jpg"]["bytes"])
        ...     image, soft_label = transforms(image, sample["label_map"])
    """
    check_unmatched(unmatched)
    return _join(samples, label_maps, key, unmatched, complete)


def _join(
    samples: Iterable[Mapping[str, Any]], label_maps: LabelMaps, field: str, unmatched: OnUnmatched, complete: bool
) -> Iterator[dict[str, Any]]:
    rule, skipped = label_maps.split.key_rule, {entry["key"] for entry in label_maps.split.skipped}
    seen = np.zeros(len(label_maps), bool) if complete else None
    matched, extra = 0, _Extra(0, [])
    try:
        for sample in samples:
            key = _key(sample, field)
            row = _row(label_maps.index, key, rule)
            if row is not None:
                if seen is not None:
                    _mark(seen, row, key)
                matched += 1
                yield {**sample, "label_map": label_maps.at(row)}
            elif skipped.isdisjoint(_names(key, rule)):
                if unmatched == "error":
                    raise DatasetError(_no_label_map(label_maps, key, matched))
                extra = _Extra(extra.number + 1, [*extra.examples, key][:3])
    finally:  # pipelines of a set length do not come to the end
        if extra.number:
            examples = ", ".join(map(repr, extra.examples))
            logger.warning(
                "%d samples without label map left out, such as %s; %d had one", extra.number, examples, matched
            )
    if seen is not None and not seen.all():
        unseen = np.flatnonzero(~seen)
        examples = ", ".join(repr(label_maps.index.key(row)) for row in unseen[:3].tolist())
        raise DatasetError(
            f"{len(unseen)} of {len(seen)} label maps did not come, such as {examples}: with complete=True the samples must "
            f"be all of split {label_maps.split.name!r}, in one process"
        )


def _key(sample: Mapping[str, Any], field: str) -> str:
    key = sample.get(field)
    if not isinstance(key, str):
        raise DatasetError(
            f"a sample has no key in {field!r}, but {sorted(sample)}: name the field with the key by key="
        )
    return key


def _row(index: Index, key: str, rule: str | None) -> int | None:
    row = index.row(key)
    if row is None and key:  # a key as webdataset has it, such as './a'
        row = index.row(key_from_member(key))
    return index.row(_by_rule(key, rule)) if row is None and rule is not None else row


def _mark(seen: npt.NDArray[np.bool_], row: int, key: str) -> None:
    if seen[row]:
        raise DatasetError(
            f"key {key!r} came twice: with complete=True every sample must come once, so shards must not repeat"
        )
    seen[row] = True


def _no_label_map(label_maps: LabelMaps, key: str, matched: int) -> str:
    return (
        f"no label map of {key!r} among the {len(label_maps)} of config {label_maps.manifest.config!r}, split "
        f"{label_maps.split.name!r}, with keys such as {next(iter(label_maps), None)!r}; {matched} samples before it had one. "
        "Give the samples of this split, or unmatched='skip' to leave out those without label map"
    )
