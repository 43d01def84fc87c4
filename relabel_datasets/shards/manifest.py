"""The manifest of a config, `_info.json`: shards, origin of the label maps, and classes.

The manifest is written last and atomically: a config without a manifest, or a shard that is not in it, does not exist. It
contains the fields that timm's `wds/` reader needs (`splits: {name: {name, num_samples, filenames, shard_lengths}}`).
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import DatasetError
from ..labels.calibration import Calibration
from ..labels.limits import MAX_CLASSES, MAX_CROPS, MAX_DENSE, MAX_SCALES
from ..naming import check_config, check_extension, check_file_name, check_sha256, check_split
from ..schema import (
    FieldError,
    Rule,
    boolean,
    dict_of,
    fail,
    fields,
    free_form,
    integer,
    list_of,
    number,
    optional,
    parse_json,
    record,
    shown,
    string,
    text,
    tuple_of,
)
from ..storage.folders import MANIFEST_NAME, Folder, LocalFolder
from ..storage.local import write_atomically

VERSION = 1
MAX_SAMPLES = 2**32 - 1  # of a split: the index stores row numbers in 32 bits
LOW_AGREEMENT = 0.5  # timm's weakest ImageNet models agree with 60 % of 1000 classes, and with more of fewer classes


@dataclass(frozen=True)
class Split:
    """Entry of one split. Lists have one item per shard.

    Attributes:
        name: Name of the split.
        num_samples: Number of samples.
        filenames: File names of the shards.
        shard_lengths: Numbers of samples.
        shard_bytes: Sizes in bytes.
        shard_sha256: SHA-256s, in hex.
        shard_statistics: Statistics of the label maps, see `labels.statistics.Statistics`.
        index: File name of the index.
        index_bytes: Size of the index in bytes.
        index_sha256: SHA-256 of the index, in hex.
        image_extension: Extension of the images in the shards; None for label-only shards.
        key_rule: Rule that derives keys from image paths, see `data.keys.key_of`; None if the source had keys.
        source_sha256: SHA-256 of the source's keys and labels, in its order.
        skipped: Images that could not be read, with `key`, `name` and `error`. Default: none.
        computed_with: `batch_size`, `device` and `torch` of the build, and `compiled` if the annotator was compiled, None if only some
            models of an ensemble were. They affect the last bits of the maps. Default: unknown.
        calibration: Gains that `LabelPooling(calibrated=True)` applies. Default: none.
    """

    name: str
    num_samples: int
    filenames: list[str]
    shard_lengths: list[int]
    shard_bytes: list[int]
    shard_sha256: list[str]
    shard_statistics: list[list[float]]
    index: str
    index_bytes: int
    index_sha256: str
    image_extension: str | None
    key_rule: str | None
    source_sha256: str
    skipped: list[dict[str, str]] = field(default_factory=list)
    computed_with: dict[str, Any] | None = None
    calibration: Calibration | None = None

    @property
    def agreement(self) -> float | None:
        """Share of the label maps, pooled over the whole image, that rank the original class first. None without samples."""
        # The first of the statistics of a shard, which are read without importing torch.
        agreeing = sum(statistics[0] for statistics in self.shard_statistics)
        return agreeing / self.num_samples if self.num_samples else None


@dataclass(frozen=True)
class Manifest:
    """Metadata of a config.

    Attributes:
        config: Name of the config.
        classes: Names of the classes.
        annotator: Description of the annotator, from `Annotator.describe`.
        encoding: Name, `k`, `dtype` and `map_size` of the encoding. For multiscale, `map_sizes` are the sizes of all maps of an
            image, and `map_size` is the largest. For stored crops, `map_size` is None, and `num_crops` is the number of crops per
            image.
        splits: Entries of the splits, by name.
        made_with: Name and version of the package that wrote it.
        version: Version of the format.
    """

    config: str
    classes: list[str]
    annotator: dict[str, Any]
    encoding: dict[str, Any]
    splits: dict[str, Split]
    made_with: str
    version: int = VERSION

    @property
    def has_maps(self) -> bool:
        """Whether the config has label maps, not stored crops."""
        return "num_crops" not in self.encoding

    @property
    def map_sizes(self) -> list[list[int]]:
        """Sizes (H, W) of the label maps of an image. Empty for stored crops, and if all shards are empty."""
        encoding = self.encoding
        sizes: list[list[int]] = encoding.get("map_sizes", [encoding["map_size"]] if encoding["map_size"] else [])
        return sizes

    def check_maps(self, purpose: str) -> None:
        """Raise DatasetError if the config has stored crops instead of label maps.

        Args:
            purpose: Function or command that needs label maps, such as `"relabel analyze"`.
        """
        if not self.has_maps:
            raise DatasetError(
                f"{purpose} needs label maps, but config {self.config!r} has stored crops (encoding {self.encoding['name']!r}): choose "
                "a config of label maps"
            )

    @classmethod
    def read(cls, folder: Folder) -> Manifest:
        """Read the manifest in a local or remote folder.

        Args:
            folder: Folder of the config.

        Returns:
            The manifest.

        Raises:
            FileNotFoundError: There is no manifest.
            DatasetError: The manifest is damaged, has another version, or cannot be reached.
        """
        return folder.read(MANIFEST_NAME, lambda data: cls.parse(data, f"{folder}/{MANIFEST_NAME}"))

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read the manifest in a local folder.

        Args:
            folder: Folder of the config.

        Returns:
            The manifest.

        Raises:
            FileNotFoundError: There is no manifest.
            DatasetError: The manifest is damaged, or has another version.
        """
        return cls.read(LocalFolder(folder))

    @classmethod
    def parse(cls, data: bytes, path: str) -> Manifest:
        """Parse a manifest.

        Args:
            data: Content of the file.
            path: Name of the file in error messages.

        Returns:
            The manifest.

        Raises:
            DatasetError: The manifest is damaged, or has another version.
        """
        try:
            content = parse_json(data)
        except ValueError as error:
            raise DatasetError(f"{path} is damaged, it is not JSON: {error}") from error
        version = content.get("version") if isinstance(content, dict) else None
        if type(version) is not int or version != VERSION:
            raise DatasetError(
                f"{path} has version {shown(version)}, this package reads version {VERSION}: update relabel_datasets"
            )
        if content.pop("checksum", None) != _checksum(content):
            raise DatasetError(f"{path} is damaged: its content does not match its checksum")
        try:
            _MANIFEST(content, "")
            _check_relations(content)
        except (FieldError, DatasetError) as error:
            raise DatasetError(f"{path} is damaged: {error}") from error
        splits = {name: _parse_split(split) for name, split in content.pop("splits").items()}
        return cls(splits=splits, **content)

    def save(self, folder: Path) -> None:
        """Write the manifest atomically.

        Args:
            folder: Folder of the config.
        """
        write_atomically(folder / MANIFEST_NAME, self.to_bytes())

    def to_bytes(self) -> bytes:
        """Return the content of the file."""
        content = asdict(self)
        for split in content["splits"].values():
            if split["calibration"] is None:
                del split["calibration"]
            elif "map_sizes" not in self.encoding:  # of one map
                (split["calibration"]["gains"],) = split["calibration"]["gains"]
        content["checksum"] = _checksum(content)
        return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _check_gains(value: object, name: str) -> None:
    """Check the gains of one map, or those of each map of an image."""
    of_maps = isinstance(value, list) and value and isinstance(value[0], list)
    rule = list_of(list_of(number(), 1), 1, MAX_SCALES) if of_maps else list_of(number(), 1)
    rule(value, name)


_COUNT = integer(0, MAX_SAMPLES)
# See labels.statistics.Statistics. Early versions wrote five values.
_STATISTICS = tuple_of(_COUNT, _COUNT, _COUNT, number(), _COUNT, integer(), num_optional=1)
_COMPUTED_WITH = fields(
    {"batch_size": integer(1), "device": optional(text()), "torch": text(), "compiled": optional(boolean())},
    optional=("compiled",),
)
_MAP_SIZE = tuple_of(integer(1, MAX_DENSE), integer(1, MAX_DENSE))
_CALIBRATION = record(
    shares=list_of(number(), 1), gains=_check_gains, num_crops=integer(1), kl_before=number(), kl_after=number()
)
_SPLIT_FIELDS: dict[str, Rule] = {
    "name": check_split,
    "num_samples": _COUNT,
    "filenames": list_of(lambda value, name: check_file_name(value, name, ".tar"), 1),
    "shard_lengths": list_of(_COUNT),
    "shard_bytes": list_of(integer(1)),
    "shard_sha256": list_of(check_sha256),
    "shard_statistics": list_of(_STATISTICS),
    "index": lambda value, name: check_file_name(value, name, ".safetensors"),
    "index_bytes": integer(1),
    "index_sha256": check_sha256,
    "image_extension": optional(check_extension),
    "key_rule": optional(text()),
    "source_sha256": check_sha256,
    "skipped": list_of(record(key=string(), name=string(), error=string())),
    "computed_with": optional(_COMPUTED_WITH),
    "calibration": _CALIBRATION,
}
_SPLIT = fields(_SPLIT_FIELDS, optional=("computed_with", "calibration"))  # shards of earlier versions lack them
_ENCODING: dict[str, Rule] = {
    "name": text(".+", "a name"),
    "k": integer(1, MAX_CLASSES),
    "dtype": text(".+", "a name"),
    "map_size": optional(_MAP_SIZE),
    "map_sizes": list_of(_MAP_SIZE, 0, MAX_SCALES),
    "num_crops": integer(1, MAX_CROPS),
}
_MANIFEST = record(
    config=check_config,
    classes=list_of(text(), 2, MAX_CLASSES),
    annotator=free_form(name=text()),
    encoding=fields(_ENCODING, optional=("num_crops", "map_sizes")),  # only for stored crops and for multiscale
    splits=dict_of(_SPLIT, 1),
    made_with=text(),
    version=integer(VERSION, VERSION),
)


def _check_relations(content: dict[str, Any]) -> None:
    """Check the relations between fields that are valid one by one.

    Raises:
        FieldError: Two fields contradict each other.
    """
    classes, map_size = content["classes"], content["encoding"]["map_size"]
    map_sizes = content["encoding"].get("map_sizes")
    if map_sizes is not None and map_size != max(map_sizes, key=math.prod, default=None):
        fail("encoding.map_size", "the largest of map_sizes", map_size)
    if map_size and len(classes) * math.prod(map_size) > MAX_DENSE:
        fail("encoding.map_size", f"at most {MAX_DENSE} locations x classes, with {len(classes)} classes", map_size)
    num_crops = content["encoding"].get("num_crops", 0)
    if len(classes) * num_crops > MAX_DENSE:
        fail("encoding.num_crops", f"at most {MAX_DENSE // len(classes)} with {len(classes)} classes", num_crops)
    files: set[str] = set()
    for name, split in content["splits"].items():
        field = f"splits[{shown(name)}]"
        if split["name"] != name:
            fail(f"{field}.name", f"{name!r}, its key", split["name"])
        _check_shards(split, field)
        if "calibration" in split:
            _check_calibration(split["calibration"], map_sizes, f"{field}.calibration")
        for file in (split["index"], *split["filenames"]):
            if file.lower() in files:  # the file systems of macOS and Windows ignore case
                raise FieldError(
                    f"{field}: the file name {file!r} is used twice: each shard and index needs a different file"
                )
            files.add(file.lower())


def _check_shards(split: dict[str, Any], field: str) -> None:
    num_shards, lengths = len(split["filenames"]), split["shard_lengths"]
    for name in ("shard_lengths", "shard_bytes", "shard_sha256", "shard_statistics"):
        if len(split[name]) != num_shards:
            fail(f"{field}.{name}", f"a list of {num_shards} values, one for each file name", split[name])
    if sum(lengths) != split["num_samples"]:
        fail(f"{field}.num_samples", f"{sum(lengths)}, the sum of shard_lengths", split["num_samples"])
    for shard, (length, statistics) in enumerate(zip(lengths, split["shard_statistics"], strict=True)):
        agreeing, several, crops, _, same_best, *_ = statistics
        if max(agreeing, several, crops) > length or same_best > crops:
            fail(f"{field}.shard_statistics[{shard}]", f"counts of at most {length} samples", statistics)


def _check_calibration(calibration: dict[str, Any], map_sizes: list[list[int]] | None, field: str) -> None:
    shares, gains = calibration["shares"], calibration["gains"]
    if not 0 < shares[0] <= shares[-1] <= 1 or any(low >= high for low, high in pairwise(shares)):
        fail(f"{field}.shares", "increasing numbers above 0 and at most 1", shares)
    expected = f"{len(shares)} positive numbers, one for each of shares"
    num_maps = 1
    if map_sizes is not None:
        num_maps, expected = len(map_sizes) or 1, f"{len(map_sizes)} lists of {expected}, one for each of map_sizes"
    # `_check_gains` has checked that they are numbers, or lists of numbers.
    is_of_maps = isinstance(gains[0], list)
    of_maps = gains if is_of_maps else [gains]
    if (
        is_of_maps != (map_sizes is not None)
        or len(of_maps) != num_maps
        or any(len(row) != len(shares) or min(row) <= 0 for row in of_maps)
    ):
        fail(f"{field}.gains", expected, gains)


def _parse_split(content: dict[str, Any]) -> Split:
    calibration = content.pop("calibration", None)
    if calibration is None:
        return Split(**content)
    gains = calibration["gains"]
    of_maps = gains if isinstance(gains[0], list) else [gains]
    knots = {"shares": tuple(calibration["shares"]), "gains": tuple(map(tuple, of_maps))}
    return Split(**content, calibration=Calibration(**{**calibration, **knots}))


def _checksum(content: dict[str, Any]) -> str:
    """Return the hash of a manifest's content. The manifest verifies all other files, and this hash verifies the manifest."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
