"""LabelMap: class logits of one image at every location, as a torchvision tv_tensor.

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
    """The part of the original image that the current image shows, as an affine map.

    The point (u, v) of the current image lies at `(xx * u + xy * v + x0, yx * u + yy * v + y0)` of the original image. Both
    points are in units of their whole image. x and u point to the right, y and v down, and (0, 0) is the top left corner.

    `visible_xyxy` is the box of the original image that the current image has pixels of. Pixels outside it were filled, for
    example by a translation after a crop.
    """

    xx: float = 1.0
    xy: float = 0.0
    x0: float = 0.0
    yx: float = 0.0
    yy: float = 1.0
    y0: float = 0.0
    visible_xyxy: Box = (0.0, 0.0, 1.0, 1.0)

    def compose(self, inner: View) -> View:
        """Return the view of an image that shows the part `inner` of the current image.

        The visible box is limited to the bounding box of this view, which is exact for an upright view.
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
        """Whether the view is an upright box: neither rotated nor sheared, but possibly mirrored."""
        return abs(self.xy) + abs(self.yx) < 1e-9

    @property
    def box_xyxy(self) -> Box:
        """Box (x1, y1, x2, y2) of an upright view, with x1 > x2 or y1 > y2 if it is mirrored."""
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
        """Return the metadata on the device of `logits`, with the base in its dtype."""
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
        if isinstance(self.base, PackedBase):  # only maps that were just read from disk, on the CPU
            return torch.from_numpy(self.base.dense(self.classes.numpy().reshape(-1)))
        return self.base


class LabelMap(TVTensor):
    """Class logits `[K, H, W]` of an image, sparse over classes, that follow the image through v2 transforms.

    At each location, the classes in `classes` have the stored logits and every other class has its `base`:

        dense[c, y, x] = logits[k, y, x] where classes[k, y, x] == c, else base[c]

    Geometric v2 transforms change only `view` and `canvas_size`. `LabelPooling` then pools the part in view. Like softmax
    inputs, the logits of a location are defined up to a constant.

    Args:
        logits: Floating-point logits `[K, H, W]`.
        classes: Integer class indices of the logits: `[K, H, W]`, or `[K, 1, 1]` for whole heatmaps.
        num_classes: Number C of classes in the dataset.
        base: Logits `[C]` of the classes that are not stored. None means 0, as in the published label maps.
        canvas_size: Size (height, width) in pixels of the current image. Default: (H, W).
        view: Part of the original image that the current image shows. Default: the whole image.
        key: Key of the sample in its dataset, if it has one.
        label: Original class index of the sample, if it has one.

    Raises:
        ValueError: Shapes or dtypes do not match, or a class index is not below `num_classes`.
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
        # A tensor stays on its device, also under torch.set_default_device.
        logits = cls._to_tensor(logits, device=logits.device if isinstance(logits, Tensor) else None)
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
        """Return `tensor` as a LabelMap with the metadata of `like`. Keywords override single fields."""
        assert isinstance(like, LabelMap)
        metadata = like._metadata._replace(**kwargs) if kwargs else like._metadata
        return cls._wrap(tensor, metadata.like(tensor))

    @classmethod
    def _wrap_output(cls, output: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        # Without this, operations that keep the type (clone, to, detach, requires_grad_) would return a LabelMap without
        # metadata. All of them have the map itself as an argument.
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
        """Stored logits `[K, H, W]`, as a plain tensor that shares memory with the map."""
        logits: Tensor = self.as_subclass(Tensor)
        return logits

    @property
    def classes(self) -> Tensor:
        """Class indices of the logits, int64 `[K, H, W]` or `[K, 1, 1]`."""
        return self._metadata.classes

    @property
    def base(self) -> Tensor | None:
        """Logits `[C]` of the classes that are not stored at a location, or None for 0."""
        return self._metadata.dense_base()

    @property
    def packed_base(self) -> PackedBase | None:
        """The base in its stored form, or None if the map was not read from disk."""
        base = self._metadata.base
        return base if isinstance(base, PackedBase) else None

    def base_array(self) -> npt.NDArray[Any] | None:
        """Return the base `[C]` as a new array, or None for 0. The map must be on the CPU."""
        base = self._metadata.base
        if isinstance(base, PackedBase):
            return base.dense(self.classes.numpy().reshape(-1))
        return None if base is None else base.numpy().copy()

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return self._metadata.num_classes

    @property
    def canvas_size(self) -> tuple[int, int]:
        """Size (height, width) of the current image in pixels."""
        return self._metadata.canvas_size

    @property
    def view(self) -> View:
        """Part of the original image that the current image shows."""
        return self._metadata.view

    @property
    def key(self) -> str | None:
        """Key of the sample in its dataset, or None."""
        return self._metadata.key

    @property
    def label(self) -> int | None:
        """Original class index of the sample, or None."""
        return self._metadata.label

    @property
    def encoding(self) -> str:
        """Name of the encoding, `"heatmaps"` or `"topk"`."""
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
        """Encode dense logits as a label map.

        Args:
            dense: Class logits at every location, `[C, H, W]`.
            encoding: `"heatmaps"` keeps whole heatmaps of the `k` classes that matter most in the image and the mean logit
                of every other class. `"topk"` keeps the `k` best classes at each location and sets all others to 0.
            k: Number of classes to keep, at most C. Default: 10 for heatmaps, 5 for topk.
            canvas_size: Size (height, width) of the image in pixels. Default: (H, W).
            key: Key of the sample.
            label: Original class index of the sample.

        Returns:
            The label map.

        Raises:
            ValueError: `dense` is not a finite `[C, H, W]`, the encoding is unknown, or `k` is below 1.
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
        """Return the logits `[C, H, W]` of the whole original image, regardless of the view."""
        num_locations = self.shape[1:]
        base = self.base
        if base is None:
            base = self.logits.new_zeros(self.num_classes)
        dense = base[:, None, None].expand(-1, *num_locations).clone()
        return dense.scatter_(0, self.classes.expand(self.shape), self.logits)

    def to_safetensors(self, storage_dtype: str | None = None) -> bytes:
        """Serialize the map as safetensors bytes, in the format of `labels/codec.py`.

        Equal maps give equal bytes. View, key and label are not stored: a stored map covers the whole image, and the
        dataset holds the key and the label.

        Args:
            storage_dtype: Storage dtype of the logits: `"uint4"` or `"uint8"`, quantized over the range of each heatmap, or
                `"float16"`. Default: `"uint4"` for heatmaps, `"float16"` for topk.

        Returns:
            The bytes of a safetensors file.

        Raises:
            ValueError: The dtype is unknown, uint4 is requested for a topk map, or logits are not finite or too large for
                float16.
        """
        base = self.base
        encoded = Encoded(self.logits[None], self.classes[None], None if base is None else base[None], self.num_classes)
        return codec.encode(encoded, [self.canvas_size], storage_dtype)[0]

    @classmethod
    def from_safetensors(cls, blob: bytes, *, key: str | None = None, label: int | None = None) -> LabelMap:
        """Read a label map from safetensors bytes, in float32.

        Args:
            blob: Bytes returned by `to_safetensors`.
            key: Key of the sample, which errors name.
            label: Original class index of the sample.

        Returns:
            The label map of the whole image.

        Raises:
            LabelMapError: (a ValueError) The bytes are not a valid label map.
        """
        try:
            (content,) = codec.decode([blob])
        except LabelMapError as error:
            raise LabelMapError(f"label map {key!r}: {error}") if key is not None else error from None
        return _whole(content, key, label)


def read_label_maps(
    blobs: Sequence[bytes], keys: Sequence[str], labels: Sequence[int], num_classes: int | None = None
) -> list[LabelMap]:
    """Read several label maps at once, several times faster than one at a time. They share one piece of memory.

    Args:
        blobs: Bytes of the maps.
        keys: Keys of the samples.
        labels: Original class indices of the samples.
        num_classes: Number of classes that each map must have. Default: any.

    Returns:
        The label maps, in order.

    Raises:
        LabelMapError: (a ValueError) Bytes are not a valid label map, or it has another number of classes. The message
            names the key.
    """
    try:
        contents = codec.decode(blobs, num_classes)
    except LabelMapError:
        for blob, key in zip(blobs, keys, strict=True):  # find the one that is wrong
            try:
                codec.decode([blob], num_classes)
            except LabelMapError as error:
                raise LabelMapError(f"label map {key!r}: {error}") from None
        raise
    return [_whole(content, key, label) for content, key, label in zip(contents, keys, labels, strict=True)]


def _whole(content: codec.Decoded, key: str | None, label: int | None) -> LabelMap:
    """Return the label map of a whole image."""
    logits, classes, base, num_classes, canvas_size = content
    return LabelMap._wrap(logits, _Metadata(classes, base, num_classes, canvas_size, View(), key, label))


def _rebuild(logits: Tensor, metadata: _Metadata) -> LabelMap:
    return LabelMap._wrap(logits, metadata)
