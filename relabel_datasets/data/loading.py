"""load_dataset, and the names it knows."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, overload

from .datasets import RelabelDataset
from .joins import Images, OnUnmatched
from .storage import Folder, default_cache, is_url, open_folder
from .store import open_config
from .stream import RelabelStream

# Short names are folders in the cache. What can be made without data has its maker here, "module:function", called with
# the folder and imported by name since it stands above this module; the others are made by the builder named.
_MAKERS = {"scenes-relabel": "relabel_datasets.demo:make_scenes_relabel"}
_BUILDERS = {"imagenet-relabel": "imagenet_relabel.py", "imagenette-relabel": "imagenette_relabel.py"}

Path_ = str | os.PathLike[str]


@overload
def load_dataset(path: Path_ | Folder, name: str | None = ..., split: None = ..., *, streaming: Literal[False] = ...,
                 **kwargs: Any) -> dict[str, RelabelDataset]: ...  # fmt: skip
@overload
def load_dataset(path: Path_ | Folder, name: str | None = ..., split: str = ..., *, streaming: Literal[False] = ...,
                 **kwargs: Any) -> RelabelDataset: ...  # fmt: skip
@overload
def load_dataset(path: Path_ | Folder, name: str | None = ..., split: None = ..., *, streaming: Literal[True],
                 **kwargs: Any) -> dict[str, RelabelStream]: ...  # fmt: skip
@overload
def load_dataset(path: Path_ | Folder, name: str | None = ..., split: str = ..., *, streaming: Literal[True],
                 **kwargs: Any) -> RelabelStream: ...  # fmt: skip
def load_dataset(
    path: Path_ | Folder,
    name: str | None = None,
    split: str | None = None,
    *,
    images: Images | None = None,
    unmatched: OnUnmatched = "error",
    streaming: bool = False,
    transforms: Callable[..., Any] | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path_ | None = None,
    cache_limit: int | str | None = None,
    storage_options: dict[str, Any] | None = None,
    download: bool = False,
    **order: Any,
) -> RelabelDataset | RelabelStream | dict[str, RelabelDataset] | dict[str, RelabelStream]:
    """Return a dataset of images with label maps.

    Args:
        path: a folder with a dataset; its URL, see `open_folder`; `"org/name"` on the Hub; or a short name:
            `"scenes-relabel"`, which is drawn and built in the cache on first use (about a minute), `"imagenette-relabel"` or
            `"imagenet-relabel"`, once their builders have run.
        name: the config, that is the annotator; may be left out where there is only one.
        split: `"train"`, `"validation"`, ...; None gives a dict of all splits.
        images: where a label-only dataset finds its images, see `RelabelDataset`.
        unmatched: `"error"`, or `"skip"` to leave out label maps without image and images without label map.
        streaming: False gives a `RelabelDataset`, with random access; True a `RelabelStream`, which reads shard by shard.
        transforms: called with (image, LabelMap), see `RelabelDataset`.
        revision: of a dataset on the Hub: a branch, a tag or a commit.
        token: for the Hub. Default: that of `hf auth login`, or of the environment variable `HF_TOKEN`.
        cache_dir: where short names are looked up and remote shards kept. Default: the environment variable
            `RELABEL_CACHE`, else `~/.cache/relabel_datasets`.
        cache_limit: bytes that remote shards may take on disk, see `open_folder`.
        storage_options: for fsspec, see `open_folder`.
        download: whether to fetch all shards of a remote dataset at once, instead of each when first needed.
        order: of a stream: `shuffle`, `seed`, `window`, `remainder`, `rank`, `world_size`, `batch_size`, see `RelabelStream`.

    Raises:
        FileNotFoundError: no dataset there; the message says how to build one.
        DatasetError: (a ValueError) no such config or split, damaged files, or a server that cannot be reached.

    Example:
        >>> dataset = load_dataset("scenes-relabel", split="train")
        >>> image, label_map = dataset[0]
    """
    if order and not streaming:
        raise TypeError(f"{sorted(order)} are arguments of a stream: give streaming=True, or use a RelabelSampler")
    folder = (
        open_folder(
            find_root(path, cache_dir, revision, token),
            storage_options={**({"token": token} if token else {}), **(storage_options or {})},
            cache_dir=cache_dir,
            cache_limit=cache_limit,
        )
        if isinstance(path, (str, os.PathLike))
        else path
    )

    def load(split: str) -> Any:
        dataset = RelabelDataset(folder, name, split, images=images, unmatched=unmatched, transforms=transforms)
        if download:
            dataset.download()
        return RelabelStream(dataset, **order) if streaming else dataset

    return load(split) if split is not None else {each: load(each) for each in open_config(folder, name)[1].splits}


def find_root(path: Path_, cache_dir: Path_ | None, revision: str | None, token: str | None) -> Path_:
    """Return the path or URL of what `load_dataset` was given, see there; scenes are made if need be."""
    known = sorted({*_MAKERS, *_BUILDERS})
    if not is_url(path) and not Path(path).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", os.fspath(path)):
        return f"hf://datasets/{path}" + (f"@{revision}" if revision else "")
    if revision or token:
        raise ValueError(f"revision= and token= are for datasets on the Hub, 'org/name', not for {path}")
    if is_url(path) or Path(path).exists():
        return path
    if path not in known:
        raise FileNotFoundError(f"no dataset at {path}, and it is not one of the short names {known}")
    cached = (default_cache() if cache_dir is None else Path(cache_dir)) / path
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
