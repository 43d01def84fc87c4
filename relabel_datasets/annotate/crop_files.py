"""Labels of fixed crops as FKD, FerKD and ImageNet+ publish them. Files are untrusted and fully validated.

FKD and FerKD have one file `<split>/<class>/<name>.tar` per image, which is no tar but a list of three arrays: boxes
`[N, 4]` as (top, left, height, width) in shares of the image, flips `[N]`, and labels, by type:

    label type               labels       reading
    hard                     [N]          class index
    smoothing                [N, 2]       class index and probability; the other classes share the rest evenly
    marginal_smoothing_k5    [N, 2, 5]    class indices, then probabilities; the other classes share the rest evenly
    marginal_smoothing_k10   [N, 2, 10]   the same
    marginal_renorm          [N, 2, 5]    class indices, then probabilities, divided by their sum; the other classes have 0

ImageNet+ has `config.pth.tar` and one file `<index>.pth.tar` per image: `[index, [{"params": ..., "prob": ...}, ...]]`. `params`
are the parameters of the augmentation by name, or in the order of the configuration; `prob` are the k greatest probabilities
and their class indices, or the probabilities of all classes. The other classes share the rest evenly.

Shapes: N crops of an image, C classes, k of them stored.

Reference: utils_FKD.py and FKD_SLG/generate_soft_label.py of szq0214/FKD; dr/transforms.py and dr/utils.py of apple/ml-dr.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import LabelMapError
from ..labels.limits import MAX_SIDE
from ..words import counted
from .numpy_pickles import brief
from .torch_files import as_array, load_plain_file, load_torch_file

LABEL_TYPES = ("hard", "smoothing", "marginal_smoothing_k5", "marginal_smoothing_k10", "marginal_renorm")
MAX_BYTES = 1 << 23  # per file, packed and unpacked; FKD's files have 30 to 60 KB, those of ImageNet+ up to 100 KB
_MAX_CROPS = 1 << 14
_RENORM = "marginal_renorm"
_WRITERS_NAMES = {"marginal_renorm_k5": _RENORM}
_MAX_HALF = 1 << 11  # float16 represents the integers up to here exactly
_SLACK = {"float16": 2e-3, "float32": 1e-5, "float64": 1e-9}  # rounding of boxes and of sums of probabilities
_QUARTER_TURNED = 5  # EXIF orientations from here on swap height and width
_PLAIN_STEPS = ("uint8", "to_tensor", "normalize")  # of the configuration of ImageNet+; they have no parameters
_CROP, _FLIP = "random_resized_crop", "random_horizontal_flip"

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class CropFile:
    """Labels of the crops of one image.

    Attributes:
        boxes: (top, left, height, width) of each crop `[N, 4]`: shares of the height and width of the image, float16, float32 or
            float64, or pixels, int64.
        flips: Whether each crop is mirrored after cropping, bool `[N]`.
        classes: Class indices `[N, k]`, int64. Those of one crop differ.
        probs: Probabilities of these classes `[N, k]`, float16 or float32.
        spread_rest: Whether the other classes share what is left of 1 evenly. Otherwise their probability is 0.
    """

    boxes: Array
    flips: npt.NDArray[np.bool_]
    classes: npt.NDArray[np.int64]
    probs: Array
    spread_rest: bool

    def shares(self, image_size: tuple[int, int], orientation: int = 1) -> Array:
        """Return the boxes as shares of the upright image. The releases have cropped images without turning them.

        Args:
            image_size: (height, width) of the upright image in pixels.
            orientation: EXIF orientation of the stored image, 1 to 8. Default: 1, upright.

        Returns:
            (top, left, height, width) of each crop `[N, 4]`.

        Raises:
            LabelMapError: A box in pixels exceeds the image, which is then another image.
        """
        boxes, stored_size = self.boxes, image_size[::-1] if orientation >= _QUARTER_TURNED else image_size
        if boxes.dtype.kind == "i":
            sides = np.tile(stored_size, 2)
            if bool((boxes[:, :2] + boxes[:, 2:] > sides[:2]).any()):
                raise LabelMapError(
                    f"crops exceed the image of {stored_size[0]} x {stored_size[1]} pixels (height x width)"
                )
            boxes = boxes / sides
        return boxes if orientation == 1 else _turned(boxes, orientation)


def _turned(boxes: Array, orientation: int) -> Array:
    """Return boxes in an image that was turned upright."""
    corners, sides = boxes[:, :2].astype(np.float64), boxes[:, 2:].astype(np.float64)
    if orientation >= _QUARTER_TURNED:
        corners, sides = corners[:, ::-1], sides[:, ::-1]
    is_mirrored = [orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)]  # top to bottom, left to right
    return np.concatenate([np.where(is_mirrored, 1 - corners - sides, corners), sides], axis=1)


def find_label_type(name: str | None) -> str | None:
    """Return the label type of FKD's reader for a name, which may be that of FKD's writer. None stays None.

    Raises:
        ValueError: There is no such label type.
    """
    known = _WRITERS_NAMES.get(name, name) if name is not None else None
    if known is not None and known not in LABEL_TYPES:
        raise ValueError(f"label_type must be one of {', '.join(LABEL_TYPES)}, got {name!r}")
    return known


def parse_fkd(data: bytes, num_classes: int, label_type: str | None = None) -> CropFile:
    """Parse and validate a file of FKD or FerKD.

    Args:
        data: Content of the file.
        num_classes: Number C of classes.
        label_type: Type of the labels, one of `LABEL_TYPES`. Default: by their shape, with marginal smoothing for `[N, 2, k]`.

    Returns:
        Labels of the crops.

    Raises:
        LabelMapError: The file is damaged, has labels of another type, or its values are out of range.
    """
    loaded = load_torch_file(data, MAX_BYTES, expected="arrays and tensors", arrays=True)
    if not isinstance(loaded, (list, tuple)) or len(loaded) != 3:
        raise LabelMapError("expected a list of boxes, flips and labels, as FKD writes it")
    boxes, flips, labels = (
        as_array(value, name) for value, name in zip(loaded, ("boxes", "flips", "labels"), strict=True)
    )
    _check_crops(boxes, flips)
    _check_fkd_boxes(boxes)
    found = _label_type_of(labels, len(boxes))
    if label_type is not None and label_type != found and not (label_type == _RENORM and found.startswith("marginal")):
        raise LabelMapError(
            f"labels of type {label_type!r} were expected, but those of shape {list(labels.shape)} are of type {found!r}"
        )
    if found == "hard":
        classes, probs = labels[:, None], np.ones((len(labels), 1), np.float32)
    else:
        pairs = labels[:, :, None] if labels.ndim == 2 else labels
        classes, probs = pairs[:, 0], pairs[:, 1]
    checked = _check_classes(classes, num_classes)
    probs = _check_probs(probs)
    if label_type == _RENORM:
        probs = _renormalized(probs)
    return CropFile(boxes, flips.astype(bool), checked, probs, spread_rest=found != "hard" and label_type != _RENORM)


def _label_type_of(labels: Array, num_crops: int) -> str:
    """Return the label type that labels of this shape have, marginal smoothing rather than renormalization."""
    kinds = {1: "hard", 2: "smoothing", 3: f"marginal_smoothing_k{labels.shape[-1] if labels.ndim == 3 else 0}"}
    if (
        labels.shape[:1] != (num_crops,)
        or labels.shape[1:2] not in ((), (2,))
        or kinds.get(labels.ndim) not in LABEL_TYPES
    ):
        raise LabelMapError(
            f"labels of {counted(num_crops, 'crop')} must be [N], [N, 2], [N, 2, 5] or [N, 2, 10], got {list(labels.shape)}"
        )
    return kinds[labels.ndim]


def _check_crops(boxes: Array, flips: Array) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not 1 <= len(boxes) <= _MAX_CROPS:
        raise LabelMapError(f"boxes must be [N, 4] with N of 1 to {_MAX_CROPS}, got {list(boxes.shape)}")
    if flips.shape != boxes.shape[:1] or not ((flips == 0) | (flips == 1)).all():
        raise LabelMapError(f"flips must be {counted(len(boxes), 'bool')}, one for each box, got {list(flips.shape)}")


def _check_fkd_boxes(boxes: Array) -> None:
    if boxes.dtype.name not in _SLACK:
        raise LabelMapError(f"boxes must be floating point, got {boxes.dtype}")
    slack, wide = _SLACK[boxes.dtype.name], boxes.astype(np.float64)
    corners, sides = wide[:, :2], wide[:, 2:]
    if not ((corners >= 0) & (sides > 0) & (corners + sides <= 1 + slack)).all():  # false for nan, too
        raise LabelMapError(
            "boxes must be (top, left, height, width) within the image, as shares of its height and width"
        )


def _check_classes(classes: Array, num_classes: int) -> npt.NDArray[np.int64]:
    if classes.dtype == np.float16 and num_classes > _MAX_HALF:
        raise LabelMapError(
            f"class indices are stored as float16, which represents them exactly up to {_MAX_HALF} only, but there are "
            f"{num_classes} classes: get labels in float32"
        )
    if classes.dtype.kind == "b" or not (np.isfinite(classes).all() and (classes == np.floor(classes)).all()):
        raise LabelMapError("class indices must be whole numbers")
    if classes.min() < 0 or classes.max() >= num_classes:
        raise LabelMapError(
            f"class indices must be in 0 .. {num_classes - 1}, got {classes.min():.0f} .. {classes.max():.0f}"
        )
    checked = classes.astype(np.int64)
    if (np.diff(np.sort(checked, axis=1), axis=1) == 0).any():
        raise LabelMapError("the classes of a crop must differ")
    return checked


def _check_probs(probs: Array) -> Array:
    """Return probabilities `[N, k]` as float16 or float32 after checking them."""
    if probs.dtype.kind != "f":
        raise LabelMapError(f"probabilities must be floating point, got {probs.dtype}")
    wide = probs.astype(np.float64)
    if not ((wide >= 0) & (wide <= 1)).all():  # false for nan, too
        raise LabelMapError("probabilities must be 0 to 1")
    slack = max(_SLACK[probs.dtype.name], _SLACK["float32"])
    if (wide.sum(1) > 1 + slack).any():
        raise LabelMapError(f"the probabilities of a crop must have a sum of at most 1, got {wide.sum(1).max():.4f}")
    return probs if probs.dtype == np.float16 else probs.astype(np.float32)


def _renormalized(probs: Array) -> Array:
    """Return probabilities divided by the sum of each crop, in float32 as FKD's reader computes them."""
    total = probs.astype(np.float32).sum(1, keepdims=True)
    if not total.all():
        raise LabelMapError("the probabilities of a crop must not all be 0")
    renormalized: Array = np.minimum(probs.astype(np.float32) / total, np.float32(1))
    return renormalized


@dataclass(frozen=True)
class PlusConfig:
    """Configuration of a release of ImageNet+.

    Attributes:
        num_samples: Number of crops N of each image.
        has_flips: Whether crops are mirrored at random.
    """

    num_samples: int
    has_flips: bool

    @classmethod
    def parse(cls, data: bytes) -> PlusConfig:
        """Parse and validate `config.pth.tar`.

        Args:
            data: Content of the file.

        Raises:
            LabelMapError: The file is damaged, or its augmentation has other operations than RandomResizedCrop and flip.
        """
        config = load_plain_file(data, MAX_BYTES)
        settings = config.get("reinforce") if isinstance(config, dict) else None
        steps = settings.get("image_augmentation") if isinstance(settings, dict) else None
        if not isinstance(settings, dict) or not isinstance(steps, dict):
            raise LabelMapError("is no configuration of ImageNet+: it has no `reinforce.image_augmentation`")
        count = settings.get("num_samples")
        if type(count) is not int or not 1 <= count <= _MAX_CROPS:
            raise LabelMapError(f"`reinforce.num_samples` must be 1 to {_MAX_CROPS}, got {brief(count)}")
        if not all(isinstance(name, str) for name in steps):
            raise LabelMapError("`reinforce.image_augmentation` must have operations by name")
        enabled = [name for name, step in steps.items() if not isinstance(step, dict) or step.get("enable", True)]
        if other := [name for name in enabled if name not in (*_PLAIN_STEPS, _CROP, _FLIP)]:
            raise LabelMapError(
                f"the labels are those of crops that were also augmented by {', '.join(other)}, which is not imported: get the "
                f"variant RRC, whose images are only cropped and mirrored"
            )
        if _CROP not in enabled:
            raise LabelMapError(f"the augmentation has no {_CROP}, only {', '.join(enabled) or 'nothing'}")
        return cls(count, _FLIP in enabled)


def parse_imagenet_plus(data: bytes, index: int, config: PlusConfig, num_classes: int) -> CropFile:
    """Parse and validate a file of ImageNet+.

    Args:
        data: Content of the file.
        index: Index in the name of the file.
        config: Configuration of the release.
        num_classes: Number C of classes.

    Returns:
        Labels of the crops, with boxes in pixels.

    Raises:
        LabelMapError: The file is damaged, does not fit the configuration, or its values are out of range.
    """
    loaded = load_plain_file(data, MAX_BYTES)
    if not isinstance(loaded, (list, tuple)) or len(loaded) != 2 or not isinstance(loaded[1], list):
        raise LabelMapError("expected an index and a list of samples, as ImageNet+ has them")
    if loaded[0] != index or len(loaded[1]) != config.num_samples:
        raise LabelMapError(
            f"expected index {index} and {config.num_samples} samples, got {brief(loaded[0])} and {counted(len(loaded[1]), 'sample')}"
        )
    if not all(isinstance(sample, dict) and sample.keys() >= {"params", "prob"} for sample in loaded[1]):
        raise LabelMapError("each sample must have `params` and `prob`")
    crops = [_crop_of(sample["params"], config) for sample in loaded[1]]
    boxes, flips = as_array([box for box, _ in crops], "crops"), as_array([flip for _, flip in crops], "flips")
    _check_crops(boxes, flips)
    if boxes.dtype.kind != "i" or boxes.min() < 0 or boxes[:, 2:].min() < 1 or boxes.max() > MAX_SIDE:
        raise LabelMapError("crops must be (top, left, height, width) in whole pixels")
    classes, probs = _sparse_probs([sample["prob"] for sample in loaded[1]])
    if (
        probs.shape != classes.shape
        or probs.ndim != 2
        or len(probs) != len(boxes)
        or not 1 <= probs.shape[1] <= num_classes
    ):
        raise LabelMapError(
            f"probabilities and class indices must be {config.num_samples} lists of the same length, at most {num_classes}, got "
            f"{list(probs.shape)} and {list(classes.shape)}"
        )
    return CropFile(
        boxes.astype(np.int64),
        flips.astype(bool),
        _check_classes(classes, num_classes),
        _check_probs(probs),
        spread_rest=True,
    )


def _crop_of(params: object, config: PlusConfig) -> tuple[list[object], object]:
    """Return the box and the flip of one sample. In a dict, each operation has its parameters and those of a second image."""
    if isinstance(params, dict):
        box, flip = _first_image(params.get(_CROP)), _first_image(params.get(_FLIP, False))
    else:
        items = _items(params, 1 + config.has_flips)
        if items is None:
            wanted = "the crop and the flip" if config.has_flips else "the crop"
            raise LabelMapError(f"`params` must be a dict, or a list of {wanted}")
        box, flip = items[0], items[1] if config.has_flips else False
    numbers = _items(box, 4)
    if numbers is None or not isinstance(flip, (bool, int)):
        raise LabelMapError("`params` must have a crop of four numbers and a flip that is a bool")
    return numbers, flip


def _first_image(params: object) -> object:
    pair = _items(params, 1) or _items(params, 2)
    return params if pair is None else pair[0]


def _items(value: object, length: int) -> list[object] | None:
    """Return the items of a list or tuple of this length, or None for everything else."""
    return list(value) if isinstance(value, (list, tuple)) and len(value) == length else None


def _sparse_probs(probs: Sequence[object]) -> tuple[Array, Array]:
    """Return class indices and probabilities `[N, k]`."""
    pairs = [_items(prob, 2) for prob in probs]
    if all(pair is not None and isinstance(pair[0], (list, tuple)) for pair in pairs):
        values, classes = ([pair[part] for pair in pairs if pair is not None] for part in (0, 1))
        return as_array(classes, "class indices"), as_array(values, "probabilities")
    dense = as_array(list(probs), "probabilities")
    return np.broadcast_to(np.arange(dense.shape[-1] if dense.ndim else 0), dense.shape), dense
