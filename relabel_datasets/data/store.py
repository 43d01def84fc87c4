"""LabelMaps: the label maps of a split as a read-only mapping from key to LabelMap."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ..keywords import checked_keywords
from ..labels.label_map import LabelMap, read_label_maps
from ..shards.configs import find_split, open_config
from ..shards.index import Index
from ..shards.tars import ShardReader
from ..storage.folders import Folder
from ..storage.resolve import open_folder


class LabelMaps(Mapping[str, LabelMap]):
    """Mapping from sample key to `LabelMap` over the shards of a split: put ReLabel under any dataset that has keys.

    It opens an index and reads single maps by their place in the shards, so it costs no memory to speak of and may be
    shared by DataLoader workers, forked or spawned. Read images with `relabel_datasets.decode_image`, which applies
    their EXIF rotation, as the annotator saw them.

    Args:
        root: folder of the dataset, or of one of its configs: a path, a URL, or what `open_folder` returns.
        name: the config; may be left out where there is only one.
        split: name of the split.

    Attributes:
        manifest: how the maps were made, and the names of the classes.
        split: the split's entry in the manifest.

    Raises:
        FileNotFoundError: no such dataset, index or shard.
        DatasetError: (a ValueError) no such config or split, or files that are damaged or do not belong together.

    Example:
        >>> label_maps = LabelMaps("imagenet-relabel", split="train")
        >>> label_map = label_maps["n01440764_10026"]
    """

    @checked_keywords()
    def __init__(self, root: str | os.PathLike[str] | Folder, name: str | None = None, split: str = "train") -> None:
        folder, self.manifest = open_config(open_folder(root), name)
        self.split = find_split(self.manifest, split)
        self.index = Index(folder, self.split, len(self.manifest.classes))
        self.shards = ShardReader(folder, self.split)

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[str]:
        return (self.index.key(row) for row in range(len(self.index)))

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.index.row(key) is not None

    def __getitem__(self, key: str) -> LabelMap:
        row = self.index.row(key)
        if row is None:
            raise KeyError(f"no label map of {key!r} among the {len(self)} of split {self.split.name!r}")
        return self.at(row)

    def at(self, row: int) -> LabelMap:
        """Return the label map of a row, in the order of the shards."""
        return self.at_rows([row])[0]

    def at_rows(self, rows: Sequence[int]) -> list[LabelMap]:
        """Return the label maps of some rows: faster than one by one, and in one piece of memory."""
        keys, blobs = [], []
        for row in rows:
            keys.append(self.index.key(row))
            blobs.append(self.map_bytes(row))
        labels = self.index.labels[np.asarray(rows, np.int64)].tolist()
        return read_label_maps(blobs, keys, labels, len(self.manifest.classes))

    def map_bytes(self, row: int) -> bytes:
        """Return the bytes of a row's label map as they are stored."""
        return self.shards.read(row, self.index.extent(row, "map"), f"{self.index.key(row)}.safetensors")

    def image_bytes(self, row: int) -> bytes:
        """Return the bytes of a row's image file, for shards that hold images."""
        name = f"{self.index.key(row)}.{self.split.image_extension}"
        return self.shards.read(row, self.index.extent(row, "image"), name)
