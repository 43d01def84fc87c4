"""Read the stored labels of images, whatever their encoding."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import LabelMapError
from . import codec
from .batch import LabelMapBatch, MapRow, to_label_map
from .calibration import Calibration
from .crop_labels import CropLabels, DecodedCrops, wrap_decoded
from .encodings.base import Encoded, MapEncoding
from .label_map import LabelMap
from .view import WHOLE

Labels = LabelMap | CropLabels
ReadLabels = MapRow | CropLabels


def read_label(blob: bytes, *, key: str | None = None, label: int | None = None) -> Labels:
    """Read the labels of an image from safetensors bytes.

    Args:
        blob: Bytes that `to_safetensors` of a `LabelMap` or of `CropLabels` returned.
        key: Key of the sample, which errors name.
        label: Original class index of the sample.

    Returns:
        The label map or the crop labels.

    Raises:
        LabelMapError: (a ValueError) The bytes are not valid labels.
    """
    labels: Labels = to_label_map(_wrap(_decode_one(blob, key), [key], [label])[0])
    return labels


def read_labels(
    blobs: Sequence[bytes],
    keys: Sequence[str],
    labels: Sequence[int],
    num_classes: int | None = None,
    calibration: Calibration | None = None,
) -> list[Labels]:
    """Read the labels of several images at once, several times faster than one at a time. They share one piece of memory.

    Args:
        blobs: Bytes of the labels.
        keys: Keys of the samples.
        labels: Original class indices of the samples.
        num_classes: Number of classes that all must have. Default: any.
        calibration: Calibration of the label maps. Default: none.

    Returns:
        The label maps or crop labels, in order.

    Raises:
        LabelMapError: (a ValueError) Bytes are not valid labels, or have another number of classes. The message names the key.
    """
    return list(map(to_label_map, read_rows(blobs, keys, labels, num_classes, calibration)))


def read_rows(
    blobs: Sequence[bytes],
    keys: Sequence[str],
    labels: Sequence[int],
    num_classes: int | None = None,
    calibration: Calibration | None = None,
) -> list[ReadLabels]:
    """Read the labels of several images at once, see `read_labels`. Label maps are returned as rows of batches.

    Raises:
        LabelMapError: See `read_labels`.
    """
    try:
        decoded = codec.decode(blobs, num_classes)
    except LabelMapError:
        for blob, key in zip(blobs, keys, strict=True):  # find the one that is wrong
            _decode_one(blob, key, num_classes)
        raise
    return _wrap(decoded, keys, labels, calibration)


def _decode_one(blob: bytes, key: str | None, num_classes: int | None = None) -> list[codec.Decoded]:
    """Decode the labels of one image. Errors name the key if there is one."""
    try:
        return codec.decode([blob], num_classes)
    except LabelMapError as error:
        raise LabelMapError(f"label map {key!r}: {error}") if key is not None else error from None


def _wrap(
    decoded: Sequence[codec.Decoded],
    keys: Sequence[str | None],
    labels: Sequence[int | None],
    calibration: Calibration | None = None,
) -> list[ReadLabels]:
    found: dict[int, ReadLabels] = {}  # by place
    crops: dict[int, DecodedCrops] = {}
    for rows, encoding, content, num_classes, canvas_sizes in decoded:
        if isinstance(encoding, MapEncoding):
            batch = LabelMapBatch(
                Encoded(encoding, content, num_classes),
                (WHOLE,) * len(rows),
                tuple(labels[row] for row in rows),
                tuple(keys[row] for row in rows),
                (calibration,) * len(rows),
            )
            maps = [MapRow(batch, i, size) for i, size in enumerate(canvas_sizes)]
            if len(maps) == len(keys):
                return list(maps)
            found |= zip(rows, maps, strict=True)
        else:
            tensors = zip(rows, content, canvas_sizes, strict=True)
            crops |= {row: DecodedCrops(values, num_classes, size) for row, values, size in tensors}
    # All crops together, although each image may have a layout of its own.
    wrapped = wrap_decoded(list(crops.values()), [keys[row] for row in crops], [labels[row] for row in crops])
    found |= dict(zip(crops, wrapped, strict=True))
    return [found[row] for row in range(len(found))]
