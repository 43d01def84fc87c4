"""Annotators: what gives dense logits for images, and one made of any torch module.

Shapes: B images of h x w pixels, C classes, H x W locations of the map.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from ..devices import find_device

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Annotator(Protocol):
    """A classifier that gives dense logits `[B, C, H, W]` for images squashed to its input size."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names, or WordNet synsets, of the C classes in the order of the logits; None if unknown."""

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""

    def preprocess(self, image: PIL.Image.Image) -> Tensor:
        """Return an RGB image as uint8 `[3, h, w]`, all of it squashed to the input size. Called from many threads.

        What an `Ensemble` returns is one tensor, too, but holds the image in the sizes of all its annotators.
        """

    def __call__(self, images: Tensor) -> Tensor:
        """Return float32 logits `[B, C, H, W]`, on the annotator's device, of a batch of what `preprocess` returned."""

    def describe(self) -> dict[str, Any]:
        """Return what decides the maps, as JSON values: equal for annotators that give equal maps. One is `name`."""


class ModuleAnnotator:
    """Annotator of any torch module that gives `[B, C, H, W]` class logits for normalised images `[B, 3, h, w]`.

    Args:
        module: the network. It is moved to `device` and put in evaluation mode.
        input_size: (height, width) in pixels that images are squashed to, or an int for both.
        classes: names of the C classes in the order of the logits.
        mean: of each channel of RGB, in 0 .. 1.
        std: of each channel of RGB, in 0 .. 1.
        interpolation: how images are resized: a name of `PIL.Image.Resampling` in small letters.
        dtype: `"float32"`, or `"float16"` or `"bfloat16"` to compute under autocast, faster on most accelerators.
            Logits of float16 are the closer ones by a decimal place, those of bfloat16 cannot overflow.
        device: where to compute. Default: the current CUDA device, or the CPU where there is none.
        channels_last: hold images and weights in the order of memory that convolutions prefer; the maps are the same.
        compile: run the module through `torch.compile`, which takes a minute and, on the CPU, a C++ compiler. Logits
            may differ in their last bits, as between devices, so `describe` does not tell.
        name: what the manifest calls the module. Default: the name of its type.

    Attributes:
        num_classes: C.
        map_size: (H, W) of the maps.

    Raises:
        ValueError: an argument is out of range, the module's output is not `[B, C, H, W]` with C classes, or it cannot
            be compiled.

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
        compile: bool = False,  # noqa: A002  what torch and transformers call it
        name: str | None = None,
    ) -> None:
        self.input_size = check_size(input_size)
        if interpolation.upper() not in PIL.Image.Resampling.__members__:
            known = [member.lower() for member in PIL.Image.Resampling.__members__]
            raise ValueError(f"interpolation must be one of {known}, got {interpolation!r}")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {sorted(_DTYPES)}, got {dtype!r}")
        if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
            raise ValueError(f"mean and std must be three numbers each, and std positive, got {mean} and {std}")
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self.interpolation = interpolation.lower()
        self.dtype = dtype
        self.name = type(module).__name__ if name is None else name
        self._weights_sha256 = hash_weights(module)
        self.device = find_device(device)
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._module = module.to(self.device).to(memory_format=self._memory_format).eval().requires_grad_(False)
        self._mean = torch.tensor(self.mean, dtype=torch.float32, device=self.device)[:, None, None] * 255
        self._std = torch.tensor(self.std, dtype=torch.float32, device=self.device)[:, None, None] * 255
        try:
            logits = self._forward(torch.zeros(1, 3, *self.input_size, dtype=torch.uint8, device="cpu"))
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"{self.name} fails for images of {list(self.input_size)} pixels: {error!r}") from error
        self.num_classes = logits.shape[1]
        self.map_size = (logits.shape[2], logits.shape[3])
        if classes is not None and len(classes) != self.num_classes:
            raise ValueError(f"{self.name} gives logits of {self.num_classes} classes, but {len(classes)} are named")
        self.classes = None if classes is None else tuple(classes)
        if compile:
            self._compile()

    def _compile(self) -> None:
        self._module.compile()
        try:
            self._forward(torch.zeros(1, 3, *self.input_size, dtype=torch.uint8, device="cpu"))
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{self.name} cannot be compiled here: leave compile out, or see that torch.compile works (on the CPU "
                f"it takes a C++ compiler and Python's headers). {type(error).__name__}: {reason}"
            ) from error

    def preprocess(self, image: PIL.Image.Image) -> Tensor:
        """Return an RGB image as uint8 `[3, h, w]`, all of it squashed to the input size.

        Raises:
            ValueError: the image is not RGB.
        """
        if image.mode != "RGB":
            raise ValueError(f"the image must be RGB, got mode {image.mode!r}: convert it first")
        height, width = self.input_size
        resized = image.resize((width, height), PIL.Image.Resampling[self.interpolation.upper()])
        # NumPy, not torch, moves the channels: torch would start threads for it in every thread that decodes.
        return torch.from_numpy(np.ascontiguousarray(np.array(resized).transpose(2, 0, 1)))

    def __call__(self, images: Tensor) -> Tensor:
        """Return float32 logits `[B, C, H, W]`, on the annotator's device, of uint8 images `[B, 3, h, w]`.

        Raises:
            ValueError: `images` are not uint8 of the input size.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (3, *self.input_size):
            expected = f"uint8 [B, 3, {self.input_size[0]}, {self.input_size[1]}]"
            raise ValueError(f"images must be {expected}, as preprocess makes them, got {_describe_value(images)}")
        return self._forward(images)

    @torch.inference_mode()
    def _forward(self, images: Tensor) -> Tensor:
        normalised = (images.to(self.device, non_blocking=True).float() - self._mean) / self._std
        autocast = torch.autocast(self.device.type, _DTYPES[self.dtype], enabled=self.dtype != "float32")
        with autocast:  # not weights in `dtype`: norms and their statistics stay in float32, and logits a third closer
            logits: object = self._module(normalised.contiguous(memory_format=self._memory_format))
        if not isinstance(logits, Tensor) or logits.ndim != 4 or len(logits) != len(images) or 0 in logits.shape:
            raise ValueError(
                f"{self.name} must give logits [B, C, H, W], one for each class at each location, for images "
                f"{list(normalised.shape)}, got {_describe_value(logits)}"
            )
        return logits.float()

    def describe(self) -> dict[str, Any]:
        """Return what decides the maps, as JSON values: equal for annotators that give equal maps.

        The weights are known by the SHA-256 of their state dict, wherever they came from.
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
    """Annotator that gives some classes of another, in any order: its maps are over the dataset's own classes.

    Args:
        annotator: gives logits of all its classes.
        rows: for each class of the dataset, which class of `annotator` it is; `match_classes` finds them.
        classes: names of the dataset's classes.

    Raises:
        ValueError: there is not one row for each class, or a row is out of range.
    """

    def __init__(self, annotator: Annotator, rows: Sequence[int], classes: Sequence[str]) -> None:
        if len(rows) != len(classes):
            raise ValueError(f"there must be one row for each class, got {len(rows)} rows and {len(classes)} classes")
        outside = [row for row in rows if not 0 <= row < annotator.num_classes]
        if outside:
            raise ValueError(f"rows must be in 0 .. {annotator.num_classes - 1}, got {outside[:5]}")
        self.annotator = annotator
        self.classes = tuple(classes)
        self.num_classes = len(classes)
        self._rows = torch.tensor(rows, dtype=torch.long, device="cpu")

    def preprocess(self, image: PIL.Image.Image) -> Tensor:
        """Return what the inner annotator takes."""
        return self.annotator.preprocess(image)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Return float32 logits `[B, C, H, W]` of the dataset's C classes."""
        logits = self.annotator(images)
        self._rows = self._rows.to(logits.device)  # once
        return logits.index_select(1, self._rows)

    def describe(self) -> dict[str, Any]:
        """Return what the inner annotator says, and the rows as a hash, since there may be thousands."""
        inner = self.annotator.describe()
        digest = hashlib.sha256(inner.get("rows_sha256", "").encode())  # the inner one may be a subset, too
        digest.update(self._rows.cpu().numpy().astype("<i8").tobytes())
        return {**inner, "num_classes": self.num_classes, "rows_sha256": digest.hexdigest()}


def check_size(size: int | Sequence[int]) -> tuple[int, int]:
    """Return an input size as (height, width).

    Raises:
        ValueError: it is not a positive int or two of them.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"input_size must be a positive int or two of them (height, width), got {size}")
    return sides[0], sides[1]


def hash_weights(module: nn.Module) -> str:
    """Return the SHA-256 of a module's state dict: of its names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    state: Mapping[str, Tensor] = module.state_dict()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(values.numpy().data)
    return digest.hexdigest()


def _describe_value(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
