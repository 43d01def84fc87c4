"""`write_report`: Write the label maps of a dataset as one interactive HTML file.

The folder `page/` holds the template, its style, and scripts that decode and pool label maps like `labels/codec.py` and
`labels/pooling.py`. Strings from the dataset enter the page through Jinja2's autoescape, as JSON without `<`, or as text nodes.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..analysis.analysis import Analysis, analyze
from ..analysis.label_maps import measure_images, spread_rows
from ..data.datasets import RelabelDataset
from ..data.joins import Images
from ..data.store import LabelMaps
from ..errors import DatasetError
from ..keywords import checked_keywords
from ..shards.card import find_restricted_images
from ..storage.folders import Folder, local_path
from ..storage.local import write_atomically
from ..storage.resolve import open_folder
from .crop_samples import NUM_STORED, crop_samples
from .html_content import NUM_SUSPECTS, provenance, statistics
from .html_samples import ReadImage, sample_contents, sample_index
from .names import legible_names
from .opening import opening_view

logger = logging.getLogger(__name__)

_PAGE = Path(__file__).parent / "page"
_SCRIPTS = ("label_map.js", "stage.js", "gallery.js", "sheet.js", "page.js")
_CROP_SCRIPTS = ("stage.js", "gallery.js", "sheet.js", "crops.js")


@checked_keywords()
def write_report(
    path: str | os.PathLike[str] | Folder,
    out: str | os.PathLike[str] = "report.html",
    config: str | None = None,
    split: str = "train",
    *,
    num_samples: int = 1000,
    images: Images | bool = True,
    restricted_images: str | None = None,
    boxes: str | os.PathLike[str] | None = None,
    num_crops: int = 100_000,
    progress: bool = True,
) -> Path:
    """Write an HTML page with samples, statistics and provenance of a split's label maps or stored crops.

    In the page, a crop box can be dragged over each sample to see the pooled label of the crop. Boxes of stored crops can be clicked
    to see the stored labels. The file works offline and loads nothing. It holds the stored labels of the samples, and their images as
    JPEGs of at most 256 pixels, about 10 KB each. The page opens on the sample whose crops have the most different labels.

    Args:
        path: Dataset, as for `load_dataset`.
        out: File to write. Its folder is created if it does not exist. Default: "report.html".
        config: Name of the config. Default: the only config of the dataset.
        split: Name of the split. Default: "train".
        num_samples: Maximum number of samples in the page, spread evenly over the split. The 100 images with the most suspect
            labels are added to them. Statistics always cover all samples. Default: 1000.
        images: Images of the samples. True uses those in the shards, False shows heatmaps without images. For a label-only
            dataset, give the location of the images, see `RelabelDataset`. Default: True.
        restricted_images: Name of images that must not be redistributed, as in the card (`restricted_images:`), to include
            them in the page. Default: such images are left out.
        boxes: Boxes of objects for overlap statistics, see `read_boxes`. Default: no overlap statistics.
        num_crops: Number of crops for the statistics, over all images, see `analyze`. Default: 100,000.
        progress: Whether to show progress bars on stderr. Default: True.

    Returns:
        The path of the file.

    Raises:
        FileNotFoundError: The dataset, the images or the boxes do not exist.
        ValueError: `num_samples` is not positive, the config or split is unknown, `restricted_images` differs from the name in
            the card, or a file is corrupt.

    Example:
        >>> write_report("scenes-relabel", "report.html", split="validation")
    """
    if num_samples < 1:
        raise ValueError(f"num_samples= must be at least 1, got {num_samples}")
    out = local_path(out, "out=")
    if out.is_dir():
        raise ValueError(
            f"out={str(out)!r} is a folder: give the path of the file to write, such as {out / 'report.html'}"
        )
    folder = open_folder(path)
    label_maps = LabelMaps(folder, config, split)
    read_image, note = _find_images(folder, label_maps, images, restricted_images)
    out.parent.mkdir(parents=True, exist_ok=True)  # fail before minutes of work
    analysis = analyze(folder, config, split, boxes=boxes, num_crops=num_crops, progress=progress)
    measured = measure_images(label_maps, _choose_rows(label_maps, num_samples, analysis), progress=False)
    names = legible_names(label_maps.manifest.classes)
    has_maps, keys = label_maps.manifest.has_maps, measured["key"].tolist()
    content = {
        **provenance(folder, label_maps),
        **statistics(analysis, dict(zip(label_maps.manifest.classes, names, strict=True))),
        "note": note,
        "index": sample_index(measured, names, opening_view(label_maps, measured)),
    }
    if has_maps:
        samples = sample_contents(label_maps, keys, read_image, progress=progress)
        page = _render("page.html", _SCRIPTS, **content, samples=samples)
    else:
        crops = crop_samples(label_maps, keys, read_image, progress=progress)
        page = _render("crops.html", _CROP_SCRIPTS, **content, samples=crops, num_stored=NUM_STORED)
    write_atomically(out, page.encode())
    return out


def _choose_rows(label_maps: LabelMaps, num_samples: int, analysis: Analysis) -> list[int]:
    """Return the rows of the samples in the page, in the order of the split."""
    keys = [key for key, *_ in analysis.tables["suspects"].rows[:NUM_SUSPECTS]]
    suspects = {row for key in keys if (row := label_maps.index.row(key)) is not None}
    return sorted(suspects.union(spread_rows(range(len(label_maps)), num_samples)))


def _find_images(
    folder: Folder, label_maps: LabelMaps, images: Images | bool, allowed: str | None
) -> tuple[ReadImage | None, str]:
    """Return a function that reads an image by row (None leaves images out), and a note about the images for the page."""
    restricted = find_restricted_images(folder.card(), [label_maps.manifest])
    if allowed is not None and allowed != restricted:
        raise DatasetError(
            f"restricted_images is {allowed!r}, but "
            + (
                f"the card of {folder} restricts the images of {restricted!r}: give this name"
                if restricted
                else f"the card of {folder} does not restrict its images: leave it out"
            )
        )
    if images is False:
        return None, "Images were left out; labels are shown without them."
    if images is True and not label_maps.index.has_images:
        return None, "The shards have no images; labels are shown without them."
    if restricted != allowed:
        logger.warning(
            "images of %s must not be redistributed and are left out of the report; use restricted_images=%r "
            "(--restricted-images %r) to include them in a report that you do not share",
            restricted, restricted, restricted,
        )  # fmt: skip
        return (
            None,
            f"Images of {restricted} must not be redistributed and were left out; labels are shown without them.",
        )
    manifest = label_maps.manifest
    dataset = RelabelDataset(
        folder, manifest.config, label_maps.split.name, images=None if images is True else images
    )  # fmt: skip
    note = f"This file contains images of {restricted}: do not share it." if restricted else ""
    return dataset.image, note


def _render(template: str, scripts: Sequence[str], **content: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # only reports need it

    environment = Environment(
        loader=FileSystemLoader(_PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = "".join(f"\n{(_PAGE / name).read_text(encoding='utf-8')}" for name in scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = (_PAGE / "page.css").read_text(encoding="utf-8")
    static = {"script": Markup(script), "style": Markup(style)}  # noqa: S704  independent of the dataset
    return environment.get_template(template).render(**static, script_hash=f"sha256-{digest}", **content)
