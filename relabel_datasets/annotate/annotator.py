"""Annotator protocol, and an annotator that wraps any torch module.

Shapes: B images of h x w pixels, C classes, H x W locations of the map.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from ..devices import find_device
from ..labels.precision import autocast
from .cast_weights import cast_weights
from .compiled import CompiledForward

logger = logging.getLogger(__name__)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MIN_COMPILED = 100_000  # forward passes from which on compiling, which takes about a minute, is worth it
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
            images: Stacked results of `preprocess`, uint8 `[B, ...]`. A build overwrites them after the batch.

        Returns:
            Logits on the annotator's device, float32 `[B, C, H, W]`, in memory of their own.
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
            accelerators. float16 logits are more precise by one decimal place; bfloat16 logits cannot overflow. Weights that autocast
            would cast in every forward pass are cast once, in a copy of the module; norms stay in float32. Default: `"float32"`.
        device: Device of the forward pass. Default: the current CUDA device if available, else the CPU.
        channels_last: Whether to keep images and weights in the memory format that convolutions prefer. The maps are the same.
            Default: True.
        compile: Whether to compile the forward pass with `torch.compile`, for batches of one size: that of a build, or of the first call.
            Other batches run uncompiled. It takes about a minute and, on the CPU, a C++ compiler. On a GPU, the compiled pass is
            captured as a CUDA graph. Logits may differ in their last bits, as they do between devices, so `describe` does not include
            it, but builds record it. Default: None, on a GPU in builds of at least 100,000 forward passes, where a module that cannot
            be compiled runs uncompiled with a warning.
        name: Name of the annotator in the manifest. Default: name of the module's type.

    Attributes:
        num_classes: Number C of classes.
        map_size: (H, W) of the maps.

    Raises:
        ValueError: An argument is out of range, or the output of the module is not `[B, C, H, W]` with C classes.

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
        compile: bool | None = None,  # noqa: A002  name used by torch and transformers
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
        self._compile: bool | None = False  # the first forward passes determine the layout of the features
        self._compiled: dict[bool, CompiledForward] = {}  # at most one, by whether it is `classify`
        self.set_normalization(mean, std)
        try:
            logits = self._forward(torch.zeros(1, 3, *self.input_size, dtype=torch.uint8, device="cpu"))
            if dtype != "float32":
                self._module = cast_weights(self._module, _DTYPES[dtype], self._probe)
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
        self._compile = compile

    def set_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set the mean and the standard deviation of each RGB channel, in 0 .. 1."""
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self._mean = torch.tensor(self.mean, dtype=torch.float32, device=self.device)[:, None, None] * 255
        self._std = torch.tensor(self.std, dtype=torch.float32, device=self.device)[:, None, None] * 255

    @property
    def compiled(self) -> bool:
        """Whether the batches that the annotator was prepared for run compiled."""
        return bool(self._compiled)

    def prepare(self, batch_size: int, num_images: int, *, classify: bool = False) -> None:
        """Compile the forward pass for batches of one size, if `compile` allows it. No other batches run compiled afterwards.

        Args:
            batch_size: Number of images per batch.
            num_images: Number of images that will be annotated, which decides whether compiling is worth it by default.
            classify: Whether to compile `classify` instead of the label maps. Default: False.

        Raises:
            ValueError: The module cannot be compiled, or its compiled logits are wrong, and `compile` is True.
        """
        is_default = self._compile is None and self.device.type == "cuda" and num_images >= MIN_COMPILED
        is_wanted, shape = self._compile or is_default, (batch_size, 3, *self.input_size)
        if is_wanted and classify in self._compiled and self._compiled[classify].shape == shape:
            return
        self._compiled = {}  # first, since a graph keeps memory of the GPU
        if not is_wanted:
            return
        function, dtype = self._function(classify), _DTYPES[self.dtype]
        try:
            with torch.inference_mode(), autocast(self.device, dtype):
                forward = CompiledForward(lambda pixels: self._logits(function, pixels), shape, self.device, dtype)
            self._compiled = {classify: forward}
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if self._compile:
                raise ValueError(
                    f"{self.name} cannot be compiled here: leave out compile=. On the CPU, torch.compile needs a C++ compiler and Python's "
                    f"headers. {reason}"
                ) from error
            self._compile = False
            logger.warning("%s runs uncompiled, which is slower: torch.compile failed. %s", self.name, reason)

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Run uncompiled in this context, in which the module or its normalization may be changed."""
        before = self._compile, self._compiled
        self._compile, self._compiled = False, {}
        try:
            yield
        finally:
            self._compile, self._compiled = before

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
        if not hasattr(self._module, "classify"):
            return self(images).mean((2, 3))
        self._check_images(images)
        logits: Tensor = self._apply(images, classify=True)
        return logits

    def _check_images(self, images: Tensor) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (3, *self.input_size):
            expected = f"uint8 [B, 3, {self.input_size[0]}, {self.input_size[1]}]"
            raise ValueError(f"images must be {expected}, as returned by preprocess, got {_describe_value(images)}")

    def _forward(self, images: Tensor) -> Tensor:
        logits: object = self._apply(images)
        if not isinstance(logits, Tensor) or logits.ndim != 4 or len(logits) != len(images) or 0 in logits.shape:
            raise ValueError(
                f"{self.name} must return logits [B, C, H, W], one per class and location, for images "
                f"{list(images.shape)}, got {_describe_value(logits)}"
            )
        return logits

    def _function(self, classify: bool) -> Callable[[Tensor], Any]:
        function: Any = self._module.classify if classify else self._module
        return cast(Callable[[Tensor], Any], function)

    @torch.inference_mode()
    def _apply(self, images: Tensor, *, classify: bool = False) -> Any:
        """Return what the module returns for images, logits in float32."""
        if self._compile and not self._compiled:
            self.prepare(len(images), len(images), classify=classify)
        compiled = self._compiled.get(classify)
        with autocast(self.device, _DTYPES[self.dtype]):
            if compiled is not None and images.shape == compiled.shape:
                return compiled(images)
            return self._logits(self._function(classify), images.to(self.device, non_blocking=True))

    def _logits(self, function: Callable[[Tensor], Any], pixels: Tensor) -> Any:
        normalized = (pixels.float() - self._mean) / self._std
        logits = function(normalized.contiguous(memory_format=self._memory_format))
        return logits.float() if isinstance(logits, Tensor) else logits

    @torch.no_grad()  # in inference mode, operations are not split into those that autocast adds
    def _probe(self, module: nn.Module, seed: int) -> Tensor:
        """Return all logits of a module for a noise image of a seed, as one vector."""
        noise = torch.randn(1, 3, *self.input_size, generator=torch.Generator().manual_seed(seed), device="cpu")
        images = noise.to(self.device).contiguous(memory_format=self._memory_format)
        functions: list[Any] = [module, *([module.classify] if hasattr(module, "classify") else [])]
        with autocast(self.device, _DTYPES[self.dtype]):
            return torch.cat([function(images).float().flatten() for function in functions])

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


def prepare(annotator: Annotator, batch_size: int, num_images: int, *, classify: bool = False) -> None:
    """Prepare an annotator, and the annotators that it wraps, for batches of one size, see `ModuleAnnotator.prepare`."""
    for inner in wrapped(annotator):
        prepare(inner, batch_size, num_images, classify=classify)
    if isinstance(annotator, ModuleAnnotator):
        annotator.prepare(batch_size, num_images, classify=classify and hasattr(annotator._module, "classify"))


def wrapped(annotator: object) -> tuple[Any, ...]:
    """Return the annotators that an ensemble, a flip average or a class subset wraps, and none for others."""
    inner = getattr(annotator, "annotator", None)
    return getattr(annotator, "annotators", None) or (() if inner is None else (inner,))


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
