"""The dataset "scenes-relabel": drawn scenes, and shards with their label maps."""

from __future__ import annotations

import logging
from pathlib import Path

from ..annotate.builder import build
from ..data.sources import ImageFolderSource
from ..storage.temp_folders import temporary_folder
from .annotator import MODEL, load_demo_annotator
from .scenes import CLASSES, draw_scenes

logger = logging.getLogger(__name__)

CONFIG = MODEL
PICTURES = "pictures"  # folder with one ImageFolder of scenes per split, and the tables of their objects


def make_scenes_relabel(
    root: Path, *, num_train: int = 160 * len(CLASSES), num_validation: int = 40 * len(CLASSES), seed: int = 0
) -> None:
    """Draw the scenes, and build the shards of both splits with the annotator of this package. Takes about 20 seconds.

    The result has the config "resnet10t", and the scenes as ImageFolders with tables of their objects in `pictures/`. The
    operation is atomic: an interrupted run leaves no folder.

    Args:
        root: Folder to create.
        num_train: Number of training scenes. Default: 1920.
        num_validation: Number of validation scenes. Default: 480.
        seed: Seed of the scenes. Default: 0.

    Raises:
        FileExistsError: `root` exists.
    """
    if root.exists():
        raise FileExistsError(f"{root} already exists: remove it to generate the scenes again")
    root.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(f".{root.name}-", root.parent) as scratch:
        work = scratch / root.name  # inside the temporary folder, which still exists for cleanup after the rename
        logger.info("drawing %d scenes", num_train + num_validation)
        for split, num_images in (("train", num_train), ("validation", num_validation)):
            draw_scenes(work / PICTURES, split, num_images, seed=seed)
        logger.info("annotating the scenes")
        annotator = load_demo_annotator()
        for split in ("train", "validation"):
            source = ImageFolderSource(work / PICTURES / split)
            build(source, work, annotator, config=CONFIG, split=split, card="scenes-relabel")
        work.rename(root)
