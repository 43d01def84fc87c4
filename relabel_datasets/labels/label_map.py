"""LabelMap: class logits of one image at every location, as a torchvision tv_tensor.

Shapes: C classes of the dataset, K logits stored at each of H x W locations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torchvision.tv_tensors import TVTensor

from ..errors import LabelMapError
from . import codec
from .auto_augment import support_auto_augment
from .calibration import Calibration
from .encodings.base import Encoded, MapEncoding, Parts, encode_logits
from .encodings.registry import get_map_encoding
from .view import WHOLE, View


class _Metadata(NamedTuple):
    encoding: MapEncoding
    parts: Parts  # tensors of the encoding other than the logits
    num_classes: int
    canvas_size: tuple[int, int]
    view: View
    key: str | None
    label: int | None
    calibration: Calibration | None = None  # shared by all maps of a split

    def like(self, logits: Tensor) -> _Metadata:
        """Return the metadata on the device of `logits`, with floating-point tensors in its dtype."""
        parts = self.encoding.like(self.parts, logits)
        return self if parts is self.parts else self._replace(parts=parts)


class LabelMap(TVTensor):
    """Class logits of an image that follow the image through v2 transforms.

    The map itself is the tensor of the logits, `[K, H, W]`. Its encoding says which classes they belong to, and what the logits of
    all other classes are. `heatmaps`, each map of `multiscale`, and `topk` are

        dense[c, y, x] = logits[k, y, x] where classes[k, y, x] == c, else base[c], or 0 for topk

    Geometric v2 transforms change only `view` and `canvas_size`. `LabelPooling` then pools the part in view. Like softmax
    inputs, the logits of a location are defined up to a constant.

    Args:
        logits: Floating-point logits `[K, H, W]`.
        encoding: Name of the encoding, which determines the other tensors.
        num_classes: Number C of classes in the dataset.
        canvas_size: Size (height, width) in pixels of the current image. Default: (H, W).
        view: Part of the original image that the current image shows. Default: the whole image.
        key: Key of the sample in its dataset, if it has one.
        label: Original class index of the sample, if it has one.
        tensors: Other tensors of the encoding, as keywords: integer class indices `classes`, `[K, 1, 1]` for heatmaps and
            `[K, H, W]` for topk, and for heatmaps the logits `base` `[C]` of the classes that are not stored. For multiscale, also
            `logits_1`, `classes_1` and `base_1` of the second map, and so on.

    Raises:
        ValueError: The encoding is unknown, names, shapes or dtypes of the tensors are not those of the encoding, or a class
            index is not below `num_classes`.

    Example:
        >>> label_map = LabelMap(logits, "topk", classes=classes, num_classes=1000)
    """

    _metadata: _Metadata
    _is_first = True

    def __new__(
        cls,
        logits: Any,
        encoding: str,
        *,
        num_classes: int,
        canvas_size: Sequence[int] | None = None,
        view: View = WHOLE,
        key: str | None = None,
        label: int | None = None,
        **tensors: Any,
    ) -> LabelMap:
        # A tensor stays on its device, also under torch.set_default_device.
        logits = cls._to_tensor(logits, device=logits.device if isinstance(logits, Tensor) else None)
        chosen = get_map_encoding(encoding)
        parts = chosen.check(logits, tensors, num_classes)
        height, width = logits.shape[-2:] if canvas_size is None else canvas_size
        canvas = int(height), int(width)
        return cls._wrap(logits, _Metadata(chosen, parts, num_classes, canvas, View(*view), key, label))

    @classmethod
    def _wrap(cls, logits: Tensor, metadata: _Metadata) -> LabelMap:
        if LabelMap._is_first:  # not at import, which must not change torchvision
            # `batch` lets torch's default_collate refuse label maps, whose logits it would stack. `transforms` registers kernels,
            # without which v2 returns label maps unchanged.
            from . import batch as batch
            from . import transforms as transforms

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
    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the encoding by name, `"logits"` first."""
        return {"logits": self.logits, **self._metadata.encoding.plain(self._metadata.parts)}

    @property
    def classes(self) -> Tensor:
        """Class indices of the logits, int64 `[K, H, W]` or `[K, 1, 1]`. A KeyError if the encoding has none."""
        classes: Tensor = self._metadata.parts["classes"]
        return classes

    @property
    def base(self) -> Tensor | None:
        """Logits `[C]` of the classes that are not stored at a location, or None if the encoding has none."""
        return self.tensors.get("base")

    @property
    def map_sizes(self) -> list[list[int]]:
        """Sizes (H, W) of the maps of the image: one, or for `multiscale` one for each input size of the annotator."""
        return self._metadata.encoding.map_sizes(self.logits, self._metadata.parts)

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
    def calibration(self) -> Calibration | None:
        """Gains for `LabelPooling(calibrated=True)`, or None. `load_dataset` reads them from the manifest."""
        return self._metadata.calibration

    @property
    def encoding(self) -> str:
        """Name of the encoding, such as `"heatmaps"` or `"topk"`."""
        return self._metadata.encoding.name

    @classmethod
    def from_logits(
        cls,
        dense: Tensor | Sequence[Tensor],
        encoding: str = "heatmaps",
        *,
        k: int | None = None,
        canvas_size: Sequence[int] | None = None,
        key: str | None = None,
        label: int | None = None,
    ) -> LabelMap:
        """Encode dense logits as a label map.

        Args:
            dense: Class logits at every location, `[C, H, W]`. For `"multiscale"`, those of each input size.
            encoding: `"heatmaps"` keeps whole heatmaps of the `k` classes that matter most in the image and the mean logit
                of every other class. `"topk"` keeps the `k` best classes at each location and sets all others to 0.
                `"multiscale"` keeps the heatmaps of each of several input sizes.
            k: Number of classes to keep, at most C. Default: 10 for heatmaps and multiscale, 5 for topk.
            canvas_size: Size (height, width) of the image in pixels. Default: (H, W) of the first map.
            key: Key of the sample.
            label: Original class index of the sample.

        Returns:
            The label map.

        Raises:
            ValueError: `dense` is not a finite `[C, H, W]`, the encoding is unknown or not one of several maps, or `k` is below 1.
        """
        maps = [dense] if isinstance(dense, Tensor) else dense
        for one in maps:
            if one.ndim != 3:
                raise ValueError(f"dense logits must be [C, H, W], got {tuple(one.shape)}")
        encoded = encode_logits([one[None] for one in maps], encoding, k)
        tensors: dict[str, Any] = {name: tensor[0] for name, tensor in encoded.tensors.items()}
        return cls(
            **tensors, encoding=encoding, num_classes=encoded.num_classes, canvas_size=canvas_size, key=key, label=label
        )  # fmt: skip

    def with_sample(self, key: str, label: int) -> LabelMap:
        """Return the labels with the key and the original class index of a sample."""
        return LabelMap._wrap(self.logits, self._metadata._replace(key=key, label=label))

    def with_canvas_size(self, canvas_size: tuple[int, int]) -> LabelMap:
        """Return the map for the current image in another size (height, width)."""
        return LabelMap._wrap(self.logits, self._metadata._replace(canvas_size=canvas_size))

    def dense(self) -> Tensor:
        """Return the logits `[C, H, W]` of the whole original image, regardless of the view.

        For several maps, this is their mean, at the locations of the map with the most.
        """
        return self._metadata.encoding.dense(self._encoded())[0]

    def _encoded(self) -> Encoded:
        """Return the map as a batch of one."""
        tensors = {name: tensor[None] for name, tensor in self.tensors.items()}
        return Encoded(self._metadata.encoding, tensors, self.num_classes)

    def find_damage(self) -> str | None:
        """Describe damage that reading does not look for, since that would take long, or return None."""
        return self._metadata.encoding.find_damage(self.logits, self._metadata.parts)

    def to_safetensors(self, storage_dtype: str | None = None) -> bytes:
        """Serialize the map as safetensors bytes, in the format of `labels/codec.py`.

        Equal maps give equal bytes. View, key and label are not stored: a stored map covers the whole image, and the
        dataset holds the key and the label.

        Args:
            storage_dtype: Storage dtype of the logits, such as `"uint4"` or `"uint8"`, quantized over the range of each
                heatmap, or `"float16"`. Default: that of the encoding, `"uint4"` for heatmaps and `"float16"` for topk.

        Returns:
            The bytes of a safetensors file.

        Raises:
            ValueError: The encoding does not have the storage dtype, or logits are not finite or too large for float16.
        """
        return codec.encode(self._encoded(), [self.canvas_size], storage_dtype)[0]

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
        from .reading import read_label

        label_map = read_label(blob, key=key, label=label)
        if not isinstance(label_map, LabelMap):
            raise LabelMapError("the bytes hold crop labels, not a label map: use CropLabels.from_safetensors")
        return label_map


def _rebuild(logits: Tensor, metadata: _Metadata) -> LabelMap:
    return LabelMap._wrap(logits, metadata)
