"""Checks of what a build is given, before any image is annotated."""

from __future__ import annotations

from pathlib import Path

from ..data.sources import ImageFolderSource, ImageSource
from ..errors import DatasetError
from ..labels.encodings import find_entry
from ..labels.limits import MAX_SCALES
from ..storage.output import LocalOutput, Output
from ..words import counted
from .annotator import Annotator
from .shard import BuildConfig


def check_images(source: ImageSource) -> None:
    """Raise DatasetError if the source has no image with a class."""
    if not len(source.keys):
        raise DatasetError("there are no images to annotate: the source is empty")
    if max(source.labels) < 0:
        raise DatasetError(
            f"no image has a class ({counted(len(source.keys), 'image')}), first {source.name(0)}: a missing or negative label means "
            "that an image has no class"
        )


def check_apart(source: ImageSource, output: Output) -> None:
    """Raise ValueError if the dataset is in the ImageFolder: it would count as a class, and the build could not be resumed."""
    if not isinstance(source, ImageFolderSource) or not isinstance(output, LocalOutput):
        return
    out, images = Path(str(output)).resolve(), source.path.resolve()
    if images in (out, *out.parents):
        raise ValueError(f"the dataset {output} is in the image folder {source.path}: choose a folder outside of it")


def check_scales(build_config: BuildConfig, annotator: Annotator) -> None:
    """Raise ValueError if the encoding stores the maps of several input sizes, but the annotator does not have them."""
    if not find_entry(build_config.encoding).has_scales:
        return
    description = annotator.describe()
    num_maps = len(description["annotators"]) if description.get("kind") == "ensemble" else 1
    if not 2 <= num_maps <= MAX_SCALES:
        raise ValueError(
            f"encoding={build_config.encoding!r} stores the maps of 2 to {MAX_SCALES} annotators, such as one model at several input "
            f"sizes, got {counted(num_maps, 'annotator')}: use an Ensemble (on the command line, --scales), or "
            "encoding='heatmaps'"
        )
