"""`describe`: Show a dataset or a shard as text: its manifest, and its first samples with heatmaps drawn in characters."""

from __future__ import annotations

import itertools
import os
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..compatibility import read_at
from ..data.store import LabelMaps
from ..errors import DatasetError
from ..keywords import checked_keywords
from ..labels.crop_labels import CropLabels
from ..labels.label_map import LabelMap
from ..labels.reading import Labels, read_label
from ..labels.statistics import total
from ..labels.transforms import LabelPooling
from ..labels.windows import shown_definition
from ..shards.configs import find_split, open_config
from ..shards.manifest import Manifest, Split
from ..shards.tars import read_rows
from ..storage.folders import Folder, is_url, without_file_scheme
from ..storage.redaction import redact_path
from ..storage.regular_files import open_regular
from ..storage.resolve import open_folder
from ..words import counted, printable
from .names import legible_names
from .overlay import strongest_classes

_SHADES = " .:-=+*#%@"  # from probability 0 to 1; ASCII, for any terminal
_NUM_CLASSES = 12  # class names per config
_NUM_HEATMAPS = 3
_NUM_CROPS = 3  # stored crops per sample


class _Sample(NamedTuple):
    labels: Labels  # with their key and label
    map_bytes: int
    image_bytes: int  # 0: the shard has no images


@checked_keywords()
def describe(
    path: str | os.PathLike[str],
    config: str | None = None,
    split: str | None = None,
    *,
    num_samples: int = 3,
    width: int = 100,
) -> str:
    """Describe a dataset or one of its shards as text.

    Args:
        path: Dataset, as for `load_dataset`, or a shard: a local path or URL that ends in `.tar`. The shard of the samples of a
            remote dataset is downloaded into the cache.
        config: Name of the config whose samples are shown. Default: the first config.
        split: Name of the split whose samples are shown. Default: the first split.
        num_samples: Number of samples to show, from the start of the split or shard. Default: 3.
        width: Width of the terminal in characters, which limits the number of heatmaps in a row. Default: 100.

    Returns:
        The lines of text, without a final newline.

    Raises:
        FileNotFoundError: The dataset or shard does not exist.
        DatasetError: (a ValueError) The config or split is unknown, or files are corrupt.
        ValueError: A config or split is given for a shard, or `num_samples` is negative.

    Example:
        >>> print(describe("scenes-relabel", num_samples=1))
    """
    if num_samples < 0:
        raise ValueError(f"num_samples= must be at least 0, got {num_samples}")
    if os.fspath(path).partition("?")[0].endswith(".tar"):
        if config is not None or split is not None:
            raise ValueError(
                f"{redact_path(path)} is a shard, which has only one config and split: give config and split only for a dataset"
            )
        return _joined(_describe_shard(without_file_scheme(path), num_samples, width))
    return _joined(_describe_dataset(open_folder(path), config, split, num_samples, width))


def _joined(lines: Iterator[str]) -> str:
    """Return lines of text, in which names of a dataset are safe for a terminal."""
    return "\n".join(line[: line.startswith("\n")] + printable(line[line.startswith("\n") :]) for line in lines)


def _describe_dataset(
    root: Folder, config: str | None, split: str | None, num_samples: int, width: int
) -> Iterator[str]:
    names: list[str] | None = root.configs() if config is None else [config]
    configs = [open_config(root, name) for name in names] if names else [open_config(root, None)]
    for i, (folder, manifest) in enumerate(configs):
        yield from [""] if i else []
        yield from _describe_config(folder, manifest)
    folder, manifest = configs[0]
    shown = find_split(manifest, split or next(iter(manifest.splits)))
    yield from _describe_samples(folder, manifest, shown, 0, num_samples, width)


def _describe_shard(path: str, num_samples: int, width: int) -> Iterator[str]:
    plain, mark, query = path.partition("?") if is_url(path) else (path, "", "")
    parent, _, file = plain.rpartition("/")
    folder = open_folder((parent or ("/" if plain.startswith("/") else ".")) + mark + query)
    try:
        manifest = Manifest.read(folder)
    except FileNotFoundError:
        if is_url(path):
            raise
        yield f"{path}: a shard without a manifest in its folder; class names are unknown"
        yield from _show_samples(_read_samples(Path(path), num_samples), [], width)
        return
    split = next((split for split in manifest.splits.values() if file in split.filenames), None)
    if split is None:
        raise DatasetError(
            f"{folder}/{file} is not listed in the manifest of its folder: it belongs to another or an unfinished build; run "
            "`relabel verify` on the folder"
        )
    shard = split.filenames.index(file)
    yield from _describe_config(folder, manifest)
    first, length = sum(split.shard_lengths[:shard]), split.shard_lengths[shard]
    yield f"\n{file}: samples {first + 1} to {first + length} of {split.name}, {split.shard_bytes[shard]:,} bytes"
    yield from _describe_samples(folder, manifest, split, first, min(num_samples, length), width)


def _describe_config(folder: Folder, manifest: Manifest) -> Iterator[str]:
    encoding, annotator, classes = manifest.encoding, manifest.annotator, legible_names(manifest.classes)
    size = " and ".join("x".join(map(str, size)) for size in manifest.map_sizes)
    labels = f"maps       {size} locations" if manifest.has_maps else f"crops      {encoding['num_crops']} per image"
    more = f", ... {len(classes) - _NUM_CLASSES} more" if len(classes) > _NUM_CLASSES else ""
    yield f"{folder}: config {manifest.config}, made with {manifest.made_with}"
    for line in (
        f"classes    {len(classes)}: {', '.join(classes[:_NUM_CLASSES])}{more}",
        f"annotator  {annotator.get('name')}, {annotator.get('kind')}" + _input_of(annotator),
        f"{labels}, {encoding['name']} {encoding['k']}, stored as {encoding['dtype']}",
    ):
        yield from textwrap.wrap(printable(line), 110, initial_indent="  ", subsequent_indent=" " * 13)
    for split in manifest.splits.values():
        images = f"{split.image_extension} images" if split.image_extension else "no images"
        skipped = f", {counted(len(split.skipped), 'image')} skipped" if split.skipped else ""
        shards = counted(len(split.filenames), "shard")
        size = f"{sum(split.shard_bytes) / 1e6:,.1f} MB"
        yield f"  {split.name:<10} {split.num_samples:,} samples in {shards}, {images}, {size}{skipped}"
        yield from _describe_statistics(split, manifest.map_sizes)
    if any(total(split.shard_statistics).several is not None for split in manifest.splits.values()):
        definition = shown_definition(has_maps=manifest.has_maps)
        yield from textwrap.wrap(definition, 110, initial_indent=" " * 13, subsequent_indent=" " * 13)


def _input_of(annotator: dict[str, object]) -> str:
    size = annotator.get("input_size")
    return f", input {'x'.join(map(str, size))}" if isinstance(size, (list, tuple)) else ""


def _describe_statistics(split: Split, map_sizes: Sequence[Sequence[int]]) -> Iterator[str]:
    statistics = total(split.shard_statistics)
    if split.num_samples:
        several = (
            "" if statistics.several is None else f", {statistics.several / split.num_samples:.1%} show several classes"
        )
        yield f"{'':13}{split.agreement:.1%} agree with their label{several}"
    if split.calibration is not None:
        calibration = split.calibration
        after = [""] if len(calibration.gains) == 1 else [f", {height}x{width} map" for height, width in map_sizes]
        gains = [
            ", ".join(f"{gain:.2f} at {share:.0%}" for share, gain in zip(calibration.shares, of_map, strict=True))
            + f" of the area{name}"
            for of_map, name in zip(calibration.gains, after, strict=True)
        ]
        lines = [f"calibrated KL {calibration.kl_after:.3f} instead of {calibration.kl_before:.3f}, gain {gains[0]}"]
        for line in (*lines, *(f"gain {one}" for one in gains[1:])):
            yield f"{'':13}{line}"


def _describe_samples(
    folder: Folder, manifest: Manifest, split: Split, first: int, count: int, width: int
) -> Iterator[str]:
    if count:
        label_maps = LabelMaps(folder, split=split.name)
        rows = range(first, min(first + count, len(label_maps)))
        yield from _show_samples((_sample(label_maps, row) for row in rows), legible_names(manifest.classes), width)


def _sample(label_maps: LabelMaps, row: int) -> _Sample:
    index = label_maps.index
    image_bytes = index.extent(row, "image")[1] if index.has_images else 0
    return _Sample(label_maps.at(row), index.extent(row, "map")[1], image_bytes)


def _read_samples(path: Path, count: int) -> Iterator[_Sample]:
    """Yield the first samples of a shard without an index."""
    rows = read_rows(path)
    with open_regular(path) as file:
        for row in rows[:count]:
            blob = read_at(file.fileno(), row.map_size, row.map_offset)
            labels = read_label(blob, key=row.key, label=row.label)
            if row.label >= labels.num_classes:
                raise DatasetError(
                    f"{path}: sample {row.key!r}: .cls must be below {labels.num_classes}, the number of classes, got {row.label}"
                )
            yield _Sample(labels, row.map_size, row.image_size)


def _show_samples(samples: Iterator[_Sample], names: Sequence[str], width: int) -> Iterator[str]:
    """Yield the lines of samples. If there are no class names, class indices are shown."""
    for labels, label_bytes, image_bytes in samples:
        class_names = names or [f"class {index}" for index in range(labels.num_classes)]
        label = "none" if labels.label is None else class_names[labels.label]
        height, image_width = labels.canvas_size
        image = f"image {image_bytes:,} bytes, " if image_bytes else ""
        kind = "crops" if isinstance(labels, CropLabels) else "map"
        yield f"\n{labels.key}: label {label}, {height}x{image_width} pixels, {image}{kind} {label_bytes:,} bytes"
        if isinstance(labels, CropLabels):
            yield from _crop_rows(labels, class_names)
        else:
            yield "  pooled: " + _best(LabelPooling()(labels), class_names)
            yield from _heatmap_row(labels, class_names, width)


def _best(soft_label: torch.Tensor, names: Sequence[str]) -> str:
    """Return the strongest classes of a soft label `[C]` as text."""
    values, indices = soft_label.topk(min(_NUM_HEATMAPS, len(soft_label)))
    best = zip(values.tolist(), indices.tolist(), strict=True)
    return ", ".join(f"{value:.1%} {names[index]}" for value, index in best)


def _crop_rows(labels: CropLabels, names: Sequence[str]) -> Iterator[str]:
    """Yield the lines of the mean label and of the first crops."""
    yield "  mean: " + _best(labels.mean_label(), names)
    for crop in range(min(_NUM_CROPS, labels.num_crops)):
        x1, y1, x2, y2 = labels.pixel_box(crop)
        mirrored = ", mirrored" if labels.flips[crop] else ""
        yield f"  crop {crop}, x {x1} to {x2}, y {y1} to {y2}{mirrored}: {_best(labels.soft_labels([crop])[0], names)}"
    if labels.num_crops > _NUM_CROPS:
        yield f"  ... {labels.num_crops - _NUM_CROPS} more"


def _heatmap_row(label_map: LabelMap, names: Sequence[str], width: int) -> Iterator[str]:
    """Yield the lines of heatmaps of the strongest classes, as many as fit. Each location is two characters wide."""
    side = 2 * label_map.shape[-1] + 2  # with the frame
    num_fitting = max(1, (width - 2) // (side + 1))
    chosen = [index for index, _ in strongest_classes(label_map, min(_NUM_HEATMAPS, num_fitting))]
    probabilities = label_map.dense().softmax(0)
    blocks = [[names[index][:side].ljust(side), *_heatmap(probabilities[index])] for index in chosen]
    for parts in itertools.zip_longest(*blocks):
        yield "  " + " ".join(parts).rstrip()


def _heatmap(probability: torch.Tensor) -> Iterator[str]:
    """Yield the rows of a heatmap `[H, W]` in a frame."""
    shades = (probability * len(_SHADES)).long().clamp(max=len(_SHADES) - 1)
    edge = "+" + "--" * probability.shape[1] + "+"
    yield edge
    for row in shades.tolist():
        yield "|" + "".join(2 * _SHADES[shade] for shade in row) + "|"
    yield edge
