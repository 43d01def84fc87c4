"""Find a config and a split of a dataset."""

from __future__ import annotations

from contextlib import suppress

from ..errors import DatasetError
from ..naming import check_config, check_split
from ..storage.folders import MANIFEST_NAME, Folder
from .manifest import Manifest, Split

SPLIT_ALIASES = {"val": ("validation",), "validation": ("val",)}


def open_config(root: Folder, name: str | None) -> tuple[Folder, Manifest]:
    """Return the folder of a config and its manifest.

    Raises:
        FileNotFoundError: there is no dataset at `root`.
        DatasetError: no such config, or several and none is named; or a remote dataset cannot be reached.
    """
    if name is not None:
        check_config(name, f"name= of {root}")
        with suppress(FileNotFoundError):
            return root.child(name), open_manifest(root, name)
    configs = root.configs()
    if configs is None:
        manifest = Manifest.read(root)
        if name not in (None, manifest.config):
            raise DatasetError(f"{root} is config {manifest.config!r}, not {name!r}")
        return root, manifest
    if not configs:
        raise FileNotFoundError(f"no dataset at {root}: expected {root}/<config>/{MANIFEST_NAME}")
    if name is None and len(configs) > 1:
        raise DatasetError(f"{root} has several configs, name one of {configs}")
    if name is not None and name in configs:
        raise DatasetError(f"{root}/{name}/{MANIFEST_NAME} is missing, yet the card names this config: publish it anew")
    if name is not None:
        raise DatasetError(f"{root} has no config {name!r}, only {configs}")
    return root.child(configs[0]), open_manifest(root, configs[0])


def open_manifest(root: Folder, config: str) -> Manifest:
    """Return the manifest of a config in the folder of a dataset.

    Raises:
        FileNotFoundError: There is none.
        DatasetError: The manifest is damaged, that of another config, or cannot be reached.
    """
    folder = root.child(config)
    manifest = Manifest.read(folder)
    if manifest.config != config:
        raise DatasetError(
            f"{folder}/{MANIFEST_NAME} is that of config {manifest.config!r}, not {config!r}: the folder was renamed or the "
            "file is from elsewhere; give the folder the name that the manifest has"
        )
    return manifest


def find_split(manifest: Manifest, name: str) -> Split:
    """Return the entry of a split; "val" and "validation" are the same.

    Raises:
        DatasetError: there is none of this name.
    """
    check_split(name, f"split= of config {manifest.config!r}")
    for candidate in (name, *SPLIT_ALIASES.get(name, ())):
        if candidate in manifest.splits:
            return manifest.splits[candidate]
    raise DatasetError(f"config {manifest.config!r} has no split {name!r}, only {sorted(manifest.splits)}")
