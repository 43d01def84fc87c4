"""Load a dataset by path, URL, Hub repository or short name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

from ..keywords import checked_keywords
from ..shards.images import ImageFormat
from ..storage.folders import Folder
from ..storage.resolve import PathLike, open_folder
from .datasets import RelabelDataset
from .joins import Images, OnUnmatched
from .sampling import Remainder
from .store import find_config
from .stream import RelabelStream

if TYPE_CHECKING:
    from typing_extensions import Unpack

_HINTS = {
    "batch_sampler": "pass it to the DataLoader",
    "data_files": "pass the folder or URL of the dataset as 'path'",
    "keep_in_memory": "leave it out, samples are read from disk when needed",
    "num_proc": "leave it out, the DataLoader has num_workers",
    "num_workers": "pass it to the DataLoader",
    "target_transform": "pass 'transforms', called with (image, label map), such as a v2.Compose that ends in LabelPooling()",
    "trust_remote_code": "leave it out, no code of a dataset is run",
    "verification_mode": "leave it out, and see relabel_datasets.verify",
}


class LoadOptions(TypedDict, total=False):
    """Keyword arguments of `load_dataset`, see there."""

    images: Images | None
    unmatched: OnUnmatched
    transforms: Callable[..., Any] | None
    image_format: ImageFormat
    namespace: str | None
    revision: str | None
    token: str | None
    cache_dir: PathLike | None
    cache_limit: int | str | None
    storage_options: dict[str, Any] | None
    download: bool


class StreamOptions(TypedDict, total=False):
    """Keyword arguments that `load_dataset` passes on to `RelabelStream`, see there."""

    shuffle: bool
    seed: int
    window: int | None
    remainder: Remainder
    rank: int | None
    world_size: int | None
    batch_size: int


class StreamLoadOptions(LoadOptions, StreamOptions, total=False):
    """Keyword arguments of `load_dataset` with `streaming=True`."""


@overload
def load_dataset(path: PathLike | Folder, name: str | None = ..., split: None = ..., *, streaming: Literal[False] = ...,
                 **options: Unpack[LoadOptions]) -> dict[str, RelabelDataset]: ...  # fmt: skip
@overload
def load_dataset(path: PathLike | Folder, name: str | None = ..., split: str = ..., *, streaming: Literal[False] = ...,
                 **options: Unpack[LoadOptions]) -> RelabelDataset: ...  # fmt: skip
@overload
def load_dataset(path: PathLike | Folder, name: str | None = ..., split: None = ..., *, streaming: Literal[True],
                 **options: Unpack[StreamLoadOptions]) -> dict[str, RelabelStream]: ...  # fmt: skip
@overload
def load_dataset(path: PathLike | Folder, name: str | None = ..., split: str = ..., *, streaming: Literal[True],
                 **options: Unpack[StreamLoadOptions]) -> RelabelStream: ...  # fmt: skip
@checked_keywords(*StreamOptions.__annotations__, hints=_HINTS)
def load_dataset(
    path: PathLike | Folder,
    name: str | None = None,
    split: str | None = None,
    *,
    images: Images | None = None,
    unmatched: OnUnmatched = "error",
    streaming: bool = False,
    transforms: Callable[..., Any] | None = None,
    image_format: ImageFormat = "pil",
    namespace: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: PathLike | None = None,
    cache_limit: int | str | None = None,
    storage_options: dict[str, Any] | None = None,
    download: bool = False,
    **order: Unpack[StreamOptions],
) -> RelabelDataset | RelabelStream | dict[str, RelabelDataset] | dict[str, RelabelStream]:
    """Load a dataset of images with label maps.

    Args:
        path: Folder of the dataset, its URL, `"org/name"` on the Hub, or a short name such as `"imagenet-relabel"`, see
            `open_folder`.
        name: Config name, which names the annotator. Default: The only config.
        split: Split name, such as `"train"` or `"validation"`. Default: All splits, as a dict.
        images: Images of a label-only dataset, such as the root of an ImageFolder, see `RelabelDataset`. Default: The images in
            the shards.
        unmatched: `"error"`, or `"skip"` to leave out label maps without an image and images without a label map. Default:
            `"error"`.
        streaming: Whether to return a `RelabelStream`, which reads shard by shard, instead of a `RelabelDataset`, which has
            random access. Default: False.
        transforms: Transforms called with (image, LabelMap), such as a `v2.Compose` with `LabelPooling`. Default: None, which
            returns the image and its label map.
        image_format: `"pil"` for PIL images, or `"tensor"` for uint8 tensors, which are faster, see `RelabelDataset`. Default:
            "pil".
        namespace: User or organization on the Hub that hosts the short name, see `open_folder`.
        revision: Branch, tag or commit of a dataset on the Hub.
        token: Hub token. Default: The token of `hf auth login` or of the environment variable `HF_TOKEN`.
        cache_dir: Folder for short names and cached remote files, see `open_folder`.
        cache_limit: Largest disk space for remote shards in bytes, or a text such as `"200G"`, see `open_folder`.
        storage_options: Options of fsspec's file system for URLs, see `open_folder`.
        download: Whether to download all shards of a remote dataset now instead of each shard on first use. Default:
            False.
        order: Options of a stream: `shuffle`, `seed`, `window`, `remainder`, `rank`, `world_size` and `batch_size`, see
            `RelabelStream`.

    Returns:
        The dataset or stream of `split`, or a dict from split name to dataset or stream if `split` is None.

    Raises:
        FileNotFoundError: The dataset does not exist. The message says how to build it.
        RefusedError: (a ValueError) Access to the dataset must be requested, or the token is not valid.
        DatasetError: (a ValueError) The config or split does not exist, files are corrupt, or the server cannot be reached.
        TypeError: A keyword argument does not exist, or is for streams only.

    Example:
        >>> transforms = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), LabelPooling(), v2.ToImage()])
        >>> dataset = load_dataset("scenes-relabel", split="train", transforms=transforms)
        >>> image, soft_label = dataset[0]
    """
    if order and not streaming:
        named = ", ".join(f"{argument}=" for argument in sorted(order))
        raise TypeError(f"{named} only applies to a stream: pass streaming=True, or use a RelabelSampler")
    folder = open_folder(
        path,
        namespace=namespace,
        revision=revision,
        token=token,
        storage_options=storage_options,
        cache_dir=cache_dir,
        cache_limit=cache_limit,
    )
    config = find_config(folder, name)

    def load(split: str) -> Any:
        dataset = RelabelDataset(
            config, split=split, images=images, unmatched=unmatched, transforms=transforms, image_format=image_format
        )
        if download:
            dataset.download()
        return RelabelStream(dataset, **order) if streaming else dataset

    return load(split) if split is not None else {split: load(split) for split in config.manifest.splits}
