"""Import published label maps: convert the files of a release to shards, index, manifest and card.

Shapes: K classes stored per location, H x W locations.
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
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._version import __version__
from ..data.skipped import Skipped
from ..data.sources import source_sha256
from ..errors import DatasetError, ImageError, LabelMapError
from ..keywords import checked_keywords
from ..labels import codec
from ..labels.encodings import Encoded, get_map_encoding
from ..labels.statistics import Statistics, add_up, image_statistics
from ..naming import check_config, check_split
from ..shards.card import read_template, write_card
from ..shards.index import make_index
from ..shards.manifest import Manifest
from ..shards.tars import ShardInfo, ShardWriter, make_split, shard_names
from ..storage.folders import MANIFEST_NAME, local_path
from ..storage.local import write_atomically
from ..storage.output_errors import explaining_errors
from ..words import counted, printable
from .pairing import PairedImages, find_images
from .published import FORMATS, PublishedMaps

logger = logging.getLogger(__name__)

ORDERS = ("hw", "wh")
_ENCODING = get_map_encoding("topk")  # of all releases
_BATCH_SIZE = 256  # files encoded at a time, while the next ones are read
_NUM_SAMPLED = 64  # files that determine the common shape


@checked_keywords()
def import_label_maps(
    maps: PublishedMaps,
    path: str | os.PathLike[str],
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
    """Write the label maps of a release as a split of a new config in the `topk` encoding.

    Scores, classes and locations are those of the release, apart from the rounding to `storage_dtype`. Samples are shuffled and
    assigned to shards as in `build`. The config is written completely or not at all. As in the training code of the releases,
    a map is assumed to cover its whole image.

    A label map stores the size of its image. Without `images`, the size of the map in locations is stored instead.
    `load_dataset(..., images=...)` corrects it by the image. Users of `LabelMaps` must correct it before any transform, by
    `LabelMap.wrap(label_map.logits, like=label_map, canvas_size=(height, width))`.

    Args:
        maps: Label map files of the release.
        path: Folder of the dataset. The config is written to `<path>/<config>`, which must not exist.
        order: Order of the axes in the files: `"hw"` for `[2, K, height, width]`, `"wh"` for `[2, K, width, height]`. See
            `detect_order`.
        images: ImageFolder with the images of the maps, or its parent folder if it is named like the split. Image sizes are
            read from the headers, including EXIF rotation. Every map must have an image and every image a map. Default:
            none.
        include_images: Whether to copy the images into the shards. Licenses of many images forbid publishing such shards.
            Default: False.
        config: Name of the config. Default: name of the format.
        split: Name of the split. Default: `"train"`.
        storage_dtype: Precision of the stored logits: `"float16"`, with a relative error of at most 1/2048, or `"uint8"`.
            Default: `"float16"`.
        shard_size: Number of samples per shard. Default: 5000.
        skip_bad: Whether to skip damaged and invalid files, maps without an image and images without a map. They are
            reported on stderr and listed in the manifest. Default: False, which stops at the first bad file.
        num_threads: Number of threads that read files. Default: 4.
        card: Template of the dataset card README.md, a file or a name in cards/. Default: a general one.
        progress: Whether to show a progress bar on stderr. Default: True.

    Returns:
        Manifest of the config.

    Raises:
        DatasetError: The config exists already, or images and maps do not match.
        LabelMapError: A file is damaged or not a label map of this format.
        ImageError: The header of an image is unreadable.
        ValueError: An argument is out of range.
        FileNotFoundError: The images or the card template do not exist.

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
        raise ValueError("include_images needs the folder of the images: set images=")
    for name, value in (("shard_size", shard_size), ("num_threads", num_threads)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    storage_dtype = _ENCODING.entry.resolve_storage_dtype(storage_dtype)
    if card is not None:
        read_template(card)  # fail before minutes of work
    root = local_path(path, "the folder of the dataset")
    folder = root / config
    if folder.exists():
        raise DatasetError(f"{folder} exists already: choose another config name, or remove that folder")
    paired = None if images is None else find_images(maps, images, split)
    if paired is not None and not skip_bad:
        paired.check_complete()
    job = _Job(maps, order == "wh", _common_shape(maps), paired, include_images, storage_dtype, skip_bad)
    folder.mkdir(parents=True)
    try:
        with explaining_errors(folder):
            shuffled = np.random.default_rng(0).permutation(len(maps)).tolist()
            written = _write_shards(folder, split, job, shuffled, shard_size, num_threads, progress)
            manifest = _finish_import(folder, split, job, written)
    except BaseException:  # including KeyboardInterrupt
        shutil.rmtree(folder, ignore_errors=True)
        raise
    write_card(root, card)
    if images is None:
        logger.info("%s: the maps do not store the sizes of their images; load them with images=", folder)
    return manifest


class _LoadedMap(NamedTuple):
    position: int  # in the release
    logits: Tensor  # [K, H, W]
    classes: Tensor  # [K, H, W]
    canvas: tuple[int, int]  # (height, width)
    image: bytes | None


@dataclass(frozen=True)
class _Job:
    """Settings of an import."""

    maps: PublishedMaps
    transposed: bool  # files store [K, W, H]
    shape: tuple[int, ...]  # [K, H, W] or [K, W, H], as in the files
    images: PairedImages | None
    include_images: bool
    storage_dtype: str
    skip_bad: bool

    @property
    def map_size(self) -> tuple[int, int]:
        """(H, W) of the maps."""
        return (self.shape[2], self.shape[1]) if self.transposed else (self.shape[1], self.shape[2])

    def load(self, index: int) -> _LoadedMap | Skipped:
        """Return the label map of a file with axes [K, H, W]."""
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
                raise type(error)(f"{error}. skip_bad=True skips such files and lists them in the manifest") from error
            return Skipped(self.maps.keys[index], self.maps.name(index), str(error))
        if self.transposed:
            logits, classes = logits.mT, classes.mT
        return _LoadedMap(index, logits, classes, canvas, image)


def _common_shape(maps: PublishedMaps) -> tuple[int, ...]:
    """Return the most common `[K, H, W]` of a random sample of the files."""
    shapes: Counter[tuple[int, ...]] = Counter()
    last_error: Exception | None = None
    for index in np.random.default_rng(0).permutation(len(maps))[:_NUM_SAMPLED].tolist():
        try:
            shapes[tuple(maps.load(index)[0].shape)] += 1
        except (OSError, LabelMapError) as error:
            last_error = error
    if not shapes:
        assert last_error is not None
        raise LabelMapError(
            f"none of {counted(min(len(maps), _NUM_SAMPLED), 'file')} is a label map of format {maps.format!r}: {last_error}"
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
                for batch in _map_batches(job, chunk, pool):
                    loaded = [item for item in batch if isinstance(item, _LoadedMap)]
                    statistics.append(_write_batch(writer, job, loaded))
                    bad = [item for item in batch if isinstance(item, Skipped)]
                    for skipped in bad:
                        tqdm.write(printable(f"skipped: {skipped.error}"), file=sys.stderr)
                    written.skipped += bad
                    bar.update(len(batch))
                written.shards.append(writer.close()._replace(statistics=add_up(statistics)))
            if not written.shards[-1].rows:
                raise DatasetError(
                    f"no file of {name} can be imported ({counted(len(chunk), 'file')}), last {written.skipped[-1].error}"
                )
    return written


def _map_batches(job: _Job, indices: list[int], pool: ThreadPoolExecutor) -> Iterator[list[_LoadedMap | Skipped]]:
    """Yield the files in batches, with the next batch prefetched."""
    prefetched: Iterator[_LoadedMap | Skipped] = iter(())
    for start in range(0, len(indices), _BATCH_SIZE):
        previous, prefetched = prefetched, pool.map(job.load, indices[start : start + _BATCH_SIZE])
        if start:
            yield list(previous)
    yield list(prefetched)


def _write_batch(writer: ShardWriter, job: _Job, loaded: list[_LoadedMap]) -> Statistics:
    if not loaded:
        return Statistics()
    logits = torch.stack([item.logits for item in loaded])
    classes = torch.stack([item.classes for item in loaded])
    encoded = Encoded(_ENCODING, {"logits": logits, "classes": classes}, job.maps.num_classes)
    blobs = codec.encode(encoded, [item.canvas for item in loaded], job.storage_dtype)
    labels = [job.maps.labels[item.position] for item in loaded]
    for item, label, blob in zip(loaded, labels, blobs, strict=True):
        writer.add(job.maps.keys[item.position], label, item.image, blob)
    return image_statistics(encoded, labels)


def _finish_import(folder: Path, split: str, job: _Job, written: _Written) -> Manifest:
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
        encoding={
            "name": _ENCODING.name,
            "k": job.shape[0],
            "dtype": job.storage_dtype,
            "map_size": list(job.map_size),
        },
        splits={split: entry},
        made_with=f"relabel_datasets {__version__}",
    )
    manifest.save(folder)
    if entry.skipped:
        logger.warning("%s skipped: see `skipped` in %s/%s", counted(len(entry.skipped), "file"), folder, MANIFEST_NAME)
    return manifest
