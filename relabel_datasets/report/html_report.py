"""`write_report`: a dataset's label maps as one HTML file, to look at and to pool with the mouse.

The page is in page/: a template, its style, and scripts that decode and pool label maps as `labels/codec.py` and
`labels/pooling.py` do. Texts of the dataset get into it by Jinja2's autoescape, as JSON without `<`, or as text nodes.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..analysis.analysis import analyze
from ..analysis.label_maps import measure_maps
from ..data.datasets import RelabelDataset
from ..data.joins import Images
from ..data.store import LabelMaps
from ..errors import DatasetError
from ..shards.card import find_restricted_images
from ..storage.folders import Folder, local_path
from ..storage.local import write_atomically
from ..storage.resolve import open_folder
from .html_content import about, statistics
from .html_samples import Pictures, sample_contents, sample_index
from .names import legible_names

logger = logging.getLogger(__name__)

_PAGE = Path(__file__).parent / "page"
_SCRIPTS = ("label_map.js", "stage.js", "gallery.js", "page.js")


def write_report(
    dataset: str | os.PathLike[str] | Folder,
    out: str | os.PathLike[str] = "report.html",
    name: str | None = None,
    split: str = "train",
    *,
    num_samples: int = 1000,
    images: Images | bool = True,
    restricted_images: str | None = None,
    boxes: str | os.PathLike[str] | None = None,
    num_crops: int = 100_000,
    progress: bool = True,
) -> Path:
    """Write a page that shows how a split's label maps were made, their statistics, and samples to pool crops of.

    The file opens from disk and loads nothing. It holds the samples' label maps as they are stored, and their images as JPEGs
    of at most 256 pixels, about 10 KB each.

    Args:
        dataset: as `load_dataset` takes it.
        out: the file to write; its folder is made if need be.
        name: the config; may be left out where there is only one.
        split: of the dataset.
        num_samples: at most so many samples to look at, spread evenly. Statistics are always of all.
        images: False leaves them out, and heatmaps are shown alone; else those of the shards, or where a label-only dataset
            finds them, see `RelabelDataset`.
        restricted_images: the name of images that may not be redistributed, as the card has it (`restricted_images:`), to put
            them into the page all the same. Without it they are left out.
        boxes: of objects, for statistics of overlap, see `read_boxes`.
        num_crops: that statistics are of, over all images.
        progress: whether to show progress bars on stderr.

    Returns:
        The path of the file.

    Raises:
        FileNotFoundError: no such dataset, images or boxes.
        ValueError: `num_samples` is not positive, there is no such config or split, `restricted_images` names others than the
            card does, or a file is damaged.

    Example:
        >>> write_report("scenes-relabel", "report.html", split="validation")
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    out = local_path(out, "out=")
    if out.is_dir():
        raise ValueError(f"{out} is a folder: give the path of the file to write, such as {out / 'report.html'}")
    folder = open_folder(dataset)
    label_maps = LabelMaps(folder, name, split)
    pictures, note = _find_pictures(folder, label_maps, images, restricted_images)
    out.parent.mkdir(parents=True, exist_ok=True)  # if it cannot be made, better now than after minutes
    analysis = analyze(folder, name, split, boxes=boxes, num_crops=num_crops, progress=progress)
    measures = measure_maps(label_maps, num_crops=1, num_samples=num_samples, progress=False)
    names = legible_names(label_maps.manifest.classes)
    page = _render(
        **about(folder, label_maps),
        **statistics(analysis, dict(zip(label_maps.manifest.classes, names, strict=True))),
        note=note,
        index=sample_index(measures, names),
        samples=sample_contents(label_maps, measures.images["key"].tolist(), pictures, progress=progress),
    )
    write_atomically(out, page.encode())
    return out


def _find_pictures(
    folder: Folder, label_maps: LabelMaps, images: Images | bool, allowed: str | None
) -> tuple[Pictures | None, str]:
    """Return what gives images by row, None to leave them out, and what the page says of it."""
    restricted = find_restricted_images(folder.card(), [label_maps.manifest])
    if allowed is not None and allowed != restricted:
        raise DatasetError(
            f"restricted_images is {allowed!r}, but the images of {folder} "
            + (f"are those of {restricted!r}" if restricted else "may be redistributed, as far as its card says")
            + ": name the right ones, or none"
        )
    if images is False:
        return None, "Images were left out: heatmaps are shown alone."
    if images is True and not label_maps.index.has_images:
        return None, "The shards hold no images: heatmaps are shown alone."
    if restricted != allowed:
        logger.warning(
            "images of %s may not be redistributed and are left out of the report; restricted_images=%r "
            "(--restricted-images %r) puts them into one that you keep to yourself",
            restricted, restricted, restricted,
        )  # fmt: skip
        return None, f"Images of {restricted} may not be redistributed and were left out: heatmaps are shown alone."
    manifest = label_maps.manifest
    dataset = RelabelDataset(
        folder, manifest.config, label_maps.split.name, images=None if images is True else images
    )  # fmt: skip
    note = f"It holds images of {restricted}: do not pass this file on." if restricted else ""
    return dataset.image, note


def _render(**content: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # readers do not need it

    environment = Environment(
        loader=FileSystemLoader(_PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = "".join(f"\n{(_PAGE / name).read_text(encoding='utf-8')}" for name in _SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = (_PAGE / "page.css").read_text(encoding="utf-8")
    ours = {"script": Markup(script), "style": Markup(style)}  # noqa: S704  nothing in them is of the dataset
    return environment.get_template("page.html").render(**ours, script_hash=f"sha256-{digest}", **content)
