"""Settings of annotation, and a shard that is being written, the unit of work of a build."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from ..data.skipped import Skipped
from ..data.sources import ImageSource
from ..errors import DatasetError
from ..labels import codec
from ..labels.encodings import Encoded, encode_to_cpu
from ..labels.statistics import Statistics, add_up, crop_fidelity, image_statistics
from ..shards.tars import ShardInfo, ShardWriter
from ..storage.output_errors import explaining_errors
from ..words import counted
from .calibrate import CROPS_PER_IMAGE, CropMeasures
from .crop_shard import Add, CropWriter
from .prefetch import Batch, LoadedImage, Stage

_FIDELITY_CROPS = 256  # random crops per shard whose labels are compared with dense labels; more would be slow


@dataclass(frozen=True)
class BuildConfig:
    """Settings of annotation and storage.

    Attributes:
        encoding: Encoding of the labels: `"heatmaps"` or `"topk"` for label maps, `"multiscale"` for the heatmaps of each member
            of an `Ensemble`, such as one model at several input sizes, `"crops"` for stored crops. Default: `"heatmaps"`.
        k: Number of classes to keep, per image for heatmaps, per image and member for multiscale and per location for topk, or of
            components that the labels of an image are made of for crops. Default: that of the encoding, 10, 10, 5 or 16.
        storage_dtype: Precision of the stored logits: `"uint4"`, `"uint8"` or `"float16"` for label maps, `"compact"` for crops.
            Default: that of the encoding.
        num_crops: Number of crops per image for the encoding crops, 1 to 65536. Each is one image for the annotator. Default: 100
            for crops. It cannot be set for label maps.
        images: Whether to copy the images into the shards. Default: True.
        batch_size: Number of images per batch of the annotator, or of crops for the encoding crops. The last bits of the logits
            depend on it, because libraries select kernels by the shape of a batch, so the manifest records it. Default: 32.
        num_threads: Number of threads that read and decode images, or of processes if the annotator is on a GPU. Default: 4.
    """

    encoding: str = "heatmaps"
    k: int | None = None
    storage_dtype: str | None = None
    num_crops: int | None = None
    images: bool = True
    batch_size: int = 32
    num_threads: int = 4

    def rows_per_batch(self, num_images: int) -> int:
        """Return the number of images or crops of every batch. A dataset that is smaller than a batch of label maps is one batch."""
        return self.batch_size if self.num_crops else min(self.batch_size, num_images)


@dataclass
class Annotated:
    """Finished shard.

    Attributes:
        info: Content of the shard.
        skipped: Unreadable images that are not in the shard.
        map_sizes: (H, W) of the label maps of an image, one for each map. Empty if the shard is empty.
        crops: Measurements of the random crops that calibrate labels, see `calibrate.CropMeasures`.
    """

    info: ShardInfo
    skipped: list[Skipped] = field(default_factory=list)
    map_sizes: list[list[int]] = field(default_factory=list)
    crops: list[list[float]] = field(default_factory=list)


class OpenShard:
    """Shard that is being written. The file is written completely or not at all.

    Args:
        number: Number of the shard in its split.
        path: Path of the shard.
        source: Source of the images.
        indices: Indices of the images in the source, in the order of the shard.
        build_config: Settings of annotation and storage.
        num_calibrated: Number of images, the first of the shard, whose random crops are annotated to calibrate label maps.

    Attributes:
        stages: Images or stored crops to annotate, then the crops that calibrate label maps.
    """

    def __init__(
        self,
        number: int,
        path: Path,
        source: ImageSource,
        indices: Sequence[int],
        build_config: BuildConfig,
        num_calibrated: int,
    ) -> None:
        self.number = number
        self._path, self._source, self._indices = path, source, indices
        self._extension = source.extension if build_config.images else None
        self._writer: ShardWriter | None = None
        self._annotated = Annotated(ShardInfo([], 0, ""))
        self.stages = [Stage(self, indices, build_config.num_crops)]
        self._parts: dict[int | None, _MapWriter | CropWriter | CropMeasures] = {}
        calibrated = indices[:num_calibrated]
        if build_config.num_crops is None:
            self._labels: _MapWriter | CropWriter = _MapWriter(self._add, source, build_config, calibrated)
        else:
            self._labels = CropWriter(self._add, source, build_config.k)
        self._parts[build_config.num_crops] = self._labels
        if isinstance(self._labels, _MapWriter) and calibrated:
            self.stages.append(Stage(self, calibrated, CROPS_PER_IMAGE))
            measures = CropMeasures(source, self._labels.kept)
            self._annotated.crops = measures.records
            self._parts[CROPS_PER_IMAGE] = measures

    def skip(self, batch: Batch[OpenShard]) -> list[Skipped]:
        """Return and record the unreadable images of a batch.

        Raises:
            DatasetError: None of the images of the shard is readable.
        """
        if batch.stage is not self.stages[0]:  # they have been recorded
            return []
        new = [image for image in batch.images if isinstance(image, Skipped)]
        self._annotated.skipped += new
        indices, skipped = self._indices, self._annotated.skipped
        # One unreadable image in a last shard of one image is plausible; several without a readable one indicate a wrong path.
        if len(skipped) == len(indices) and (len(indices) > 1 or len(self._source.keys) == 1):
            raise DatasetError(
                f"no image of {self._path.name} can be used ({counted(len(indices), 'image')}), first {skipped[0].error}"
            )
        return new

    def is_done(self, batch: Batch[OpenShard]) -> bool:
        """Return whether a batch is the last one of the shard."""
        return batch.is_last and batch.stage is self.stages[-1]

    def num_done(self, batch: Batch[OpenShard]) -> int:
        """Return the number of images that a batch adds to the shard, including skipped ones."""
        return len(batch.images) if batch.stage is self.stages[0] else 0

    def take(self, batch: Batch[OpenShard], logits: list[Tensor]) -> None:
        """Encode and write the results of a batch.

        Args:
            batch: Next batch of a stage of the shard.
            logits: Results of the annotator, one for each map of an image. Empty if all rows belong to unreadable images.

        Raises:
            OSError: The disk is full, or the folder was removed.
        """
        with explaining_errors(self._path.parent):
            self._open()
            self._parts[batch.stage.num_crops].take(batch, logits)

    def close(self) -> Annotated:
        """Complete the shard.

        Returns:
            Content of the shard and the skipped images.

        Raises:
            OSError: The disk is full, or the folder was removed.
        """
        with explaining_errors(self._path.parent), self._open() as writer:
            self._annotated.info = writer.close()._replace(statistics=self._labels.statistics)
        if isinstance(self._labels, _MapWriter):
            self._annotated.map_sizes = self._labels.map_sizes
        return self._annotated

    def abort(self) -> None:
        """Remove what has been written. No-op for a complete shard."""
        if self._writer is not None:
            self._writer.__exit__(None, None, None)

    def _open(self) -> ShardWriter:
        if self._writer is None:
            self._writer = ShardWriter(self._path, self._extension)
        return self._writer

    def _add(self, image: LoadedImage, blob: bytes) -> None:
        key, label = self._source.keys[image.position], self._source.labels[image.position]
        self._open().add(key, label, image.data, blob)


class _MapWriter:
    """Encodes and stores the label maps of the images of a shard.

    Attributes:
        kept: Stored maps of the images to keep, by their index in the source.
        map_sizes: (H, W) of each map of an image.
    """

    def __init__(self, add: Add, source: ImageSource, build_config: BuildConfig, keep: Sequence[int]) -> None:
        self._add, self._source, self._build_config, self._keep = add, source, build_config, set(keep)
        self._random = np.random.default_rng(0)  # the same crops in every run
        self.statistics = Statistics()
        self.kept: dict[int, bytes] = {}
        self.map_sizes: list[list[int]] = []

    def take(self, batch: Batch[OpenShard], dense: list[Tensor]) -> None:
        """Store the maps of a batch, see `OpenShard.take`."""
        if not dense:
            return
        self.map_sizes = [list(maps.shape[2:]) for maps in dense]
        if dense[0].device.type not in ("cpu", "cuda"):  # others, such as MPS, lack operations of the encodings
            dense = [maps.cpu() for maps in dense]
        images = {row: image for row, image in enumerate(batch.images) if not isinstance(image, Skipped)}
        is_whole = len(images) == len(batch.images)
        rows = slice(len(images)) if is_whole else list(images)
        encoded = encode_to_cpu(dense, self._build_config.encoding, self._build_config.k)
        encoded = encoded.changed(lambda tensor: tensor[rows])
        self._store(list(images.values()), encoded, [maps[rows] for maps in dense])

    def _store(self, images: list[LoadedImage], encoded: Encoded, dense: list[Tensor]) -> None:
        sizes = [image.size for image in images]
        blobs = codec.encode(encoded, sizes, self._build_config.storage_dtype)
        labels = [self._source.labels[image.position] for image in images]
        parts = [self.statistics, image_statistics(encoded, labels)]
        count = min(_FIDELITY_CROPS - self.statistics.crops, len(blobs))
        if count > 0:
            fidelity = crop_fidelity([maps[:count] for maps in dense], blobs[:count], sizes[:count], self._random)
            parts.append(fidelity)
        self.statistics = add_up(parts)
        for image, blob in zip(images, blobs, strict=True):
            self._add(image, blob)
            if image.position in self._keep:
                self.kept[image.position] = blob
