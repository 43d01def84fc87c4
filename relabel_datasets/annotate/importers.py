"""Import published label maps: the files of a release become shards, index, manifest and card, like those of a build.

Shapes: K classes stored at a location, H x W locations.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.skipped import Skipped
from ..data.sources import source_sha256
from ..errors import DatasetError, ImageError, LabelMapError
from ..labels import codec
from ..labels.encoding import Encoded
from ..labels.statistics import Statistics, add_up, image_statistics
from ..naming import check_config, check_split
from ..shards.card import read_template, write_card
from ..shards.index import make_index
from ..shards.manifest import Manifest
from ..shards.tars import ShardInfo, ShardWriter, make_split, shard_names
from ..storage.folders import local_path
from ..storage.local import write_atomically
from ..storage.output import explaining_errors
from ..words import printable
from .pairing import FoundImages, find_images
from .published import FORMATS, PublishedMaps

logger = logging.getLogger(__name__)

ORDERS = ("hw", "wh")
_BATCH = 256  # files read while as many are encoded
_NUM_LOOKED_AT = 64  # files that tell the shape of all


def import_label_maps(
    maps: PublishedMaps,
    root: str | os.PathLike[str],
    *,
    order: str,
    images: str | os.PathLike[str] | None = None,
    include_images: bool = False,
    config: str | None = None,
    split: str = "train",
    storage_dtype: str | None = None,
    shard_size: int = 5000,
    skip_bad: bool = False,
    num_threads: int = 4,
    card: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Manifest:
    """Write the label maps of a release as a split of a new config, in the `topk` encoding; return its manifest.

    Scores, classes and their places stay as published, but for the rounding to `storage_dtype`. Samples are dealt to shards by
    the same fixed shuffle as in `build`. The config is written whole or not at all. Maps are taken to be of whole images, as
    the releases' training code does.

    A label map knows the size of its image. Without `images` it is given its own, in locations. `load_dataset(...,
    images=...)` corrects that by the image it reads, but who uses `LabelMaps` must do so before any transform, by
    `LabelMap.wrap(label_map.logits, like=label_map, canvas_size=(height, width))`.

    Args:
        maps: the release's files.
        root: folder of the dataset; the config goes into `<root>/<config>`, which must not exist.
        order: `"hw"` if the files' tensors are `[2, K, height, width]`, `"wh"` if they are `[2, K, width, height]`; see
            `detect_order`.
        images: the ImageFolder that the maps are of, or the folder above it where that is named like the split. Images'
            sizes are read from their headers, EXIF rotation included, and each must have a map and each map an image.
        include_images: whether the images' bytes go into the shards, which for many images may then not be published.
        config: name of the config. Default: the format's.
        split: name of the split.
        storage_dtype: how logits are stored: `"float16"`, within 1/2048 of each score, or `"uint8"`. Default: `"float16"`.
        shard_size: samples a shard.
        skip_bad: leave out files that are damaged or no label maps, maps without image and images without map; they are
            shown and listed in the manifest. By default the first bad file stops the import.
        num_threads: threads that read files.
        card: template of the dataset's README.md. Default: a general one.
        progress: whether to show a progress bar on stderr.

    Raises:
        DatasetError: (a ValueError) the config exists, or images and maps do not match.
        LabelMapError: (a ValueError) a file is bad; the message names it.
        ImageError: (a ValueError) an image has no readable header.
        ValueError: an argument is out of range.
        FileNotFoundError: no such images or card template.

    Example:
        >>> maps = PublishedMaps("relabel_imagenet.tar", "relabel")
        >>> order = detect_order(maps, "/path/to/imagenet", TimmAnnotator("resnet50.a1_in1k", pretrained=True)).order
        >>> import_label_maps(maps, "imagenet-relabel", order=order, images="/path/to/imagenet")
    """
    config = check_config(maps.format if config is None else config, "config=")
    check_split(split, "split=")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
    if include_images and images is None:
        raise ValueError("include_images takes images: say where they are")
    for name, value in (("shard_size", shard_size), ("num_threads", num_threads)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    storage_dtype = codec.resolve_storage_dtype("topk", storage_dtype)
    if card is not None:
        read_template(card)  # better now than after minutes
    root = local_path(root, "the folder of the dataset")
    folder = root / config
    if folder.exists():
        raise DatasetError(f"{folder} is there already: choose another config name, or remove that folder")
    found = None if images is None else find_images(maps, images, split)
    if found is not None and not skip_bad:
        found.check_complete()
    job = _Job(maps, order == "wh", _common_shape(maps), found, include_images, storage_dtype, skip_bad)
    folder.mkdir(parents=True)
    try:
        with explaining_errors(folder):
            order_of_all = np.random.default_rng(0).permutation(len(maps)).tolist()
            written = _write_shards(folder, split, job, order_of_all, shard_size, num_threads, progress)
            manifest = _finish(folder, split, job, written)
    except BaseException:  # Ctrl-C, too
        shutil.rmtree(folder, ignore_errors=True)
        raise
    write_card(root, card)
    if images is None:
        logger.info("%s: the maps do not know their images' sizes; load them with images=", folder)
    return manifest


class _Loaded(NamedTuple):
    position: int  # in the release
    logits: Tensor  # [K, H, W]
    classes: Tensor  # [K, H, W]
    canvas: tuple[int, int]  # (height, width)
    image: bytes | None


@dataclass(frozen=True)
class _Job:
    """What an import makes of each file."""

    maps: PublishedMaps
    transposed: bool  # files have [K, W, H]
    shape: tuple[int, ...]  # [K, H, W] or [K, W, H], as in the files
    images: FoundImages | None
    include_images: bool
    storage_dtype: str
    skip_bad: bool

    @property
    def map_size(self) -> tuple[int, int]:
        """(H, W)."""
        return (self.shape[2], self.shape[1]) if self.transposed else (self.shape[1], self.shape[2])

    def load(self, index: int) -> _Loaded | Skipped:
        """Return the label map of a file, with its axes in our order."""
        try:
            logits, classes = self.maps.load(index)
            if logits.shape != self.shape:
                raise LabelMapError(
                    f"{self.maps.name(index)}: expected {list(self.shape)} as in the other files, got {list(logits.shape)}"
                )
            canvas, image = self.map_size, None
            if self.images is not None:
                canvas, image = self.images.open(index, whole=self.include_images)
        except (OSError, LabelMapError, ImageError) as error:
            if not self.skip_bad:
                raise type(error)(
                    f"{error}. skip_bad=True (--skip-bad) leaves such files out, and lists them"
                ) from error
            return Skipped(self.maps.keys[index], self.maps.name(index), str(error))
        if self.transposed:
            logits, classes = logits.mT, classes.mT
        return _Loaded(index, logits, classes, canvas, image)


def _common_shape(maps: PublishedMaps) -> tuple[int, ...]:
    """Return the `[K, H, W]` that most of the files have that are looked at."""
    shapes: Counter[tuple[int, ...]] = Counter()
    error: Exception | None = None
    for index in np.random.default_rng(0).permutation(len(maps))[:_NUM_LOOKED_AT].tolist():
        try:
            shapes[tuple(maps.load(index)[0].shape)] += 1
        except (OSError, LabelMapError) as bad:
            error = bad
    if not shapes:
        assert error is not None
        raise LabelMapError(
            f"none of {min(len(maps), _NUM_LOOKED_AT)} files is a label map of format {maps.format!r}: {error}"
        )
    return shapes.most_common(1)[0][0]


@dataclass
class _Written:
    names: Sequence[str]
    shards: list[ShardInfo]
    skipped: list[Skipped]


def _write_shards(
    folder: Path, split: str, job: _Job, indices: list[int], shard_size: int, num_threads: int, progress: bool
) -> _Written:
    chunks = [indices[start : start + shard_size] for start in range(0, len(indices), shard_size)]
    written = _Written(shard_names(split, len(chunks)), [], [] if job.images is None else list(job.images.extra))
    extension = job.images.source.extension if job.images is not None and job.include_images else None
    with (
        ThreadPoolExecutor(num_threads, thread_name_prefix="import") as pool,
        tqdm(total=len(indices), unit="map", disable=not progress, desc="import") as bar,
    ):
        for name, chunk in zip(written.names, chunks, strict=True):
            with ShardWriter(folder / name, extension) as writer:
                statistics = [Statistics()]
                for batch in _batches(job, chunk, pool):
                    statistics.append(_write_batch(writer, job, [item for item in batch if isinstance(item, _Loaded)]))
                    bad = [item for item in batch if isinstance(item, Skipped)]
                    for skipped in bad:
                        tqdm.write(printable(f"skipped: {skipped.error}"), file=sys.stderr)
                    written.skipped += bad
                    bar.update(len(batch))
                written.shards.append(writer.close()._replace(statistics=add_up(statistics)))
            if not written.shards[-1].rows:
                raise DatasetError(
                    f"none of the {len(chunk)} files of {name} can be imported, last {written.skipped[-1].error}"
                )
    return written


def _batches(job: _Job, indices: list[int], pool: ThreadPoolExecutor) -> Iterator[list[_Loaded | Skipped]]:
    """Yield the files in batches; the next one is read while one is encoded."""
    waiting: Iterator[_Loaded | Skipped] = iter(())
    for start in range(0, len(indices), _BATCH):
        previous, waiting = waiting, pool.map(job.load, indices[start : start + _BATCH])
        if start:
            yield list(previous)
    yield list(waiting)


def _write_batch(writer: ShardWriter, job: _Job, loaded: list[_Loaded]) -> Statistics:
    if not loaded:
        return Statistics()
    logits = torch.stack([item.logits for item in loaded])
    classes = torch.stack([item.classes for item in loaded])
    encoded = Encoded(logits, classes, None, job.maps.num_classes)
    blobs = codec.encode(encoded, [item.canvas for item in loaded], job.storage_dtype)
    labels = [job.maps.labels[item.position] for item in loaded]
    for item, label, blob in zip(loaded, labels, blobs, strict=True):
        writer.add(job.maps.keys[item.position], label, item.image, blob)
    return image_statistics(encoded, labels)


def _finish(folder: Path, split: str, job: _Job, written: _Written) -> Manifest:
    """Write the index, and then the manifest of all shards."""
    maps = job.maps
    rows = list(itertools.chain.from_iterable(shard.rows for shard in written.shards))
    index = make_index(rows, images=job.include_images)
    entry = make_split(
        split,
        written.names,
        written.shards,
        index,
        image_extension=job.images.source.extension if job.images is not None and job.include_images else None,
        key_rule=maps.key_rule,
        source_sha256=source_sha256(maps),
        skipped=[skipped._asdict() for skipped in written.skipped],
    )
    write_atomically(folder / entry.index, index)
    manifest = Manifest(
        config=folder.name,
        classes=list(maps.classes),
        annotator={
            "kind": "imported",
            "name": folder.name,
            "format": maps.format,
            "reference": FORMATS[maps.format].reference,
            "order": "wh" if job.transposed else "hw",
            "canvas": "map" if job.images is None else "images",
            "num_classes": maps.num_classes,
        },
        encoding={"name": "topk", "k": job.shape[0], "dtype": job.storage_dtype, "map_size": list(job.map_size)},
        splits={split: entry},
        made_with=f"relabel_datasets {version('relabel-datasets')}",
    )
    manifest.save(folder)
    if entry.skipped:
        logger.warning("%d files were left out: see %s", len(entry.skipped), folder)
    return manifest
