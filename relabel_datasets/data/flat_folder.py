"""Images in a folder without class folders, such as ImageNet's validation images as distributed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..shards.formats import IMAGE_EXTENSIONS
from ..shards.packed import PackedStrings
from .clutter import is_clutter_name
from .folder_scan import check_file_names, read_image_file
from .keys import key_of

_HF_FILES = ("state.json", "dataset_dict.json")  # written by `datasets.Dataset.save_to_disk`


def is_flat_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a folder of image files, without folders, tars or a saved Hugging Face dataset in it.

    Hidden files and folders are ignored.
    """
    if not Path(path).is_dir():
        return False
    with os.scandir(path) as entries:
        visible = [entry for entry in entries if not is_clutter_name(entry.name)]
    is_other = any(entry.is_dir() or entry.name.endswith(".tar") or entry.name in _HF_FILES for entry in visible)
    return not is_other and any(map(_is_image, visible))


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(IMAGE_EXTENSIONS) and entry.is_file()


class FlatFolder:
    """Images of a folder without class folders, sorted by name. They have no labels, so they can only be joined.

    Args:
        path: Folder of the images.
        key_rule: Rule from file name to key, `"stem"` or `"path"`, see `key_of`.
    """

    def __init__(self, path: str | os.PathLike[str], key_rule: str) -> None:
        self._path = Path(path)
        with os.scandir(path) as entries:
            names = sorted(entry.name for entry in entries if not is_clutter_name(entry.name) and _is_image(entry))
        check_file_names(self._path, names)
        self._names = PackedStrings(names)
        self.keys: Sequence[str] = PackedStrings([key_of(name, key_rule) for name in names])

    def read(self, index: int) -> bytes:
        """Return the bytes of an image file. Thread-safe."""
        return read_image_file(self._path / self._names[index])
