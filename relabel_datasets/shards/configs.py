"""Find a config and a split of a dataset."""

from __future__ import annotations

from contextlib import suppress

from ..errors import DatasetError
from ..naming import check_config, is_split
from ..storage.folders import MANIFEST_NAME, Folder
from .manifest import Manifest, Split

_VALIDATION = ("validation", "val", "valid")
SPLIT_ALIASES = {name: tuple(other for other in _VALIDATION if other != name) for name in _VALIDATION}

_ONE_SPLIT = (
    "split= is the name of one split; a part of it is torch.utils.data.Subset(dataset, range(n)), several are "
    "torch.utils.data.ConcatDataset([dataset, other]), and load_dataset without split= returns a dict of all"
)


def open_config(root: Folder, config: str | None) -> tuple[Folder, Manifest]:
    """Open a config of a dataset.

    Args:
        root: Folder of the dataset, or of a config.
        config: Name of the config. None selects the only config.

    Returns:
        The folder of the config and its manifest.

    Raises:
        FileNotFoundError: There is no dataset at `root`.
        DatasetError: There is no such config, there are several configs and none is given, or a remote dataset cannot be
            reached.
    """
    if config is not None:
        check_config(config, f"config of {root}")
        with suppress(FileNotFoundError):
            return root.child(config), open_manifest(root, config)
    configs = root.configs()
    if configs is None:
        manifest = Manifest.read(root)
        if config not in (None, manifest.config):
            raise DatasetError(f"{root} is config {manifest.config!r}, not {config!r}")
        return root, manifest
    if not configs:
        raise FileNotFoundError(
            f"no dataset at {root}: expected {root}/<config>/{MANIFEST_NAME}. To make a dataset of a folder of images, run "
            "`relabel build IMAGES OUT --annotator MODEL`"
        )
    if config is None and len(configs) > 1:
        raise DatasetError(f"{root} has several configs, name one of {configs} with config=")
    if config is not None and config in configs:
        raise DatasetError(
            f"{root}/{config}/{MANIFEST_NAME} is missing, although the card lists this config: publish the dataset again"
        )
    if config is not None:
        raise DatasetError(f"{root} has no config {config!r}, only {configs}")
    return root.child(configs[0]), open_manifest(root, configs[0])


def open_manifest(root: Folder, config: str) -> Manifest:
    """Read the manifest of a config.

    Args:
        root: Folder of the dataset.
        config: Name of the config.

    Returns:
        The manifest.

    Raises:
        FileNotFoundError: There is no manifest.
        DatasetError: The manifest is damaged, belongs to another config, or cannot be reached.
    """
    folder = root.child(config)
    manifest = Manifest.read(folder)
    if manifest.config != config:
        raise DatasetError(
            f"{folder}/{MANIFEST_NAME} belongs to config {manifest.config!r}, not {config!r}: the folder was renamed, or the "
            f"file was copied from another config; rename the folder to {manifest.config!r}"
        )
    return manifest


def find_split(manifest: Manifest, name: str) -> Split:
    """Return the entry of a split. "val" and "validation" are synonyms.

    Args:
        manifest: Manifest of the config.
        name: Name of the split.

    Raises:
        DatasetError: There is no such split.
    """
    names = (name, *SPLIT_ALIASES.get(name, ())) if isinstance(name, str) else ()
    for candidate in names:
        if candidate in manifest.splits:
            return manifest.splits[candidate]
    advice = "" if is_split(name) else f": {_ONE_SPLIT}"
    raise DatasetError(f"config {manifest.config!r} has no split {name!r:.80}, only {sorted(manifest.splits)}{advice}")
