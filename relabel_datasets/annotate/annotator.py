"""Annotator protocol, and an annotator that wraps any torch module.

Shapes: B images of h x w pixels, C classes, H x W locations of the map.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from ..devices import find_device
from ..labels.precision import autocast

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Annotator(Protocol):
    """Protocol of classifiers that return dense logits `[B, C, H, W]` for images squashed to their input size."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names or WordNet synsets of the C classes in the order of the logits, or None if unknown."""

    @property
    def num_classes(self) -> int:
        """Number C of classes."""

    def preprocess(self, image: PIL.Image.Image) -> Tensor:
        """Squash a whole RGB image to the input size. Must be thread-safe.

        Args:
            image: RGB image of any size.

        Returns:
            Pixels, uint8 `[3, h, w]`. `Ensemble` returns one uint8 vector `[n]` with the image in the sizes of all its members.
        """

    def __call__(self, images: Tensor) -> Tensor:
        """Compute the label maps of a batch.

        Args:
            images: Stacked results of `preprocess`, uint8 `[B, ...]`.

        Returns:
            Logits on the annotator's device, float32 `[B, C, H, W]`.
        """

    def describe(self) -> dict[str, Any]:
        """Describe everything that determines the maps.

        Returns:
            JSON values, among them `name`. Annotators that compute equal maps return equal descriptions.
        """


class ModuleAnnotator:
    """Annotator that wraps a torch module mapping normalized images `[B, 3, h, w]` to class logits `[B, C, H, W]`.

    Args:
        module: Network. It is moved to `device` and put in evaluation mode.
        input_size: (height, width) in pixels that images are squashed to, or an int for both.
        classes: Names of the C classes in the order of the logits. Default: unknown.
        mean: Mean of each RGB channel, in 0 .. 1. Default: that of ImageNet.
        std: Standard deviation of each RGB channel, in 0 .. 1. Default: that of ImageNet.
        interpolation: Interpolation of the resize, the lowercase name of a `PIL.Image.Resampling`. Default: `"bicubic"`.
        dtype: Precision of the forward pass: `"float32"`, or `"float16"` or `"bfloat16"` for autocast, which is faster on most
            accelerators. float16 logits are more precise by one decimal place; bfloat16 logits cannot overflow. Default:
            `"float32"`.
        device: Device of the forward pass. Default: the current CUDA device if available, else the CPU.
        channels_last: Whether to keep images and weights in the memory format that convolutions prefer. The maps are the same.
            Default: True.
        compile: Whether to use `torch.compile`, which takes a minute and, on the CPU, a C++ compiler. Logits may differ in
            their last bits, as they do between devices, so `describe` does not include it. Default: False.
        name: Name of the annotator in the manifest. Default: name of the module's type.

    Attributes:
        num_classes: Number C of classes.
        map_size: (H, W) of the maps.

    Raises:
        ValueError: An argument is out of range, the output of the module is not `[B, C, H, W]` with C classes, or the module
            cannot be compiled.

    Example:
        >>> backbone = torch.nn.Conv2d(3, 64, kernel_size=32, stride=32)
        >>> annotator = ModuleAnnotator(torch.nn.Sequential(backbone, torch.nn.Conv2d(64, 10, kernel_size=1)), 224)
        >>> annotator(annotator.preprocess(image)[None]).shape
        torch.Size([1, 10, 7, 7])
    """

    def __init__(
        self,
        module: nn.Module,
        input_size: int | Sequence[int],
        *,
        classes: Sequence[str] | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        interpolation: str = "bicubic",
        dtype: str = "float32",
        device: str | torch.device | None = None,
        channels_last: bool = True,
        compile: bool = False,  # noqa: A002  name used by torch and transformers
        name: str | None = None,
    ) -> None:
        self.input_size = check_size(input_size)
        if interpolation.upper() not in PIL.Image.Resampling.__members__:
            known = [member.lower() for member in PIL.Image.Resampling.__members__]
            raise ValueError(f"interpolation must be one of {known}, got {interpolation!r}")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {sorted(_DTYPES)}, got {dtype!r}")
        if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
            raise ValueError(
                f"mean and std must have three numbers each, and std must be positive, got {mean} and {std}"
            )
        self.interpolation = interpolation.lower()
        self.dtype = dtype
        self.name = type(module).__name__ if name is None else name
        self._weights_sha256 = hash_weights(module)
        self.device = find_device(device)
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._module = module.to(self.device).to(memory_format=self._memory_format).eval().requires_grad_(False)
        self.set_normalization(mean, std)
        try:
            logits = self._forward(torch.zeros(1, 3, *self.input_size, dtype=torch.uint8, device="cpu"))
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"{self.name} fails for images of {list(self.input_size)} pixels: {error!r}") from error
        self.num_classes = logits.shape[1]
        self.map_size = (logits.shape[2], logits.shape[3])
        if classes is not None and len(classes) != self.num_classes:
            raise ValueError(
                f"{self.name} returns logits of {self.num_classes} classes, but classes has {len(classes)} names: name all "
                "classes of the module, in the order of its logits"
            )
        self.classes = None if classes is None else tuple(classes)
        if compile:
            self._compile()

    def set_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set the mean and the standard deviation of each RGB channel, in 0 .. 1."""
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self._mean = torch.tensor(self.mean, dtype=torch.float32, device=self.device)[:, None, None] * 255
        self._std = torch.tensor(self.std, dtype=torch.float32, device=self.device)[:, None, None] * 255

    def _compile(self) -> None:
        self._module.compile()
        try:
            self._forward(torch.zeros(1, 3, *self.input_size, dtype=torch.uint8, device="cpu"))
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{self.name} cannot be compiled here: leave compile out, or install what torch.compile needs (on the CPU, "
                f"a C++ compiler and Python's headers). {type(error).__name__}: {reason}"
            ) from error

    def preprocess(self, image: PIL.Image.Image) -> Tensor:
        """Squash a whole RGB image to the input size.

        Args:
            image: RGB image of any size.

        Returns:
            Pixels, uint8 `[3, h, w]`.

        Raises:
            ValueError: The image is not RGB.
        """
        if image.mode != "RGB":
            raise ValueError(f"the image must be RGB, got mode {image.mode!r}: convert it first")
        height, width = self.input_size
        resized = image.resize((width, height), PIL.Image.Resampling[self.interpolation.upper()])
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)  # a view, in the memory format of convolutions

    def __call__(self, images: Tensor) -> Tensor:
        """Compute the label maps of a batch.

        Args:
            images: Preprocessed images, uint8 `[B, 3, h, w]`.

        Returns:
            Logits on the annotator's device, float32 `[B, C, H, W]`.

        Raises:
            ValueError: The images are not uint8 of the input size, or the module returned no logits `[B, C, H, W]`.
        """
        self._check_images(images)
        return self._forward(images)

    def classify(self, images: Tensor) -> Tensor:
        """Compute the logits of whole images, as the classifier itself computes them.

        Args:
            images: Preprocessed images, uint8 `[B, 3, h, w]`.

        Returns:
            Logits on the annotator's device, float32 `[B, C]`: those of the classifier if the module has a method `classify`, as
            that of `TimmAnnotator` does, else the mean over the map.
        """
        function = getattr(self._module, "classify", None)
        if function is None:
            return self(images).mean((2, 3))
        self._check_images(images)
        logits: Tensor = self._apply(function, images)
        return logits.float()

    def _check_images(self, images: Tensor) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (3, *self.input_size):
            expected = f"uint8 [B, 3, {self.input_size[0]}, {self.input_size[1]}]"
            raise ValueError(f"images must be {expected}, as returned by preprocess, got {_describe_value(images)}")

    def _forward(self, images: Tensor) -> Tensor:
        logits: object = self._apply(self._module, images)
        if not isinstance(logits, Tensor) or logits.ndim != 4 or len(logits) != len(images) or 0 in logits.shape:
            raise ValueError(
                f"{self.name} must return logits [B, C, H, W], one per class and location, for images "
                f"{list(images.shape)}, got {_describe_value(logits)}"
            )
        return logits.float()

    @torch.inference_mode()
    def _apply(self, function: Callable[[Tensor], Any], images: Tensor) -> Any:
        """Return `function` of normalized images."""
        normalized = (images.to(self.device, non_blocking=True).float() - self._mean) / self._std
        # Autocast instead of weights in `dtype`: norms stay in float32, and the error of the logits is a third smaller.
        with autocast(self.device, _DTYPES[self.dtype]):
            return function(normalized.contiguous(memory_format=self._memory_format))

    def describe(self) -> dict[str, Any]:
        """Describe everything that determines the maps. Weights are identified by the SHA-256 of their state dict.

        Returns:
            JSON values. Annotators that compute equal maps return equal descriptions.
        """
        return {
            "kind": "module",
            "name": self.name,
            "weights_sha256": self._weights_sha256,
            "input_size": list(self.input_size),
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "dtype": self.dtype,
            "num_classes": self.num_classes,
        }


class ClassSubset:
    """Annotator that selects and reorders classes of another annotator, so that its maps are over the classes of a dataset.

    Args:
        annotator: Annotator with logits of all its classes.
        rows: Class index of `annotator` for each class of the dataset, see `match_classes`.
        classes: Names of the classes of the dataset.

    Raises:
        ValueError: The numbers of rows and classes differ, or a row is out of range.
    """

    def __init__(self, annotator: Annotator, rows: Sequence[int], classes: Sequence[str]) -> None:
        if len(rows) != len(classes):
            raise ValueError(f"expected one row per class, got {len(rows)} rows and {len(classes)} classes")
        outside = [row for row in rows if not 0 <= row < annotator.num_classes]
        if outside:
            raise ValueError(f"rows must be in 0 .. {annotator.num_classes - 1}, got {outside[:5]}")
        self.annotator = annotator
        self.classes = tuple(classes)
        self.num_classes = len(classes)
        self._rows = torch.tensor(rows, dtype=torch.long, device="cpu")

    def preprocess(self, image: PIL.Image.Image) -> Tensor:
        """Preprocess an image with the inner annotator.

        Args:
            image: RGB image of any size.

        Returns:
            Pixels that the inner annotator expects.
        """
        return self.annotator.preprocess(image)

    def __call__(self, images: Tensor) -> Tensor:
        """Compute the label maps of a batch and select the classes of the dataset.

        Args:
            images: Stacked results of `preprocess`, uint8 `[B, ...]`.

        Returns:
            Logits of the C classes of the dataset, float32 `[B, C, H, W]`.
        """
        return self._select(self.annotator(images))

    def classify(self, images: Tensor) -> Tensor:
        """Compute the logits of whole images and select the classes of the dataset.

        Args:
            images: Stacked results of `preprocess`, uint8 `[B, ...]`.

        Returns:
            Logits of the C classes of the dataset, float32 `[B, C]`.
        """
        return self._select(classify(self.annotator, images))

    def maps(self, images: Tensor) -> list[Tensor]:
        """Compute the label maps of each input size and select the classes of the dataset.

        Args:
            images: Stacked results of `preprocess`, uint8 `[B, ...]`.

        Returns:
            Logits of the C classes of the dataset, float32 `[B, C, H, W]` for each map of the inner annotator.
        """
        return [self._select(logits) for logits in annotate_scales(self.annotator, images)]

    @torch.inference_mode()
    def _select(self, logits: Tensor) -> Tensor:
        self._rows = self._rows.to(logits.device)  # copied once
        return logits.index_select(1, self._rows)

    def describe(self) -> dict[str, Any]:
        """Describe everything that determines the maps.

        Returns:
            Description of the inner annotator with a hash of the rows, of which there may be thousands.
        """
        inner = self.annotator.describe()
        digest = hashlib.sha256(inner.get("rows_sha256", "").encode())  # the inner annotator may be a subset as well
        digest.update(self._rows.cpu().numpy().astype("<i8").tobytes())
        return {**inner, "num_classes": self.num_classes, "rows_sha256": digest.hexdigest()}


@torch.inference_mode()
def classify(annotator: Annotator, images: Tensor) -> Tensor:
    """Return an annotator's logits of whole images, float32 `[B, C]`.

    Args:
        annotator: Annotator. Its method `classify` computes the logits if it has one; otherwise they are the mean over its maps.
        images: Stacked results of `preprocess`, uint8 `[B, ...]`.
    """
    method: Callable[[Tensor], Tensor] | None = getattr(annotator, "classify", None)
    return annotator(images).mean((2, 3)) if method is None else method(images)


@torch.inference_mode()
def annotate_scales(annotator: Annotator, images: Tensor) -> list[Tensor]:
    """Return an annotator's label maps of each input size, float32 `[B, C, H, W]` each.

    Args:
        annotator: Annotator. Its method `maps` computes them if it has one, as an `Ensemble` does; otherwise there is one map.
        images: Stacked results of `preprocess`, uint8 `[B, ...]`.
    """
    method: Callable[[Tensor], list[Tensor]] | None = getattr(annotator, "maps", None)
    return [annotator(images)] if method is None else method(images)


def check_size(size: int | Sequence[int]) -> tuple[int, int]:
    """Check an input size.

    Args:
        size: Side, or (height, width), in pixels.

    Returns:
        (height, width) in pixels.

    Raises:
        ValueError: The size is not one or two positive ints.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"input_size must be a positive int or two positive ints (height, width), got {size}")
    return sides[0], sides[1]


def hash_weights(module: nn.Module) -> str:
    """Hash the names, dtypes, shapes and values of a module's state dict.

    Args:
        module: Network.

    Returns:
        SHA-256 in hexadecimal digits.
    """
    digest = hashlib.sha256()
    state: Mapping[str, Tensor] = module.state_dict()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(values.numpy().data)
    return digest.hexdigest()


def _describe_value(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
