"""Work of a build: the list of shards, and a record of each finished shard.

Records are kept in a hidden folder of the config until the manifest replaces them. The work can be pickled, so any process with
access to the source and the output can annotate any shard.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..data.skipped import Skipped
from ..data.sources import ImageSource
from ..errors import DatasetError
from ..labels.statistics import Statistics
from ..shards.index import Row
from ..shards.manifest import Split
from ..shards.tars import ShardInfo, index_name, read_rows, shard_names
from ..storage.output import LocalOutput, Output
from ..storage.output_errors import explaining_errors
from ..words import counted
from .annotator import Annotator
from .calibrate import num_calibrated_images
from .class_subset import ClassSubset
from .shard import Annotated, BuildConfig, OpenShard

Plan = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """Build of one split.

    Attributes:
        output: Output that holds the dataset.
        config: Name of the config.
        split: Name of the split.
        plan: Everything that determines the bytes of the split, as JSON values.
        source: Images, with their labels as stored in the shards.
        build_config: Settings of annotation and storage.
        rows: Classes of the annotator to keep, see `ClassSubset`. Default: None, all classes.
    """

    output: Output
    config: str
    split: str
    plan: Plan
    source: ImageSource
    build_config: BuildConfig
    rows: Sequence[int] | None = None

    @cached_property
    def shards(self) -> list[list[int]]:
        """Indices of the images of each shard, in order. Images with a class are shuffled with a fixed seed."""
        order = np.random.default_rng(0).permutation(len(self.source.keys))
        order = order[np.asarray(self.source.labels)[order] >= 0]
        size = self.plan["shard_size"]
        return [order[start : start + size].tolist() for start in range(0, len(order), size)]

    @cached_property
    def names(self) -> Sequence[str]:
        """File names of the shards."""
        return shard_names(self.split, len(self.shards))

    @property
    def folder(self) -> str:
        """Path or URL of the config for messages."""
        return f"{self.output}/{self.config}"

    def file(self, name: str) -> str:
        """Return the path of a file of the config, relative to the output."""
        return f"{self.config}/{name}"

    @property
    def _hidden(self) -> str:
        return self.file(f".build-{self.split}")

    @property
    def lock_name(self) -> str:
        """Name of the lock that the builder of this split holds."""
        return f"{self._hidden}/lock"

    def restrict(self, annotator: Annotator) -> Annotator:
        """Return an annotator of the classes to keep."""
        return annotator if self.rows is None else ClassSubset(annotator, self.rows, self.plan["classes"])

    def num_calibrated(self, number: int) -> int:
        """Return the number of images of a shard, its first ones, whose random crops are annotated to calibrate labels.

        They are the first images of the split, whatever the size of shards, and a random sample, since the order is random.
        """
        if self.build_config.num_crops is not None:  # the labels of stored crops are the answers
            return 0
        size: int = self.plan["shard_size"]
        total = sum(map(len, self.shards))
        return min(size, max(0, num_calibrated_images(total) - number * size))

    def is_started(self) -> bool:
        """Return whether this run or an earlier one has started and not finished."""
        return self._read("plan.json") is not None

    def start(self) -> None:
        """Record the plan.

        Raises:
            DatasetError: An earlier run has started with another plan.
        """
        recorded = self._read("plan.json")
        if recorded is None:
            self.output.write(f"{self._hidden}/plan.json", json.dumps(self.plan, sort_keys=True).encode())
        else:
            refuse_other_plan(self.folder, recorded, self.plan)

    def load(self, number: int) -> Annotated | None:
        """Return the record of a shard, or None if the shard is not finished or does not match its record."""
        try:
            record = self._read(f"{self.names[number]}.json") or {}
            rows, num_bytes, sha256, statistics = record["info"]
            info = ShardInfo([Row(*row) for row in rows], num_bytes, sha256, Statistics.from_list(statistics))
            skipped = [Skipped(*fields) for fields in record["skipped"]]
            annotated = Annotated(info, skipped, record["map_sizes"], record["crops"])
        except (KeyError, TypeError, ValueError):
            return None  # not finished, or the record is damaged
        is_valid = self.output.has(self.file(self.names[number]), info.num_bytes, info.sha256)
        return annotated if is_valid else None

    def open(self, number: int) -> OpenShard:
        """Return a shard to write, at the path from which `store` publishes it."""
        path = self.output.shard_path(self.file(self.names[number]))
        shard = self.shards[number]
        return OpenShard(number, path, self.source, shard, self.build_config, self.num_calibrated(number))

    def store(self, number: int, annotated: Annotated) -> None:
        """Publish a complete shard, and record it."""
        name = self.names[number]
        with explaining_errors(self.folder):
            self.output.publish(self.file(name))
            self.output.write(f"{self._hidden}/{name}.json", json.dumps(asdict(annotated)).encode())

    def restore(self, split: Split, map_sizes: list[list[int]]) -> int:
        """Record all valid shards of a finished split on disk, so that only the others are annotated.

        Args:
            split: Split in the manifest.
            map_sizes: (H, W) of the label maps of an image.

        Returns:
            Number of valid shards.
        """
        assert isinstance(self.output, LocalOutput)
        skipped = {entry["key"]: Skipped(**entry) for entry in split.skipped}
        num_valid = 0
        for number, name in enumerate(self.names):
            num_bytes, sha256 = split.shard_bytes[number], split.shard_sha256[number]
            if self.output.has(self.file(name), num_bytes, sha256):
                rows = read_rows(self.output.shard_path(self.file(name)))
                keys = map(self.source.keys.__getitem__, self.shards[number])
                statistics = Statistics.from_list(split.shard_statistics[number])
                info = ShardInfo(rows, num_bytes, sha256, statistics)
                self.store(number, Annotated(info, [skipped[key] for key in keys if key in skipped], map_sizes))
                num_valid += 1
        return num_valid

    def check_complete(self, annotated: Sequence[Annotated]) -> None:
        """Check that all shards exist in the output as this process sees it.

        Raises:
            DatasetError: A shard was removed or changed, or a worker wrote to another folder.
        """
        for name, shard in zip(self.names, annotated, strict=True):
            size, expected = self.output.size(self.file(name)), shard.info.num_bytes
            if size != expected:
                actual = "is missing" if size is None else f"has {counted(size, 'byte')} instead of {expected}"
                raise DatasetError(
                    f"{self.folder}/{name} {actual}: it was removed or changed during the build, or a worker on another machine "
                    "writes to another folder. Run the same command again to rebuild it"
                )

    def clean(self) -> None:
        """Remove the temporary files of killed builders. The lock must be held."""
        names = [*self.names, index_name(self.split)]
        self.output.clean(map(self.file, names))
        self.output.clean(f"{self._hidden}/{name}" for name in ("plan.json", *(f"{name}.json" for name in self.names)))

    def remove_records(self) -> None:
        """Remove the records once the manifest replaces them."""
        self.output.remove(self._hidden)

    def _read(self, name: str) -> Any:
        try:
            return json.loads(self.output.read(f"{self._hidden}/{name}"))
        except FileNotFoundError:
            return None


def refuse_other_plan(folder: str, existing: Plan, plan: Plan) -> None:
    """Check that existing label maps were built with the same plan.

    Args:
        folder: Path or URL of the config for messages.
        existing: Plan of the existing label maps.
        plan: Plan of this build.

    Raises:
        DatasetError: The plans differ.
    """
    other = [key for key in plan if existing.get(key) != plan[key]]
    if other:
        raise DatasetError(
            f"{folder} has label maps built with another {' and '.join(other)}: "
            + "; ".join(f"{key} {_short(existing.get(key))} there, {_short(plan[key])} now" for key in other)
            + ". Use the existing values, choose another config name, or remove that folder"
        )


def _short(value: object) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) < 200 else text[:200] + " ..."
