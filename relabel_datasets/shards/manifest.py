"""The manifest of a config, `_info.json`: its shards, how their label maps were made, and the classes.

It is written last, aside and renamed: a config without a manifest, or a shard that is not in it, does not exist. What
timm's `wds/` reader needs (`splits: {name: {name, num_samples, filenames, shard_lengths}}`) is part of it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DatasetError
from ..naming import check_config, check_extension, check_file_name, check_sha256, check_split
from ..storage.folders import MANIFEST_NAME, Folder, LocalFolder
from ..storage.local import write_atomically

VERSION = 1


@dataclass(frozen=True)
class Split:
    """The shards of one split; lists go by shard."""

    name: str
    num_samples: int
    filenames: list[str]
    shard_lengths: list[int]  # samples
    shard_bytes: list[int]
    shard_sha256: list[str]
    shard_statistics: list[list[float]]  # see labels.statistics.Statistics
    index: str  # file name of the index
    index_bytes: int
    index_sha256: str
    image_extension: str | None  # of the images in the shards; None for label-only shards
    key_rule: str | None  # how keys come from image paths, see images.key_of; None where the source had keys
    source_sha256: str  # of the source's keys and labels, in its order
    skipped: list[dict[str, str]] = field(default_factory=list)  # images that could not be read: key, name, error


@dataclass(frozen=True)
class Manifest:
    """Everything about a config but its samples."""

    config: str
    classes: list[str]
    annotator: dict[str, Any]  # what Annotator.describe() says
    encoding: dict[str, Any]  # name, k, dtype, and the map's size
    splits: dict[str, Split]
    made_with: str  # package and version
    version: int = VERSION

    @classmethod
    def read(cls, folder: Folder) -> Manifest:
        """Return the manifest in a config's folder, local or remote.

        Raises:
            FileNotFoundError: There is none.
            DatasetError: It is damaged, of another version, or cannot be reached.
        """
        return folder.read(MANIFEST_NAME, lambda data: cls.parse(data, f"{folder}/{MANIFEST_NAME}"))

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Return the manifest in a config's folder.

        Raises:
            FileNotFoundError: There is none.
            DatasetError: It is damaged, or of another version.
        """
        return cls.read(LocalFolder(folder))

    @classmethod
    def parse(cls, data: bytes, path: str) -> Manifest:
        """Return the manifest in the bytes of its file.

        Args:
            data: content of the file.
            path: what the errors call it.

        Raises:
            DatasetError: it is damaged, or of another version.
        """
        try:
            content = json.loads(data)
        except ValueError as error:
            raise DatasetError(f"{path} is damaged, it is not JSON: {error}") from error
        version = content.get("version") if isinstance(content, dict) else None
        if version != VERSION:
            raise DatasetError(f"{path} has version {version!r}, this package reads {VERSION}: update relabel_datasets")
        if content.pop("checksum", None) != _checksum(content):
            raise DatasetError(f"{path} is damaged: it is not what was written, by its own checksum")
        try:
            splits = {name: Split(**split) for name, split in content.pop("splits").items()}
            manifest = cls(splits=splits, **content)
        except (TypeError, KeyError, AttributeError) as error:
            raise DatasetError(f"{path} is damaged: {error}") from error
        for split in splits.values():
            lists = (
                split.filenames,
                split.shard_lengths,
                split.shard_bytes,
                split.shard_sha256,
                split.shard_statistics,
            )
            if len({len(values) for values in lists}) != 1 or sum(split.shard_lengths) != split.num_samples:
                raise DatasetError(f"{path} is damaged: the lists of split {split.name!r} do not agree")
        _check_names(manifest, path)
        return manifest

    def save(self, folder: Path) -> None:
        """Write the manifest into a config's folder, whole or not at all."""
        write_atomically(folder / MANIFEST_NAME, self.to_bytes())

    def to_bytes(self) -> bytes:
        """Return the bytes of its file."""
        content = asdict(self)
        content["checksum"] = _checksum(content)
        return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _check_names(manifest: Manifest, path: str) -> None:
    """Raise DatasetError unless all names are valid: they become paths and URLs, and come from strangers."""
    check_config(manifest.config, f"{path}, config")
    files: set[str] = set()
    for key, split in manifest.splits.items():
        where = f"{path}, splits, {check_split(key, f'{path}, splits')}"
        if split.name != key:
            raise DatasetError(f"{where}, name: expected {key!r}, got {split.name!r}")
        check_file_name(split.index, f"{where}, index", ".safetensors")
        check_sha256(split.index_sha256, f"{where}, index_sha256")
        for name, sha256 in zip(split.filenames, split.shard_sha256, strict=True):
            check_file_name(name, f"{where}, filenames", ".tar")
            check_sha256(sha256, f"{where}, shard_sha256")
        if split.image_extension is not None:
            check_extension(split.image_extension, f"{where}, image_extension")
        for name in (split.index, *split.filenames):
            if name.lower() in files:  # the file systems of macOS and Windows ignore case
                raise DatasetError(
                    f"{where}: the file name {name!r} is used twice: each shard and index is its own file"
                )
            files.add(name.lower())


def _checksum(content: dict[str, Any]) -> str:
    """Return a hash of a manifest's content: all other files are verified by the manifest, it by itself."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
