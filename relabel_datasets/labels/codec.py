"""Read and write the stored labels of an image, a label map or crop labels: the tensors of their encoding as safetensors bytes.

Each encoding documents its tensors in its module in `encodings`. The metadata has one key, "relabel", with sorted JSON:

    {"canvas": [height, width], "num_classes": C, "version": 1}

and, for all encodings but `heatmaps` and `topk`, which are older than the field, "encoding" with the name of the encoding. There is
only one key, because safetensors writes several keys in random order, and equal maps must have equal bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

from ..errors import LabelMapError
from ..schema import FieldError, Rule, fields, integer, list_of, one_of, parse_json, record, shown, text, tuple_of
from .encodings.base import Array, Encoded, Encoding, StoredTensor
from .encodings.levels import BITS
from .encodings.registry import ENCODINGS, get_encoding
from .limits import MAX_CLASSES, MAX_SIDE
from .stored import Form, StoredTensors, are_valid

VERSION = 1
_UNNAMED = ("heatmaps", "topk")  # encodings whose name is not stored
_NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    f"{kind}{8 * size}": np.dtype(f"{letter}{size}")
    for kind, letter, sizes in (("U", "u", (1, 2, 4, 8)), ("I", "i", (1, 2, 4, 8)), ("F", "f", (2, 4, 8)))
    for size in sizes
}
_MAX_HEADER = 1 << 12  # bytes; a header has about 350, and thousands of headers are cached


class Decoded(NamedTuple):
    """Stored labels of images with the same layout.

    Attributes:
        rows: Places of the images among those that were decoded.
        encoding: Encoding of the labels.
        content: Result of `Encoding.decode`; logits are float32.
        num_classes: Number of classes C.
        canvas_sizes: Size (height, width) of each image in pixels.
    """

    rows: list[int]
    encoding: Encoding
    content: Any
    num_classes: int
    canvas_sizes: list[tuple[int, int]]


def encode(encoded: Encoded, canvas_sizes: list[tuple[int, int]], storage_dtype: str | None = None) -> list[bytes]:
    """Serialize the label maps of a batch.

    Args:
        encoded: Encoded maps of B images.
        canvas_sizes: Sizes (height, width) of the B images in pixels.
        storage_dtype: Precision of the stored logits. Default: that of the encoding.

    Returns:
        The safetensors bytes of each map.

    Raises:
        ValueError: The maps could not be decoded, the encoding does not have the storage dtype, or logits are too large for it.
    """
    encoding = encoded.encoding
    storage_dtype = encoding.entry.resolve_storage_dtype(storage_dtype)
    _check_batch(encoded, canvas_sizes)
    encoding.check_storable(encoded)
    batch = encoding.store(encoded, storage_dtype)
    return [
        serialize(encoding, {name: values[i] for name, values in batch.items()}, encoded.num_classes, canvas)
        for i, canvas in enumerate(canvas_sizes)
    ]


def serialize(encoding: Encoding, arrays: Mapping[str, Array], num_classes: int, canvas_size: tuple[int, int]) -> bytes:
    """Return the safetensors bytes of the labels of one image.

    Args:
        encoding: Encoding of the labels.
        arrays: Tensors to store.
        num_classes: Number of classes C.
        canvas_size: Size (height, width) of the image in pixels.
    """
    metadata = {"canvas": list(canvas_size), "num_classes": num_classes, "version": VERSION}
    if encoding.name not in _UNNAMED:
        metadata["encoding"] = encoding.name
    tensors = {name: np.asarray(values, order="C") for name, values in arrays.items()}
    return save(tensors, metadata={"relabel": json.dumps(metadata, sort_keys=True, separators=(",", ":"))})


def _check_batch(encoded: Encoded, canvas_sizes: list[tuple[int, int]]) -> None:
    batch = len(encoded.logits)
    if len(canvas_sizes) != batch:
        raise ValueError(f"expected {batch} canvas sizes of positive height and width, got {canvas_sizes}")
    check_sizes(encoded.num_classes, canvas_sizes)


def check_sizes(num_classes: int, canvas_sizes: Sequence[tuple[int, int]]) -> None:
    """Raise ValueError unless labels of this number of classes, for images of these sizes, can be read back."""
    if any(min(canvas) < 1 for canvas in canvas_sizes):
        raise ValueError(f"expected canvas sizes of positive height and width, got {canvas_sizes}")
    if any(max(canvas) > MAX_SIDE for canvas in canvas_sizes):
        raise ValueError(f"canvas sizes must be at most {MAX_SIDE}, got {canvas_sizes}")
    if not 2 <= num_classes <= MAX_CLASSES:
        raise ValueError(f"a label map has 2 to {MAX_CLASSES} classes, got {num_classes}")


def decode(blobs: Sequence[bytes], num_classes: int | None = None) -> list[Decoded]:
    """Decode labels. Those with the same layout are decoded together and share one block of memory.

    Args:
        blobs: Safetensors bytes of each map.
        num_classes: Number of classes that each map must have. Default: any.

    Returns:
        The labels of each layout.

    Raises:
        LabelMapError: A blob is not a valid label map, or it has another number of classes.
    """
    rows_of_layout: dict[int, list[int]] = {}
    layouts, canvas_sizes = [], []
    for row, blob in enumerate(blobs):
        length = int.from_bytes(blob[:8], "little")
        if len(blob) < 8 or length > min(_MAX_HEADER, len(blob) - 8):
            raise LabelMapError(f"{len(blob)} bytes are not a whole safetensors file: truncated, or not a label map")
        layout, canvas_size = _parse_header(blob[8 : 8 + length])
        if len(blob) != layout.end:
            raise LabelMapError(
                f"the header describes {layout.end} bytes, but there are {len(blob)}: truncated or damaged"
            )
        layouts.append(layout)
        canvas_sizes.append(canvas_size)
        rows_of_layout.setdefault(id(layout), []).append(row)
    decoded = []
    for rows in rows_of_layout.values():
        layout = layouts[rows[0]]
        if num_classes not in (None, layout.num_classes):
            raise LabelMapError(
                f"it has {layout.num_classes} classes, but its dataset has {num_classes}: it belongs to another dataset"
            )
        blobs_of_layout = blobs if len(rows) == len(blobs) else [blobs[row] for row in rows]
        sizes = [canvas_sizes[row] for row in rows]
        decoded.append(
            Decoded(rows, layout.encoding, _decode_layout(blobs_of_layout, layout), layout.num_classes, sizes)
        )
    return decoded


def _decode_layout(blobs: Sequence[bytes], layout: _Layout) -> Any:
    """Return the result of `Encoding.decode`, later if that cannot fail."""
    stored = tuple(map(bytes, blobs))
    if layout.form is not None and are_valid(stored, layout.form):
        return StoredTensors(stored, layout.form, lambda: _decode_now(stored, layout))
    return _decode_now(blobs, layout)


def _decode_now(blobs: Sequence[bytes], layout: _Layout) -> Any:
    data, batch = b"".join(blobs), len(blobs)  # join does not copy a single blob
    arrays = {
        name: np.ndarray((batch, *shape), dtype, data, offset, (layout.end, *strides))
        for name, shape, dtype, offset, strides in layout.tensors
    }
    return layout.encoding.decode(arrays, layout.num_classes, layout.storage_dtype)


class _Layout(NamedTuple):
    """Layout of the tensors in the bytes of a label map. Equal layouts are one object."""

    # name, shape, dtype, offset in the blob, strides in bytes
    tensors: tuple[tuple[str, tuple[int, ...], np.dtype[Any], int, tuple[int, ...]], ...]
    end: int  # length of the blob
    encoding: Encoding
    num_classes: int
    storage_dtype: str
    form: Form | None  # None for other encodings than heatmaps and topk


_intern_layout = lru_cache(maxsize=1024)(lambda layout: layout)


_RANGE = tuple_of(integer(), integer())
_STRINGS = record(relabel=text())
_METADATA = fields(
    {
        "version": integer(VERSION, VERSION),
        "num_classes": integer(2, MAX_CLASSES),
        "canvas": tuple_of(integer(1, MAX_SIDE), integer(1, MAX_SIDE)),
        "encoding": text(),
    },
    optional=("encoding",),
)


@lru_cache(maxsize=8192)  # headers differ only by canvas size, of which a dataset has some thousands at most
def _parse_header(header: bytes) -> tuple[_Layout, tuple[int, int]]:
    """Return the layout and the canvas size."""
    try:
        entries = parse_json(header)
        strings: Any = entries.pop("__metadata__", None) if isinstance(entries, dict) else None
        _STRINGS(strings, "__metadata__")
        metadata = parse_json(strings["relabel"].encode())
        version = metadata.get("version", VERSION) if isinstance(metadata, dict) else VERSION
        if type(version) is not int or version != VERSION:
            raise FieldError(f"format version {shown(version)} cannot be read, only {VERSION}: update relabel_datasets")
        _METADATA(metadata, "")
        encoding = _find_encoding(metadata, entries)
        _tensors_rule(encoding)(entries, "")
    except ValueError as error:
        raise LabelMapError(f"not the header of a label map: {error}") from None
    num_classes, canvas = metadata["num_classes"], metadata["canvas"]
    tensors = [(name, entry["shape"], entry["dtype"], entry["data_offsets"]) for name, entry in entries.items()]
    start, end, placed = 8 + len(header), 0, []
    for name, shape, dtype, (begin, stop) in sorted(tensors, key=lambda tensor: tensor[3]):
        numpy_dtype = _NUMPY_DTYPES[dtype]
        if begin != end or stop - begin != math.prod(shape) * numpy_dtype.itemsize:
            raise LabelMapError(
                f"{name}: bytes {begin} to {stop} do not fit its shape {shown(shape)} or do not start at {end}"
            )
        strides = tuple(numpy_dtype.itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        placed.append((name, tuple(shape), numpy_dtype, start + begin, strides))
        end = stop
    stored = {name: StoredTensor(shape, dtype) for name, shape, dtype, *_ in placed}
    storage_dtype = encoding.check_header(stored, num_classes)
    form = _form_of(encoding, placed, num_classes, storage_dtype, start + end)
    layout = _Layout(tuple(placed), start + end, encoding, num_classes, storage_dtype, form)
    return _intern_layout(layout), (canvas[0], canvas[1])


def _form_of(
    encoding: Encoding, placed: Sequence[tuple[Any, ...]], num_classes: int, storage_dtype: str, end: int
) -> Form | None:
    if encoding.name not in _UNNAMED:
        return None
    shapes, dtypes, offsets = ({name: entry[part] for name, *entry in placed} for part in range(3))
    _, height, width = shapes["logits"]
    return Form(
        is_topk=encoding.name == "topk",
        bits=BITS[storage_dtype],
        num_classes=num_classes,
        k=shapes["classes"][0],
        height=height,
        width=width,
        logits=offsets["logits"],
        classes=offsets["classes"],
        class_size=dtypes["classes"].itemsize,
        base=offsets.get("base", -1),
        ranges=offsets.get("ranges", -1),
        end=end,
    )


def _find_encoding(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> Encoding:
    """Return the encoding of stored labels. The encodings whose name is not stored differ in the tensor `base`."""
    name = metadata.get("encoding", "heatmaps" if "base" in tensors else "topk")
    if name not in ENCODINGS:
        raise FieldError(f"encoding {shown(name)} is unknown, only {', '.join(ENCODINGS)}: update relabel_datasets")
    return get_encoding(name)


def _tensors_rule(encoding: Encoding) -> Rule:
    tensor = record(dtype=one_of(*encoding.stored_types), shape=list_of(integer(1)), data_offsets=_RANGE)
    return fields(dict.fromkeys(encoding.stored_tensors, tensor), optional=encoding.optional_tensors)
