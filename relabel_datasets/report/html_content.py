"""Content of the HTML report about the dataset: how its label maps were made, and their statistics as plots and tables."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from markupsafe import Markup

from ..analysis.analysis import SEVERAL, SUSPECT, Analysis, Table
from ..data.store import LabelMaps
from ..extras import install_command, is_installed
from ..shards.manifest import Manifest
from ..storage.folders import Folder
from ..words import counted
from .plots import plot, to_bytes

logger = logging.getLogger(__name__)

NUM_SUSPECTS = 100  # images with suspect labels that are always in the page
_MAX_ROWS = 50  # of tables that may be long
_CLASS_COLUMNS = {
    "classes": ("class",),
    "confused": ("label", "best"),
    "suspects": ("label", "suggestion"),
}  # columns that hold class names, by table
_TITLES = {
    "overlap": "Overlap of random crops with objects",
    "by_overlap": "Confidence and agreement of crops by overlap",
    "num_classes": "Number of classes per image and per crop",
    "classes": "Statistics per class",
    "confused": "Confused classes",
    "suspects": "Suspect labels",
    "fidelity": "Fidelity of the stored labels",
    "calibration": "Gain of calibrated labels by share of the image area",
}
_MAP_WORDS = {
    "noun": "map",
    "whole": "pooled label of the whole image",
    "show": "Show label map",
    "fact": "Maps agree with labels",
    "crops": "random crops",
    "agrees": "A map agrees with the label if the label has the highest probability when pooled over the whole image.",
}
_CROP_WORDS = {
    "noun": "mean label",
    "whole": "mean label of the stored crops",
    "show": "Show stored crops",
    "fact": "Mean labels agree with labels",
    "crops": "stored crops",
    "agrees": "The mean label of the crops of an image agrees with the label if the label has the highest probability.",
}


class Fact(NamedTuple):
    """Fact on top of a page."""

    name: str
    value: str
    note: str = ""


def provenance(folder: Folder, label_maps: LabelMaps) -> dict[str, Any]:
    """Return the template variables about how the label maps were made."""
    manifest, split = label_maps.manifest, label_maps.split
    encoding = manifest.encoding
    annotator = _entries(manifest.annotator)
    location = str(folder) if folder.is_remote else str(Path(str(folder)).absolute())
    facts = [
        Fact("Images", f"{split.num_samples:,}", f"{len(manifest.classes):,} classes"),
        Fact("Annotator", _annotator(manifest), _annotator_note(manifest)),
        _stored_labels(manifest),
        Fact("Size of a label map" if manifest.has_maps else "Labels of an image", f"{label_maps.index.mean_size('map'):,.0f} bytes", f"{sum(split.shard_bytes) / 1e6:,.1f} MB of shards"),
    ]  # fmt: skip
    return {
        "title": location.rstrip("/")
        .rpartition("/")[2]
        .partition("@")[0],  # without parent folders: the page may be shared
        "annotator": _annotator(manifest),
        "config": manifest.config,
        "split": split.name,
        "about_maps": facts,
        "splits": _splits(manifest),
        "made": [
            ("Annotator", [entry for entry in annotator if not _is_checksum(entry)]),
            ("Encoding", _entries(encoding)),
            ("Package", [("made with", manifest.made_with), ("format version", str(manifest.version))]),
        ],
        "checksums": [entry for entry in annotator if _is_checksum(entry)],
    }


def _entries(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return names and values as text."""
    return [(key.replace("_", " "), _as_text(value)) for key, value in values.items()]


def _is_checksum(entry: tuple[str, str]) -> bool:
    return re.search(r"\b[0-9a-f]{32,}\b", entry[1]) is not None


def _stored_labels(manifest: Manifest) -> Fact:
    encoding = manifest.encoding
    note = f"{encoding['name']}, k = {encoding['k']}, {encoding['dtype']}"
    if not manifest.has_maps:
        return Fact("Stored crops", f"{encoding['num_crops']} per image", note)
    sizes = " and ".join(" x ".join(map(str, size)) for size in manifest.map_sizes)
    return Fact("Label maps", f"{sizes} locations", note)


def _annotator(manifest: Manifest) -> str:
    return str(manifest.annotator.get("name", manifest.config))


def _annotator_note(manifest: Manifest) -> str:
    size, exact = manifest.annotator.get("input_size"), manifest.annotator.get("linear_head")
    notes = [f"at {' x '.join(map(str, size))} pixels"] if isinstance(size, Sequence) else []
    if exact is not None and manifest.has_maps:
        notes.append("exact maps" if exact else "approximate maps")
    return ", ".join(notes)


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return "not recorded"
    if isinstance(value, list):
        return ", ".join(map(_as_text, value))
    return json.dumps(value, sort_keys=True)


def _splits(manifest: Manifest) -> Table:
    """Return the properties of the splits: a column per split, because there are few of them and screens may be narrow."""
    splits = list(manifest.splits.values())
    rows = [
        ("images", *(f"{split.num_samples:,}" for split in splits)),
        ("shards", *(f"{len(split.filenames):,}" for split in splits)),
        ("MB", *(f"{sum(split.shard_bytes) / 1e6:,.1f}" for split in splits)),
        ("bytes per sample", *(f"{sum(split.shard_bytes) / max(1, split.num_samples):,.0f}" for split in splits)),
        ("has images", *("yes" if split.image_extension else "no" for split in splits)),
        ("unreadable", *(f"{len(split.skipped):,}" for split in splits)),
    ]
    return Table(("split", *(split.name for split in splits)), rows)


def statistics(analysis: Analysis, names: Mapping[str, str]) -> dict[str, Any]:
    """Return the template variables about statistics.

    Args:
        analysis: Analysis of the dataset.
        names: Legible name of each class, by class.

    Returns:
        The variables by name.
    """
    has_maps = "label maps" in analysis.summary
    numbers, words = (
        (analysis.summary["label maps"], _MAP_WORDS) if has_maps else (analysis.summary["stored crops"], _CROP_WORDS)
    )
    return {
        "words": words,
        "scope": (
            f"Measured on all {numbers['images']:,} images and {numbers['crops']:,} {words['crops']} of 8% to 100% of the area. "
            f"{words['agrees']} Entropies are in nats. {analysis.definitions[SEVERAL]}"
        ),
        "suspects": f"{_suspects(len(analysis.tables['suspects'].rows))} {analysis.definitions[SUSPECT]}",
        "about_labels": [
            Fact(words["fact"], _number("share", numbers["images that agree with their label, share"]), "of images"),
            Fact("Show several classes", _number("share", numbers[SEVERAL]), "of images"),
        ],
        "plots": [{"title": _TITLES[name], "svg": svg} for name, svg in _plots(analysis).items()],
        "topics": [
            (
                topic.capitalize(),
                [(name.removesuffix(", share"), _number(name, value)) for name, value in values.items()],
            )
            for topic, values in analysis.summary.items()
        ],
        "tables": [_table(name, table, names) for name, table in analysis.tables.items() if table.rows],
    }


def _suspects(count: int) -> str:
    shown = (
        ""
        if count <= NUM_SUSPECTS
        else f" The {NUM_SUSPECTS} most suspect ones of the split are shown, and others among the samples."
    )
    return f"{counted(count, 'image has a suspect label', 'images have suspect labels')}.{shown}"


def _table(name: str, table: Table, names: Mapping[str, str]) -> dict[str, Any]:
    is_cut = name in ("confused", "suspects") and len(table.rows) > _MAX_ROWS
    is_class = [column in _CLASS_COLUMNS.get(name, ()) for column in table.columns]
    return {
        "title": _TITLES[name] + (f" (first {_MAX_ROWS} of {len(table.rows):,})" if is_cut else ""),
        "columns": [column.replace("_", " ") for column in table.columns],
        "rows": [
            [
                names[value] if is_name else _number(column, value)
                for column, value, is_name in zip(table.columns, row, is_class, strict=True)
            ]
            for row in (table.rows[:_MAX_ROWS] if is_cut else table.rows)
        ],
    }


def _number(name: str, value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if value != value:  # NaN: no images
        return "-"
    is_share = any(word in name for word in ("share", "confidence", "agreement", "p_", "same_best", "images_shown"))
    return f"{value:.1%}" if is_share else f"{value:.3f}"


def _plots(analysis: Analysis) -> dict[str, Markup]:
    """Return the plots as inline SVG, without background and in the text color of the page; none without matplotlib."""
    if not is_installed("plots"):  # the tables of the page have the same numbers
        logger.warning("the report has tables but no plots, which need matplotlib: %s", install_command("plots"))
        return {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # the browser draws the text
        figures = plot(analysis)
        return {name: _inline_svg(name, to_bytes(figure, "svg")) for name, figure in figures.items()}


def _inline_svg(name: str, svg: bytes) -> Markup:
    """Return an SVG file as an HTML element whose ids do not collide with those of other plots."""
    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(svg)  # noqa: S314  written by matplotlib
    for metadata in root.findall("{http://www.w3.org/2000/svg}metadata"):
        root.remove(metadata)
    for element in root.iter():
        for attribute, value in element.attrib.items():
            if attribute == "id":
                value = f"{name}-{value}"
            elif attribute.endswith("href") and value.startswith("#"):
                value = f"#{name}-{value[1:]}"
            else:
                value = value.replace("url(#", f"url(#{name}-")
                value = value.replace("#ffffff", "none").replace("#000000", "currentColor")
            element.set(attribute, value)
    root.set("role", "img")
    root.set("aria-label", _TITLES[name])
    for size in ("width", "height"):
        del root.attrib[size]  # set by the style of the page
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704  ElementTree escapes its text
