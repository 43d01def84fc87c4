"""Read and write the stored form of a label map: sparse logits as safetensors bytes.

    tensor    dtype                 shape
    logits    F16, or U8 (8 bits)   [K, H, W]
              or U8 (4 bits)        [ceil(K/2), H, W]: heatmap i in the low half of plane i, i + ceil(K/2) in the high
    classes   U8, U16 or U32        [K] (heatmaps) or [K, H, W] (topk): the narrowest that holds C - 1
    base      as logits             [C], or [ceil(C/2)] packed as above; heatmaps only. The base of a class that has a
                                    heatmap is the heatmap's mean, whatever is stored.
    ranges    F16, only with U8     [K, 2], or [K + 1, 2] with a base: the values of the lowest and of the highest level
                                    of each heatmap, and of the base in the last row

The metadata has one key, "relabel", with sorted JSON: {"canvas": [height, width], "num_classes": C, "version": 1}.
Only one key, because safetensors writes several keys in random order, and equal maps must have equal bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save
from torch import Tensor

from ..errors import LabelMapError
from ..schema import FieldError, fields, integer, list_of, one_of, parse_json, record, shown, text, tuple_of
from .encoding import Encoded, quantize_heatmaps
from .limits import MAX_CLASSES, MAX_DENSE, MAX_SIDE
from .packed_base import Array, PackedBase, unpack_levels

VERSION = 1
STORED_DTYPES = ("uint4", "uint8", "float16")
DEFAULT_DTYPES = {"heatmaps": "uint4", "topk": "float16"}  # the smallest with nearly no loss
_LEVELS = {"uint4": 16, "uint8": 256}
_CLASS_DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(f"uint{name[1:]}") for name in ("U8", "U16", "U32")}
_NUMPY_DTYPES: dict[str, np.dtype[Any]] = {**_CLASS_DTYPES, "F16": np.dtype(np.float16)}
_MAX_HEADER = 1 << 12  # bytes; a header has about 350, and thousands of headers are cached


class Decoded(NamedTuple):
    """Content of one stored label map: the fields of `LabelMap`."""

    logits: Tensor  # [K, H, W] float32
    classes: Tensor  # [K, 1, 1] or [K, H, W] int64
    base: Tensor | PackedBase | None  # [C] float32
    num_classes: int
    canvas_size: tuple[int, int]


def encode(encoded: Encoded, canvas_sizes: list[tuple[int, int]], storage_dtype: str | None = None) -> list[bytes]:
    """Serialize the label maps of a batch.

    Args:
        encoded: Encoded maps of B images.
        canvas_sizes: Sizes (height, width) of the B images in pixels.
        storage_dtype: Precision of the stored logits: `"uint4"` (heatmaps only), `"uint8"` or `"float16"`. Default:
            `"uint4"` for heatmaps, `"float16"` for topk.

    Returns:
        The safetensors bytes of each map.

    Raises:
        ValueError: The maps could not be decoded, the storage dtype is unknown, or logits are too large for float16.
    """
    storage_dtype = resolve_storage_dtype("topk" if encoded.base is None else "heatmaps", storage_dtype)
    _check_encodable(encoded, canvas_sizes)
    batch = _stored_tensors(encoded, storage_dtype)
    blobs = []
    for i, canvas in enumerate(canvas_sizes):
        metadata = {"canvas": list(canvas), "num_classes": encoded.num_classes, "version": VERSION}
        tensors = {name: np.ascontiguousarray(values[i]) for name, values in batch.items()}
        blobs.append(save(tensors, metadata={"relabel": json.dumps(metadata, sort_keys=True, separators=(",", ":"))}))
    return blobs


def resolve_storage_dtype(encoding: str, storage_dtype: str | None) -> str:
    """Return a storage dtype after checking it, or the default of the encoding for None.

    Raises:
        ValueError: The storage dtype is unknown, or uint4 is requested for topk.
    """
    if storage_dtype is None:
        return DEFAULT_DTYPES[encoding]
    if storage_dtype not in STORED_DTYPES:
        raise ValueError(f"storage_dtype must be one of {STORED_DTYPES}, got {storage_dtype!r}")
    if storage_dtype == "uint4" and encoding == "topk":
        raise ValueError(
            "topk maps are stored as 'float16' or 'uint8', not 'uint4': error diffusion needs neighboring logits of the same class"
        )
    return storage_dtype


def _check_encodable(encoded: Encoded, canvas_sizes: list[tuple[int, int]]) -> None:
    logits, classes, num_classes = encoded.logits, encoded.classes, encoded.num_classes
    grid = logits.shape[2:] if encoded.base is None else (1, 1)
    if 0 in logits.shape[1:] or classes.shape != (*logits.shape[:2], *grid):
        raise ValueError(
            "a stored label map has heatmaps [K, H, W] with classes [K, 1, 1] and a base, or logits and classes "
            f"[K, H, W] and no base, got {tuple(logits.shape[1:])} and {tuple(classes.shape[1:])}"
        )
    if len(canvas_sizes) != len(logits) or any(min(canvas) < 1 for canvas in canvas_sizes):
        raise ValueError(f"expected {len(logits)} canvas sizes of positive height and width, got {canvas_sizes}")
    if not 2 <= num_classes <= MAX_CLASSES:
        raise ValueError(f"a label map has 2 to {MAX_CLASSES} classes, got {num_classes}")
    if num_classes * math.prod(logits.shape[2:]) > MAX_DENSE:
        raise ValueError(
            f"a label map has at most {MAX_DENSE} classes x locations, got {num_classes} x {tuple(logits.shape[2:])}: "
            "choose a smaller input size"
        )
    if any(max(canvas) > MAX_SIDE for canvas in canvas_sizes):
        raise ValueError(f"canvas sizes must be at most {MAX_SIDE}, got {canvas_sizes}")
    if bool(((classes < 0) | (classes >= num_classes)).any()):
        raise ValueError(f"class indices must be in 0 .. {num_classes - 1}")
    if bool((classes.sort(1).values.diff(dim=1) == 0).any()):
        raise ValueError("the classes of one location must differ from each other")
    limit = float(np.finfo(np.float16).max)
    for name, values in (("logits", logits), ("base", encoded.base)):
        if values is not None and not bool((values.abs() <= limit).all()):  # false for nan, too
            raise ValueError(f"{name} must be finite and within float16's +-{limit:.0f}")


def _stored_tensors(encoded: Encoded, storage_dtype: str) -> dict[str, Array]:
    """Return the tensors to store, with a batch dimension."""
    classes = encoded.classes if encoded.base is None else encoded.classes[:, :, 0, 0]
    stored: dict[str, Array] = {"classes": classes.cpu().numpy().astype(_class_dtype(encoded.num_classes))}
    logits = encoded.logits.float()
    if storage_dtype == "float16":
        stored["logits"] = logits.half().cpu().numpy()
        if encoded.base is not None:
            stored["base"] = encoded.base.half().cpu().numpy()
        return stored
    low, high = _float16_range(logits.flatten(2))
    if encoded.base is None:
        quantized = _round_to_levels(logits, low[..., None, None], high[..., None, None], _LEVELS[storage_dtype])
    else:
        quantized = quantize_heatmaps(logits, low, high, _LEVELS[storage_dtype])
        base = _base_of_the_rest(encoded.base.float(), classes)
        base_low, base_high = _float16_range(base[:, None])
        stored["base"] = _pack(_round_to_levels(base, base_low, base_high, _LEVELS[storage_dtype]), storage_dtype)
        low, high = torch.cat([low, base_low], 1), torch.cat([high, base_high], 1)
    stored["logits"] = _pack(quantized, storage_dtype)
    stored["ranges"] = torch.stack([low, high], dim=2).half().cpu().numpy()
    return stored


def _class_dtype(num_classes: int) -> np.dtype[Any]:
    return next(dtype for dtype in _CLASS_DTYPES.values() if num_classes - 1 <= np.iinfo(dtype).max)


def _base_of_the_rest(base: Tensor, classes: Tensor) -> Tensor:
    """Return the base `[B, C]` with the classes of heatmaps set to the lowest other value, which narrows the range."""
    kept = torch.zeros_like(base, dtype=torch.bool).scatter_(1, classes, True)
    lowest = base.masked_fill(kept, torch.inf).amin(1, keepdim=True)
    return torch.where(kept, torch.where(lowest.isinf(), 0.0, lowest), base)


def _float16_range(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return minimum and maximum over the last dimension as float32, rounded outwards to float16 values."""
    bounds = []
    for bound, outwards in ((values.amin(-1), -np.inf), (values.amax(-1), np.inf)):
        exact = bound.cpu().numpy()
        half = exact.astype(np.float16)
        too_narrow = half > exact if outwards < 0 else half < exact
        half = np.where(too_narrow, np.nextafter(half, np.float16(outwards)), half)
        bounds.append(torch.from_numpy(half.astype(np.float32)).to(values.device))
    return bounds[0], bounds[1]


def _round_to_levels(values: Tensor, low: Tensor, high: Tensor, levels: int) -> Tensor:
    step = ((high - low) / (levels - 1)).clamp_min(torch.finfo(torch.float32).tiny)
    return ((values - low) / step).round().clamp(0, levels - 1).to(torch.uint8)


def _pack(levels: Tensor, storage_dtype: str) -> Array:
    """Return levels `[B, N, ...]` as bytes. For uint4, a byte holds two levels: `[B, ceil(N/2), ...]`."""
    values = levels.cpu().numpy()
    if storage_dtype == "uint8":
        return values
    half = -(-values.shape[1] // 2)
    packed = values[:, :half].copy()
    packed[:, : values.shape[1] - half] |= values[:, half:] << 4
    return packed


def decode(blobs: Sequence[bytes], num_classes: int | None = None) -> list[Decoded]:
    """Decode label maps. Maps with the same layout are decoded together and share one block of memory.

    Args:
        blobs: Safetensors bytes of each map.
        num_classes: Number of classes that each map must have. Default: any.

    Returns:
        The content of each map, in order.

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
    contents: dict[int, Decoded] = {}
    for rows in rows_of_layout.values():
        layout = layouts[rows[0]]
        if num_classes not in (None, layout.num_classes):
            raise LabelMapError(
                f"it has {layout.num_classes} classes, but its dataset has {num_classes}: it belongs to another dataset"
            )
        blobs_of_layout = blobs if len(rows) == len(blobs) else [blobs[row] for row in rows]
        sizes = [canvas_sizes[row] for row in rows]
        contents.update(zip(rows, _decode_layout(blobs_of_layout, layout, sizes), strict=True))
    return [contents[row] for row in range(len(blobs))]


def _decode_layout(blobs: Sequence[bytes], layout: _Layout, canvas_sizes: list[tuple[int, int]]) -> list[Decoded]:
    data, batch = b"".join(blobs), len(blobs)  # join does not copy a single blob
    arrays = {
        name: np.ndarray((batch, *shape), dtype, data, offset, (layout.end, *strides))
        for name, shape, dtype, offset, strides in layout.tensors
    }
    num_classes, has_base = layout.num_classes, "base" in arrays
    classes = arrays["classes"].astype(np.int64)
    for indices in classes.tolist() if has_base else [[int(classes.max())]]:
        if max(indices) >= num_classes:
            raise LabelMapError(f"class index {max(indices)} is not below num_classes={num_classes}")
        if len(set(indices)) != len(indices):
            raise LabelMapError(f"each heatmap must be of another class, got {indices}")
    bases: Sequence[Tensor | PackedBase | None] = [None] * batch
    if layout.bits == 16:
        logits = _finite(arrays["logits"].astype(np.float32), "logits")
        if has_base:
            values = _finite(arrays["base"].astype(np.float32), "base")
            values[np.arange(batch)[:, None], classes] = _means(logits)
            bases = [torch.from_numpy(row) for row in values]
    else:
        ranges = _finite(arrays["ranges"].astype(np.float32), "ranges")
        low = ranges[:, :, 0]
        step = (ranges[:, :, 1] - low) * np.float32(1 / (2**layout.bits - 1))
        count = layout.num_logits
        logits = unpack_levels(arrays["logits"], count, layout.bits) * step[:, :count, None, None]
        logits += low[:, :count, None, None]
        if has_base:
            rows = zip(arrays["base"], low[:, -1], step[:, -1], _means(logits), strict=True)
            bases = [PackedBase(*row, num_classes) for row in rows]
    if has_base:
        classes = classes[:, :, None, None]
    # One tensor per row. Rows of one tensor would each be pickled with the memory of all rows.
    return [
        Decoded(torch.from_numpy(values), torch.from_numpy(indices), base, num_classes, size)
        for values, indices, base, size in zip(logits, classes, bases, canvas_sizes, strict=True)
    ]


def _means(logits: Array) -> Array:
    """Return the means `[B, K]` of heatmaps."""
    num_locations = logits.shape[2] * logits.shape[3]
    sums: Array = np.add.reduce(logits.reshape(*logits.shape[:2], num_locations), 2)  # faster than np.mean
    sums /= np.float32(num_locations)
    return sums


def _finite(values: npt.NDArray[np.float32], name: str) -> npt.NDArray[np.float32]:
    if np.count_nonzero(np.isfinite(values)) != values.size:  # half the time of np.all
        raise LabelMapError(f"{name} must be finite, got nan or inf")
    return values


class _Layout(NamedTuple):
    """Layout of the tensors in the bytes of a label map. Equal layouts are one object."""

    # name, shape, dtype, offset in the blob, strides in bytes
    tensors: tuple[tuple[str, tuple[int, ...], np.dtype[Any], int, tuple[int, ...]], ...]
    end: int  # length of the blob
    num_logits: int
    num_classes: int
    bits: int


_intern_layout = lru_cache(maxsize=1024)(lambda layout: layout)


_RANGE = tuple_of(integer(), integer())
_TENSOR = record(dtype=one_of(*_NUMPY_DTYPES), shape=list_of(integer(1)), data_offsets=_RANGE)
_TENSORS = fields(dict.fromkeys(("logits", "classes", "base", "ranges"), _TENSOR), optional=("base", "ranges"))
_STRINGS = record(relabel=text())
_METADATA = record(
    version=integer(VERSION, VERSION),
    num_classes=integer(2, MAX_CLASSES),
    canvas=tuple_of(integer(1, MAX_SIDE), integer(1, MAX_SIDE)),
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
        _TENSORS(entries, "")
    except ValueError as error:
        raise LabelMapError(f"not the header of a label map: {error}") from None
    num_classes, canvas = metadata["num_classes"], metadata["canvas"]
    tensors = [(name, entry["shape"], entry["dtype"], entry["data_offsets"]) for name, entry in entries.items()]
    start, end, placed = 8 + len(header), 0, {}
    for name, shape, dtype, (begin, stop) in sorted(tensors, key=lambda tensor: tensor[3]):
        numpy_dtype = _NUMPY_DTYPES[dtype]
        if begin != end or stop - begin != math.prod(shape) * numpy_dtype.itemsize:
            raise LabelMapError(
                f"{name}: bytes {begin} to {stop} do not fit its shape {shown(shape)} or do not start at {end}"
            )
        strides = tuple(numpy_dtype.itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        placed[name] = (tuple(shape), numpy_dtype, start + begin, strides)
        end = stop
    num_logits, bits = _check_shapes({name: (shape, dtype) for name, (shape, dtype, *_) in placed.items()}, num_classes)
    tensors_in_order = tuple((name, *tensor) for name, tensor in placed.items())
    return _intern_layout(_Layout(tensors_in_order, start + end, num_logits, num_classes, bits)), (canvas[0], canvas[1])


def _check_shapes(tensors: dict[str, tuple[tuple[int, ...], np.dtype[Any]]], num_classes: int) -> tuple[int, int]:
    """Return the number of logits per location and the bits they are stored in."""
    has_base, quantized = "base" in tensors, "ranges" in tensors
    logits_shape, classes_shape = tensors["logits"][0], tensors["classes"][0]
    if len(logits_shape) != 3 or not classes_shape:
        raise LabelMapError(f"logits must be [K, H, W] and classes have K, got {logits_shape} and {classes_shape}")
    num_logits, grid = classes_shape[0], logits_shape[1:]
    if num_classes * math.prod(grid) > MAX_DENSE:
        raise LabelMapError(
            f"a map of {num_classes} classes at {grid} locations exceeds {MAX_DENSE} classes x locations"
        )
    if num_logits > num_classes:
        raise LabelMapError(f"a map of {num_classes} classes cannot store {num_logits} of them at each location")
    bits = 16 if not quantized else 4 if has_base and tensors["base"][0] != (num_classes,) else 8
    per_byte = 2 if bits == 4 else 1
    stored = np.dtype(np.float16 if bits == 16 else np.uint8)
    expected: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
        "logits": ((-(-num_logits // per_byte), *grid), stored),
        "classes": ((num_logits,) if has_base else (num_logits, *grid), _class_dtype(num_classes)),
    }
    if has_base:
        expected["base"] = ((-(-num_classes // per_byte),), stored)
    if quantized:
        expected["ranges"] = ((num_logits + has_base, 2), np.dtype(np.float16))
    for name, (shape, dtype) in expected.items():
        if tensors[name] != (shape, dtype):
            raise LabelMapError(f"{name} must be {dtype} {shape}, got {tensors[name][1]} {tensors[name][0]}")
    return num_logits, bits
