"""Build a config: images -> annotator -> shards, index, manifest and card, going on where an earlier run stopped."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..data.card import read_template, write_card
from ..data.index import Row, make_index
from ..data.manifest import DatasetError, Manifest, Split, sha256_of, write_atomically
from ..data.shards import ShardInfo, shard_names
from ..labels.codec import resolve_dtype
from ..labels.encoding import resolve_k
from .annotator import Annotator, ClassSubset
from .classes import match_classes
from .shard import Annotated, Settings, Skipped, annotate_shard
from .sources import ImageSource, source_sha256

logger = logging.getLogger(__name__)


def build(
    source: ImageSource,
    root: str | os.PathLike[str],
    annotator: Annotator,
    *,
    config: str | None = None,
    split: str = "train",
    settings: Settings = Settings(),
    shard_size: int = 5000,
    class_mapping: Mapping[str, str | int] | None = None,
    card: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Manifest:
    """Annotate all images of a source and write a split of a config; return its manifest.

    The images are dealt to the shards at random, by a fixed seed, so that each shard is a sample of the whole. A second
    run with the same arguments continues after the last finished shard, and one with other arguments is refused.
    Images that cannot be read are left out, shown, and listed in the manifest.

    Args:
        source: the images, see `ImageFolderSource`, `WebDatasetSource`, `HFSource` and `open_source`.
        root: folder of the dataset; the config goes into `<root>/<config>`.
        annotator: gives dense logits. If its classes are others than the source's, its rows are matched to these by
            name, see `match_classes`.
        config: name of the config. Default: the annotator's name.
        split: name of the split.
        settings: how label maps are made and stored.
        shard_size: samples a shard.
        class_mapping: dataset class -> the annotator's class or its index, where names do not match.
        card: template of the dataset's README.md. Default: a general one.
        progress: whether to show a progress bar with rate and time left on stderr.

    Raises:
        DatasetError: (a ValueError) the folder holds, in part or whole, something else of this name; or no image of a
            shard can be read.
        ValueError: settings or classes that do not fit the annotator.
    """
    settings = _resolved(settings)
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, got {shard_size}")
    if card is not None:
        read_template(card)  # better now than after hours
    annotator = _in_dataset_classes(annotator, source, class_mapping)
    config = config or re.sub(r"[^\w.-]+", "-", str(annotator.describe()["name"]))
    folder = Path(root) / config
    plan = {
        "annotator": annotator.describe(),
        "classes": list(annotator.classes or map(str, range(annotator.num_classes))),
        "encoding": {"name": settings.encoding, "k": settings.k, "dtype": settings.dtype},
        "images": settings.images,
        "shard_size": shard_size,
        "source_sha256": source_sha256(source),
    }
    manifest = _existing(folder, split, plan)
    work = _Work(folder, split, plan, len(source.keys))
    if manifest is not None and split in manifest.splits:
        logger.info("%s already has all of split %r", folder, split)
        if not work.is_begun():
            return manifest
    else:
        annotated = work.run(source, annotator, settings, progress)
        manifest = _finish(folder, split, plan, manifest, work.names, annotated, source, settings)
    write_card(Path(root), card)  # also where an earlier run was stopped between manifest and card
    work.clean_up()
    return manifest


def _in_dataset_classes(
    annotator: Annotator, source: ImageSource, mapping: Mapping[str, str | int] | None
) -> Annotator:
    if source.classes is not None and (source.classes != annotator.classes or mapping):
        rows = match_classes(annotator.classes, source.classes, mapping, annotator.num_classes)
        if annotator.classes is None and not mapping:
            logger.warning(
                "the annotator's classes have no names: its %d are taken for the source's, in order", len(rows)
            )
        annotator = ClassSubset(annotator, rows, tuple(source.classes))
    highest = max(source.labels, default=0)
    if highest >= annotator.num_classes:
        raise ValueError(
            f"the source has class index {highest}, but the annotator only {annotator.num_classes} classes"
        )
    return annotator


def _resolved(settings: Settings) -> Settings:
    """Return the settings with every default filled in, as they go into the manifest.

    Raises:
        ValueError: they are not settings that an encoder takes.
    """
    for name in ("batch_size", "num_threads"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(settings, name)}")
    k = resolve_k(settings.encoding, settings.k)
    return replace(settings, k=k, dtype=resolve_dtype(settings.encoding, settings.dtype))


def _existing(folder: Path, split: str, plan: dict[str, Any]) -> Manifest | None:
    """Return the config's manifest, if there is one, when `plan` may be added to it or is in it."""
    try:
        manifest = Manifest.load(folder)
    except FileNotFoundError:
        return None
    encoding = {key: manifest.encoding[key] for key in plan["encoding"]}
    found: dict[str, Any] = {"annotator": manifest.annotator, "classes": manifest.classes, "encoding": encoding}
    if split in manifest.splits:
        there = manifest.splits[split]
        found |= {"source_sha256": there.source_sha256, "images": there.image_extension is not None}
    _refuse_other_plan(folder, found, {key: plan[key] for key in found})
    return manifest


def _refuse_other_plan(folder: Path, found: dict[str, Any], plan: dict[str, Any]) -> None:
    other = [key for key in plan if found.get(key) != plan[key]]
    if other:
        raise DatasetError(
            f"{folder} holds label maps made with another {' and '.join(other)}: "
            + "; ".join(f"{key} {_short(found.get(key))} there, {_short(plan[key])} now" for key in other)
            + ". Choose another config name, or remove that folder"
        )


def _short(value: object) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) < 200 else text[:200] + " ..."


class _Work:
    """A build in progress: which shards there will be, and a record of each that is finished.

    The records lie in a hidden folder of the config until the manifest takes their place.
    """

    def __init__(self, folder: Path, split: str, plan: dict[str, Any], num_images: int) -> None:
        self._folder, self._records, self._plan = folder, folder / f".build-{split}", plan
        self._num_images = num_images
        order = np.random.default_rng(0).permutation(num_images)
        size = plan["shard_size"]
        self._shards = [order[start : start + size].tolist() for start in range(0, num_images, size)]
        self.names = shard_names(split, len(self._shards))

    def run(self, source: ImageSource, annotator: Annotator, settings: Settings, progress: bool) -> list[Annotated]:
        """Return what there is of every shard, after annotating those that are not finished."""
        self._begin()
        finished = [self._load(name) for name in self.names]
        done = sum(len(indices) for indices, each in zip(self._shards, finished, strict=True) if each)
        with tqdm(total=self._num_images, initial=done, unit="img", disable=not progress, desc="annotate") as bar:
            for i, (name, indices) in enumerate(zip(self.names, self._shards, strict=True)):
                if finished[i] is None:
                    finished[i] = annotate_shard(
                        self._folder / name, source, indices, annotator, settings, bar.update, _report
                    )
                    self._save(name, finished[i])
        return [each for each in finished if each is not None]

    def is_begun(self) -> bool:
        """Return whether there are records, of this or an earlier run."""
        return self._records.exists()

    def _begin(self) -> None:
        self._records.mkdir(parents=True, exist_ok=True)
        path = self._records / "plan.json"
        if path.exists():
            _refuse_other_plan(self._folder, json.loads(path.read_text(encoding="utf-8")), self._plan)
        else:
            write_atomically(path, json.dumps(self._plan, sort_keys=True).encode())

    def _load(self, name: str) -> Annotated | None:
        try:
            record = json.loads((self._records / f"{name}.json").read_text(encoding="utf-8"))
            size = (self._folder / name).stat().st_size
        except FileNotFoundError:
            return None
        info = ShardInfo([Row(*row) for row in record["info"][0]], *record["info"][1:])
        if size != info.num_bytes:
            return None  # not the shard that was recorded: annotate it again
        return Annotated(info, [Skipped(*each) for each in record["skipped"]], record["map_size"])

    def _save(self, name: str, annotated: Annotated | None) -> None:
        assert annotated is not None
        write_atomically(self._records / f"{name}.json", json.dumps(asdict(annotated)).encode())

    def clean_up(self) -> None:
        shutil.rmtree(self._records)


def _report(skipped: Skipped) -> None:
    tqdm.write(f"skipped, cannot be read: {skipped.error}", file=sys.stderr)


def _finish(
    folder: Path,
    split: str,
    plan: dict[str, Any],
    manifest: Manifest | None,
    names: Sequence[str],
    annotated: list[Annotated],
    source: ImageSource,
    settings: Settings,
) -> Manifest:
    """Write the index and then the manifest of all shards."""
    index = folder / f"{split}.index.safetensors"
    rows = [row for each in annotated for row in each.info.rows]
    write_atomically(index, make_index(rows, images=settings.images))
    entry = Split(
        name=split,
        num_samples=len(rows),
        filenames=list(names),
        shard_lengths=[len(each.info.rows) for each in annotated],
        shard_bytes=[each.info.num_bytes for each in annotated],
        shard_sha256=[each.info.sha256 for each in annotated],
        index=index.name,
        index_bytes=index.stat().st_size,
        index_sha256=sha256_of(index),
        image_extension=source.extension if settings.images else None,
        key_rule=source.key_rule,
        source_sha256=plan["source_sha256"],
        skipped=[skipped._asdict() for each in annotated for skipped in each.skipped],
    )
    map_size = next((each.map_size for each in annotated if each.map_size), None)
    manifest = Manifest(
        config=folder.name,
        classes=plan["classes"],
        annotator=plan["annotator"],
        encoding={**plan["encoding"], "map_size": None if map_size is None else list(map_size)},
        splits={**(manifest.splits if manifest else {}), split: entry},
        made_with=f"relabel_datasets {version('relabel-datasets')}",
    )
    manifest.save(folder)
    if entry.skipped:
        logger.warning("%d of %d images could not be read: see %s", len(entry.skipped), len(source.keys), folder)
    return manifest
