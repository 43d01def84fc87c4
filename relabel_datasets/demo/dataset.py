"""The data set "scenes-relabel": scenes, and shards with their label maps."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from ..annotate.builder import build
from ..data.sources import ImageFolderSource
from .annotator import MODEL, load_annotator, train_annotator
from .scenes import CLASSES, draw_scenes

logger = logging.getLogger(__name__)

CONFIG = MODEL
PICTURES = "pictures"  # folder of the scenes as an ImageFolder for each split, and of the tables of their objects
CHECKPOINT = "annotator.safetensors"


def make_scenes_relabel(
    root: Path,
    *,
    num_train: int = 160 * len(CLASSES),
    num_validation: int = 40 * len(CLASSES),
    num_clean: int = 4096,
    annotator_epochs: int = 8,
    seed: int = 0,
) -> None:
    """Draw the scenes, train their annotator, and build the shards of both splits; about a minute on two cores.

    `root` is there when all of it is done, and not at all after an interruption. It has the config "resnet10t", the
    pictures as ImageFolders with the tables of their objects in `pictures/`, and the annotator's weights.

    Args:
        root: the folder to make.
        num_train: pictures to train with.
        num_validation: pictures to validate with.
        num_clean: clean pictures that the annotator learns from.
        annotator_epochs: how often it sees each.
        seed: of all that is random.

    Raises:
        FileExistsError: `root` is there already.
    """
    if root.exists():
        raise FileExistsError(f"{root} is there already: remove it to make the scenes again")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as scratch:
        work = Path(scratch) / root.name  # in a folder of its own, so that renaming leaves one to clean up
        logger.info("drawing %d scenes", num_train + num_validation)
        for split, num_images in (("train", num_train), ("validation", num_validation)):
            draw_scenes(work / PICTURES, split, num_images, seed=seed)
        logger.info("training an annotator on %d clean pictures of single objects", num_clean)
        train_annotator(work / CHECKPOINT, num_pictures=num_clean, epochs=annotator_epochs, seed=seed)
        annotator = load_annotator(work / CHECKPOINT)
        logger.info("annotating the scenes")
        for split in ("train", "validation"):
            source = ImageFolderSource(work / PICTURES / split)
            build(source, work, annotator, config=CONFIG, split=split, card="scenes-relabel")
        work.rename(root)
