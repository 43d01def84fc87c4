"""Images of the students of `students.py`: photos in memory, mosaics of photos, and wrong labels."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps

import relabel_datasets as rd
from relabel_datasets.labels.batch import to_label_map
from relabel_datasets.shards.images import decode_image

Annotation = rd.LabelMap | rd.CropLabels
MOSAIC_SIDE = 288  # pixels


class Photo(NamedTuple):
    """An image file with its class."""

    key: str
    data: bytes
    label: int
    parts: Sequence[
        tuple[int, Sequence[float]]
    ] = ()  # class and box (x1, y1, x2, y2) in 0..1 of each photo of a mosaic


class Photos:
    """Images in memory with their classes: a source of `build`, and validation images.

    Args:
        classes: Class names.
        photos: The images.
        side: Shorter side in pixels to which images are reduced when they are decoded. None keeps their size.
    """

    key_rule = None
    extension = "jpg"

    def __init__(self, classes: Sequence[str], photos: Sequence[Photo], side: int | None) -> None:
        self.classes, self.photos, self.side = classes, photos, side
        self.keys = [photo.key for photo in photos]
        self.labels = self.targets = [photo.label for photo in photos]
        self._decoded: dict[int, PIL.Image.Image] = {}

    def relabeled(self, rows: Sequence[int], labels: Sequence[int], side: int | None) -> Photos:
        """Return some of the images, with other labels of all images and another size."""
        return Photos(self.classes, [self.photos[row]._replace(label=labels[row]) for row in rows], side)

    def read(self, index: int) -> bytes:
        return self.photos[index].data

    def name(self, index: int) -> str:
        return self.keys[index]

    def image(self, index: int) -> PIL.Image.Image:
        if index not in self._decoded:
            image = decode_image(self.read(index), self.name(index))
            scale = 1.0 if self.side is None else min(1.0, self.side / min(image.size))
            size = tuple(round(scale * pixels) for pixels in image.size)
            self._decoded[index] = image.resize(size, PIL.Image.Resampling.LANCZOS) if scale < 1 else image
        return self._decoded[index]


class AnnotatedPhotos(rd.RelabelDataset):
    """Photos in memory with their label maps or stored crops, and with the labels of the photos.

    Args:
        path: Dataset with the annotations.
        photos: Photos of the same keys.
        config: Config of the dataset.
    """

    def __init__(self, path: Path, photos: Photos, config: str = "maps") -> None:
        super().__init__(path, config, split="train", images=photos)
        self._photos = photos
        self._index = {key: index for index, key in enumerate(photos.keys)}

    def _image(self, row: int) -> PIL.Image.Image:
        return self._photos.image(self._index[self.label_maps.index.key(row)])

    def _pair(self, row: int, label_map: Annotation) -> tuple[PIL.Image.Image, Annotation]:
        image, annotation = super()._pair(row, to_label_map(label_map))
        return image, annotation.with_sample(annotation.key, self._photos.labels[self._index[annotation.key]])


def load_photos(folder: Path, kind: str, side: int) -> Photos:
    """Return the training images of a table (`few`, `mosaics` or `all`), or the validation images (`val`).

    Args:
        folder: Folder with the ImageFolders `train` and `val`.
        kind: Name of the images.
        side: See `Photos`.
    """
    source = rd.data.ImageFolderSource(folder / ("val" if kind == "val" else "train"))
    rows = list(range(len(source.keys))) if kind in ("all", "val") else _one_in_ten(source)
    if kind == "mosaics":
        return Photos(source.classes, _mosaics(source, len(rows)), side)
    if kind == "val":  # keys without the names of ImageNet, so that evaluation does not look for their ReaL labels
        photos = [Photo(f"val-{row}", source.read(row), int(source.labels[row])) for row in rows]
    else:
        photos = [Photo(source.keys[row], source.read(row), int(source.labels[row])) for row in rows]
    return Photos(source.classes, photos, side)


def with_noise(labels: Sequence[int], num_classes: int, percent: int, seed: int) -> list[int]:
    """Return the labels, of which `percent` % are replaced by another class at random."""
    rng = np.random.default_rng(seed)
    order, shifts = rng.permutation(len(labels)), rng.integers(1, num_classes, len(labels))
    noisy = np.array(labels)
    wrong = order[: round(len(labels) * percent / 100)]
    noisy[wrong] = (noisy[wrong] + shifts[wrong]) % num_classes
    return noisy.tolist()


def main_class(photo: Photo, box: Sequence[float]) -> int:
    """Return the class of the part of a photo that has the largest area in a box (x1, y1, x2, y2)."""

    def area(part: Sequence[float]) -> float:
        width, height = (min(part[i + 2], box[i + 2]) - max(part[i], box[i]) for i in (0, 1))
        return max(width, 0) * max(height, 0)

    return max(photo.parts, key=lambda part: area(part[1]))[0] if photo.parts else photo.label


def _one_in_ten(source: rd.data.ImageFolderSource) -> list[int]:
    """Return every tenth row of each class."""
    labels = np.asarray(source.labels)
    return [int(row) for label in range(len(source.classes)) for row in np.flatnonzero(labels == label)[::10]]


def _mosaics(source: rd.data.ImageFolderSource, count: int) -> list[Photo]:
    """Return mosaics of two to four photos with the class of the largest. No photo is used twice while others are left."""
    rng = np.random.default_rng(0)
    rows: list[int] = []
    mosaics = []
    for i in range(count):
        number = int(rng.integers(2, 5))
        if len(rows) < number:
            rows = rng.permutation(len(source.keys)).tolist()
        chosen, rows = rows[:number], rows[number:]
        photos = [decode_image(source.read(row), source.name(row)) for row in chosen]
        picture, boxes = _mosaic(photos, rng)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=95, subsampling=0)
        parts = [(int(source.labels[row]), box) for row, box in zip(chosen, boxes, strict=True)]
        mosaics.append(Photo(f"mosaic-{i:05}", file.getvalue(), parts[0][0], parts))
    return mosaics


def _mosaic(photos: Sequence[PIL.Image.Image], rng: np.random.Generator) -> tuple[PIL.Image.Image, list[list[float]]]:
    """Return a picture of two to four photos, the first of which is the largest, and their boxes in 0..1."""
    first, cut = rng.uniform(0.55, 0.7, 2)
    a, b = first, cut if len(photos) == 4 else 0.5
    layout = {
        2: [(0, 0, a, 1), (a, 0, 1, 1)],
        3: [(0, 0, a, 1), (a, 0, 1, b), (a, b, 1, 1)],
        4: [(0, 0, a, b), (a, 0, 1, b), (0, b, a, 1), (a, b, 1, 1)],
    }[len(photos)]
    corners = np.round(np.array(layout).reshape(-1, 2, 2) * MOSAIC_SIDE).astype(int)  # [photo, corner, (x, y)]
    for axis in np.flatnonzero(rng.integers(0, 2, 2)):  # mirror the layout, not the photos
        corners[..., axis] = MOSAIC_SIDE - corners[:, ::-1, axis]
    if rng.integers(0, 2):
        corners = corners[..., ::-1]
    picture = PIL.Image.new("RGB", (MOSAIC_SIDE, MOSAIC_SIDE))
    for photo, ((x1, y1), (x2, y2)) in zip(photos, corners.tolist(), strict=True):
        picture.paste(PIL.ImageOps.fit(photo, (x2 - x1, y2 - y1), PIL.Image.Resampling.BICUBIC), (x1, y1))
    return picture, (corners.reshape(-1, 4) / MOSAIC_SIDE).tolist()
