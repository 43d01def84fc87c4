"""verify: read a whole dataset and name everything that is wrong with it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..errors import DatasetError
from ..keywords import checked_keywords
from ..naming import CONFIG_RULE, check_config, is_config
from ..shards.manifest import Manifest
from ..storage.folders import CARD_NAME, MANIFEST_NAME, MAX_CARD_BYTES, Folder, card_configs, default_cache, is_url
from ..storage.hub import HubRepo
from ..storage.regular_files import read_inside
from ..storage.resolve import find, hub_url
from ..words import printable
from .check import Shards, ShardScan, Source, SplitToCheck, check_image_extension, compare_sha256
from .configs import open_config
from .images import check_refuses_truncated
from .index import Index
from .manifest import Split

_SHOWN = 20  # problems in the summary


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, and where; None where it does not apply."""

    config: str | None
    split: str | None
    shard: str | None  # file name
    key: str | None  # of the sample
    problem: str

    def __str__(self) -> str:
        where = "/".join(filter(None, (self.config, self.shard or self.split)))
        return printable(": ".join(filter(None, (where, self.key and repr(self.key), self.problem))))


@dataclass(frozen=True)
class SplitCounts:
    """What was found of a split."""

    config: str
    split: str
    num_samples: int
    num_shards: int
    num_bytes: int  # of the shards


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        path: the dataset; a URL without credentials.
        splits: how much there is of each.
        problems: everything that is wrong: first of cards, manifests and indices, then by shard and sample.
        notes: what is odd, but harms nobody who reads by the manifest.
        seconds: how long it took.
    """

    path: str
    splits: list[SplitCounts]
    problems: list[Problem]
    notes: list[Problem]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def to_json(self) -> str:
        """Return all of it as JSON."""
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=1, sort_keys=True)

    def __str__(self) -> str:
        lines = [
            f"{each.config}/{each.split}: {each.num_samples} samples in {each.num_shards} shards, "
            f"{each.num_bytes / 1e6:.1f} MB"
            for each in self.splits
        ]
        lines += [f"note: {note}" for note in self.notes[:_SHOWN]]
        lines += map(str, self.problems[:_SHOWN])
        if len(self.problems) > _SHOWN:
            lines.append(f"... and {len(self.problems) - _SHOWN} more")
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        lines.append(f"{self.path}: {'ok' if self.ok else count}, {self.seconds:.1f} s")
        return "\n".join(map(printable, lines))


@checked_keywords()
def verify(
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    storage_options: dict[str, Any] | None = None,
    num_workers: int | None = None,
    quick: bool = False,
    progress: bool = True,
) -> VerifyReport:
    """Check every byte and every sample of a dataset; the report names each that is bad.

    Card, manifests and indices; size and sha256 of every shard; and of every sample its members, where the index has
    them, its label, that its label map and image can be decoded, and that both are of one size. It goes on after what is
    bad. Remote shards are downloaded, not taken from the cache, and deleted once checked.

    Args:
        path: of the dataset, or of one of its configs, as `load_dataset` takes it.
        name: the config. Default: all.
        revision: of a dataset on the Hub: a branch, a tag or a commit.
        token: for the Hub. Default: that of `hf auth login`, or of the environment variable `HF_TOKEN`.
        storage_options: for URLs, see `open_folder`.
        num_workers: processes that check shards, 0 for this one alone. Default: one for each CPU, or for each shard if
            these are fewer.
        quick: whether to look only into shards whose size or sha256 is wrong.
        progress: whether to show a progress bar on stderr.

    Raises:
        FileNotFoundError: no dataset there.
        DatasetError: (a ValueError) no such config, or the server cannot be reached.
        ValueError: `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` is set.

    Example:
        >>> report = verify("path/to/dataset")
        >>> report.ok, [(problem.shard, problem.key) for problem in report.problems]
        (True, [])
    """
    check_refuses_truncated("verifying a dataset")
    began = time.monotonic()
    problems: list[Problem] = []
    found = find(path, revision=revision, token=token)
    if isinstance(found, HubRepo):  # read through fsspec, since what is in the Hub's cache is not what is on the Hub
        found, storage_options = hub_url(found)
    with _scratch(found) as scratch:
        source = Source(found, storage_options, scratch)
        root = source.open(scratch)
        configs = _config_names(root, name)
        problems += _check_card(root, configs, every=name is None)
        splits = [split for config in configs for split in _open_splits(source, root, config, quick, problems)]
        counts = _check_shards(splits, num_workers, progress, problems)
    notes = [] if root.is_remote else [note for split in splits for note in _stray_shards(split)]
    return VerifyReport(str(root), counts, problems, notes, time.monotonic() - began)


def _scratch(path: str | os.PathLike[str]) -> AbstractContextManager[str | None]:
    """Make a temporary folder for a remote dataset: beside the cache, since /tmp may be in memory."""
    if not is_url(path):
        return nullcontext()
    default_cache().mkdir(parents=True, exist_ok=True)
    return TemporaryDirectory(prefix="verify-", dir=default_cache())


def _config_names(root: Folder, name: str | None) -> list[str | None]:
    """Return the configs to check; None is the root itself."""
    if name is not None:
        check_config(name, "name=")
    configs = root.configs()
    if name is None:
        if configs == []:
            open_config(root, name)  # raises
        return [None] if configs is None else [*configs]
    if configs is None or name not in configs:
        open_config(root, name)  # raises, unless the config is there and the card lacks it
    return [None if configs is None else name]


def _check_card(root: Folder, configs: list[str | None], *, every: bool) -> Iterator[Problem]:
    """Yield what is wrong with README.md; a remote one has been read to find the configs."""
    if root.is_remote or configs == [None]:
        return
    for path in sorted(Path(str(root)).glob(f"*/{MANIFEST_NAME}")):
        if not is_config(path.parent.name):
            problem = f"the name of this folder is not valid, so that it is not read: {CONFIG_RULE}"
            yield Problem(path.parent.name, None, None, None, problem)
    card = Path(str(root), CARD_NAME)
    try:
        named = card_configs(read_inside(card, MAX_CARD_BYTES), str(card))
    except (OSError, DatasetError) as error:
        yield Problem(
            None,
            None,
            None,
            None,
            f"{CARD_NAME} cannot be read, {error}: write it with relabel_datasets.shards.card.write_card",
        )
        return
    for config in configs:
        if config not in named:
            problem = f"{CARD_NAME} does not name it, so that `datasets` and remote readers do not find it"
            yield Problem(
                config, None, None, None, f"{problem}: write it anew with relabel_datasets.shards.card.write_card"
            )
    for config in named if every else ():
        if config not in configs:
            yield Problem(config, None, None, None, f"{CARD_NAME} names it, but it has no {MANIFEST_NAME}")


def _open_splits(
    source: Source, root: Folder, config: str | None, quick: bool, problems: list[Problem]
) -> Iterator[SplitToCheck]:
    """Yield the splits of a config, each with its index; what cannot be opened goes to `problems`."""
    folder = root if config is None else root.child(config)
    name = config or str(root).rpartition("/")[2]
    try:
        manifest = Manifest.read(folder)
    except (OSError, DatasetError) as error:
        problems.append(Problem(name, None, None, None, str(error)))
        return
    if manifest.config != name and config is not None:
        problems.append(Problem(name, None, None, None, f"its manifest is that of config {manifest.config!r}"))
    for split in manifest.splits.values():
        index = None
        try:
            index = _open_index(folder, split, len(manifest.classes))
        except (OSError, DatasetError) as error:
            problems.append(Problem(name, split.name, None, None, str(error)))
        yield SplitToCheck(source, config, manifest, split, index, quick)


def _open_index(folder: Folder, split: Split, num_classes: int) -> Index:
    with folder.open(split.index, split.index_bytes, split.index_sha256) as file:
        compare_sha256(file, split.index, split.index_sha256)
    return Index(folder, split, num_classes)


def _stray_shards(split: SplitToCheck) -> list[Problem]:
    """Return a note for each file that is named like a shard of this split but is in no split."""
    folder = split.open(None)
    known = {name for each in split.manifest.splits.values() for name in each.filenames}
    stray = {path.name for path in Path(str(folder)).glob(f"{split.split.name}-*.tar")} - known
    text = "is not in the manifest: `datasets`, which goes by file names, reads it all the same; delete it"
    return [Problem(split.name, split.split.name, name, None, text) for name in sorted(stray)]


def _check_shards(
    splits: list[SplitToCheck], num_workers: int | None, progress: bool, problems: list[Problem]
) -> list[SplitCounts]:
    """Check the shards of all splits; add to `problems` and return what there is of each split."""
    shards = Shards(splits)
    num_workers = min(_num_cpus(), len(shards)) if num_workers is None else num_workers
    total = sum(split.split.num_samples for split in splits)
    with tqdm(total=total, unit="sample", desc="verify", disable=not progress) as bar:
        results = iter(DataLoader(shards, batch_size=None, num_workers=num_workers))
        return [_check_split(split, results, problems, bar) for split in splits]


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_split(split: SplitToCheck, results: Iterator[ShardScan], problems: list[Problem], bar: Any) -> SplitCounts:
    seen: dict[int, str] = {}  # shard by the hash of a key, which takes less memory than the key
    num_samples = num_shards = num_bytes = 0
    image_fields: set[str | None] = set()
    for shard, length in zip(split.split.filenames, split.split.shard_lengths, strict=True):
        found = next(results)
        for key in found.keys:
            if hash(key) in seen:
                found.problems.append((key, f"its key stands in {seen[hash(key)]}, too"))
            seen[hash(key)] = shard
        problems += [Problem(split.name, split.split.name, shard, *each) for each in found.problems]
        image_fields |= found.image_fields
        num_samples += found.num_samples
        num_shards += found.num_bytes > 0
        num_bytes += found.num_bytes
        bar.set_postfix(bad=len(problems), refresh=False)
        bar.update(length)
    if problem := check_image_extension(split.split, set() if split.quick else image_fields):
        problems.append(Problem(split.name, split.split.name, None, None, problem))
    return SplitCounts(split.name, split.split.name, num_samples, num_shards, num_bytes)
