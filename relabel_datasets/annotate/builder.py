"""Build a config: images -> annotator -> shards, index, manifest and card, going on where an earlier run stopped."""

from __future__ import annotations

import logging
import os
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, NamedTuple, cast

import torch
from tqdm.auto import tqdm

from ..data.skipped import Skipped
from ..data.sources import ImageSource, source_sha256
from ..data.spellings import check_distinct
from ..errors import DatasetError
from ..keywords import checked_keywords
from ..labels.codec import resolve_storage_dtype
from ..labels.encoding import resolve_k
from ..naming import check_config, check_split, default_config
from ..shards.card import read_template, write_output_card
from ..shards.formats import FIELDS
from ..shards.images import check_refuses_truncated
from ..shards.index import make_index
from ..shards.manifest import Manifest, Split
from ..shards.tars import make_split
from ..storage.folders import CARD_NAME, MANIFEST_NAME
from ..storage.output import LocalOutput, explaining_errors, open_output
from ..storage.redaction import redact_values
from ..words import counted, printable
from .annotator import Annotator, ClassSubset
from .classes import describe_pairs, match_classes
from .engines import Description, Engine, MakeAnnotator, Workers, find_engine
from .shard import Annotated, BuildConfig
from .work import Plan, Work, refuse_other_plan

logger = logging.getLogger(__name__)


@checked_keywords()
def build(
    source: ImageSource,
    root: str | os.PathLike[str],
    annotator: Annotator | MakeAnnotator,
    *,
    config: str | None = None,
    split: str = "train",
    build_config: BuildConfig = BuildConfig(),
    shard_size: int = 5000,
    class_mapping: Mapping[str, str | int] | None = None,
    all_classes: bool = False,
    card: str | os.PathLike[str] | None = None,
    engine: str | Engine = "local",
    storage_options: dict[str, Any] | None = None,
    progress: bool = True,
) -> Manifest:
    """Annotate all images of a source and write a split of a config; return its manifest.

    The images are dealt to the shards at random, by a fixed seed, so that each shard is a sample of the whole. Whatever
    stops a build, the finished shards are kept: a second run with the same arguments compares them with their records, by
    size and sha256, makes the others, and so also mends a finished split on disk. One with other arguments is refused, and
    so is one with another batch size, type of device or version of torch, on which the last bits of the maps depend.
    Images that cannot be read are left out, shown, and listed in the manifest.

    Args:
        source: the images, see `ImageFolderSource`, `WebDatasetSource`, `HFSource` and `open_source`.
        root: folder of the dataset, or the URL of one, of any protocol that fsspec can write to (`s3://bucket/name`); the
            config goes into `<root>/<config>`. One builder at a time may write a split: on disk a lock sees to that, of a
            URL only among the builders of one machine.
        annotator: gives dense logits; or a function without arguments that makes one, where it is needed. If its classes
            are others than the source's, its rows are matched to these by name, see `match_classes`.
        config: name of the config. Default: the annotator's name.
        split: name of the split.
        build_config: how label maps are made and stored.
        shard_size: samples a shard.
        class_mapping: dataset class -> the annotator's class or its index, where names do not match.
        all_classes: keep all of the annotator's classes. The dataset then has these, and the class index of each image is
            that of its class among them: every class of the source must be one of the annotator's.
        card: template of the dataset's README.md. Default: that of the card there, else a general one.
        engine: `"local"` annotates in this process, `"ray"` or a `RayEngine` on a Ray cluster.
        storage_options: for fsspec. Credentials are best left in their usual places.
        progress: whether to show a progress bar with rate and time left on stderr.

    Raises:
        DatasetError: (a ValueError) the folder holds, in part or whole, something else of this name; another process builds
            it; or no image of a shard can be read.
        ValueError: settings or classes that do not fit the annotator, or `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` is set:
            equal images must give equal label maps on every machine.
        OSError: `root` cannot be written to, or is full.
    """
    check_refuses_truncated("building label maps")
    check_distinct(source.keys, "the images")
    build_config = _resolved(build_config)
    check_split(split, "split=")
    if config is not None:
        check_config(config, "config=")
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, got {shard_size}")
    if card is not None:
        read_template(card)  # better now than after hours
    _check_images(source)
    if build_config.images and source.extension not in FIELDS:
        raise ValueError(
            f"the source's extension must be one of {FIELDS}, since timm reads no other, got {source.extension!r}"
        )
    engine = find_engine(engine)
    output = open_output(root, storage_options)
    output.check_writable()
    make = _ConstantFactory(cast(Annotator, annotator)) if hasattr(annotator, "describe") else annotator
    with engine.start(make) as workers:
        classes = _resolve_classes(workers.description, source, class_mapping, all_classes)
        described: Annotator = workers.description
        if classes.rows is not None:
            described = ClassSubset(described, classes.rows, classes.names)
        plan: Plan = {
            "annotator": redact_values(described.describe()),
            "classes": list(classes.names),
            "encoding": {"name": build_config.encoding, "k": build_config.k, "dtype": build_config.storage_dtype},
            "images": build_config.images,
            "image_extension": source.extension if build_config.images else None,
            "shard_size": shard_size,
            "source_sha256": source_sha256(source),
            "made_with": f"relabel_datasets {version('relabel-datasets')}",
            "batch_size": build_config.batch_size,
            "device": workers.description.device,
            "torch": torch.__version__.partition("+")[0],  # without the build's tag
        }
        config = config or default_config(str(plan["annotator"]["name"]))
        work = Work(output, config, split, plan, classes.source, build_config, classes.rows)
        with output.lock(work.lock_name, f"split {split!r} of {work.folder}"):
            return _build(work, workers, card, progress)


def _check_images(source: ImageSource) -> None:
    """Raise DatasetError if the source has no image that could be annotated."""
    if not len(source.keys):
        raise DatasetError("there are no images to annotate: the source is empty")
    if max(source.labels) < 0:
        raise DatasetError(
            f"no image has a class ({counted(len(source.keys), 'image')}), first {source.name(0)}: labels that are missing or negative "
            "mean that an image has no class"
        )


@dataclass(frozen=True)
class _ConstantFactory:
    """Makes the annotator that was given, where it is."""

    annotator: Annotator

    def __call__(self) -> Annotator:
        return self.annotator


def _build(work: Work, workers: Workers, card: str | os.PathLike[str] | None, progress: bool) -> Manifest:
    manifest = _existing(work)
    work.clean()
    there = None if manifest is None else manifest.splits.get(work.split)
    annotated = None
    if manifest is not None and there is not None and _is_whole(work, there):
        logger.info("%s already has all of split %r", work.folder, work.split)
        if not work.is_begun():
            work.end()  # an earlier run may have been stopped as it did this
            return manifest
    else:
        if manifest is not None:  # shards are added to those of an earlier run
            refuse_other_plan(work.folder, {"made_with": manifest.made_with}, {"made_with": work.plan["made_with"]})
            if there is not None and there.computed_with is not None:
                computed_with = there.computed_with
                refuse_other_plan(work.folder, computed_with, {key: work.plan[key] for key in computed_with})
        with explaining_errors(work.folder):
            work.begin()
            if manifest is not None and there is not None:
                _mend(work, there, manifest)
        annotated = _annotate(work, workers, progress)
        work.clean()  # what workers left that were killed meanwhile
    # Other builders may be at other splits or configs: manifest and card are changed by one after the other.
    with explaining_errors(work.output), work.output.lock(".relabel-lock", str(work.output), wait=True):
        work.output.clean([work.file(MANIFEST_NAME), CARD_NAME])
        if annotated is not None:
            manifest = _finish(work, _existing(work), annotated)
        write_output_card(work.output, card)  # also where an earlier run was stopped between manifest and card
    work.end()
    assert manifest is not None
    return manifest


class _Classes(NamedTuple):
    """The classes of the dataset."""

    names: Sequence[str]
    rows: list[int] | None  # which of the annotator's they are; None: all
    source: ImageSource  # with labels among them


def _resolve_classes(
    annotator: Description, source: ImageSource, mapping: Mapping[str, str | int] | None, keep_all: bool
) -> _Classes:
    names: Sequence[str] = annotator.classes or tuple(map(str, range(annotator.num_classes)))
    classes = _Classes(names, None, source)
    if source.classes is not None and (tuple(source.classes) != annotator.classes or mapping):
        rows = match_classes(annotator.classes, source.classes, mapping, annotator.num_classes)
        if annotator.classes is None and not mapping:
            logger.warning(
                "the annotator's classes have no names; its rows are the dataset's classes in their order: %s",
                describe_pairs(source.classes, rows),
            )
        classes = _Classes(tuple(source.classes), rows, source)
        if keep_all:
            if annotator.classes is None:
                named = dict(zip(rows, source.classes, strict=True))
                names = tuple(named.get(row, name) for row, name in enumerate(names))
            classes = _Classes(names, None, _Relabelled(source, rows))
    highest = max(source.labels, default=0)
    if highest >= len(classes.names):
        first = source.name(list(source.labels).index(highest))
        raise ValueError(f"{first} has class index {highest}, but the annotator has only {len(classes.names)} classes")
    return classes


class _Relabelled:
    """A source whose class indices are those of the annotator's classes.

    Args:
        source: the images.
        rows: for each of its classes, which class of the annotator it is.
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


def _resolved(build_config: BuildConfig) -> BuildConfig:
    """Return the settings with every default filled in, as they go into the manifest.

    Raises:
        ValueError: they are not settings that an encoder takes.
    """
    for name in ("batch_size", "num_threads"):
        if getattr(build_config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(build_config, name)}")
    k = resolve_k(build_config.encoding, build_config.k)
    return replace(
        build_config, k=k, storage_dtype=resolve_storage_dtype(build_config.encoding, build_config.storage_dtype)
    )


def _existing(work: Work) -> Manifest | None:
    """Return the config's manifest, if there is one, when the work may be added to it or is in it."""
    try:
        content = work.output.read(work.file(MANIFEST_NAME))
    except FileNotFoundError:
        return None
    manifest = Manifest.parse(content, f"{work.folder}/{MANIFEST_NAME}")
    plan = work.plan
    encoding = {key: manifest.encoding[key] for key in plan["encoding"]}
    found: Plan = {"annotator": manifest.annotator, "classes": manifest.classes, "encoding": encoding}
    if work.split in manifest.splits:
        there = manifest.splits[work.split]
        found |= {"source_sha256": there.source_sha256, "images": there.image_extension is not None}
        found |= {"image_extension": there.image_extension}
    refuse_other_plan(work.folder, found, {key: plan[key] for key in found})
    return manifest


def _is_whole(work: Work, split: Split) -> bool:
    """Return whether a finished split on disk is what its manifest says; a remote one is taken for it."""
    if not isinstance(work.output, LocalOutput):
        return True
    files = [(split.index, split.index_bytes, split.index_sha256)]
    files += zip(split.filenames, split.shard_bytes, split.shard_sha256, strict=True)
    return all(work.output.has(work.file(name), num_bytes, sha256) for name, num_bytes, sha256 in files)


def _mend(work: Work, split: Split, manifest: Manifest) -> None:
    if split.filenames != list(work.names):
        raise DatasetError(
            f"{work.folder}: files of split {split.name!r} are missing or damaged. Give the shard_size it was built with, "
            f"{max(split.shard_lengths)} or more, to mend it"
        )
    whole = work.restore(split, manifest.encoding["map_size"])
    logger.warning(
        "%s: %d of %d shards are missing or damaged, and made anew",
        work.folder,
        len(work.names) - whole,
        len(work.names),
    )


def _annotate(work: Work, workers: Workers, progress: bool) -> list[Annotated]:
    """Return what there is of every shard, after annotating those that are not finished."""
    finished = [work.load(number) for number in range(len(work.names))]
    missing = [number for number, each in enumerate(finished) if each is None]
    done = sum(len(work.shards[number]) for number, each in enumerate(finished) if each is not None)
    total = sum(map(len, work.shards))
    with tqdm(total=total, initial=done, unit="img", disable=not progress, desc="annotate") as bar:
        for number, annotated in workers.run(work, missing, bar.update, _report):
            finished[number] = annotated
    return [each for each in finished if each is not None]


def _report(skipped: Skipped) -> None:
    tqdm.write(printable(f"skipped: {skipped.error}"), file=sys.stderr)


def _skipped_by(source: ImageSource) -> Iterator[Skipped]:
    """Yield the images that are not dealt to shards."""
    yield from getattr(source, "skipped", ())
    for index, label in enumerate(source.labels):
        if label < 0:
            name = source.name(index)
            yield Skipped(source.keys[index], name, f"{name} has no class: its label is missing or negative")


def _finish(work: Work, manifest: Manifest | None, annotated: list[Annotated]) -> Manifest:
    """Write the index and then the manifest of all shards."""
    work.check_complete(annotated)
    rows = [row for each in annotated for row in each.info.rows]
    all_skipped = [*_skipped_by(work.source), *(skipped for each in annotated for skipped in each.skipped)]
    index = make_index(rows, images=work.build_config.images)
    entry = make_split(
        work.split,
        work.names,
        [each.info for each in annotated],
        index,
        image_extension=work.plan["image_extension"],
        key_rule=work.source.key_rule,
        source_sha256=work.plan["source_sha256"],
        computed_with={key: work.plan[key] for key in ("batch_size", "device", "torch")},
        skipped=[skipped._asdict() for skipped in all_skipped],
    )
    work.output.write(work.file(entry.index), index)
    map_size = next((each.map_size for each in annotated if each.map_size), None)
    manifest = Manifest(
        config=work.config,
        classes=work.plan["classes"],
        annotator=work.plan["annotator"],
        encoding={**work.plan["encoding"], "map_size": None if map_size is None else list(map_size)},
        splits={**(manifest.splits if manifest else {}), work.split: entry},
        made_with=work.plan["made_with"],
    )
    work.output.write(work.file(MANIFEST_NAME), manifest.to_bytes())
    if entry.skipped:
        num_images = entry.num_samples + len(entry.skipped)
        logger.warning(
            "%d of %d images skipped: see `skipped` in %s/%s",
            len(entry.skipped),
            num_images,
            work.folder,
            MANIFEST_NAME,
        )
    return manifest
