"""load_dataset, and the short names it knows."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, overload

from .datasets import Images, RelabelDataset
from .manifest import Manifest
from .store import find_config

# Short names are folders in the cache. What can be made without data has its maker here, "module:function", called with
# the folder and imported by name since it stands above this module; the others are made by the builder named.
_MAKERS = {"scenes-relabel": "relabel_datasets.demo:make_scenes_relabel"}
_BUILDERS = {"imagenet-relabel": "imagenet_relabel.py", "imagenette-relabel": "imagenette_relabel.py"}


@overload
def load_dataset(
    path: str | os.PathLike[str], name: str | None = ..., split: None = ..., *, images: Images | None = ...,
    transforms: Callable[..., Any] | None = ..., cache_dir: str | os.PathLike[str] | None = ...,
) -> dict[str, RelabelDataset]: ...  # fmt: skip
@overload
def load_dataset(
    path: str | os.PathLike[str], name: str | None = ..., split: str = ..., *, images: Images | None = ...,
    transforms: Callable[..., Any] | None = ..., cache_dir: str | os.PathLike[str] | None = ...,
) -> RelabelDataset: ...  # fmt: skip
def load_dataset(
    path: str | os.PathLike[str],
    name: str | None = None,
    split: str | None = None,
    *,
    images: Images | None = None,
    transforms: Callable[..., Any] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> RelabelDataset | dict[str, RelabelDataset]:
    """Return a dataset of images with label maps.

    Args:
        path: a folder with a dataset, or a short name: `"scenes-relabel"`, which is drawn and built in the cache on
            first use (about a minute), `"imagenette-relabel"` or `"imagenet-relabel"`, once their builders have run.
        name: the config, that is the annotator; may be left out where there is only one.
        split: `"train"`, `"validation"`, ...; None gives a dict of all splits.
        images: where a label-only dataset finds its images, see `RelabelDataset`.
        transforms: called with (image, LabelMap), see `RelabelDataset`.
        cache_dir: where short names are looked up. Default: the environment variable `RELABEL_CACHE`, else
            `~/.cache/relabel_datasets`.

    Raises:
        FileNotFoundError: no dataset there; the message says how to build one.
        DatasetError: (a ValueError) no such config or split, or damaged files.

    Example:
        >>> dataset = load_dataset("scenes-relabel", split="train")
        >>> image, label_map = dataset[0]
    """
    root = _find_root(path, cache_dir)
    if split is not None:
        return RelabelDataset(root, name, split, images=images, transforms=transforms)
    splits = Manifest.load(find_config(root, name)).splits
    return {each: RelabelDataset(root, name, each, images=images, transforms=transforms) for each in splits}


def default_cache() -> Path:
    """Return the folder of short names."""
    return Path(os.environ.get("RELABEL_CACHE") or Path.home() / ".cache" / "relabel_datasets")


def _find_root(path: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None) -> Path:
    root = Path(path)
    if root.exists():
        return root
    known = sorted({*_MAKERS, *_BUILDERS})
    if path not in known:
        raise FileNotFoundError(f"no dataset at {root}, and it is not one of the short names {known}")
    cached = (default_cache() if cache_dir is None else Path(cache_dir)) / root
    if not cached.exists():
        if path not in _MAKERS:
            raise FileNotFoundError(
                f"{path} is not at {cached}: build it there with builders/{_BUILDERS[str(path)]}, or give load_dataset the "
                "folder that holds it"
            )
        module, _, function = _MAKERS[str(path)].partition(":")
        try:
            getattr(import_module(module), function)(cached)
        except OSError:
            if not cached.exists():  # else another process, such as another rank, was first
                raise
    return cached
