"""The work of a build: which shards there are to be, a record of each that is finished, and how one is made.

The records lie in a hidden folder of the config until the manifest takes their place. All of it can be pickled: any process
that reaches source and output can make any shard.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
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
from ..storage.output import LocalOutput, Output, explaining_errors
from .annotator import Annotator, ClassSubset
from .shard import Annotated, BuildConfig, annotate_shard

Plan = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """A split that is being built.

    Attributes:
        output: where the dataset is.
        config: name of the config.
        split: name of the split.
        plan: everything that decides its bytes, as JSON values.
        source: the images, with labels as they are to be stored.
        build_config: how label maps are stored.
        rows: which of the annotator's classes are kept, see `ClassSubset`; None: all.
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
        """Which images of the source each shard holds, in order. Images with a class are dealt at random, by a fixed seed."""
        order = np.random.default_rng(0).permutation(len(self.source.keys))
        order = order[np.asarray(self.source.labels)[order] >= 0]
        size = self.plan["shard_size"]
        return [order[start : start + size].tolist() for start in range(0, len(order), size)]

    @cached_property
    def names(self) -> Sequence[str]:
        """The shards' file names."""
        return shard_names(self.split, len(self.shards))

    @property
    def folder(self) -> str:
        """What messages call the config."""
        return f"{self.output}/{self.config}"

    def file(self, name: str) -> str:
        """Return the name in the output of a file of the config."""
        return f"{self.config}/{name}"

    @property
    def _hidden(self) -> str:
        return self.file(f".build-{self.split}")

    @property
    def lock_name(self) -> str:
        """The name of the lock that a builder of this split holds."""
        return f"{self._hidden}/lock"

    def restrict(self, annotator: Annotator) -> Annotator:
        """Return the annotator of the classes that are kept."""
        return annotator if self.rows is None else ClassSubset(annotator, self.rows, self.plan["classes"])

    def is_begun(self) -> bool:
        """Return whether this or an earlier run has begun."""
        return self._read("plan.json") is not None

    def begin(self) -> None:
        """Prepare the folder.

        Raises:
            DatasetError: an earlier run has begun something else there.
        """
        begun = self._read("plan.json")
        if begun is None:
            self.output.write(f"{self._hidden}/plan.json", json.dumps(self.plan, sort_keys=True).encode())
        else:
            refuse_other_plan(self.folder, begun, self.plan)

    def load(self, number: int) -> Annotated | None:
        """Return what was recorded of a shard, if it is finished and is still what was recorded."""
        try:
            record = self._read(f"{self.names[number]}.json") or {}
            rows, num_bytes, sha256, statistics = record["info"]
            info = ShardInfo([Row(*row) for row in rows], num_bytes, sha256, Statistics(*statistics))
            annotated = Annotated(info, [Skipped(*each) for each in record["skipped"]], record["map_size"])
        except (KeyError, TypeError, ValueError):
            return None  # not finished, or a damaged record: annotate it again
        found = self.output.has(self.file(self.names[number]), info.num_bytes, info.sha256)
        return annotated if found else None

    def annotate(
        self,
        number: int,
        annotator: Annotator,
        on_progress: Callable[[int], object] = lambda _count: None,
        on_skipped: Callable[[Skipped], object] = lambda _skipped: None,
    ) -> Annotated:
        """Write one shard where `store` finds it, see `annotate_shard`.

        Raises:
            OSError: the disk is full, or the folder is gone; the message says so.
        """
        path = self.output.shard_path(self.file(self.names[number]))
        with explaining_errors(path.parent):
            return annotate_shard(
                path, self.source, self.shards[number], annotator, self.build_config, on_progress, on_skipped
            )

    def store(self, number: int, annotated: Annotated) -> None:
        """Bring a shard that `annotate` wrote to its place, and record it."""
        name = self.names[number]
        with explaining_errors(self.folder):
            self.output.publish(self.file(name))
            self.output.write(f"{self._hidden}/{name}.json", json.dumps(asdict(annotated)).encode())

    def restore(self, split: Split, map_size: Sequence[int] | None) -> int:
        """Record all whole shards of a finished split on disk, so that only the others are made; return how many are whole.

        Args:
            split: from the manifest.
            map_size: (H, W) of its label maps.
        """
        assert isinstance(self.output, LocalOutput)
        skipped = {each["key"]: Skipped(**each) for each in split.skipped}
        whole = 0
        for number, name in enumerate(self.names):
            num_bytes, sha256 = split.shard_bytes[number], split.shard_sha256[number]
            if self.output.has(self.file(name), num_bytes, sha256):
                rows = read_rows(self.output.shard_path(self.file(name)))
                lost = [
                    skipped[key] for key in map(self.source.keys.__getitem__, self.shards[number]) if key in skipped
                ]
                size = None if map_size is None else (map_size[0], map_size[1])
                statistics = Statistics(*split.shard_statistics[number])  # type: ignore[arg-type]
                self.store(number, Annotated(ShardInfo(rows, num_bytes, sha256, statistics), lost, size))
                whole += 1
        return whole

    def check_complete(self, annotated: Sequence[Annotated]) -> None:
        """Raise DatasetError if a shard is not there any more, or not yet where this process looks for it."""
        for name, each in zip(self.names, annotated, strict=True):
            size = self.output.size(self.file(name))
            if size != each.info.num_bytes:
                raise DatasetError(
                    f"{self.folder}/{name} has {size} instead of {each.info.num_bytes} bytes: it was removed or changed during "
                    "the build, or another machine does not write to this folder. The same command makes it anew"
                )

    def clean(self) -> None:
        """Remove what killed builders left behind; this one holds the lock."""
        names = [*self.names, index_name(self.split)]
        self.output.clean(map(self.file, names))
        self.output.clean(f"{self._hidden}/{name}" for name in ("plan.json", *(f"{name}.json" for name in self.names)))

    def end(self) -> None:
        """Remove the records: the manifest is there."""
        self.output.remove(self._hidden)

    def _read(self, name: str) -> Any:
        try:
            return json.loads(self.output.read(f"{self._hidden}/{name}"))
        except FileNotFoundError:
            return None


def refuse_other_plan(folder: str, found: Plan, plan: Plan) -> None:
    """Raise DatasetError if what is there differs from what is planned."""
    other = [key for key in plan if found.get(key) != plan[key]]
    if other:
        raise DatasetError(
            f"{folder} holds label maps made with another {' and '.join(other)}: "
            + "; ".join(f"{key} {_short(found.get(key))} there, {_short(plan[key])} now" for key in other)
            + ". Give the values that are there, choose another config name, or remove that folder"
        )


def _short(value: object) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) < 200 else text[:200] + " ..."
