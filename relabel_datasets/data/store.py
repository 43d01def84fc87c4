"""Mapping from key to label map over the shards of a split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..errors import DatasetError
from ..keywords import checked_keywords
from ..labels.batch import to_label_map
from ..labels.reading import Labels, ReadLabels, read_rows
from ..shards.configs import find_split, open_config
from ..shards.index import Index
from ..shards.manifest import Manifest
from ..shards.tars import ShardReader
from ..storage.folders import Folder
from ..storage.resolve import PathLike, open_folder


class OpenedConfig(NamedTuple):
    """A config of a dataset whose manifest was read."""

    root: Folder  # of the dataset, as it was opened
    folder: Folder  # of the config
    manifest: Manifest


def find_config(path: PathLike | Folder | OpenedConfig, config: str | None) -> OpenedConfig:
    """Return a config of a dataset with its manifest. A config that was opened before is not read again.

    Args:
        path: Dataset, as `load_dataset` accepts it, or a config that was opened before.
        config: Config name. Default: The only config.

    Raises:
        FileNotFoundError: The dataset does not exist.
        DatasetError: The config does not exist, or the dataset has several and `config` is None.
    """
    if not isinstance(path, OpenedConfig):
        root = open_folder(path)
        return OpenedConfig(root, *open_config(root, config))
    if config not in (None, path.manifest.config):
        raise DatasetError(f"{path.folder} is config {path.manifest.config!r}, not {config!r}")
    return path


class LabelMaps(Mapping[str, Labels]):
    """Read-only mapping from sample key to `LabelMap` over the shards of a split, or to `CropLabels` for stored crops.

    Use it to add label maps to any dataset whose samples have keys. Single label maps are read at their offset, so memory use is
    small, and DataLoader workers can share one instance, forked or spawned. Decode the images with
    `relabel_datasets.decode_image`, which applies their EXIF orientation, as the annotator did.

    Args:
        path: Folder of the dataset or of one of its configs: a path, a URL, or the result of `open_folder`.
        config: Config name. Default: The only config.
        split: Split name.

    Attributes:
        manifest: Manifest of the config, with the class names and the annotator's description.
        split: Entry of the split in the manifest.

    Raises:
        FileNotFoundError: The dataset, its index or a shard does not exist.
        DatasetError: (a ValueError) The config or split does not exist, or files are corrupt or inconsistent.

    Example:
        >>> label_maps = LabelMaps("imagenet-relabel", split="train")
        >>> label_map = label_maps["n01440764_10026"]
    """

    @checked_keywords()
    def __init__(self, path: PathLike | Folder | OpenedConfig, config: str | None = None, split: str = "train") -> None:
        _, folder, self.manifest = find_config(path, config)
        self.split = find_split(self.manifest, split)
        self.index = Index(folder, self.split, len(self.manifest.classes))
        self.shards = ShardReader(folder, self.split)

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[str]:
        return (self.index.key(row) for row in range(len(self.index)))

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.index.row(key) is not None

    def __getitem__(self, key: str) -> Labels:
        row = self.index.row(key) if isinstance(key, str) else None
        if row is None:
            raise KeyError(f"no label map of {key!r} among the {len(self)} of split {self.split.name!r}")
        return self.at(row)

    def at(self, row: int) -> Labels:
        """Return the label map at a row, counted from 0 in the order of the shards."""
        return self.at_rows([row])[0]

    def at_rows(self, rows: Sequence[int]) -> list[Labels]:
        """Return the label maps at several rows. This is faster than reading one at a time."""
        return list(map(to_label_map, self.read_rows(rows)))

    def read_rows(self, rows: Sequence[int]) -> list[ReadLabels]:
        """Return the label maps at several rows as rows of batches, which transforms accept, see `labels.compose`."""
        keys = [self.index.key(row) for row in rows]
        blobs = [
            self.shards.read(row, self.index.extent(row, "map"), f"{key}.safetensors")
            for row, key in zip(rows, keys, strict=True)
        ]
        labels = self.index.labels[np.asarray(rows, np.int64)].tolist()
        return read_rows(blobs, keys, labels, len(self.manifest.classes), self.split.calibration)

    def map_bytes(self, row: int) -> bytes:
        """Return the stored bytes of the label map at a row."""
        return self.shards.read(row, self.index.extent(row, "map"), f"{self.index.key(row)}.safetensors")

    def image_bytes(self, row: int) -> bytes:
        """Return the bytes of the image file at a row. The shards must hold images."""
        name = f"{self.index.key(row)}.{self.split.image_extension}"
        return self.shards.read(row, self.index.extent(row, "image"), name)
