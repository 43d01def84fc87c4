"""Join label maps with a stream of samples, by key."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DatasetError
from ..shards.index import Index
from ..shards.manifest import Split
from ..words import counted
from .joins import Extra, IndexKeys, OnUnmatched, by_rule, check_unmatched, log_spelling, names_of, skipped_keys
from .keys import key_from_member
from .spellings import SPELLINGS, Spell, Spelling, StreamSpelling
from .store import LabelMaps

logger = logging.getLogger(__name__)

_NUM_FIRST = 20  # samples that decide whether keys match exactly


def join(
    samples: Iterable[Mapping[str, Any]],
    label_maps: LabelMaps,
    *,
    key: str = "__key__",
    unmatched: OnUnmatched = "error",
    complete: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield the samples of a stream with their label maps, as new dicts that also have `"label_map"`.

    Samples whose images were skipped when the label maps were made are left out.

    Args:
        samples: Samples as dicts, such as those of a `webdataset` pipeline or of a `datasets.IterableDataset`.
        label_maps: Label maps of the same split.
        key: Name of the field with the sample key.
        unmatched: `"error"`, or `"skip"` to leave out samples without a label map and log their number at the end.
        complete: Whether every label map must occur exactly once, as in one pass of one process over a whole epoch.

    Returns:
        An iterator over the joined samples.

    Raises:
        DatasetError: (a ValueError) A sample has no key or no label map. With `complete`: a key is repeated, or label maps
            remain at the end.

    Example:
        >>> label_maps = LabelMaps("imagenet-relabel", split="train")
        >>> pipeline = webdataset.WebDataset("imagenet-train-{0000..1023}.tar", shardshuffle=100)
        >>> for sample in join(pipeline, label_maps):
        ...     image = decode_image(sample["jpg"])  # applies the EXIF orientation, as the annotator did
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
    rule, skipped = label_maps.split.key_rule, _SkippedKeys(label_maps.split)
    seen = np.zeros(len(label_maps), bool) if complete else None
    spelled = StreamSpelling(IndexKeys(label_maps.index), partial(_log_stream_spelling, label_maps))
    matched, extra = 0, Extra(0, [])
    samples = iter(samples)
    first = list(itertools.islice(samples, _NUM_FIRST))
    if any(_row(label_maps.index, _key(sample, field), rule) is not None for sample in first):
        spelled.close()  # keys are spelled as the label maps' keys, so a stray sample must not match by another spelling
    try:
        for sample in itertools.chain(first, samples):
            key = _key(sample, field)
            row = _row(label_maps.index, key, rule)
            if row is None:
                row = spelled.row(key)
            elif not matched:
                spelled.close()
            if row is not None:
                if seen is not None:
                    _mark(seen, row, key)
                matched += 1
                yield {**sample, "label_map": label_maps.at(row)}
            elif not skipped.has(key, spelled.spell, matched):
                if unmatched == "error":
                    raise DatasetError(_no_label_map(label_maps, key, matched))
                extra = Extra(extra.number + 1, [*extra.examples, key][:3])
    finally:  # a pipeline of fixed length never reaches the end
        if extra.number:
            examples = ", ".join(map(repr, extra.examples))
            logger.warning(
                "%s without a label map left out, such as %s; %d had one",
                counted(extra.number, "sample"),
                examples,
                matched,
            )
    if seen is not None and not seen.all():
        unseen = np.flatnonzero(~seen)
        examples = ", ".join(repr(label_maps.index.key(row)) for row in unseen[:3].tolist())
        raise DatasetError(
            f"{len(unseen)} of {len(seen)} label maps had no sample, such as {examples}: with complete=True one process must "
            f"read all samples of split {label_maps.split.name!r}"
        )


def _log_stream_spelling(label_maps: LabelMaps, spelling: Spelling, key: str, row: int) -> None:
    log_spelling("the samples", spelling, key, label_maps.index.key(row))


def _key(sample: Mapping[str, Any], field: str) -> str:
    key = sample.get(field)
    if not isinstance(key, str):
        raise DatasetError(
            f"a sample has no key in {field!r}, only the fields {sorted(sample)}: pass the name of the field as key="
        )
    return key


def _row(index: Index, key: str, rule: str | None) -> int | None:
    row = index.row(key)
    if row is None and key:  # webdataset does not normalize keys such as './a'
        row = index.row(key_from_member(key))
    return index.row(by_rule(key, rule)) if row is None and rule is not None else row


def _mark(seen: npt.NDArray[np.bool_], row: int, key: str) -> None:
    if seen[row]:
        raise DatasetError(
            f"key {key!r} is repeated: with complete=True every sample must occur once, so shards must not repeat"
        )
    seen[row] = True


def _no_label_map(label_maps: LabelMaps, key: str, matched: int) -> str:
    return (
        f"no label map of {key!r} among the {len(label_maps)} of config {label_maps.manifest.config!r}, split "
        f"{label_maps.split.name!r}, with keys such as {next(iter(label_maps), None)!r}; {counted(matched, 'sample')} before it had one. "
        "Pass the samples of this split, or unmatched='skip' to leave out samples without a label map"
    )


class _SkippedKeys:
    """Lookup of the images that were skipped when the label maps were made."""

    def __init__(self, split: Split) -> None:
        self._split = split
        self._by_spell: dict[Spell | None, set[str]] = {}

    def has(self, key: str, spell: Spell | None, matched: int) -> bool:
        """Return whether a key is that of a skipped image. Before any key has matched, all spellings are compared."""
        if not self._split.skipped:
            return False
        spells = (spell,) if matched else (None, *(spelling.spell for spelling in SPELLINGS))
        return any(not self._keys(spell).isdisjoint(names_of(key, self._split.key_rule, spell)) for spell in spells)

    def _keys(self, spell: Spell | None) -> set[str]:
        if spell not in self._by_spell:
            self._by_spell[spell] = skipped_keys(self._split, spell)
        return self._by_spell[spell]
