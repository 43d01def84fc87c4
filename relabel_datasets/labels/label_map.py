"""LabelMap: the class logits of one image at every location, as a torchvision tv_tensor.

Shapes: C classes of the dataset, K logits stored at each location (P whole heatmaps), H x W locations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.tv_tensors import TVTensor

from ..errors import LabelMapError
from . import codec
from .auto_augment import support_auto_augment
from .encoding import Encoded, encode_logits
from .packed_base import PackedBase

Box = tuple[float, float, float, float]


class View(NamedTuple):
    """Which part of the original image the current image shows: an affine map between the two.

    A point (u, v) of the current image lies at `(xx * u + xy * v + x0, yx * u + yy * v + y0)` of the original. Both
    are in units of their whole image: x and u to the right, y and v down, (0, 0) the upper left corner.

    `visible_xyxy` is the box of the original that the current image has pixels of. What an image shows beyond it was
    filled, as by a translation after a crop.
    """

    xx: float = 1.0
    xy: float = 0.0
    x0: float = 0.0
    yx: float = 0.0
    yy: float = 1.0
    y0: float = 0.0
    visible_xyxy: Box = (0.0, 0.0, 1.0, 1.0)

    def compose(self, inner: View) -> View:
        """Return the view of an image that shows the part `inner` of the image that this view belongs to.

        The original stays visible within the box around this view, which is exact where this view is upright.
        """
        a, b, c, d, e, f, (x1, y1, x2, y2) = self
        p, q, r, s, t, u, _ = inner
        visible = (
            max(x1, c + min(a, 0.0) + min(b, 0.0)), max(y1, f + min(d, 0.0) + min(e, 0.0)),
            min(x2, c + max(a, 0.0) + max(b, 0.0)), min(y2, f + max(d, 0.0) + max(e, 0.0)),
        )  # fmt: skip
        return View(
            a * p + b * s, a * q + b * t, a * r + b * u + c, d * p + e * s, d * q + e * t, d * r + e * u + f, visible
        )  # fmt: skip

    @property
    def is_box(self) -> bool:
        """Whether the view is an upright box, mirrored or not: neither rotated nor sheared."""
        return abs(self.xy) + abs(self.yx) < 1e-9

    @property
    def box_xyxy(self) -> Box:
        """The box of an upright view; x1 > x2 or y1 > y2 where it is mirrored."""
        return (self.x0, self.y0, self.x0 + self.xx, self.y0 + self.yy)


class _Metadata(NamedTuple):
    classes: Tensor
    base: Tensor | PackedBase | None
    num_classes: int
    canvas_size: tuple[int, int]
    view: View
    key: str | None
    label: int | None

    def like(self, logits: Tensor) -> _Metadata:
        """Follow `logits` to its device, and the base to its dtype as well."""
        base = self.base
        if isinstance(base, PackedBase) and not (logits.dtype == torch.float32 and logits.device.type == "cpu"):
            base = self.dense_base()
        if isinstance(base, Tensor) and (base.device != logits.device or base.dtype != logits.dtype):
            base = base.to(logits.device, logits.dtype if logits.is_floating_point() else None)
        if self.classes.device == logits.device and base is self.base:
            return self
        return self._replace(classes=self.classes.to(logits.device), base=base)

    def dense_base(self) -> Tensor | None:
        """Return the base `[C]`."""
        if isinstance(self.base, PackedBase):  # of a map that was just read: it is on the CPU
            return torch.from_numpy(self.base.dense(self.classes.numpy().reshape(-1)))
        return self.base


class LabelMap(TVTensor):
    """`[K, H, W]` class logits of an image, sparse over classes, that follow the image through v2 transforms.

    At a location, the classes in `classes` have the logits stored there and every other class has its `base`:

        dense[c, y, x] = logits[k, y, x] where classes[k, y, x] == c, else base[c]

    Geometric v2 transforms change only `view` and `canvas_size`; `LabelPooling` then pools the part in view. Logits
    are defined up to a constant of each location, as softmax is.

    Args:
        logits: `[K, H, W]`, floating point.
        classes: class indices of the logits, integer: `[K, H, W]`, or `[K, 1, 1]` for whole heatmaps.
        num_classes: C, the number of the dataset's classes.
        base: `[C]` logits of the classes that are not stored; None means 0, as the published label maps have it.
        canvas_size: (height, width) in pixels of the image that the map belongs to, as it is now. Default: (H, W).
        view: which part of the original image that image shows. Default: all of it.
        key: the sample's key in its dataset, if it has one.
        label: the sample's original class index, if it has one.

    Raises:
        ValueError: shapes or dtypes do not fit together, or a class index is not below `num_classes`.
    """

    _metadata: _Metadata
    _is_first = True

    def __new__(
        cls,
        logits: Any,
        classes: Any,
        *,
        num_classes: int,
        base: Any = None,
        canvas_size: Sequence[int] | None = None,
        view: View = View(),
        key: str | None = None,
        label: int | None = None,
    ) -> LabelMap:
        logits = cls._to_tensor(logits)
        classes = torch.as_tensor(classes, device=logits.device)
        base = None if base is None else torch.as_tensor(base, dtype=logits.dtype, device=logits.device)
        if logits.ndim != 3 or not logits.is_floating_point():
            raise ValueError(f"logits must be floating point [K, H, W], got {logits.dtype} {tuple(logits.shape)}")
        if classes.is_floating_point() or classes.shape not in (logits.shape, (logits.shape[0], 1, 1)):
            raise ValueError(
                f"classes must be integers of shape {tuple(logits.shape)} or {(logits.shape[0], 1, 1)}, "
                f"got {classes.dtype} {tuple(classes.shape)}"
            )
        if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
            raise ValueError(f"class indices must be in 0 .. {num_classes - 1}, got {classes.min()} .. {classes.max()}")
        if base is not None and base.shape != (num_classes,):
            raise ValueError(f"base must have shape ({num_classes},), one logit a class, got {tuple(base.shape)}")
        height, width = logits.shape[1:] if canvas_size is None else canvas_size
        metadata = _Metadata(
            classes.long(), base, num_classes, (int(height), int(width)), View(*view), key, label
        )  # fmt: skip
        return cls._wrap(logits, metadata)

    @classmethod
    def _wrap(cls, logits: Tensor, metadata: _Metadata) -> LabelMap:
        if LabelMap._is_first:  # not at import, which must not change torchvision
            support_auto_augment(LabelMap)
            LabelMap._is_first = False
        label_map = logits.as_subclass(cls)
        label_map._metadata = metadata
        return label_map

    @classmethod
    def wrap(cls, tensor: Tensor, like: TVTensor, **kwargs: Any) -> LabelMap:
        """Return `tensor` as a LabelMap with the metadata of `like`; keywords override single fields."""
        assert isinstance(like, LabelMap)
        metadata = like._metadata._replace(**kwargs) if kwargs else like._metadata
        return cls._wrap(tensor, metadata.like(tensor))

    @classmethod
    def _wrap_output(cls, output: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        # Called for the operations that keep the type (clone, to, detach, requires_grad_): without it, they would
        # return a LabelMap that has lost its metadata. They all have the map itself as their first argument.
        like = next((arg for arg in args if isinstance(arg, LabelMap)), None)
        if like is None or not isinstance(output, Tensor):
            return super()._wrap_output(output, args, kwargs)
        return cls._wrap(output, like._metadata.like(output))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.logits, self._metadata)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        shape = "x".join(map(str, self.shape))
        return (
            f"LabelMap({shape}, encoding={self.encoding!r}, num_classes={self.num_classes}, "
            f"canvas_size={self.canvas_size}, view={tuple(round(v, 4) for v in self.view[:6])}, "
            f"key={self.key!r}, label={self.label})"
        )

    @property
    def logits(self) -> Tensor:
        """`[K, H, W]` stored logits, as a plain tensor that shares the map's memory."""
        logits: Tensor = self.as_subclass(Tensor)
        return logits

    @property
    def classes(self) -> Tensor:
        """`[K, H, W]` or `[K, 1, 1]` int64 class indices of the logits."""
        return self._metadata.classes

    @property
    def base(self) -> Tensor | None:
        """`[C]` logits of the classes that are not stored at a location, or None for 0."""
        return self._metadata.dense_base()

    @property
    def packed_base(self) -> PackedBase | None:
        """The base as it was stored, or None where it is not of a stored map."""
        base = self._metadata.base
        return base if isinstance(base, PackedBase) else None

    def base_array(self) -> npt.NDArray[Any] | None:
        """Return a new array of the base `[C]` of a map on the CPU, or None for 0."""
        base = self._metadata.base
        if isinstance(base, PackedBase):
            return base.dense(self.classes.numpy().reshape(-1))
        return None if base is None else base.numpy().copy()

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return self._metadata.num_classes

    @property
    def canvas_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the image that the map belongs to, as it is now."""
        return self._metadata.canvas_size

    @property
    def view(self) -> View:
        """Which part of the original image the current image shows."""
        return self._metadata.view

    @property
    def key(self) -> str | None:
        """The sample's key in its dataset, or None."""
        return self._metadata.key

    @property
    def label(self) -> int | None:
        """The sample's original class index, or None."""
        return self._metadata.label

    @property
    def encoding(self) -> str:
        """`"heatmaps"` or `"topk"`: which of the two the map is stored as."""
        return "heatmaps" if self._metadata.base is not None else "topk"

    @classmethod
    def from_logits(
        cls,
        dense: Tensor,
        encoding: str = "heatmaps",
        *,
        k: int | None = None,
        canvas_size: Sequence[int] | None = None,
        key: str | None = None,
        label: int | None = None,
    ) -> LabelMap:
        """Return the label map of dense logits.

        Args:
            dense: `[C, H, W]` class logits at every location.
            encoding: `"heatmaps"` keeps whole heatmaps of the `k` classes that matter in the image and the mean logit
                of all others; `"topk"` keeps the `k` best classes at each location and takes the others as 0.
            k: how many; default 10 heatmaps, top 5. At most C are kept.
            canvas_size: (height, width) of the image in pixels; default (H, W).
            key: the sample's key.
            label: the sample's original class index.

        Raises:
            ValueError: `dense` is not a finite `[C, H, W]`, or the encoding or `k` is unknown.
        """
        if dense.ndim != 3:
            raise ValueError(f"dense logits must be [C, H, W], got {tuple(dense.shape)}")
        encoded = encode_logits(dense[None], encoding, k)
        return cls(
            encoded.logits[0],
            encoded.classes[0],
            num_classes=dense.shape[0],
            base=None if encoded.base is None else encoded.base[0],
            canvas_size=canvas_size,
            key=key,
            label=label,
        )

    def dense(self) -> Tensor:
        """Return the `[C, H, W]` logits of the whole original image, whatever the view."""
        num_locations = self.shape[1:]
        base = self.base
        if base is None:
            base = self.logits.new_zeros(self.num_classes)
        dense = base[:, None, None].expand(-1, *num_locations).clone()
        return dense.scatter_(0, self.classes.expand(self.shape), self.logits)

    def to_safetensors(self, dtype: str | None = None) -> bytes:
        """Return the map as safetensors bytes, the same on every run; `labels/codec.py` defines the format.

        The view, key and label are not stored: a stored map is of a whole image, and its place in a dataset tells the
        rest.

        Args:
            dtype: how logits are stored: `"uint4"` or `"uint8"`, quantised over the range of each heatmap, or
                `"float16"`. Default: `"uint4"` for heatmaps, `"float16"` for topk.

        Raises:
            ValueError: unknown dtype, uint4 for a topk map, or logits that are not finite or too large for float16.
        """
        base = self.base
        encoded = Encoded(self.logits[None], self.classes[None], None if base is None else base[None], self.num_classes)
        return codec.encode(encoded, [self.canvas_size], dtype)[0]

    @classmethod
    def from_safetensors(cls, blob: bytes, *, key: str | None = None, label: int | None = None) -> LabelMap:
        """Return the map stored in safetensors bytes, in float32.

        Args:
            blob: what `to_safetensors` returned.
            key: the sample's key, also named in errors.
            label: the sample's original class index.

        Raises:
            LabelMapError: (a ValueError) the bytes are not a valid label map; the message says what is wrong.
        """
        try:
            (content,) = codec.decode([blob])
        except LabelMapError as error:
            raise LabelMapError(f"label map {key!r}: {error}") if key is not None else error from None
        return _whole(content, key, label)


def read_label_maps(blobs: Sequence[bytes], keys: Sequence[str], labels: Sequence[int]) -> list[LabelMap]:
    """Return `LabelMap.from_safetensors` of each, in a fraction of the time; those of one call lie in one piece of memory.

    Raises:
        LabelMapError: (a ValueError) bytes that are not a valid label map; the message names the key.
    """
    try:
        contents = codec.decode(blobs)
    except LabelMapError:
        for blob, key in zip(blobs, keys, strict=True):
            LabelMap.from_safetensors(blob, key=key)  # tells which
        raise
    return [_whole(*each) for each in zip(contents, keys, labels, strict=True)]


def _whole(content: codec.Decoded, key: str | None, label: int | None) -> LabelMap:
    """Return the map of a whole image."""
    logits, classes, base, num_classes, canvas_size = content
    return LabelMap._wrap(logits, _Metadata(classes, base, num_classes, canvas_size, View(), key, label))


def _rebuild(logits: Tensor, metadata: _Metadata) -> LabelMap:
    return LabelMap._wrap(logits, metadata)
