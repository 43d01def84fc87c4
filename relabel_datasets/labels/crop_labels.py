"""CropLabels: the labels of fixed crops of one image, as a torchvision tv_tensor.

Shapes: N stored crops of an image, C classes of the dataset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.tv_tensors import TVTensor

from ..errors import LabelMapError
from . import codec
from .auto_augment import support_auto_augment
from .crops import to_pixels
from .encodings.base import Array, StoredTensor
from .encodings.crop_codec import check_crops_header, compress_crops, decompress_labels, sparse_crops
from .encodings.crops import Crops, box_arrays, find_boxes, label_arrays, seed_array, seed_of
from .encodings.registry import find_entry, get_encoding
from .pooling_checks import check_temperature


class _Metadata(NamedTuple):
    arrays: dict[str, Array]  # as stored
    flips: npt.NDArray[np.bool_]
    num_classes: int
    canvas_size: tuple[int, int]
    key: str | None
    label: int | None
    epoch: int | None = None
    seed: int = 0


class CropLabels(TVTensor):
    """Soft labels of N fixed crops of an image. `RandomStoredCrop` cuts out one of the crops and returns it with its label.

    The tensor itself has the boxes `[N, 4]` of the crops, xyxy in units of the whole image, in float64. Labels stay compressed
    until they are used. A stored label is valid for its own crop only, so other geometric transforms raise an error.

    Make it with `from_logits`, `from_probabilities` or `from_safetensors`, or read it from a dataset with the encoding `crops`.

    Args:
        arrays: Tensors of the encoding `crops`, as `tensors` returns them.
        num_classes: Number C of classes in the dataset.
        canvas_size: Size (height, width) in pixels of the image.
        key: Key of the sample in its dataset, if it has one.
        label: Original class index of the sample, if it has one.

    Raises:
        LabelMapError: (a ValueError) The arrays do not fit together.

    Example:
        >>> labels = CropLabels.from_logits(logits, canvas_size=(375, 500), key="n01440764_10026")  # [100, 1000]
        >>> labels.soft_labels([0, 5]).shape
        torch.Size([2, 1000])
    """

    _metadata: _Metadata
    _is_first = True

    def __new__(
        cls,
        arrays: Mapping[str, Any],
        *,
        num_classes: int,
        canvas_size: Sequence[int],
        key: str | None = None,
        label: int | None = None,
    ) -> CropLabels:
        stored = {name: np.asarray(values) for name, values in arrays.items()}
        encoding, canvas = _encoding(), (int(canvas_size[0]), int(canvas_size[1]))
        codec.check_sizes(num_classes, [canvas])
        unknown = stored.keys() - set(encoding.stored_tensors)
        if unknown:
            raise LabelMapError(f"crops have no tensors {sorted(unknown)}")
        header = {name: StoredTensor(values.shape, values.dtype) for name, values in stored.items()}
        storage_dtype = encoding.check_header(header, num_classes)
        (checked,) = encoding.decode(
            {name: values[None] for name, values in stored.items()}, num_classes, storage_dtype
        )
        (labels,) = wrap_decoded([DecodedCrops(checked, num_classes, canvas)], [key], [label])
        return labels

    @classmethod
    def _wrap(cls, boxes: Tensor, metadata: _Metadata) -> CropLabels:
        if CropLabels._is_first:  # not at import, which must not change torchvision
            from . import crop_transforms as crop_transforms  # registers kernels, which refuse other crops

            support_auto_augment(CropLabels)
            CropLabels._is_first = False
        labels = boxes.as_subclass(cls)
        labels._metadata = metadata
        return labels

    @classmethod
    def wrap(cls, tensor: Tensor, like: TVTensor, **kwargs: Any) -> CropLabels:
        """Return `tensor` as CropLabels with the metadata of `like`. Keywords override single fields."""
        assert isinstance(like, CropLabels)
        return cls._wrap(tensor, like._metadata._replace(**kwargs))

    @classmethod
    def _wrap_output(cls, output: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        like = next((arg for arg in args if isinstance(arg, CropLabels)), None)
        if like is None or not isinstance(output, Tensor):
            return super()._wrap_output(output, args, kwargs)
        return cls._wrap(output, like._metadata)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.boxes_xyxy, self._metadata)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return (
            f"CropLabels({self.num_crops} crops, num_classes={self.num_classes}, canvas_size={self.canvas_size}, "
            f"key={self.key!r}, label={self.label})"
        )

    @property
    def boxes_xyxy(self) -> Tensor:
        """Boxes of the crops `[N, 4]` in units of the whole image, float64, as a plain tensor that shares memory."""
        boxes: Tensor = self.as_subclass(Tensor)
        return boxes

    @property
    def flips(self) -> Tensor:
        """Whether each crop is mirrored after cropping, bool `[N]`."""
        return torch.from_numpy(self._metadata.flips)

    @property
    def num_crops(self) -> int:
        """Number of stored crops N."""
        return len(self._metadata.flips)

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return self._metadata.num_classes

    @property
    def canvas_size(self) -> tuple[int, int]:
        """Size (height, width) of the image in pixels."""
        return self._metadata.canvas_size

    @property
    def key(self) -> str | None:
        """Key of the sample in its dataset, or None."""
        return self._metadata.key

    @property
    def label(self) -> int | None:
        """Original class index of the sample, or None."""
        return self._metadata.label

    @property
    def epoch(self) -> int | None:
        """Epoch for which a stream read the sample, or None. `RandomStoredCrop` chooses crops by it."""
        return self._metadata.epoch

    @property
    def seed(self) -> int:
        """Seed of the stream that read the sample, 0 without one. With `epoch`, it determines the order of the crops."""
        return self._metadata.seed

    @property
    def encoding(self) -> str:
        """Name of the encoding, `"crops"`."""
        return _encoding().name

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Stored tensors by name, see `encodings/crops.py`. Only these are compressed."""
        return {name: torch.from_numpy(values) for name, values in self._metadata.arrays.items()}

    @classmethod
    def from_logits(
        cls,
        logits: Tensor,
        *,
        canvas_size: Sequence[int],
        key: str | None = None,
        label: int | None = None,
        boxes: npt.ArrayLike | None = None,
        flips: npt.ArrayLike | None = None,
        k: int | None = None,
    ) -> CropLabels:
        """Compress the annotator's logits of the crops of an image.

        Args:
            logits: Logits of each crop `[N, C]`.
            canvas_size: Size (height, width) of the image in pixels.
            key: Key of the sample, which determines the boxes. Default: `""`.
            label: Original class index of the sample.
            boxes: (top, left, height, width) of each crop `[N, 4]`, as shares of the height and width of the image. Default:
                those of `labels.crops.seeded_crops` for this key.
            flips: `[N]`, whether each crop is mirrored. Required with `boxes`, and not allowed without.
            k: Number of components that the labels are made of. More are more exact and take more bytes. Default: 16.

        Returns:
            The labels.

        Raises:
            ValueError: The logits are not finite `[N, C]`, have too many crops or classes, or the boxes do not fit.
        """
        entry = find_entry("crops")
        arrays = compress_crops(logits, entry.resolve_k(k))
        return cls(
            arrays | _own_boxes(boxes, flips, key),
            num_classes=logits.shape[1], canvas_size=canvas_size, key=key, label=label,
        )  # fmt: skip

    @classmethod
    def from_probabilities(
        cls,
        classes: npt.ArrayLike,
        probs: npt.ArrayLike,
        *,
        num_classes: int,
        canvas_size: Sequence[int],
        boxes: npt.ArrayLike,
        flips: npt.ArrayLike,
        spread_rest: bool,
        key: str | None = None,
        label: int | None = None,
    ) -> CropLabels:
        """Store the best probabilities of the crops of an image exactly, as published files have them.

        Args:
            classes: Class indices `[N, k]`.
            probs: Probabilities `[N, k]`, float16 or float32.
            num_classes: Number of classes C.
            canvas_size: Size (height, width) of the image in pixels.
            boxes: (top, left, height, width) of each crop `[N, 4]`, as shares of the height and width of the image.
            flips: `[N]`, whether each crop is mirrored.
            spread_rest: Whether the other classes share what is left of 1 evenly. Otherwise their probability is 0.
            key: Key of the sample.
            label: Original class index of the sample.

        Returns:
            The labels.

        Raises:
            ValueError: Shapes or values do not fit.
        """
        arrays = sparse_crops(np.asarray(classes), np.asarray(probs), num_classes, spread_rest=spread_rest)
        return cls(
            arrays | box_arrays(boxes, flips), num_classes=num_classes, canvas_size=canvas_size, key=key, label=label
        )

    def soft_labels(self, crops: Sequence[int] | None = None, temperature: float = 1.0) -> Tensor:
        """Return the soft labels of some crops.

        Args:
            crops: Indices of n crops, 0 to N - 1. Default: all.
            temperature: Divisor of the logits before the softmax, above 0. Default: 1.

        Returns:
            Soft labels `[n, C]`, float32.

        Raises:
            ValueError: The temperature is not positive.
            IndexError: A crop does not exist.
        """
        check_temperature(temperature)
        rows = np.arange(self.num_crops) if crops is None else np.asarray(crops, np.intp).reshape(-1)
        return torch.from_numpy(
            decompress_labels(label_arrays(self._metadata.arrays), self.num_classes, rows, temperature)
        )

    def mean_label(self) -> Tensor:
        """Return the mean soft label of all crops `[C]`, a label of the whole image."""
        return self.soft_labels().mean(0)

    def pixel_box(self, crop: int) -> tuple[int, int, int, int]:
        """Return the box (left, top, right, bottom) of a crop in whole pixels of the image, at least one pixel in size."""
        left, top, right, bottom = to_pixels(self.boxes_xyxy[crop], self.canvas_size)[0].tolist()
        return left, top, right, bottom

    def with_sample(self, key: str, label: int) -> CropLabels:
        """Return the labels with the key and the original class index of a sample."""
        return CropLabels._wrap(self.boxes_xyxy, self._metadata._replace(key=key, label=label))

    def with_canvas_size(self, canvas_size: tuple[int, int]) -> CropLabels:
        """Return the labels for the same image in another size (height, width)."""
        return CropLabels._wrap(self.boxes_xyxy, self._metadata._replace(canvas_size=canvas_size))

    def at_epoch(self, epoch: int, seed: int = 0) -> CropLabels:
        """Return the labels as a stream with this seed reads them in an epoch, see `epoch` and `seed`."""
        return CropLabels._wrap(self.boxes_xyxy, self._metadata._replace(epoch=epoch, seed=seed))

    def find_damage(self) -> str | None:
        """Describe damage that reading does not look for, or return None. There is none for crops."""
        return None

    def to_safetensors(self) -> bytes:
        """Serialize the labels as safetensors bytes, in the format of `labels/codec.py`. Key and label are not stored.

        Returns:
            The bytes of a safetensors file. Equal labels give equal bytes.
        """
        return codec.serialize(_encoding(), self._metadata.arrays, self.num_classes, self.canvas_size)

    @classmethod
    def from_safetensors(cls, blob: bytes, *, key: str | None = None, label: int | None = None) -> CropLabels:
        """Read crop labels from safetensors bytes.

        Args:
            blob: Bytes returned by `to_safetensors`.
            key: Key of the sample, which errors name.
            label: Original class index of the sample.

        Returns:
            The labels.

        Raises:
            LabelMapError: (a ValueError) The bytes are not valid crop labels.
        """
        from .reading import read_label

        labels = read_label(blob, key=key, label=label)
        if not isinstance(labels, CropLabels):
            raise LabelMapError("the bytes hold a label map, not crop labels: use LabelMap.from_safetensors")
        return labels


class DecodedCrops(NamedTuple):
    """Stored labels of the crops of one image."""

    tensors: dict[str, Array]
    num_classes: int
    canvas_size: tuple[int, int]


def wrap_decoded(
    contents: Sequence[DecodedCrops], keys: Sequence[str | None], labels: Sequence[int | None]
) -> list[CropLabels]:
    """Return the crop labels of decoded contents."""
    images, sizes = [content.tensors for content in contents], [content.canvas_size for content in contents]
    nums_crops = [_count(content.tensors, content.num_classes) for content in contents]
    located = find_boxes(images, sizes, nums_crops)
    return [
        CropLabels._wrap(
            torch.from_numpy(boxes),
            _Metadata(content.tensors, flips, content.num_classes, content.canvas_size, key, label),
        )
        for content, (boxes, flips), key, label in zip(contents, located, keys, labels, strict=True)
    ]


def _count(arrays: Mapping[str, Array], num_classes: int) -> int:
    """Return the number of crops of stored arrays."""
    header = {name: StoredTensor(values.shape, values.dtype) for name, values in label_arrays(arrays).items()}
    return check_crops_header(header, num_classes)


def _encoding() -> Crops:
    return cast(Crops, get_encoding("crops"))


def _own_boxes(boxes: npt.ArrayLike | None, flips: npt.ArrayLike | None, key: str | None) -> dict[str, Array]:
    if (boxes is None) != (flips is None):
        raise ValueError("boxes= and flips= belong together: give both or none")
    return seed_array(seed_of(key or "")) if boxes is None or flips is None else box_arrays(boxes, flips)


def _rebuild(boxes: Tensor, metadata: _Metadata) -> CropLabels:
    return CropLabels._wrap(boxes, metadata)
