"""Datasets of images with label maps: random access, streams, shuffling, joins with images, and image sources.

Names are imported on first use.

Example:
    >>> from relabel_datasets.data import load_dataset, join, open_source
    >>> dataset = load_dataset("path/to/dataset", split="train")
    >>> image, label_map = dataset[0]
    >>> source = open_source("path/to/images")  # ImageFolder, WebDataset tars or a Hugging Face dataset
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._lazy import import_lazily

if TYPE_CHECKING:
    from .datasets import RelabelDataset
    from .hf_source import HFSource
    from .joins import Images, KeyedImages, OnUnmatched, Unmatched
    from .loading import LoadOptions, StreamOptions, load_dataset
    from .pipeline import RelabelPipeline
    from .samples import decode_sample
    from .sampling import RelabelSampler, Remainder
    from .skipped import Skipped
    from .sources import ImageFolderSource, ImageSource, open_source
    from .store import LabelMaps, OpenedConfig
    from .stream import RelabelLoader, RelabelStream
    from .stream_joins import join
    from .tar_source import WebDatasetSource

_MODULES = {
    "HFSource": "hf_source",
    "ImageFolderSource": "sources",
    "ImageSource": "sources",
    "Images": "joins",
    "KeyedImages": "joins",
    "LabelMaps": "store",
    "LoadOptions": "loading",
    "OnUnmatched": "joins",
    "OpenedConfig": "store",
    "RelabelDataset": "datasets",
    "RelabelLoader": "stream",
    "RelabelPipeline": "pipeline",
    "RelabelSampler": "sampling",
    "RelabelStream": "stream",
    "Remainder": "sampling",
    "Skipped": "skipped",
    "StreamOptions": "loading",
    "Unmatched": "joins",
    "WebDatasetSource": "tar_source",
    "decode_sample": "samples",
    "join": "stream_joins",
    "load_dataset": "loading",
    "open_source": "sources",
}
__all__ = [
    "HFSource",
    "ImageFolderSource",
    "ImageSource",
    "Images",
    "KeyedImages",
    "LabelMaps",
    "LoadOptions",
    "OnUnmatched",
    "OpenedConfig",
    "RelabelDataset",
    "RelabelLoader",
    "RelabelPipeline",
    "RelabelSampler",
    "RelabelStream",
    "Remainder",
    "Skipped",
    "StreamOptions",
    "Unmatched",
    "WebDatasetSource",
    "decode_sample",
    "join",
    "load_dataset",
    "open_source",
]


def __getattr__(name: str) -> Any:
    return import_lazily(__name__, _MODULES, name)


def __dir__() -> list[str]:
    return __all__
