"""RelabelDataset: images with their label maps, in the style of torchvision's datasets."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import PIL.Image
from torchvision.datasets import VisionDataset

from ..labels.compose import run_pipeline
from ..labels.label_map import LabelMap
from .images import decode_image, key_of, scan_image_folder
from .manifest import DatasetError
from .storage import Folder, open_folder
from .store import SPLIT_ALIASES, LabelMaps

ImageBytes = Callable[[int], bytes]  # row -> bytes of the image file
Images = str | os.PathLike[str] | Mapping[str, bytes]


class RelabelDataset(VisionDataset):
    """Images with label maps: `dataset[i]` is `(image, label_map)`, or what `transforms` makes of the two.

    Random access through an index of byte offsets; nothing is scanned or loaded at the start but the folder of images
    of label-only shards. Works with DataLoader workers, forked or spawned, and with any sampler.

    Args:
        root: folder of the dataset, or of one of its configs: a path, a URL, or what `open_folder` returns.
        name: the config, that is the annotator; may be left out where there is only one.
        split: name of the split.
        images: where a label-only dataset finds its images: the root of an ImageFolder, or the folder above it where that
            is named like the split, or any mapping from key to the bytes of an image file. Default: the shards.
        transforms: called with (PIL image, LabelMap), such as a `v2.Compose` that ends in `LabelPooling`.

    Attributes:
        classes: the names of the classes, by index.
        class_to_idx: class name -> index.
        targets: `[N]` int32 original class indices.
        keys: the samples' keys.
        label_maps: the `LabelMaps` of the split, with the manifest.

    Raises:
        FileNotFoundError: the dataset, a shard, or the images are missing.
        DatasetError: (a ValueError) no such config or split, images and label maps that do not match, damaged files.

    Example:
        >>> transforms = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), LabelPooling()])
        >>> dataset = RelabelDataset("imagenette-relabel", split="train", transforms=transforms)
        >>> image, soft_label = dataset[0]
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | Folder,
        name: str | None = None,
        split: str = "train",
        *,
        images: Images | None = None,
        transforms: Callable[..., Any] | None = None,
    ) -> None:
        folder = open_folder(root)
        super().__init__(str(folder), transforms=transforms)
        self.label_maps = LabelMaps(folder, name, split)
        self.classes = tuple(self.label_maps.manifest.classes)
        self.class_to_idx = {name: index for index, name in enumerate(self.classes)}
        self.keys: Sequence[str] = _Keys(self.label_maps)
        self._image_bytes = _find_images(self.label_maps, images)

    @property
    def targets(self) -> npt.NDArray[np.int32]:
        """`[N]` int32 original class indices."""
        return self.label_maps.index.labels

    @property
    def shard_lengths(self) -> Sequence[int]:
        """Samples of each shard, in order."""
        return self.label_maps.split.shard_lengths

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
        return len(self.label_maps)

    def image(self, index: int) -> PIL.Image.Image:
        """Return the RGB image of a sample, upright and untransformed."""
        index = range(len(self))[index]  # negative ones count from the end, others raise IndexError
        return decode_image(self._image_bytes(index), self.keys[index])

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]
        image, label_map = self.image(index), self.label_maps.at(index)
        if label_map.canvas_size != (image.height, image.width):  # the same picture, perhaps in another resolution
            label_map = LabelMap.wrap(label_map.logits, like=label_map, canvas_size=(image.height, image.width))
        return (image, label_map) if self.transforms is None else run_pipeline(self.transforms, image, label_map)

    def extra_repr(self) -> str:
        """Return the lines that `repr` adds to torchvision's."""
        manifest = self.label_maps.manifest
        return f"Split: {self.label_maps.split.name}\nConfig: {manifest.config}\nClasses: {len(self.classes)}"


class _Keys(Sequence[str]):
    def __init__(self, label_maps: LabelMaps) -> None:
        self._index = label_maps.index

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        rows = range(len(self))[index]
        return self._index.key(rows) if isinstance(rows, int) else [self._index.key(row) for row in rows]


def _find_images(label_maps: LabelMaps, images: Images | None) -> ImageBytes:
    if images is None:
        if not label_maps.index.has_images:
            raise DatasetError(
                f"the shards of config {label_maps.manifest.config!r} hold no images: say where they are with images=, "
                "such as the root of an ImageFolder, or use LabelMaps for the label maps alone"
            )
        return label_maps.image_bytes
    if isinstance(images, Mapping):
        return _ImagesByKey(label_maps, images)
    return _ImageFolder(label_maps, _split_folder(Path(images), label_maps.split.name))


def _split_folder(root: Path, split: str) -> Path:
    """Return the folder of the split below `root`, where there is one, as in imagenet/train and imagenet/val."""
    names = (split, *SPLIT_ALIASES.get(split, ()))
    return next((root / name for name in names if (root / name).is_dir()), root)


class _ImagesByKey:
    """The images of a mapping, in the order of the label maps."""

    def __init__(self, label_maps: LabelMaps, images: Mapping[str, bytes]) -> None:
        self._index, self._images = label_maps.index, images
        _check_join("the given images", label_maps, missing=[key for key in label_maps if key not in images], extra=[])

    def __call__(self, row: int) -> bytes:
        return self._images[self._index.key(row)]


class _ImageFolder:
    """The images of an ImageFolder, in the order of the label maps: joined once, by key."""

    def __init__(self, label_maps: LabelMaps, root: Path) -> None:
        split = label_maps.split
        if split.key_rule is None:
            raise DatasetError(
                f"the keys of config {label_maps.manifest.config!r} do not come from image files: give images= as a "
                "mapping from key to bytes"
            )
        _, files = scan_image_folder(root)
        paths: list[str | None] = [None] * len(label_maps)
        extra = []
        skipped = {entry["key"] for entry in split.skipped}
        for path, _ in files:
            key = key_of(path, split.key_rule)
            row = label_maps.index.row(key)
            if row is not None:
                paths[row] = path
            elif key not in skipped:
                extra.append(key)
        missing = [label_maps.index.key(row) for row, path in enumerate(paths) if path is None]
        _check_join(str(root), label_maps, missing, extra)
        self._root = root
        # An array, since a list of a million strings would be copied into every worker as its counts are touched.
        self._paths = np.array([os.fsencode(path) for path in paths if path is not None])

    def __call__(self, row: int) -> bytes:
        return (self._root / os.fsdecode(self._paths[row])).read_bytes()


def _check_join(where: str, label_maps: LabelMaps, missing: list[str], extra: list[str]) -> None:
    """Raise an error unless every label map has an image and every image a label map."""
    problems = [
        f"{len(keys)} {what}, such as {', '.join(map(repr, keys[:3]))}"
        for keys, what in ((missing, "label maps have no image"), (extra, "images have no label map"))
        if keys
    ]
    if problems:
        raise DatasetError(
            f"{where} and config {label_maps.manifest.config!r}, split {label_maps.split.name!r}, do not match: "
            + "; ".join(problems)
        )
