"""Import published labels of crops: convert the files of a release to a config in the encoding `crops`."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .._version import __version__
from ..data.skipped import Skipped
from ..data.sources import source_sha256
from ..data.spellings import check_distinct
from ..errors import DatasetError, ImageError, LabelMapError
from ..keywords import checked_keywords
from ..labels.crop_labels import CropLabels
from ..labels.statistics import Statistics, add_up, stored_crop_statistics
from ..naming import check_case, check_config
from ..shards.card import read_template
from ..shards.manifest import LOW_AGREEMENT, Manifest
from ..shards.tars import ShardInfo, ShardWriter
from ..storage.folders import MANIFEST_NAME
from ..storage.output import open_output
from ..storage.output_errors import explaining_errors
from ..words import counted
from .builder import run_build
from .crop_files import CropFile
from .engines import OnProgress, OnSkipped
from .pairing import open_image
from .published_crops import REFERENCES, PublishedCrops
from .shard import Annotated, BuildConfig
from .work import Plan, Work

logger = logging.getLogger(__name__)

_NUM_SAMPLED = 64  # files that determine the number of crops and classes
_NUM_AHEAD = 64  # files that are read ahead


@checked_keywords()
def import_crops(
    crops: PublishedCrops,
    path: str | os.PathLike[str],
    *,
    include_images: bool = False,
    config: str | None = None,
    shard_size: int = 5000,
    skip_bad: bool = False,
    num_threads: int = 4,
    card: str | os.PathLike[str] | None = None,
    storage_options: dict[str, Any] | None = None,
    progress: bool = True,
) -> Manifest:
    """Write the crop labels of a release as a split of a config in the encoding `crops`.

    Boxes, flips, classes and probabilities are stored exactly as in the release. Boxes of images with an EXIF orientation are
    turned with the image, because the releases have cropped images without turning them. Samples are shuffled and assigned to
    shards as in `build`, and like a build the import is resumable: rerun the same command after any interruption. A warning follows
    if the labels of less than half of the images agree with their classes.

    Args:
        crops: Labels of the release, paired with the images.
        path: Folder of the dataset, or URL as for `build`. The config is written to `<path>/<config>`.
        include_images: Whether to copy the images into the shards. Licenses of many images forbid publishing such shards.
            Default: False.
        config: Name of the config. Default: name of the format.
        shard_size: Number of samples per shard. Default: 5000.
        skip_bad: Whether to skip damaged and invalid files, images without a file and files without an image. They are reported
            on stderr and listed in the manifest. Default: False, which stops at the first bad file.
        num_threads: Number of threads that read files. Default: 4.
        card: Template of the dataset card README.md, a file or a name in cards/. Default: that of the existing card, else a
            general one.
        storage_options: Options for fsspec. Default: none.
        progress: Whether to show a progress bar on stderr. Default: True.

    Returns:
        Manifest of the config.

    Raises:
        DatasetError: Images and files do not match, or the folder holds another config or split of this name.
        LabelMapError: A file is damaged or not of this format.
        ImageError: The header of an image is unreadable.
        ValueError: An argument is out of range.
        OSError: `path` is not writable, or the disk is full.

    Example:
        >>> crops = PublishedCrops("FKD_soft_label_500_crops_marginal_smoothing_k_5", "fkd", "/path/to/imagenet")
        >>> import_crops(crops, "imagenet-relabel")
    """
    config = check_config(crops.format if config is None else config, "config=")
    for name, value in (("shard_size", shard_size), ("num_threads", num_threads)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if card is not None:
        read_template(card)  # fail before minutes of work
    check_distinct(crops.keys, "the images")
    if not skip_bad:
        crops.check_complete()
    output = open_output(path, storage_options)
    output.check_writable()
    sample = _Sample.of(crops)
    plan: Plan = {
        "annotator": {
            "kind": "imported",
            "name": config,
            "format": crops.format,
            "reference": REFERENCES[crops.format],
            "label_type": crops.label_type,
            "num_classes": crops.num_classes,
            "sample_sha256": sample.sha256,
        },
        "classes": list(crops.classes),
        "encoding": {"name": "crops", "k": sample.k, "dtype": "sparse", "num_crops": sample.num_crops},
        "images": include_images,
        "image_extension": crops.extension if include_images else None,
        "shard_size": shard_size,
        "source_sha256": source_sha256(crops),
        "made_with": f"relabel_datasets {__version__}",
    }
    check_case(config, (file.partition("/")[0] for file in output.find(MANIFEST_NAME)), "config=")
    work = Work(output, config, crops.split, plan, crops, BuildConfig(encoding="crops", images=include_images))
    with output.lock(work.lock_name, f"split {crops.split!r} of {work.folder}"):
        manifest = run_build(work, _ImportWorker(crops, sample, skip_bad, num_threads), card, progress, "import")
    agreement = manifest.splits[crops.split].agreement
    if agreement is not None and agreement < LOW_AGREEMENT:
        logger.warning(
            "only %.1f %% of the images have crop labels whose mean ranks the class of the image first: check that the images are "
            "those of the release, complete and under their original names, and that the classes are in the order of its class indices",
            100 * agreement,
        )
    return manifest


class _Sample(NamedTuple):
    """What all files of a release share, by a random sample of them.

    Attributes:
        num_crops: Number of crops N of an image.
        k: Number of classes of a crop.
        sha256: Hash of one file's labels, which tells one release from another. Repaired files do not change it.
    """

    num_crops: int
    k: int
    sha256: str

    @classmethod
    def of(cls, crops: PublishedCrops) -> _Sample:
        shapes: Counter[tuple[int, ...]] = Counter()
        first: CropFile | None = None
        last_error: Exception | None = None
        for index in np.random.default_rng(0).permutation(len(crops))[:_NUM_SAMPLED].tolist():
            try:
                file = crops.load(index)
            except (OSError, LabelMapError) as error:
                last_error = error
                continue
            first = first or file
            shapes[file.classes.shape] += 1
        if first is None:
            raise LabelMapError(
                f"none of {counted(min(len(crops), _NUM_SAMPLED), 'file')} has crop labels of format {crops.format!r}: {last_error}"
            )
        num_crops, k = shapes.most_common(1)[0][0]
        content = b"".join(array.tobytes() for array in (first.boxes, first.flips, first.classes, first.probs))
        return cls(num_crops, k, hashlib.sha256(content).hexdigest())


class _Loaded(NamedTuple):
    position: int  # of the image
    image: bytes | None
    blob: bytes
    statistics: Statistics


@dataclass(frozen=True)
class _ImportWorker:
    """Worker that converts one shard after the other in this process, see `engines.ShardWorker`."""

    crops: PublishedCrops
    sample: _Sample
    skip_bad: bool
    num_threads: int

    def run(
        self, work: Work, numbers: Sequence[int], on_progress: OnProgress, on_skipped: OnSkipped
    ) -> Iterator[tuple[int, Annotated]]:
        with ThreadPoolExecutor(self.num_threads, thread_name_prefix="import") as pool:
            for number in numbers:
                path = work.output.shard_path(work.file(work.names[number]))
                with explaining_errors(path.parent):
                    annotated = self._write(path, work, work.shards[number], pool, on_progress, on_skipped)
                work.store(number, annotated)
                yield number, annotated

    def _write(
        self,
        path: Path,
        work: Work,
        indices: Sequence[int],
        pool: ThreadPoolExecutor,
        on_progress: OnProgress,
        on_skipped: OnSkipped,
    ) -> Annotated:
        annotated, statistics = Annotated(ShardInfo([], 0, "")), Statistics()
        with ShardWriter(path, work.plan["image_extension"]) as writer:
            for item in self._load_ahead(indices, work.build_config.images, pool):
                if isinstance(item, Skipped):
                    annotated.skipped.append(item)
                    on_skipped(item)
                else:
                    writer.add(self.crops.keys[item.position], self.crops.labels[item.position], item.image, item.blob)
                    statistics = add_up([statistics, item.statistics])
                on_progress(1)
            if len(annotated.skipped) == len(indices):
                raise DatasetError(
                    f"no image of {path.name} can be imported ({counted(len(indices), 'image')}), last "
                    f"{annotated.skipped[-1].error}"
                )
            annotated.info = writer.close()._replace(statistics=statistics)
        return annotated

    def _load_ahead(
        self, indices: Sequence[int], with_images: bool, pool: ThreadPoolExecutor
    ) -> Iterator[_Loaded | Skipped]:
        remaining = iter(indices)
        while batch := list(islice(remaining, _NUM_AHEAD)):
            yield from pool.map(lambda index: self._load(index, with_images), batch)

    def _load(self, index: int, with_image: bool) -> _Loaded | Skipped:
        """Return the stored form of the labels of an image."""
        crops = self.crops
        try:
            file = crops.load(index)
            if file.classes.shape != self.sample[:2]:
                raise LabelMapError(
                    f"{crops.file_name(index)}: expected {self.sample.num_crops} crops with {self.sample.k} classes as in the "
                    f"other files, got {list(file.classes.shape)}"
                )
            header, image = open_image(crops.images, index, whole=with_image)
            try:
                boxes = file.shares(header.size, header.orientation)
                labels = CropLabels.from_probabilities(
                    file.classes, file.probs, num_classes=crops.num_classes, canvas_size=header.size, boxes=boxes,
                    flips=file.flips, spread_rest=file.spread_rest,
                )  # fmt: skip
            except ValueError as error:
                raise LabelMapError(f"{crops.file_name(index)}: {error}") from error
        except (OSError, LabelMapError, ImageError) as error:
            if not self.skip_bad:
                raise type(error)(f"{error}. skip_bad=True skips such files and lists them in the manifest") from error
            return Skipped(crops.keys[index], crops.name(index), str(error))
        statistics = _measure(file, crops.num_classes, crops.labels[index])
        return _Loaded(index, image, labels.to_safetensors(), statistics)


def _measure(file: CropFile, num_classes: int, label: int) -> Statistics:
    """Measure the labels of an image. Classes that no crop stores have equal probabilities, so one column stands for all of them."""
    classes, columns = np.unique(np.append(file.classes, label), return_inverse=True)
    probs = file.probs.astype(np.float32)
    soft = np.zeros((len(probs), min(len(classes) + 1, num_classes)), np.float32)
    if file.spread_rest:
        soft[:] = np.maximum(1 - probs.sum(1, keepdims=True), 0) / max(num_classes - probs.shape[1], 1)
    np.put_along_axis(soft, columns[:-1].reshape(probs.shape), probs, 1)
    return stored_crop_statistics(torch.from_numpy(soft), int(columns[-1]))
