"""Read the stored labels of images, whatever their encoding."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import LabelMapError
from . import codec
from .calibration import Calibration
from .crop_labels import CropLabels, wrap_decoded
from .encodings.base import MapEncoding
from .label_map import LabelMap, whole_map

Labels = LabelMap | CropLabels


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
    return _wrap(_decode_one(blob, key), [key], [label])[0]


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
    try:
        contents = codec.decode(blobs, num_classes)
    except LabelMapError:
        for blob, key in zip(blobs, keys, strict=True):  # find the one that is wrong
            _decode_one(blob, key, num_classes)
        raise
    return _wrap(contents, keys, labels, calibration)


def _decode_one(blob: bytes, key: str | None, num_classes: int | None = None) -> list[codec.Decoded]:
    """Decode the labels of one image. Errors name the key if there is one."""
    try:
        return codec.decode([blob], num_classes)
    except LabelMapError as error:
        raise LabelMapError(f"label map {key!r}: {error}") if key is not None else error from None


def _wrap(
    contents: Sequence[codec.Decoded],
    keys: Sequence[str | None],
    labels: Sequence[int | None],
    calibration: Calibration | None = None,
) -> list[Labels]:
    of_crops = [i for i, content in enumerate(contents) if not isinstance(content.encoding, MapEncoding)]
    crops = wrap_decoded([contents[i] for i in of_crops], [keys[i] for i in of_crops], [labels[i] for i in of_crops])
    found: dict[int, Labels] = dict(zip(of_crops, crops, strict=True))
    found |= {
        i: whole_map(contents[i], keys[i], labels[i], calibration) for i in range(len(contents)) if i not in found
    }
    return [found[i] for i in range(len(contents))]
