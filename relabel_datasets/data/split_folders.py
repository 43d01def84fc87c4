"""Folders of images with one folder per split, such as photos/train/<class>/<image> and photos/val/<class>/<image>."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import DatasetError
from ..shards.configs import SPLIT_ALIASES
from ..shards.formats import IMAGE_EXTENSIONS
from .clutter import is_clutter_name

logger = logging.getLogger(__name__)

SPLIT_FOLDERS = {
    "train": "train",
    **dict.fromkeys((*SPLIT_ALIASES["validation"], "validation"), "validation"),
    "test": "test",
}
_NUM_SHOWN = 3  # class names per split in a message


def find_split_folders(path: str | os.PathLike[str]) -> dict[str, Path]:
    """Find the splits of a folder of images. Each split is an ImageFolder, tars, or a saved Hugging Face dataset.

    The depth decides: `photos/train/cat/1.jpg` is an image of split train and class cat, and `photos/train/1.jpg` is an image of
    class train in an ImageFolder without splits. A folder that also has images of other names, such as `photos/bus/`, is an
    ImageFolder. A split without class folders, such as the images of a test without labels, is left out with a warning.

    Args:
        path: Folder of images.

    Returns:
        Folder of each split, by the name of the split: train, validation (from val, valid or validation) and test. Empty if the
        path is not a folder with splits, or is a saved `DatasetDict`, of which `open_source` reads one split.

    Raises:
        DatasetError: (a ValueError) Two folders are the same split, such as val and validation.
        OSError: A folder cannot be read.
    """
    root = Path(path)
    if not root.is_dir() or (root / "dataset_dict.json").is_file():  # a DatasetDict knows its splits, of any names
        return {}
    folders = _folders(root)
    named = {name: folder for name, folder in folders.items() if name in SPLIT_FOLDERS}
    with_classes = {name: folder for name, folder in named.items() if _has_class_folders(folder)}
    if not with_classes or any(_has_images(folder) for name, folder in folders.items() if name not in named):
        return {}
    for name in sorted(named.keys() - with_classes):
        logger.warning("%s has no class folders: it is left out", named[name])
    splits: dict[str, Path] = {}
    for name in sorted(with_classes, key=list(SPLIT_FOLDERS).index):
        split = SPLIT_FOLDERS[name]
        if split in splits:
            raise DatasetError(
                f"{splits[split]} and {with_classes[name]} are both split {split!r}: rename or move one of them"
            )
        splits[split] = with_classes[name]
    return splits


def check_same_classes(classes: Mapping[str, Sequence[str] | None]) -> None:
    """Check that all splits have the same classes, because one config has one list of classes.

    Args:
        classes: Class names of each split, by the path of its images. None stands for images with class indices only.

    Raises:
        DatasetError: (a ValueError) The classes differ. The message lists some of those that only one split has.
    """
    (first, expected), *others = classes.items()
    for path, names in others:
        if names != expected and not (names is None or expected is None):
            only = [
                (where, sorted(set(a) - set(b))) for where, a, b in ((first, expected, names), (path, names, expected))
            ]
            shown = "; ".join(f"only {where} has {_listed(missing)}" for where, missing in only if missing)
            raise DatasetError(
                f"{first} and {path} have different class folders ({shown}): give both the same class folders, or build one of "
                "them alone with split="
            )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NUM_SHOWN
    return ", ".join(map(repr, names[:_NUM_SHOWN])) + (f" and {more} more" if more > 0 else "")


def _folders(path: Path) -> dict[str, Path]:
    with os.scandir(path) as entries:
        return {
            entry.name: path / entry.name for entry in entries if entry.is_dir() and not is_clutter_name(entry.name)
        }


def _has_class_folders(path: Path) -> bool:
    """Return whether there are folders with images but no image next to them, or tars or a saved Hugging Face dataset."""
    with os.scandir(path) as entries:
        files = [entry.name for entry in entries if not entry.is_dir() and not is_clutter_name(entry.name)]
    if any(name.endswith(".tar") or name == "state.json" for name in files):
        return True
    return not any(map(_is_image, files)) and any(_has_images(folder) for folder in _folders(path).values())


def _has_images(path: Path) -> bool:
    return any(_is_image(name) for _, _, names in os.walk(path) for name in names if not is_clutter_name(name))


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS)
