"""`crops`: the labels of N fixed crops (*views*) of each image.

The labels have one of the forms of `crop_codec`, which documents their tensors. The boxes are stored in one of two ways:

    stored tensor    dtype            shape
    crop_seed        U64              [1]: seed of the boxes and flips, see `labels.crops.seeded_crops`
    or, for imported crops,
    crop_boxes       F16, F32, F64    [N, 4]: (top, left, height, width) as shares of the height and width of the image
    crop_flips       U8               [ceil(N / 8)]: bit i % 8 of byte i // 8 says whether crop i is mirrored, the lowest bit first

Shapes: N crops of an image, C classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ...errors import LabelMapError
from ..crops import Bools, Floats, seeded_crops
from . import crop_compact, crop_sparse
from .base import Array, Encoding, Parts, StoredTensor
from .crop_codec import check_crops, check_crops_header

LABEL_TENSORS = tuple(dict.fromkeys((*crop_compact.NAMES, *crop_sparse.NAMES)))
_SEED, _BOXES, _FLIPS = "crop_seed", "crop_boxes", "crop_flips"
_BOX_DTYPES = tuple(np.dtype(name) for name in ("float16", "float32", "float64"))
_SLACK = 1e-2  # by which rounded boxes in float16 may exceed the image


class Crops(Encoding):
    """Labels of N fixed crops of an image. `decode` returns the stored arrays, which `crop_codec` reads."""

    stored_tensors = (*LABEL_TENSORS, _SEED, _BOXES, _FLIPS)
    optional_tensors = stored_tensors
    stored_types = ("U8", "U16", "U32", "U64", "F16", "F32", "F64")

    def check_header(self, tensors: Mapping[str, StoredTensor], num_classes: int) -> str:
        num_crops = check_crops_header({name: tensors[name] for name in tensors if name in LABEL_TENSORS}, num_classes)
        stored = {name: tensors[name] for name in tensors if name not in LABEL_TENSORS}
        if stored.keys() == {_SEED}:
            expected = {_SEED: StoredTensor((1,), np.dtype(np.uint64))}
        elif stored.keys() == {_BOXES, _FLIPS}:
            dtype = stored[_BOXES].dtype
            if dtype not in _BOX_DTYPES:
                raise LabelMapError(f"{_BOXES} must be floating point, got {dtype}")
            flips = StoredTensor((-(-num_crops // 8),), np.dtype(np.uint8))
            expected = {_BOXES: StoredTensor((num_crops, 4), dtype), _FLIPS: flips}
        else:
            raise LabelMapError(f"crops have either {_SEED} or {_BOXES} and {_FLIPS}, got {sorted(stored)}")
        for name, tensor in expected.items():
            if stored[name] != tensor:
                shape, dtype = stored[name]
                raise LabelMapError(f"{name} must be {tensor.dtype} {tensor.shape}, got {dtype} {shape}")
        return self.entry.storage_dtypes[0]

    def decode(self, arrays: Mapping[str, Array], num_classes: int, storage_dtype: str) -> list[Parts]:
        if _BOXES in arrays:
            _check_boxes(arrays[_BOXES])
        images: list[Parts] = []
        for image in range(len(next(iter(arrays.values())))):
            stored = {name: np.array(values[image]) for name, values in arrays.items()}
            check_crops(label_arrays(stored), num_classes)
            images.append(stored)
        return images


def label_arrays(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Return the stored arrays that hold labels, for `crop_codec`."""
    return {name: values for name, values in arrays.items() if name in LABEL_TENSORS}


def seed_of(key: str) -> int:
    """Return the seed of the crops of a sample: 64 bits of a hash of its key."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def seed_array(seed: int) -> dict[str, Array]:
    """Return the tensor to store for crops whose boxes are computed from a seed."""
    return {_SEED: np.array([seed], np.uint64)}


def box_arrays(boxes: npt.ArrayLike, flips: npt.ArrayLike) -> dict[str, Array]:
    """Return the tensors to store for crops with boxes of their own.

    Args:
        boxes: (top, left, height, width) of each crop `[N, 4]`, as shares of the height and width of the image. float16 and
            float32 are stored as they are, everything else as float64.
        flips: `[N]`, whether each crop is mirrored after cropping.

    Raises:
        ValueError: Shapes do not fit together, or a box is not finite, is empty, or exceeds the image.
    """
    boxes, flips = np.asarray(boxes), np.asarray(flips)
    if boxes.dtype not in _BOX_DTYPES:
        boxes = boxes.astype(np.float64)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or flips.shape != boxes.shape[:1]:
        raise ValueError(f"boxes must be [N, 4] and flips [N], got {boxes.shape} and {flips.shape}")
    try:
        _check_boxes(boxes)
    except LabelMapError as error:
        raise ValueError(str(error)) from None
    return {_BOXES: boxes, _FLIPS: np.packbits(flips.astype(bool), bitorder="little")}


def find_boxes(
    images: list[dict[str, Array]], canvas_sizes: list[tuple[int, int]], nums_crops: list[int]
) -> list[tuple[Floats, Bools]]:
    """Return the boxes and flips of the stored crops of several images.

    Args:
        images: Stored arrays of each image.
        canvas_sizes: Sizes (height, width) of the images in pixels, for which the labels were made.
        nums_crops: Number of crops of each image.

    Returns:
        Boxes `[N, 4]` xyxy in units of the whole image, and flips `[N]`, of each image.
    """
    found: dict[int, tuple[Floats, Bools]] = {}
    seeded = [i for i, arrays in enumerate(images) if _SEED in arrays]
    # Images are computed together, since NumPy's calls cost more than the numbers.
    for num_crops in {nums_crops[i] for i in seeded}:
        rows = [i for i in seeded if nums_crops[i] == num_crops]
        seeds = np.concatenate([images[i][_SEED] for i in rows])
        boxes, flips = seeded_crops(seeds, [canvas_sizes[i] for i in rows], num_crops)
        found |= {i: (boxes[row].copy(), flips[row].copy()) for row, i in enumerate(rows)}
    for i, arrays in enumerate(images):
        if _BOXES in arrays:
            top, left, height, width = arrays[_BOXES].astype(np.float64).T
            flips = np.unpackbits(arrays[_FLIPS], count=nums_crops[i], bitorder="little").astype(bool)
            found[i] = np.stack([left, top, left + width, top + height], axis=1), flips
    return [found[i] for i in range(len(images))]


def _check_boxes(boxes: Array) -> None:
    """Check boxes `[..., 4]`: (top, left, height, width) as shares of the image."""
    corners, sides = boxes[..., :2].astype(np.float64), boxes[..., 2:].astype(np.float64)
    inside = (corners >= -_SLACK) & (sides > 0) & (corners + sides <= 1 + _SLACK)  # false for nan, too
    if not inside.all():
        wrong = boxes[~inside.all(-1)][0].tolist()
        raise LabelMapError(
            f"{_BOXES} must be (top, left, height, width) within the image, as shares of its height and width, got {wrong}"
        )
