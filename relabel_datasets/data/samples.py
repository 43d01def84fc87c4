"""Decode samples that `datasets` or `webdataset` read from the shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.Image
from torchvision import tv_tensors

from ..errors import DatasetError
from ..labels.crop_labels import CropLabels
from ..labels.encoded import size_of
from ..labels.label_map import LabelMap
from ..labels.reading import Labels, read_label
from ..schema import shown
from ..shards.formats import IMAGE_EXTENSIONS
from ..shards.images import ImageFormat, check_image_format, decode_image, upright
from ..shards.tars import parse_label
from ..shards.tensor_images import to_tensor

_IMAGE_FIELDS = tuple(extension.lstrip(".") for extension in IMAGE_EXTENSIONS)


def decode_sample(sample: Mapping[str, Any], *, image_format: ImageFormat = "pil") -> dict[str, Any]:
    """Decode the image, the label map and the label of a sample.

    Use it to read the shards with `datasets` or `webdataset` instead of `load_dataset`. Pass samples whose images are not decoded
    yet if possible: this function applies the EXIF orientation and reads images of 16 bits correctly, which webdataset's
    `decode("pil")` does not.

    Args:
        sample: Row of `datasets`, or sample of `webdataset` before or after its `decode("pil")`. A batch of rows, which is a
            dict of lists as in `with_transform`, is also accepted.
        image_format: `"pil"` for a PIL image, or `"tensor"` for a `tv_tensors.Image`, uint8 `[3, H, W]`. Default: "pil".

    Returns:
        A dict with `"key"`, `"label"` (class index), `"label_map"` and, if the sample has one, `"image"` (RGB, upright). For a
        batch, a dict of lists.

    Raises:
        DatasetError: (a ValueError) The sample has no key, no label, no label map or several images, or the EXIF orientation of
            its decoded image was not applied.
        ImageError: (a ValueError) The image is corrupt.
        LabelMapError: (a ValueError) The label map is corrupt.
        ValueError: `image_format` is neither.
        TypeError: A field has an unsupported type, such as an array.

    Example:
        >>> def collate(samples):  # in the DataLoader's workers
        ...     return default_collate([transforms(sample["image"], sample["label_map"]) for sample in samples])
        >>> rows = datasets.load_dataset("path/to/dataset", "CONFIG", split="train", streaming=True)
        >>> samples = rows.map(decode_sample, remove_columns=rows.column_names)
        >>> images, soft_labels = next(iter(DataLoader(samples, batch_size=64, collate_fn=collate)))

        Without streaming, use `rows.with_transform(decode_sample)`. With webdataset, use
        `WebDataset(urls).map(decode_sample)`.
    """
    check_image_format(image_format)
    key = sample.get("__key__")
    if isinstance(key, list):
        return _decode_batch(sample, image_format)
    if not isinstance(key, str):
        raise DatasetError(
            f"the sample has no '__key__', only the fields {sorted(sample)}: it is not from shards of label maps"
        )
    label = _label(sample, key)
    label_map = _label_map(sample, key, label)
    fields = [
        field for field in _IMAGE_FIELDS if sample.get(field) is not None
    ]  # None: the column of another split's extension
    if len(fields) > 1:
        raise DatasetError(
            f"sample {key!r} has several images, {fields}: keep the one that its label map was made from"
        )
    if not fields:
        return {"key": key, "label_map": label_map, "label": label}
    image = _image(sample[fields[0]], f"{key}.{fields[0]}", image_format)
    size = size_of(image)
    if label_map.canvas_size not in (size, size[::-1]):  # the image was stored in another resolution
        label_map = label_map.with_canvas_size(size)
    if label_map.canvas_size != size:
        raise DatasetError(
            f"sample {key!r}: its image is {size[0]}x{size[1]}, its label map was made from {size[1]}x{size[0]}: the image was "
            "decoded without its EXIF orientation. Leave images undecoded, since decode_sample decodes their bytes"
        )
    return {"key": key, "image": image, "label_map": label_map, "label": label}


def _decode_batch(batch: Mapping[str, Any], image_format: ImageFormat) -> dict[str, Any]:
    rows = zip(*batch.values(), strict=True)
    samples = [decode_sample(dict(zip(batch, row, strict=True)), image_format=image_format) for row in rows]
    names = samples[0] if samples else ()
    return {name: [sample[name] for sample in samples] for name in names}


def _label(sample: Mapping[str, Any], key: str) -> int:
    stored = sample.get("cls")
    label = parse_label(stored) if isinstance(stored, bytes) else stored
    if isinstance(label, bool) or not isinstance(label, (int, np.integer)) or label < 0:
        raise DatasetError(f"sample {key!r}: 'cls' must be a class index, got {shown(stored)}")
    return int(label)


def _label_map(sample: Mapping[str, Any], key: str, label: int) -> Labels:
    stored = sample.get("safetensors")
    if stored is None:
        raise DatasetError(f"sample {key!r} has no label map in 'safetensors', only the fields {sorted(sample)}")
    if isinstance(stored, (LabelMap, CropLabels)):  # decoded by a handler of webdataset
        label_map = stored.with_sample(key, label)
    elif isinstance(stored, bytes):
        label_map = read_label(stored, key=key, label=label)
    else:
        raise TypeError(f"sample {key!r}: 'safetensors' must be bytes or a LabelMap, got {type(stored).__name__}")
    if label >= label_map.num_classes:
        raise DatasetError(
            f"sample {key!r}: 'cls' must be in 0 .. {label_map.num_classes - 1}, the classes of its label map, got {label}"
        )
    return label_map


def _image(stored: Any, name: str, image_format: ImageFormat) -> PIL.Image.Image | tv_tensors.Image:
    if isinstance(stored, dict) and isinstance(stored.get("bytes"), bytes):  # datasets.Image(decode=False)
        stored = stored["bytes"]
    if isinstance(stored, bytes):
        return decode_image(stored, name, image_format=image_format)
    if not isinstance(stored, PIL.Image.Image):
        raise TypeError(f"{name} must be bytes or a PIL image, got {type(stored).__name__}: leave images undecoded")
    image = upright(stored)
    return image if image_format == "pil" else to_tensor(image)
