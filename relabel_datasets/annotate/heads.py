"""Dense classification: apply the head of a classifier to its features at every location.

Features are the input of the head: one tensor, or several (*streams*), each with its own layout. Shapes: B images,
C classes, H x W locations of the map, D features per location (of all streams), N rows (locations), P prefix tokens (class,
distillation, registers), L tokens including prefix tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..labels.eager import eagerly
from ..labels.precision import full_precision
from ..labels.resample import resample_area

HEADS = ("local", "linearised")
Features = Tensor | Sequence[Tensor]

_MAX_ROWS = 8192  # locations per call of the head: 180 MB for the widest features, 5504 floats
# Relative to the spread. Linear heads differ by rounding (1e-7 in float32, 1e-3 in TF32), other heads by 0.2 or more.
_LINEAR_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Stream:
    """Layout of one feature tensor.

    Attributes:
        layout: `"NCHW"` or `"NHWC"` for maps, `"NLC"` or `"NCL"` for tokens.
        grid: (height, width) of the map. None for features without positions, such as the states of EfficientViM: their mean
            is used at every location.
        num_prefix_tokens: Number P of prefix tokens of `"NLC"`. Default: 0.
    """

    layout: str
    grid: tuple[int, int] | None
    num_prefix_tokens: int = 0

    def __post_init__(self) -> None:
        if self.layout not in ("NCHW", "NHWC", "NLC", "NCL"):
            raise ValueError(f"layout must be NCHW, NHWC, NLC or NCL, got {self.layout!r}")

    def map(self, features: Tensor) -> Tensor:
        """Return the features without prefix tokens as a map `[B, D, H, W]`, or `[B, D, 1, 1]` if they have no positions."""
        if self.layout == "NHWC":
            channels_first = features.permute(0, 3, 1, 2)
        elif self.layout == "NLC":
            channels_first = features[:, self.num_prefix_tokens :].transpose(1, 2)
        else:
            channels_first = features
        if self.grid is None:
            return self.mean(features)[:, :, None, None]
        return channels_first.reshape(*channels_first.shape[:2], *self.grid)

    def one_location(self, rows: Tensor) -> Tensor:
        """Return rows `[N, D]` as the features of N images of one location.

        The prefix tokens are copies of the location, so that a head pools this location whichever tokens it pools.
        """
        return self.spread(rows, (1 + self.num_prefix_tokens,) if self.layout in ("NLC", "NCL") else (1, 1))

    def condense(self, features: Tensor) -> Tensor:
        """Replace all locations by one location with their mean, and keep the prefix tokens."""
        mean = self.spread(self.mean(features), (1,) * len(self.spatial_shape(features)))
        prefix = features[:, : self.num_prefix_tokens] if self.layout == "NLC" else None
        return mean if prefix is None else torch.cat([prefix, mean], dim=1)

    def mean(self, features: Tensor) -> Tensor:
        """Return the mean over all locations, without prefix tokens, `[B, D]`."""
        if self.layout in ("NLC", "NHWC"):
            return features.flatten(1, -2)[:, self.num_prefix_tokens :].mean(1)
        return features.flatten(2).mean(2)

    def spatial_shape(self, features: Tensor) -> tuple[int, ...]:
        """Return the sizes of the axes other than batch and channels: (height, width) or (L,)."""
        return tuple(features.shape[1:-1] if self.layout in ("NHWC", "NLC") else features.shape[2:])

    def spread(self, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return rows `[N, D]` as features of a spatial shape that are the same at all locations."""
        batch, dim = rows.shape
        ones = (1,) * len(shape)
        if self.layout in ("NHWC", "NLC"):
            return rows.reshape(batch, *ones, dim).expand(batch, *shape, dim)
        return rows.reshape(batch, dim, *ones).expand(batch, dim, *shape)


class DenseClassifier(nn.Module):
    """Module that computes the logits of a classifier at every location: `[B, 3, h, w]` -> `[B, C, H, W]`.

    All images must have the same size, because the layout of the features is determined in the first forward pass.

    Streams of different grids are resampled to the coarsest grid by `resample_area`.

    Args:
        model: Classifier that owns the parameters.
        name: Name of the model in messages.
        body: Function from images to features.
        head: Function from features to logits `[B, C]`.
        find_streams: Function from images and features to one `Stream` per feature tensor. It raises a ValueError with the
            reason if the features are not a map.
        mode: `"local"` or `"linearised"`, see `TimmAnnotator`. Default: `"local"`.

    Attributes:
        linear_head: Whether the mean over a local map equals the logits of the model. Valid after the first forward pass.
        streams: Layouts of the feature tensors. Empty before the first forward pass.
        grid: (H, W) of the map.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        body: Callable[[Tensor], Features],
        head: Callable[..., Tensor],
        find_streams: Callable[[Tensor, Features], Sequence[Stream]],
        mode: str = "local",
    ) -> None:
        super().__init__()
        if mode not in HEADS:
            raise ValueError(f"head must be one of {list(HEADS)}, got {mode!r}")
        self.model = model
        self.name = name
        self.mode = mode
        self.linear_head = False
        self.streams: tuple[Stream, ...] = ()
        self.grid = (0, 0)
        self._body, self._own_head, self._find_streams = body, head, find_streams
        self._is_list = False  # features are a list of tensors
        self._condensable = False  # the logits of condensed features are those of the features

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits at every location.

        Args:
            images: Normalized images, `[B, 3, h, w]`.

        Returns:
            Logits, `[B, C, H, W]`.

        Raises:
            ValueError: The features of the model are not a map, or its head does not pool them.
        """
        tensors = self._features(images)
        # Both maps of a linear head are the same, and the local one is cheaper.
        return self._linearized(tensors) if self.mode == "linearised" and not self.linear_head else self._local(tensors)

    def classify(self, images: Tensor) -> Tensor:
        """Compute the logits of the model.

        Args:
            images: Normalized images, `[B, 3, h, w]`.

        Returns:
            Logits, `[B, C]`.
        """
        return self._head(self._features(images))

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits of the model and the local logits in one differentiable forward pass.

        Args:
            images: Normalized images, `[B, 3, h, w]`.

        Returns:
            Logits of the model, `[B, C]`, and local logits, `[B, C, H, W]`.
        """
        tensors = self._features(images)
        return self._head(tensors), self._local(tensors)

    def _features(self, images: Tensor) -> list[Tensor]:
        features = self._body(images)
        if not self.streams:
            self._find_layout(images, features)
        return [features] if isinstance(features, Tensor) else list(features)

    def _find_layout(self, images: Tensor, features: Features) -> None:
        self._is_list = not isinstance(features, Tensor)
        tensors = [features] if isinstance(features, Tensor) else list(features)
        streams = tuple(self._find_streams(images, features))
        grids = [stream.grid for stream in streams if stream.grid is not None]
        if len(streams) != len(tensors) or not grids:
            raise ValueError(f"{self.name} cannot annotate: its features are not a map of locations")
        self.grid = min(grids, key=lambda grid: grid[0] * grid[1])
        self.streams = streams
        try:
            self._probe_head(tensors)
        except BaseException:
            self.streams = ()  # the next call must determine the layout again
            raise

    @torch.inference_mode()
    def _probe_head(self, tensors: Sequence[Tensor]) -> None:
        """Determine with random features whether the head is linear and whether features can be condensed."""
        generator = torch.Generator().manual_seed(0)
        noise = [torch.randn(tensor[:1].shape, generator=generator).to(tensor.device) for tensor in tensors]
        dense, global_logits = self._local(noise).float(), self._head(noise).float()
        mean = dense.mean((2, 3))
        spread = (dense - mean[:, :, None, None]).abs().max()
        self.linear_head = bool((mean - global_logits).abs().max() <= _LINEAR_TOLERANCE * spread)
        if self.mode == "linearised" and not self.linear_head:
            _load_derivatives()
            condensed = self._head([s.condense(t) for s, t in zip(self.streams, noise, strict=True)])
            self._condensable = bool((condensed - global_logits).abs().max() <= _LINEAR_TOLERANCE * spread)

    def _local(self, tensors: Sequence[Tensor]) -> Tensor:
        """Apply the head to the features of every location; return logits `[B, C, H, W]`."""
        rows = self._rows(tensors)
        batch, height, width, dim = rows.shape
        # A view, not a copy, for features in channels-last memory.
        parts = torch.split(rows.reshape(-1, dim), _MAX_ROWS)
        dims = self._dims(tensors)
        logits = torch.cat([self._head(self._one_location(part, dims)) for part in parts])
        return logits.view(batch, height, width, -1).permute(0, 3, 1, 2)

    @eagerly  # torch.compile does not trace forward-mode derivatives
    def _linearized(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return logits `[B, C, H, W]` whose mean over the map equals the logits of the model.

        The logits at a location are those of the model plus their directional derivative. The direction moves all features, of
        locations and prefix tokens alike, by the difference between the location and the mean over locations.
        """
        with _forward_mode(tensors[0].device):
            tensors = [tensor.float().clone() for tensor in tensors]  # inference tensors have no derivatives
            global_logits = self._head(tensors)
            rows = self._rows(tensors)
            batch, height, width, dim = rows.shape
            changes = (rows - rows.mean((1, 2), keepdim=True)).reshape(-1, dim)
            pairs = zip(self.streams, tensors, strict=True)
            points = [stream.condense(tensor) for stream, tensor in pairs] if self._condensable else tensors
            size = max(
                1, _MAX_ROWS * dim // sum(tensor[0].numel() for tensor in points)
            )  # memory of _MAX_ROWS locations
            image = torch.arange(batch, device=global_logits.device).repeat_interleave(height * width)
            dims = self._dims(tensors)
            parts = [
                self._derivative([tensor[indices] for tensor in points], torch.split(part, dims, dim=1))
                for part, indices in zip(torch.split(changes, size), torch.split(image, size), strict=True)
            ]
            return (global_logits[image] + torch.cat(parts)).view(batch, height, width, -1).permute(0, 3, 1, 2)

    def _derivative(self, points: Sequence[Tensor], changes: Sequence[Tensor]) -> Tensor:
        """Return the directional derivatives `[N, C]` of the logits at N points in the directions `changes`, `[N, D]` each."""
        tangents = tuple(
            stream.spread(change, stream.spatial_shape(tensor)).contiguous()
            for stream, tensor, change in zip(self.streams, points, changes, strict=True)
        )
        derivative = torch.func.jvp(lambda *features: self._head(features), tuple(points), tangents)[1]
        assert isinstance(derivative, Tensor)
        return derivative

    def _rows(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the features of all streams at each location, concatenated, `[B, H, W, D]`."""
        pairs = zip(self.streams, tensors, strict=True)
        maps = [resample_area(stream.map(tensor), self.grid).permute(0, 2, 3, 1) for stream, tensor in pairs]
        return maps[0] if len(maps) == 1 else torch.cat(maps, dim=-1)

    def _dims(self, tensors: Sequence[Tensor]) -> list[int]:
        pairs = zip(self.streams, tensors, strict=True)
        return [tensor.shape[-1 if stream.layout in ("NHWC", "NLC") else 1] for stream, tensor in pairs]

    def _one_location(self, rows: Tensor, dims: list[int]) -> list[Tensor]:
        return [
            stream.one_location(part) for stream, part in zip(self.streams, torch.split(rows, dims, dim=1), strict=True)
        ]

    def _head(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the logits of the model for features, `[B, C]`."""
        logits = self._own_head(list(tensors) if self._is_list else tensors[0])
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise ValueError(f"{self.name} cannot annotate: its head does not pool features, see global_pool")
        return logits


def _load_derivatives() -> None:
    """Load torch's derivative rules by a first derivative, and suppress the warning of torch about its own code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
        with _forward_mode(torch.device("cpu")):
            torch.func.jvp(torch.square, (torch.ones(()),), (torch.ones(()),))


@contextmanager
def _forward_mode(device: torch.device) -> Iterator[None]:
    """Enable forward-mode derivatives in float32 within inference_mode and autocast."""
    # Fused attention, used by heads with attention pooling, has no forward-mode derivative.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        full_precision(device),
        sdpa_kernel(SDPBackend.MATH),
    ):
        yield
