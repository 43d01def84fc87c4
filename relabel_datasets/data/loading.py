"""load_dataset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

from ..keywords import checked_keywords
from ..shards.configs import open_config
from ..storage.folders import Folder
from ..storage.resolve import PathLike, open_folder
from .datasets import RelabelDataset
from .joins import Images, OnUnmatched
from .stream import RelabelStream

_STREAM_ARGUMENTS = ("shuffle", "seed", "window", "remainder", "rank", "world_size", "batch_size")
_HINTS = {
    "batch_sampler": "give it to the DataLoader",
    "data_files": "give the folder or URL of the dataset as 'path'",
    "keep_in_memory": "leave it out, samples are read from disk when needed",
    "num_proc": "leave it out, the DataLoader has num_workers",
    "num_workers": "give it to the DataLoader",
    "target_transform": "give 'transforms', called with (image, label map), such as a v2.Compose that ends in LabelPooling()",
    "trust_remote_code": "leave it out, no code of a dataset is run",
    "verification_mode": "leave it out, and see relabel_datasets.verify",
}


@overload
def load_dataset(path: PathLike | Folder, name: str | None = ..., split: None = ..., *, streaming: Literal[False] = ...,
                 **kwargs: Any) -> dict[str, RelabelDataset]: ...  # fmt: skip
@overload
def load_dataset(path: PathLike | Folder, name: str | None = ..., split: str = ..., *, streaming: Literal[False] = ...,
                 **kwargs: Any) -> RelabelDataset: ...  # fmt: skip
@overload
def load_dataset(path: PathLike | Folder, name: str | None = ..., split: None = ..., *, streaming: Literal[True],
                 **kwargs: Any) -> dict[str, RelabelStream]: ...  # fmt: skip
@overload
def load_dataset(path: PathLike | Folder, name: str | None = ..., split: str = ..., *, streaming: Literal[True],
                 **kwargs: Any) -> RelabelStream: ...  # fmt: skip
@checked_keywords(*_STREAM_ARGUMENTS, hints=_HINTS)
def load_dataset(
    path: PathLike | Folder,
    name: str | None = None,
    split: str | None = None,
    *,
    images: Images | None = None,
    unmatched: OnUnmatched = "error",
    streaming: bool = False,
    transforms: Callable[..., Any] | None = None,
    namespace: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: PathLike | None = None,
    cache_limit: int | str | None = None,
    storage_options: dict[str, Any] | None = None,
    download: bool = False,
    **order: Any,
) -> RelabelDataset | RelabelStream | dict[str, RelabelDataset] | dict[str, RelabelStream]:
    """Return a dataset of images with label maps.

    Args:
        path: a folder with a dataset, its URL, `"org/name"` on the Hub, or a short name such as `"imagenet-relabel"`, see
            `open_folder`.
        name: the config, that is the annotator; may be left out where there is only one.
        split: `"train"`, `"validation"`, ...; None gives a dict of all splits.
        images: where a label-only dataset finds its images, see `RelabelDataset`.
        unmatched: `"error"`, or `"skip"` to leave out label maps without image and images without label map.
        streaming: False gives a `RelabelDataset`, with random access; True a `RelabelStream`, which reads shard by shard.
        transforms: called with (image, LabelMap), see `RelabelDataset`.
        namespace: who has the short name on the Hub, see `open_folder`.
        revision: of a dataset on the Hub: a branch, a tag or a commit.
        token: for the Hub. Default: that of `hf auth login`, or of the environment variable `HF_TOKEN`.
        cache_dir: where what is remote is kept, see `open_folder`.
        cache_limit: bytes that remote shards may take on disk, see `open_folder`.
        storage_options: for URLs, see `open_folder`.
        download: whether to fetch all shards of a remote dataset at once, instead of each when first needed.
        order: of a stream: `shuffle`, `seed`, `window`, `remainder`, `rank`, `world_size`, `batch_size`, see `RelabelStream`.

    Raises:
        FileNotFoundError: no dataset there; the message says how to build one.
        RefusedError: (a ValueError) access must be asked for, or the token is not valid.
        DatasetError: (a ValueError) no such config or split, damaged files, or a server that cannot be reached.

    Example:
        >>> dataset = load_dataset("scenes-relabel", split="train")
        >>> image, label_map = dataset[0]
    """
    if order and not streaming:
        named = ", ".join(f"{name}=" for name in sorted(order))
        raise TypeError(f"{named} only applies to a stream: give streaming=True, or use a RelabelSampler")
    folder = open_folder(
        path,
        namespace=namespace,
        revision=revision,
        token=token,
        storage_options=storage_options,
        cache_dir=cache_dir,
        cache_limit=cache_limit,
    )

    def load(split: str) -> Any:
        dataset = RelabelDataset(folder, name, split, images=images, unmatched=unmatched, transforms=transforms)
        if download:
            dataset.download()
        return RelabelStream(dataset, **order) if streaming else dataset

    return load(split) if split is not None else {each: load(each) for each in open_config(folder, name)[1].splits}
