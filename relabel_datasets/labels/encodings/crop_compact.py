"""`compact` form of stored crops: a base shared by all views of an image, components, and corrections of single logits.

    stored tensor    dtype    shape
    crop_stream      U8       [N, B]: a raw deflate stream (RFC 1951), filled up with zeros to B bytes per view

The logits of view n and class c are BASE[b_c] + sum over r of u_nr * v_cr * STEP[b_c] + SCALE * d_nc, see `crop_fit`. BASE and STEP
are fixed tables. The decompressed stream holds small integers (*symbols*), one byte each except for the counts:

    counts           U32      [3]: number of components R, of classes with components M, and of corrections K
    base             U8       [C]: b. Its order, with equal symbols in the order of the classes, is the *rank* of a class.
    coefficients     I8       [R, N]: u
    components       I8       [R, M]: v of the classes with ranks 0 to M - 1. It is 0 for the others.
    corrected views  U8       [N]: number of corrections of each view, K in total
    corrections      I8       [K]: d, in the order of the views
    corrected ranks  U8       [2, K]: ranks of the corrected classes, their high and their low bytes

Shapes: N views, C classes, R components, K corrections.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ...errors import LabelMapError
from ..limits import MAX_CROPS, MAX_DENSE
from .base import Array, StoredTensor
from .crop_fit import BASE, SCALE, STEP, CropSymbols, fit_crops
from .sparse import Floats

NAMES = ("crop_stream",)
_COUNTS = np.dtype("<u4")
_MAX_CLASSES = 1 << 16  # ranks are stored in two bytes
_MAX_PER_VIEW = 255  # corrections of a view


class _Symbols(NamedTuple):
    """Symbols in the order of the stream, as views of its bytes."""

    base: Array  # [C]
    coefs: Array  # [R, N]
    components: Array  # [R, M]
    per_view: Array  # [N]
    corrections: Array  # [K]
    ranks: Array  # [2, K]


def compress(logits: Tensor, k: int) -> dict[str, Array]:
    """Compress the logits of all views of one image.

    Args:
        logits: Finite logits `[N, C]`.
        k: Number of components that the views share.

    Returns:
        Arrays to store, by name.

    Raises:
        ValueError: The logits are not finite `[N, C]` with N of at least 1 and C of 2 to 65536.
    """
    if logits.ndim != 2 or logits.shape[0] < 1 or logits.shape[1] < 2:
        raise ValueError(f"logits must be [N, C] with C of at least 2, got {tuple(logits.shape)}")
    values = logits.detach().cpu().float().numpy()
    if not np.isfinite(values).all():
        raise ValueError("logits must be finite, got nan or inf: try the annotator in a wider dtype")
    if logits.shape[1] > _MAX_CLASSES:
        raise ValueError(
            f"stored crops have at most {_MAX_CLASSES} classes, got {logits.shape[1]}: store label maps instead"
        )
    return {"crop_stream": _pack(fit_crops(values, k))}


def check_header(tensors: Mapping[str, StoredTensor], num_classes: int) -> int:
    shape, dtype = tensors["crop_stream"]
    if dtype != np.uint8 or len(shape) != 2 or not 1 <= shape[0] <= MAX_CROPS or shape[1] < 1:
        raise LabelMapError(
            f"crop_stream must be uint8 [N, B] with N of 1 to {MAX_CROPS} and B of at least 1, got {dtype} {shape}"
        )
    return shape[0]


def check_values(arrays: Mapping[str, Array], num_classes: int) -> None:
    symbols = _unpack(arrays["crop_stream"], num_classes)
    if int(symbols.per_view.sum(dtype=np.int64)) != len(symbols.corrections):
        raise LabelMapError(
            f"crop_stream has {len(symbols.corrections)} corrections, but its views have another number"
        )
    ranks = symbols.ranks[0].astype(np.uint16) << 8 | symbols.ranks[1]
    if len(ranks) and ranks.max() >= num_classes:
        raise LabelMapError(f"crop_stream corrects rank {ranks.max()}, which is not below num_classes={num_classes}")


def decompress(arrays: Mapping[str, Array], num_classes: int, rows: Array) -> Floats:
    symbols = _unpack(arrays["crop_stream"], num_classes)
    order = symbols.base.argsort(kind="stable")
    leading = order[: symbols.components.shape[1]]
    components = symbols.components.astype(np.float32)
    components *= STEP[symbols.base[leading]]
    coefs = symbols.coefs.T[rows].astype(np.float32)
    ends = symbols.per_view.cumsum(dtype=np.int64)
    logits = np.empty((len(rows), num_classes), np.float32)
    logits[:] = BASE[symbols.base]
    for row, view in enumerate(rows.tolist()):  # one by one, so that the bits of a view do not depend on the others
        logits[row, leading] += coefs[row] @ components
        some = slice(ends[view] - symbols.per_view[view], ends[view])
        ranks = symbols.ranks[0, some].astype(np.uint16) << 8 | symbols.ranks[1, some]
        logits[row, order[ranks]] += symbols.corrections[some] * SCALE
    return logits


def _pack(symbols: CropSymbols) -> Array:
    num_views = len(symbols.coefs)
    order = symbols.base.argsort(kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    components = symbols.components[order]
    nonzero = np.flatnonzero(components.any(1))
    num_leading = nonzero[-1] + 1 if len(nonzero) else 0
    ranks = rank[symbols.classes]
    per_view = np.bincount(symbols.views, minlength=num_views)
    counts = np.array([components.shape[1], num_leading, len(ranks)], _COUNTS)
    blocks: list[list[Array]] = [
        [counts, symbols.base.astype(np.uint8)],
        [symbols.coefs.T.astype(np.int8)],
        [components[:num_leading].T.astype(np.int8)],
        [per_view.astype(np.uint8), symbols.corrections.astype(np.int8), (ranks >> 8).astype(np.uint8)],
        [(ranks & 255).astype(np.uint8)],
    ]
    stream = min((_deflate(blocks, strategy) for strategy in _STRATEGIES), key=len)
    stored = np.zeros((num_views, -(-len(stream) // num_views)), np.uint8)
    stored.reshape(-1)[: len(stream)] = np.frombuffer(stream, np.uint8)
    return stored


_STRATEGIES = (zlib.Z_DEFAULT_STRATEGY, zlib.Z_FILTERED, zlib.Z_HUFFMAN_ONLY)


def _deflate(blocks: list[list[Array]], strategy: int) -> bytes:
    """Compress blocks of symbols, each with a Huffman code of its own."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
    parts = []
    for block in blocks:
        parts += [compressor.compress(b"".join(array.tobytes() for array in block)), compressor.flush(zlib.Z_BLOCK)]
    return b"".join([*parts, compressor.flush()])


def _unpack(stored: Array, num_classes: int) -> _Symbols:
    """Decompress the stream. The counts at its start bound the memory that it may take.

    Raises:
        LabelMapError: The stream is damaged, or its counts do not fit its length.
    """
    num_views = len(stored)
    decompressor = zlib.decompressobj(-15)
    try:
        head = decompressor.decompress(stored.tobytes(), 12)
        if len(head) < 12:
            raise LabelMapError(f"crop_stream ends after {len(head)} bytes")
        num_components, num_leading, num_corrections = np.frombuffer(head, _COUNTS).tolist()
        if (
            num_leading > num_classes
            or num_corrections > min(_MAX_PER_VIEW, num_classes) * num_views
            or num_components * (num_leading + num_views) > MAX_DENSE
        ):
            raise LabelMapError(
                f"crop_stream counts {num_components} components of {num_leading} classes and {num_corrections} corrections, too many"
                f" for {num_views} views of {num_classes} classes"
            )
        sizes = (
            num_classes,
            num_components * num_views,
            num_components * num_leading,
            num_views,
            num_corrections,
            2 * num_corrections,
        )
        length = sum(sizes)
        data = decompressor.decompress(decompressor.unconsumed_tail, length + 1)
    except zlib.error as error:
        raise LabelMapError(f"crop_stream is damaged: {error}") from None
    if len(data) != length or not decompressor.eof or any(decompressor.unused_data):
        raise LabelMapError(f"crop_stream must have {length + 12} bytes of symbols, then zeros only")
    bytes_ = np.frombuffer(data, np.uint8)
    base, coefs, components, per_view, corrections, ranks = np.split(bytes_, np.cumsum(sizes[:-1]))
    signed = np.int8
    return _Symbols(
        base,
        coefs.view(signed).reshape(num_components, num_views),
        components.view(signed).reshape(num_components, num_leading),
        per_view,
        corrections.view(signed),
        ranks.reshape(2, num_corrections),
    )
