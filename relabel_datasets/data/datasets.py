"""Map-style dataset of images with label maps, in the style of torchvision's datasets."""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
from torchvision import tv_tensors
from torchvision.datasets import VisionDataset

from ..errors import DatasetError
from ..keywords import checked_keywords
from ..labels.compose import run_batch, run_pipeline
from ..labels.crop_labels import CropLabels
from ..labels.encoded import EncodedImage, size_of
from ..labels.reading import Labels, ReadLabels
from ..labels.transform_checks import check_transforms
from ..shards.encoded_jpeg import open_image
from ..shards.images import ImageFormat, check_image_format, decode_image
from ..shards.index import Index
from ..shards.packed import IndexedStrings
from ..storage.folders import Folder
from ..storage.resolve import PathLike
from ..words import counted
from .joins import Images, JoinResult, OnUnmatched, Rows, Unmatched, check_unmatched, join_images
from .store import LabelMaps, OpenedConfig, find_config

# Dataset, epoch and seed of the stream that is reading. Threads may read a dataset at the same time.
_walk: ContextVar[tuple[RelabelDataset | None, int, int]] = ContextVar("_walk", default=(None, 0, 0))


class RelabelDataset(VisionDataset):
    """Map-style dataset of images with label maps, with random access.

    `dataset[i]` is `(image, label_map)`, or the result of `transforms` for this pair. Samples are read at their byte offset; on
    opening, only the file names of separately stored images are listed. It works with any sampler and with DataLoader workers,
    forked or spawned.

    Args:
        path: Folder of the dataset or of one of its configs: a path, a URL, or the result of `open_folder`.
        config: Config name, which names the annotator. Default: The only config.
        split: Split name.
        images: Images of a label-only dataset, joined by key: the root of an ImageFolder; WebDataset tars (one, a glob, or their
            folder); a saved Hugging Face dataset; the folder that holds any of these under the name of the split; a
            `datasets.Dataset`; an object with `keys` and `read(index)`, such as a `WebDatasetSource`; or a mapping from key
            to the bytes of an image file. Default: The images in the shards.
        unmatched: `"error"`, or `"skip"` to leave out label maps without an image and images without a label map.
        transforms: Transforms called with (image, LabelMap), such as a `v2.Compose` that ends in `LabelPooling`.
        image_format: `"pil"` for PIL images, or `"tensor"` for `tv_tensors.Image`, uint8 `[3, H, W]`: JPEGs are decoded faster,
            and v2 transforms of tensors are faster. Default: "pil".

    Attributes:
        classes: Class names, by index.
        class_to_idx: Mapping from class name to index.
        targets: `[N]` int32 original class indices.
        keys: Sample keys.
        label_maps: `LabelMaps` of the whole split, with the manifest.
        image_format: `"pil"` or `"tensor"`.
        unmatched: Numbers of left-out label maps without an image (`missing`) and images without a label map (`extra`).

    Raises:
        FileNotFoundError: The dataset, a shard, or the images do not exist.
        DatasetError: (a ValueError) The config or split does not exist, images and label maps do not match, or files are corrupt.
        ValueError: `unmatched` or `image_format` is none of its values.
        TypeError: `images` has an unsupported type.

    Example:
        >>> transforms = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), LabelPooling()])
        >>> dataset = RelabelDataset("imagenette-relabel", split="train", transforms=transforms)
        >>> image, soft_label = dataset[0]
    """

    @checked_keywords()
    def __init__(
        self,
        path: PathLike | Folder | OpenedConfig,
        config: str | None = None,
        split: str = "train",
        *,
        images: Images | None = None,
        unmatched: OnUnmatched = "error",
        transforms: Callable[..., Any] | None = None,
        image_format: ImageFormat = "pil",
    ) -> None:
        check_unmatched(unmatched)
        check_image_format(image_format)
        check_transforms(transforms)
        opened = find_config(path, config)
        super().__init__(str(opened.root), transforms=transforms)
        self.label_maps = LabelMaps(opened, split=split)
        self.image_format: ImageFormat = image_format
        self.classes = tuple(self.label_maps.manifest.classes)
        self.class_to_idx = {name: index for index, name in enumerate(self.classes)}
        self._image_bytes, self._rows, self.unmatched = _find_images(self.label_maps, images, unmatched)
        self.keys: Sequence[str] = _Keys(self.label_maps.index, self._rows)

    @property
    def targets(self) -> npt.NDArray[np.int32]:
        """`[N]` int32 original class indices."""
        labels: npt.NDArray[np.int32] = self.label_maps.index.labels
        return labels if self._rows is None else labels[self._rows]

    @property
    def shard_lengths(self) -> Sequence[int]:
        """Number of samples in each shard, in order."""
        lengths = self.label_maps.split.shard_lengths
        if self._rows is None:
            return lengths
        ends: list[int] = np.searchsorted(self._rows, np.cumsum(lengths)).tolist()
        return [end - start for start, end in itertools.pairwise([0, *ends])]

    def download(self, *, num_threads: int = 8, progress: bool = True) -> None:
        """Download all shards of a remote dataset now instead of each shard on first use.

        Args:
            num_threads: Number of shards that are downloaded at the same time.
            progress: Whether to show a progress bar on stderr.

        Raises:
            FileNotFoundError: A shard does not exist.
            DatasetError: (a ValueError) A shard is corrupt or cannot be reached, or the shards do not fit in the cache.
        """
        self.label_maps.shards.fetch_all(num_threads, progress=progress)

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, index: int) -> PIL.Image.Image | tv_tensors.Image:
        """Return the RGB image of a sample in `image_format`, with its EXIF orientation applied, without transforms."""
        return self._image(self._row(index))

    def __getitem__(self, index: int) -> Any:
        row = self._row(index)
        pair = self._pair(row, self.label_maps.at(row))
        return pair if self.transforms is None else run_pipeline(self.transforms, *pair)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return the samples at several indices. A DataLoader calls this for each batch.

        This is faster than reading one sample at a time: the label maps of a batch are decoded together, and pooled together if
        `transforms` ends in `LabelPooling`.
        """
        if type(self).__getitem__ is not RelabelDataset.__getitem__:  # a subclass defines its own samples
            return [self[index] for index in indices]
        rows = [self._row(index) for index in indices]
        if self.transforms is None:
            return [self._pair(*labeled) for labeled in zip(rows, self.label_maps.at_rows(rows), strict=True)]
        labels = self.label_maps.read_rows(rows)
        return run_batch(self.transforms, (self._pair(*labeled) for labeled in zip(rows, labels, strict=True)))

    @contextlib.contextmanager
    def reading_epoch(self, epoch: int, seed: int) -> Iterator[None]:
        """Give crop labels the epoch and the seed of the stream that reads the samples in a `with` statement."""
        token = _walk.set((self, epoch, seed))
        try:
            yield
        finally:
            _walk.reset(token)

    def _pair(self, row: int, label_map: Labels | ReadLabels) -> tuple[Any, Labels | ReadLabels]:
        """Return the image and its label map. With transforms, they may be an `EncodedImage` and a `MapRow`."""
        image: Any = self._image(row) if self.transforms is None else self._opened(row)
        size = size_of(image)
        if isinstance(label_map, CropLabels):
            reader, epoch, seed = _walk.get()
            if reader is self:
                label_map = label_map.at_epoch(epoch, seed)
        if label_map.canvas_size != size:  # the image was stored in another resolution
            label_map = label_map.with_canvas_size(size)
        return image, label_map

    def _row(self, index: int) -> int:
        try:
            index = range(len(self.keys))[operator.index(index)]  # accepts negative indices
        except TypeError:
            raise TypeError(
                f"a sample index must be an integer, got {type(index).__name__}: several samples are torch.utils.data.Subset(dataset, indices)"
            ) from None
        except IndexError:
            raise IndexError(f"index {index} is out of range for {counted(len(self.keys), 'sample')}") from None
        return index if self._rows is None else int(self._rows[index])

    def _image(self, row: int) -> PIL.Image.Image | tv_tensors.Image:
        return decode_image(self._image_bytes(row), self.label_maps.index.key(row), image_format=self.image_format)

    def _opened(self, row: int) -> EncodedImage | PIL.Image.Image | tv_tensors.Image:
        return open_image(self._image_bytes(row), self.label_maps.index.key(row), self.image_format)

    def extra_repr(self) -> str:
        """Return the lines that `repr` shows below those of torchvision."""
        manifest = self.label_maps.manifest
        text = f"Split: {self.label_maps.split.name}\nConfig: {manifest.config}\nClasses: {len(self.classes)}"
        if any(self.unmatched):
            missing, extra = self.unmatched
            left_out = (
                f"{counted(missing, 'label map')} without an image, {counted(extra, 'image')} without a label map"
            )
            text += f"\nLeft out: {left_out}"
        return text


class _Keys(IndexedStrings):
    def __init__(self, index: Index, rows: Rows | None) -> None:
        self._index, self._rows = index, rows

    def __len__(self) -> int:
        return len(self._index) if self._rows is None else len(self._rows)

    def _at(self, position: int) -> str:
        return self._index.key(position if self._rows is None else int(self._rows[position]))


def _find_images(label_maps: LabelMaps, images: Images | None, unmatched: OnUnmatched) -> JoinResult:
    if images is not None:
        return join_images(label_maps, images, unmatched)
    if not label_maps.index.has_images:
        raise DatasetError(
            f"the shards of config {label_maps.manifest.config!r} hold no images: pass images=, such as the root of an "
            "ImageFolder, or use LabelMaps to read the label maps only"
        )
    return JoinResult(label_maps.image_bytes, None, Unmatched())
