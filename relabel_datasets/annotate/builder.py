"""Build a config from images: annotate, write shards, index, manifest and card, and resume interrupted builds."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from tqdm.auto import tqdm

from .._version import __version__
from ..data.skipped import Skipped
from ..data.sources import ImageSource, source_sha256
from ..data.spellings import check_distinct
from ..errors import DatasetError
from ..keywords import checked_keywords
from ..labels.encodings import find_entry
from ..naming import check_case, check_config, check_split, default_config
from ..shards.card import read_template, write_output_card
from ..shards.formats import FIELDS, check_refuses_truncated
from ..shards.index import make_index
from ..shards.manifest import Manifest, Split
from ..shards.tars import make_split
from ..storage.folders import CARD_NAME, MANIFEST_NAME
from ..storage.output import LocalOutput, open_output
from ..storage.output_errors import explaining_errors
from ..storage.redaction import redact_values
from ..words import counted, printable
from .annotator import Annotator
from .calibrate import fit_calibration
from .checks import check_apart, check_images, check_scales
from .class_subset import ClassSubset
from .dataset_classes import resolve_classes
from .engines import Engine, MakeAnnotator, PreparedFactory, ShardWorker, find_engine
from .shard import Annotated, BuildConfig
from .work import Plan, Work, refuse_other_plan

logger = logging.getLogger(__name__)


@checked_keywords()
def build(
    source: ImageSource,
    path: str | os.PathLike[str],
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
    """Annotate all images of a source and write a split of a config.

    Builds are resumable: rerun the same command after any interruption, including SIGKILL. A rerun compares the finished shards
    with their records, by size and SHA-256, and builds the missing ones. It also repairs a finished split on disk. A rerun with
    other arguments is refused, as is one with another batch size, device type or version of torch, or one of which only the rerun
    is compiled, because they change the last bits of the maps. Images are assigned to shards at random with a fixed seed, so each
    shard is a random sample of the split. Unreadable images are skipped, reported on stderr, and listed in the manifest.

    Args:
        source: Images to annotate, see `ImageFolderSource`, `WebDatasetSource`, `HFSource` and `open_source`.
        path: Folder of the dataset, or URL of a protocol that fsspec can write to, such as `s3://bucket/name`. The config
            is written to `<path>/<config>`. Only one builder may write a split at a time. A lock ensures this on disk, and
            for a URL among the builders of one machine.
        annotator: Annotator, or a function without arguments that creates one in each process that annotates. If its classes
            differ from those of the source, they are matched by name, see `match_classes`.
        config: Name of the config. Default: name of the annotator.
        split: Name of the split. Default: `"train"`.
        build_config: Settings of annotation and storage. Default: `BuildConfig()`.
        shard_size: Number of samples per shard. Default: 5000.
        class_mapping: Annotator class, by name or index, of each dataset class whose name does not match. Default: none.
        all_classes: Whether to keep all classes of the annotator as the classes of the dataset. Every class of the source
            must then be one of them. Default: False, only the classes of the source.
        card: Template of the dataset card README.md, a file or a name in cards/. Default: that of the existing card, else a
            general one.
        engine: `"local"` to annotate in this process, `"ray"` or a `RayEngine` to annotate on a Ray cluster. Default:
            `"local"`.
        storage_options: Options for fsspec. Prefer the standard credential locations of the protocol to credentials here.
            Default: none.
        progress: Whether to show a progress bar on stderr. Default: True.

    Returns:
        Manifest of the config.

    Raises:
        DatasetError: The folder holds a different config or split of this name, another process is building the split, or all
            images of a shard are unreadable.
        ValueError: `path` is in the ImageFolder that is read, settings or classes do not fit the annotator, the encoding multiscale
            is not given an ensemble, or `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` is set, which would make label maps depend on the
            machine.
        OSError: `path` is not writable, or the disk is full.

    Example:
        >>> annotator = TimmAnnotator("resnet50.a1_in1k", pretrained=True)
        >>> build(ImageFolderSource("path/to/images"), "path/to/dataset", annotator, split="train")
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
        read_template(card)  # fail before hours of annotation
    check_images(source)
    if build_config.images and source.extension not in FIELDS:
        raise ValueError(
            f"the source extension must be one of {FIELDS}, the only ones that timm reads, got {source.extension!r}"
        )
    engine = find_engine(engine)
    output = open_output(path, storage_options)
    check_apart(source, output)
    output.check_writable()
    make = _ConstantFactory(cast(Annotator, annotator)) if hasattr(annotator, "describe") else annotator
    make = _prepared(make, len(source.keys), build_config)
    with engine.start(make) as workers:
        classes = resolve_classes(workers.description, source, class_mapping, all_classes)
        check_scales(build_config, workers.description)
        described: Annotator = workers.description
        if classes.rows is not None:
            described = ClassSubset(described, classes.rows, classes.names)
        plan: Plan = {
            "annotator": redact_values(described.describe()),
            "classes": list(classes.names),
            "encoding": _describe_encoding(build_config),
            "images": build_config.images,
            "image_extension": source.extension if build_config.images else None,
            "shard_size": shard_size,
            "source_sha256": source_sha256(source),
            "made_with": f"relabel_datasets {__version__}",
            "batch_size": build_config.batch_size,
            "device": workers.description.device,
            "torch": torch.__version__.partition("+")[0],  # without the tag of the build
            "compiled": workers.description.compiled,
        }
        config = config or default_config(str(plan["annotator"]["name"]))
        check_case(config, (file.partition("/")[0] for file in output.find(MANIFEST_NAME)), "config=")
        work = Work(output, config, split, plan, classes.source, build_config, classes.rows)
        with output.lock(work.lock_name, f"split {split!r} of {work.folder}"):
            return run_build(work, workers, card, progress)


@dataclass(frozen=True)
class _ConstantFactory:
    """Picklable function that returns a given annotator."""

    annotator: Annotator

    def __call__(self) -> Annotator:
        return self.annotator


def _prepared(make: MakeAnnotator, num_images: int, build_config: BuildConfig) -> MakeAnnotator:
    """Return a function that creates an annotator for the batches of a build."""
    num_crops, batch_size = build_config.num_crops, build_config.rows_per_batch(num_images)
    return PreparedFactory(make, batch_size, num_images * (num_crops or 1), classify=num_crops is not None)


def run_build(
    work: Work, worker: ShardWorker, card: str | os.PathLike[str] | None, progress: bool, verb: str = "annotate"
) -> Manifest:
    """Write the missing shards of a split, its index, manifest and card. The lock of the split must be held.

    Args:
        work: The build.
        worker: Writer of the shards.
        card: Template of the dataset card, see `build`.
        progress: Whether to show a progress bar on stderr.
        verb: Word for the work of the worker in the progress bar. Default: annotate.

    Returns:
        Manifest of the config.
    """
    manifest = _existing_manifest(work)
    work.clean()
    existing = None if manifest is None else manifest.splits.get(work.split)
    annotated = None
    if manifest is not None and existing is not None and _is_complete(work, existing):
        logger.info("%s already has all of split %r", work.folder, work.split)
        if not work.is_started():
            work.remove_records()  # an earlier run may have been killed while it removed them
            return manifest
    else:
        if manifest is not None:  # new shards join those of an earlier run
            refuse_other_plan(work.folder, {"made_with": manifest.made_with}, {"made_with": work.plan["made_with"]})
            if existing is not None and existing.computed_with is not None:
                computed_with = {"compiled": False, **existing.computed_with}
                refuse_other_plan(work.folder, computed_with, {key: work.plan[key] for key in computed_with})
        with explaining_errors(work.folder):
            work.start()
            if manifest is not None and existing is not None:
                _keep_valid_shards(work, existing, manifest)
        annotated = _write_missing(work, worker, progress, verb)
        work.clean()  # temporary files of workers that were killed
    # Builders of other splits and configs may run at the same time, but only one may change the manifest and the card.
    with explaining_errors(work.output), work.output.lock(".relabel-lock", str(work.output), wait=True):
        work.output.clean([work.file(MANIFEST_NAME), CARD_NAME])
        if annotated is not None:
            manifest = _finish_split(work, _existing_manifest(work), annotated)
        write_output_card(work.output, card)  # an earlier run may have been killed between manifest and card
    work.remove_records()
    assert manifest is not None
    return manifest


def _resolved(build_config: BuildConfig) -> BuildConfig:
    """Replace None by the defaults of the encoding, as the manifest stores them.

    Raises:
        ValueError: A setting is out of range or does not fit the encoding.
    """
    for name in ("batch_size", "num_threads"):
        if getattr(build_config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(build_config, name)}")
    entry = find_entry(build_config.encoding)
    k, storage_dtype = entry.resolve_k(build_config.k), entry.resolve_storage_dtype(build_config.storage_dtype)
    num_crops = entry.resolve_num_crops(build_config.num_crops)
    return replace(build_config, k=k, storage_dtype=storage_dtype, num_crops=num_crops)


def _describe_encoding(build_config: BuildConfig) -> dict[str, Any]:
    """Return the entry of the manifest without the size of label maps."""
    encoding = {"name": build_config.encoding, "k": build_config.k, "dtype": build_config.storage_dtype}
    return encoding if build_config.num_crops is None else {**encoding, "num_crops": build_config.num_crops}


def _describe_maps(build_config: BuildConfig, annotated: list[Annotated]) -> dict[str, Any]:
    """Return the fields of the manifest's entry of the encoding with the sizes of label maps."""
    sizes = next((shard.map_sizes for shard in annotated if shard.map_sizes), [])
    largest = max(sizes, key=math.prod, default=None)
    return {"map_size": largest, **({"map_sizes": sizes} if find_entry(build_config.encoding).has_scales else {})}


def _existing_manifest(work: Work) -> Manifest | None:
    """Return the manifest of the config, or None if there is none.

    Raises:
        DatasetError: The existing config or split was built with other arguments.
    """
    try:
        content = work.output.read(work.file(MANIFEST_NAME))
    except FileNotFoundError:
        return None
    manifest = Manifest.parse(content, f"{work.folder}/{MANIFEST_NAME}")
    plan = work.plan
    encoding = {key: value for key, value in manifest.encoding.items() if key not in ("map_size", "map_sizes")}
    existing: Plan = {"annotator": manifest.annotator, "classes": manifest.classes, "encoding": encoding}
    if work.split in manifest.splits:
        split = manifest.splits[work.split]
        existing |= {"source_sha256": split.source_sha256, "images": split.image_extension is not None}
        existing |= {"image_extension": split.image_extension}
    refuse_other_plan(work.folder, existing, {key: plan[key] for key in existing})
    return manifest


def _is_complete(work: Work, split: Split) -> bool:
    """Return whether all files of a finished split on disk match its manifest. Remote files are not checked."""
    if not isinstance(work.output, LocalOutput):
        return True
    files = [(split.index, split.index_bytes, split.index_sha256)]
    files += zip(split.filenames, split.shard_bytes, split.shard_sha256, strict=True)
    return all(work.output.has(work.file(name), num_bytes, sha256) for name, num_bytes, sha256 in files)


def _keep_valid_shards(work: Work, split: Split, manifest: Manifest) -> None:
    """Record the valid shards of a finished split, so that only missing and damaged ones are rebuilt."""
    if split.filenames != list(work.names):
        raise DatasetError(
            f"{work.folder}: files of split {split.name!r} are missing or damaged. Use the shard_size it was built with, "
            f"{max(split.shard_lengths)} or more, to rebuild them"
        )
    num_valid = work.restore(split, manifest.map_sizes)
    logger.warning(
        "%s: %d of %d shards are missing or damaged and will be rebuilt",
        work.folder,
        len(work.names) - num_valid,
        len(work.names),
    )


def _write_missing(work: Work, worker: ShardWorker, progress: bool, verb: str) -> list[Annotated]:
    """Write the missing shards and return all shards."""
    finished = [work.load(number) for number in range(len(work.names))]
    missing = [number for number, shard in enumerate(finished) if shard is None]
    done = sum(len(work.shards[number]) for number, shard in enumerate(finished) if shard is not None)
    total = sum(map(len, work.shards))
    if progress and work.build_config.num_crops is not None:
        _announce_crops(total - done, work.build_config.num_crops, work.build_config.batch_size)
    with tqdm(total=total, initial=done, unit="img", disable=not progress, desc=verb) as bar:
        for number, annotated in worker.run(work, missing, bar.update, _report):
            finished[number] = annotated
    return [shard for shard in finished if shard is not None]


def _announce_crops(num_images: int, num_crops: int, batch_size: int) -> None:
    crops, images = counted(num_crops, "crop"), counted(num_images, "image")
    tqdm.write(
        f"{num_images * num_crops:,} annotator forward passes: {crops} of {images}, in batches of {batch_size}",
        file=sys.stderr,
    )


def _report(skipped: Skipped) -> None:
    tqdm.write(printable(f"skipped: {skipped.error}"), file=sys.stderr)


def _skipped_by(source: ImageSource) -> Iterator[Skipped]:
    """Yield the images that are not assigned to any shard."""
    yield from getattr(source, "skipped", ())
    for index, label in enumerate(source.labels):
        if label < 0:
            name = source.name(index)
            yield Skipped(source.keys[index], name, f"{name} has no class: its label is missing or negative")


def _finish_split(work: Work, manifest: Manifest | None, annotated: list[Annotated]) -> Manifest:
    work.check_complete(annotated)
    existing = manifest.splits.get(work.split) if manifest else None
    rows = [row for shard in annotated for row in shard.info.rows]
    all_skipped = [*_skipped_by(work.source), *(skipped for shard in annotated for skipped in shard.skipped)]
    index = make_index(rows, images=work.build_config.images)
    computed_with: dict[str, Any] = {
        key: work.plan[key] for key in ("batch_size", "device", "torch") if key in work.plan
    }
    if work.plan.get("compiled", False) is not False:
        computed_with["compiled"] = work.plan["compiled"]
    entry = make_split(
        work.split,
        work.names,
        [shard.info for shard in annotated],
        index,
        image_extension=work.plan["image_extension"],
        key_rule=work.source.key_rule,
        source_sha256=work.plan["source_sha256"],
        computed_with=computed_with or None,
        skipped=[skipped._asdict() for skipped in all_skipped],
        calibration=existing.calibration
        if existing
        else fit_calibration([crop for shard in annotated for crop in shard.crops]),
    )
    work.output.write(work.file(entry.index), index)
    manifest = Manifest(
        config=work.config,
        classes=work.plan["classes"],
        annotator=work.plan["annotator"],
        encoding={**work.plan["encoding"], **_describe_maps(work.build_config, annotated)},
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
