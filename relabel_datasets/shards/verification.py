"""Verify a dataset: read all of it and report every problem."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..cpus import num_cpus
from ..errors import DatasetError
from ..keywords import checked_keywords
from ..naming import CONFIG_RULE, check_config, is_config
from ..shards.manifest import Manifest
from ..storage.folders import CARD_NAME, MANIFEST_NAME, MAX_CARD_BYTES, Folder, card_configs, default_cache, is_url
from ..storage.hub import HubRepo
from ..storage.regular_files import read_inside
from ..storage.resolve import find, hub_url
from ..storage.temp_folders import temporary_folder
from ..words import counted, printable
from .check import Shards, ShardScan, Source, SplitToCheck, check_image_extension, compare_sha256
from .configs import open_config
from .formats import check_refuses_truncated
from .index import Index
from .manifest import Split

_SHOWN = 20  # problems in the summary


@dataclass(frozen=True)
class Problem:
    """Problem of a dataset, and its location. Attributes that do not apply are None.

    Attributes:
        config: Name of the config.
        split: Name of the split.
        shard: File name of the shard.
        key: Key of the sample.
        problem: Description of the problem.
    """

    config: str | None
    split: str | None
    shard: str | None
    key: str | None
    problem: str

    def __str__(self) -> str:
        where = "/".join(filter(None, (self.config, self.shard or self.split)))
        return printable(": ".join(filter(None, (where, self.key and repr(self.key), self.problem))))


@dataclass(frozen=True)
class SplitCounts:
    """Size of a split, as far as it could be read.

    Attributes:
        config: Name of the config.
        split: Name of the split.
        num_samples: Number of samples.
        num_shards: Number of shards that are not empty.
        num_bytes: Total size of the shards in bytes.
    """

    config: str
    split: str
    num_samples: int
    num_shards: int
    num_bytes: int


@dataclass(frozen=True)
class VerifyReport:
    """Result of `verify`.

    Attributes:
        path: Path of the dataset, or its URL without credentials.
        splits: Size of each split.
        problems: All problems: first those of card, manifests and indexes, then those of shards and samples.
        notes: Oddities that do not affect readers that follow the manifest.
        seconds: Duration in seconds.
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
        """Return the report as JSON."""
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=1, sort_keys=True)

    def __str__(self) -> str:
        lines = [
            f"{split.config}/{split.split}: {counted(split.num_samples, 'sample')} in {counted(split.num_shards, 'shard')}, "
            f"{split.num_bytes / 1e6:.1f} MB"
            for split in self.splits
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
    config: str | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    storage_options: dict[str, Any] | None = None,
    num_workers: int | None = None,
    quick: bool = False,
    progress: bool = True,
) -> VerifyReport:
    """Check every byte and every sample of a dataset, and report all problems.

    The check covers the card, manifests and indexes; the size and SHA-256 of every shard; and for every sample its members,
    their positions in the index, its label, the decoding of its label map and image, and that both have the same size. It
    continues after a problem. Remote shards are downloaded instead of read from the cache, and deleted after the check.

    Args:
        path: Dataset, or one of its configs, as for `load_dataset`.
        config: Name of the config. Default: all configs.
        revision: Branch, tag or commit of a dataset on the Hub. Default: the default branch.
        token: Access token for the Hub. Default: the token of `hf auth login`, or of the environment variable `HF_TOKEN`.
        storage_options: Arguments of fsspec's file system for a URL, see `open_folder`. Default: none.
        num_workers: Number of processes that check shards, or of threads with `quick`; 0 checks in this process. Default:
            one per CPU, but at most one per shard.
        quick: Whether to read the samples only of shards whose size or SHA-256 is wrong. Default: False.
        progress: Whether to show a progress bar on stderr. Default: True.

    Returns:
        The report. `report.ok` is True if there are no problems.

    Raises:
        FileNotFoundError: There is no dataset at this path.
        DatasetError: There is no such config, or the server cannot be reached. It is a ValueError.
        ValueError: `num_workers` is negative, or `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` is set.

    Example:
        >>> report = verify("path/to/dataset")
        >>> report.ok, [(problem.shard, problem.key) for problem in report.problems]
        (True, [])
    """
    check_refuses_truncated("verifying a dataset")
    if num_workers is not None and num_workers < 0:
        raise ValueError(f"num_workers= must be at least 0, got {num_workers}")
    start = time.monotonic()
    problems: list[Problem] = []
    location = find(path, revision=revision, token=token)
    if isinstance(location, HubRepo):  # read through fsspec: the Hub's cache may differ from the Hub
        location, storage_options = hub_url(location)
    with _scratch(location) as scratch:
        source = Source(location, storage_options, scratch)
        root = source.open(scratch)
        names = _config_names(root, config)
        problems += _check_card(root, names, is_complete=config is None)
        splits = [split for name in names for split in _open_splits(source, root, name, quick, problems)]
        counts = _check_shards(splits, num_workers, quick, progress, problems)
    notes = [] if root.is_remote else [note for split in splits for note in _stray_shards(split)]
    return VerifyReport(str(root), counts, problems, notes, time.monotonic() - start)


def _scratch(path: str | os.PathLike[str]) -> AbstractContextManager[Path | None]:
    """Create a temporary folder for a remote dataset, in the cache folder since /tmp may be in memory."""
    if not is_url(path):
        return nullcontext()
    default_cache().mkdir(parents=True, exist_ok=True)
    return temporary_folder("verify-", default_cache())


def _config_names(root: Folder, config: str | None) -> list[str | None]:
    """Return the configs to check. None stands for the root folder itself."""
    if config is not None:
        check_config(config, "config=")
    configs = root.configs()
    if config is None:
        if configs == []:
            open_config(root, config)  # raises
        return [None] if configs is None else [*configs]
    if configs is None or config not in configs:
        open_config(root, config)  # raises, unless the config exists and only the card lacks it
    return [None if configs is None else config]


def _check_card(root: Folder, configs: list[str | None], *, is_complete: bool) -> Iterator[Problem]:
    """Yield the problems of README.md. A remote one has been read to find the configs.

    Args:
        root: Folder of the dataset.
        configs: Names of the configs to check.
        is_complete: Whether these are all configs of the dataset.
    """
    if root.is_remote or configs == [None]:
        return
    for path in sorted(Path(str(root)).glob(f"*/{MANIFEST_NAME}")):
        if not is_config(path.parent.name):
            problem = f"the name of this folder is not valid, so it is not read: {CONFIG_RULE}"
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
            f"{CARD_NAME} cannot be read, {error}: write it with relabel_datasets.shards.write_card",
        )
        return
    for config in configs:
        if config not in named:
            problem = f"{CARD_NAME} does not list this config, so `datasets` and remote readers do not find it"
            yield Problem(
                config, None, None, None, f"{problem}: write the card again with relabel_datasets.shards.write_card"
            )
    for config in named if is_complete else ():
        if config not in configs:
            yield Problem(config, None, None, None, f"{CARD_NAME} lists this config, but it has no {MANIFEST_NAME}")


def _open_splits(
    source: Source, root: Folder, config: str | None, quick: bool, problems: list[Problem]
) -> Iterator[SplitToCheck]:
    """Yield the splits of a config with their indexes; add those that cannot be opened to `problems`."""
    folder = root if config is None else root.child(config)
    name = config or str(root).rpartition("/")[2]
    try:
        manifest = Manifest.read(folder)
    except (OSError, DatasetError) as error:
        problems.append(Problem(name, None, None, None, str(error)))
        return
    if manifest.config != name and config is not None:
        problems.append(Problem(name, None, None, None, f"its manifest belongs to config {manifest.config!r}"))
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
    """Return a note for each file that is named like a shard of this split but belongs to no split."""
    folder = split.open(None)
    known = {name for other in split.manifest.splits.values() for name in other.filenames}
    stray = {path.name for path in Path(str(folder)).glob(f"{split.split.name}-*.tar")} - known
    text = "is not in the manifest, but `datasets` reads it since it finds shards by their names: delete it"
    return [Problem(split.name, split.split.name, name, None, text) for name in sorted(stray)]


def _check_shards(
    splits: list[SplitToCheck], num_workers: int | None, quick: bool, progress: bool, problems: list[Problem]
) -> list[SplitCounts]:
    """Check the shards of all splits, add their problems to `problems`, and return the size of each split."""
    shards = Shards(splits)
    num_workers = min(num_cpus(), len(shards)) if num_workers is None else num_workers
    total = sum(split.split.num_samples for split in splits)
    scan = _scan_in_threads if quick else _scan_in_processes
    with (
        tqdm(total=total, unit="sample", desc="verify", disable=not progress) as bar,
        closing(scan(shards, num_workers)) as results,
    ):
        return [_check_split(split, results, problems, bar) for split in splits]


def _scan_in_processes(shards: Shards, num_workers: int) -> Generator[ShardScan]:
    from torch.utils.data import DataLoader  # slow to import

    yield from DataLoader(shards, batch_size=None, num_workers=num_workers)  # type: ignore[arg-type]  # has no base class


def _scan_in_threads(shards: Shards, num_workers: int) -> Generator[ShardScan]:
    """Yield the results in order. Threads suffice for hashing, and start without torch."""
    if num_workers == 0:
        yield from map(shards.__getitem__, range(len(shards)))
        return
    with ThreadPoolExecutor(num_workers) as pool:
        yield from pool.map(shards.__getitem__, range(len(shards)))


def _check_split(split: SplitToCheck, results: Iterator[ShardScan], problems: list[Problem], bar: Any) -> SplitCounts:
    seen: dict[int, str] = {}  # hash of a key (smaller than the key) -> shard
    num_samples = num_shards = num_bytes = 0
    image_fields: set[str | None] = set()
    for shard, length in zip(split.split.filenames, split.split.shard_lengths, strict=True):
        scan = next(results)
        for key in scan.keys:
            if hash(key) in seen:
                scan.problems.append((key, f"its key is repeated: it is also in {seen[hash(key)]}"))
            seen[hash(key)] = shard
        problems += [Problem(split.name, split.split.name, shard, key, problem) for key, problem in scan.problems]
        image_fields |= scan.image_fields
        num_samples += scan.num_samples
        num_shards += scan.num_bytes > 0
        num_bytes += scan.num_bytes
        bar.set_postfix(bad=len(problems), refresh=False)
        bar.update(length)
    if extension_problem := check_image_extension(split.split, set() if split.quick else image_fields):
        problems.append(Problem(split.name, split.split.name, None, None, extension_problem))
    return SplitCounts(split.name, split.split.name, num_samples, num_shards, num_bytes)
