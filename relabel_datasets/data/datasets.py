"""RelabelDataset: images with their label maps, in the style of torchvision's datasets."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
from torchvision.datasets import VisionDataset

from ..errors import DatasetError
from ..keywords import checked_keywords
from ..labels.compose import run_batch, run_pipeline
from ..labels.label_map import LabelMap
from ..labels.v1_transforms import check_transforms
from ..shards.images import decode_image
from ..shards.index import Index
from ..shards.packed import IndexedStrings
from ..storage.folders import Folder
from ..storage.resolve import open_folder
from .joins import Images, JoinResult, OnUnmatched, Rows, Unmatched, check_unmatched, join_images
from .store import LabelMaps


class RelabelDataset(VisionDataset):
    """Images with label maps: `dataset[i]` is `(image, label_map)`, or what `transforms` makes of the two.

    Random access through an index of byte offsets; nothing is scanned or loaded at the start but the names of the
    images of label-only shards. Works with DataLoader workers, forked or spawned, and with any sampler.

    Args:
        root: folder of the dataset, or of one of its configs: a path, a URL, or what `open_folder` returns.
        name: the config, that is the annotator; may be left out where there is only one.
        split: name of the split.
        images: where a label-only dataset finds its images, joined by key: the root of an ImageFolder, WebDataset tars (one,
            a glob, or their folder), a Hugging Face dataset that was saved, or the folder above any of these where it is
            named like the split; a `datasets.Dataset`; an object with `keys` and `read(index)`, such as a
            `WebDatasetSource`; or any mapping from key to the bytes of an image file. Default: the shards.
        unmatched: `"error"`, or `"skip"` to leave out label maps without image and images without label map.
        transforms: called with (PIL image, LabelMap), such as a `v2.Compose` that ends in `LabelPooling`.

    Attributes:
        classes: the names of the classes, by index.
        class_to_idx: class name -> index.
        targets: `[N]` int32 original class indices.
        keys: the samples' keys.
        label_maps: the `LabelMaps` of the whole split, with the manifest.
        unmatched: how many were left out: `missing` label maps without image, `extra` images without label map.

    Raises:
        FileNotFoundError: the dataset, a shard, or the images are missing.
        DatasetError: (a ValueError) no such config or split, images and label maps that do not match, damaged files.
        TypeError: `images` is nothing that has images with keys.

    Example:
        >>> transforms = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), LabelPooling()])
        >>> dataset = RelabelDataset("imagenette-relabel", split="train", transforms=transforms)
        >>> image, soft_label = dataset[0]
    """

    @checked_keywords()
    def __init__(
        self,
        root: str | os.PathLike[str] | Folder,
        name: str | None = None,
        split: str = "train",
        *,
        images: Images | None = None,
        unmatched: OnUnmatched = "error",
        transforms: Callable[..., Any] | None = None,
    ) -> None:
        check_unmatched(unmatched)
        check_transforms(transforms)
        folder = open_folder(root)
        super().__init__(str(folder), transforms=transforms)
        self.label_maps = LabelMaps(folder, name, split)
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
        """Samples of each shard, in order."""
        lengths = self.label_maps.split.shard_lengths
        if self._rows is None:
            return lengths
        ends: list[int] = np.searchsorted(self._rows, np.cumsum(lengths)).tolist()
        return [end - start for start, end in itertools.pairwise([0, *ends])]

    def download(self, *, num_threads: int = 8, progress: bool = True) -> None:
        """Fetch all shards of a remote dataset now; without this, each is fetched when first needed.

        Args:
            num_threads: shards fetched at a time.
            progress: whether to show a progress bar on stderr.

        Raises:
            FileNotFoundError: a shard is missing.
            DatasetError: (a ValueError) a shard is damaged or cannot be reached, or all do not fit in the cache.
        """
        self.label_maps.shards.fetch_all(num_threads, progress=progress)

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, index: int) -> PIL.Image.Image:
        """Return the RGB image of a sample, upright and untransformed."""
        return self._image(self._row(index))

    def __getitem__(self, index: int) -> Any:
        row = self._row(index)
        pair = self._pair(row, self.label_maps.at(row))
        return pair if self.transforms is None else run_pipeline(self.transforms, *pair)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return the samples of several indices: a DataLoader asks for its batches so.

        It is faster than one by one: label maps are decoded, and pooled by a `LabelPooling` of `transforms`, together.
        """
        if type(self).__getitem__ is not RelabelDataset.__getitem__:  # a subclass says what a sample is
            return [self[index] for index in indices]
        rows = [self._row(index) for index in indices]
        label_maps = self.label_maps.at_rows(rows)
        pairs = (self._pair(row, label_map) for row, label_map in zip(rows, label_maps, strict=True))
        return list(pairs) if self.transforms is None else run_batch(self.transforms, pairs)

    def _pair(self, row: int, label_map: LabelMap) -> tuple[PIL.Image.Image, LabelMap]:
        image = self._image(row)
        if label_map.canvas_size != (image.height, image.width):  # the same picture, perhaps in another resolution
            label_map = LabelMap.wrap(label_map.logits, like=label_map, canvas_size=(image.height, image.width))
        return image, label_map

    def _row(self, index: int) -> int:
        index = range(len(self.keys))[index]  # negative ones count from the end, others raise IndexError
        return index if self._rows is None else int(self._rows[index])

    def _image(self, row: int) -> PIL.Image.Image:
        return decode_image(self._image_bytes(row), self.label_maps.index.key(row))

    def extra_repr(self) -> str:
        """Return the lines that `repr` adds to torchvision's."""
        manifest = self.label_maps.manifest
        text = f"Split: {self.label_maps.split.name}\nConfig: {manifest.config}\nClasses: {len(self.classes)}"
        if any(self.unmatched):
            missing, extra = self.unmatched
            text += f"\nLeft out: {missing} label maps without image, {extra} images without label map"
        return text


class _Keys(IndexedStrings):
    def __init__(self, index: Index, rows: Rows | None) -> None:
        self._index, self._rows = index, rows

    def __len__(self) -> int:
        return len(self._index) if self._rows is None else len(self._rows)

    def _at(self, place: int) -> str:
        return self._index.key(place if self._rows is None else int(self._rows[place]))


def _find_images(label_maps: LabelMaps, images: Images | None, unmatched: OnUnmatched) -> JoinResult:
    if images is not None:
        return join_images(label_maps, images, unmatched)
    if not label_maps.index.has_images:
        raise DatasetError(
            f"the shards of config {label_maps.manifest.config!r} hold no images: say where they are with images=, "
            "such as the root of an ImageFolder, or use LabelMaps for the label maps alone"
        )
    return JoinResult(label_maps.image_bytes, None, Unmatched())
