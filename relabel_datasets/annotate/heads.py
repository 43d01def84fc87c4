"""A classifier's own head, applied to its features at every location: what makes a dense annotator of it.

Features are what the head takes: one tensor, or several (*streams*), each laid out in its own way. Shapes: B images,
C classes, H x W locations of the map, D features at each (of all streams), N rows of locations, P prefix tokens (class,
distillation, registers), L tokens in all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .resample import resample_area

HEADS = ("local", "linearised")
Features = Tensor | Sequence[Tensor]

_ROWS = 8192  # locations that go through the head at once: 180 MB for the widest features, 5504 floats
_LINEAR = (
    1e-2  # of the spread: a linear head differs by rounding (1e-7 in float32, 1e-3 in TF32), others by 0.2 and more
)


@dataclass(frozen=True)
class Stream:
    """How one tensor of features lies in the image.

    Args:
        layout: `"NCHW"` or `"NHWC"` for maps, `"NLC"` or `"NCL"` for tokens.
        grid: (height, width) of the map. None if there is no map, as for the states of EfficientViM: their mean then
            stands at every location.
        num_prefix_tokens: P, of `"NLC"`.
    """

    layout: str
    grid: tuple[int, int] | None
    num_prefix_tokens: int = 0

    def __post_init__(self) -> None:
        if self.layout not in ("NCHW", "NHWC", "NLC", "NCL"):
            raise ValueError(f"layout must be NCHW, NHWC, NLC or NCL, got {self.layout!r}")

    def map(self, features: Tensor) -> Tensor:
        """Return `[B, D, H, W]`, without prefix tokens; `[B, D, 1, 1]` where there is no map."""
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

        The location stands for the prefix tokens, too: whichever tokens a head pools, it pools this one.
        """
        return self.spread(rows, (1 + self.num_prefix_tokens,) if self.layout in ("NLC", "NCL") else (1, 1))

    def condense(self, features: Tensor) -> Tensor:
        """Return the features of images of one location: the mean, and the prefix tokens as they are."""
        mean = self.spread(self.mean(features), (1,) * len(self.places(features)))
        prefix = features[:, : self.num_prefix_tokens] if self.layout == "NLC" else None
        return mean if prefix is None else torch.cat([prefix, mean], dim=1)

    def mean(self, features: Tensor) -> Tensor:
        """Return `[B, D]`, the mean over all but the prefix tokens."""
        if self.layout in ("NLC", "NHWC"):
            return features.flatten(1, -2)[:, self.num_prefix_tokens :].mean(1)
        return features.flatten(2).mean(2)

    def places(self, features: Tensor) -> tuple[int, ...]:
        """Return the axes of `features` other than batch and channels: (height, width) or (L,)."""
        return tuple(features.shape[1:-1] if self.layout in ("NHWC", "NLC") else features.shape[2:])

    def spread(self, rows: Tensor, places: tuple[int, ...]) -> Tensor:
        """Return rows `[N, D]` as features that are the same at all places."""
        batch, dim = rows.shape
        ones = (1,) * len(places)
        if self.layout in ("NHWC", "NLC"):
            return rows.reshape(batch, *ones, dim).expand(batch, *places, dim)
        return rows.reshape(batch, dim, *ones).expand(batch, dim, *places)


class DenseClassifier(nn.Module):
    """Module that gives a classifier's logits at every location: `[B, 3, h, w]` -> `[B, C, H, W]`.

    It is for images of one size: what the first forward pass finds out about the features holds for all.

    Streams of several grids are brought to the coarsest by `resample_area`.

    Args:
        model: the classifier, whose parameters these are.
        name: of the model, for messages.
        body: images -> features.
        head: features -> logits `[B, C]`.
        find_streams: (images, features) -> a `Stream` for each tensor of the features. It raises a ValueError with the
            reason where they are no map.
        mode: `"local"` or `"linearised"`, see `TimmAnnotator`.

    Attributes:
        linear_head: whether the mean over a local map equals the model's own logits. Known after the first forward.
        streams: of the features. Empty before the first forward.
        grid: (H, W).
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
        self._several = False  # streams, in a list
        self._condensable = False  # the head pools a location and the prefix tokens as it pools all of them

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `[B, C, H, W]` of normalised images.

        Raises:
            ValueError: the model gives no map of features, or its head does not pool them.
        """
        tensors = self._features(images)
        # Where the head is linear both maps are the same, and the local one is cheaper.
        return self._linearised(tensors) if self.mode == "linearised" and not self.linear_head else self._local(tensors)

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the model's own logits `[B, C]` and local ones `[B, C, H, W]` of the same features; both have gradients."""
        tensors = self._features(images)
        return self._head(tensors), self._local(tensors)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the part before the head, which is nearly all of the work."""
        self._body = torch.compile(self._body, *args, **kwargs)

    def _features(self, images: Tensor) -> list[Tensor]:
        features = self._body(images)
        if not self.streams:
            self._learn_layout(images, features)
        return [features] if isinstance(features, Tensor) else list(features)

    def _learn_layout(self, images: Tensor, features: Features) -> None:
        self._several = not isinstance(features, Tensor)
        tensors = [features] if isinstance(features, Tensor) else list(features)
        streams = tuple(self._find_streams(images, features))
        grids = [stream.grid for stream in streams if stream.grid is not None]
        if len(streams) != len(tensors) or not grids:
            raise ValueError(f"{self.name} cannot annotate: its features are no map of locations")
        self.grid = min(grids, key=lambda grid: grid[0] * grid[1])
        self.streams = streams
        try:
            self._probe_head(tensors)
        except BaseException:
            self.streams = ()  # not half learnt
            raise

    @torch.inference_mode()
    def _probe_head(self, tensors: Sequence[Tensor]) -> None:
        """Find out whether the head is linear, and whether it can be condensed, by random features."""
        generator = torch.Generator().manual_seed(0)
        noise = [torch.randn(tensor[:1].shape, generator=generator).to(tensor.device) for tensor in tensors]
        dense, own = self._local(noise).float(), self._head(noise).float()
        mean = dense.mean((2, 3))
        spread = (dense - mean[:, :, None, None]).abs().max()
        self.linear_head = bool((mean - own).abs().max() <= _LINEAR * spread)
        if self.mode == "linearised" and not self.linear_head:
            _load_derivatives()
            condensed = self._head([s.condense(t) for s, t in zip(self.streams, noise, strict=True)])
            self._condensable = bool((condensed - own).abs().max() <= _LINEAR * spread)

    def _local(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return `[B, C, H, W]` logits: the head applied to the features of every location."""
        rows = self._rows(tensors)
        batch, height, width, dim = rows.shape
        # Where features are channels last this is a view, not a copy.
        parts = torch.split(rows.reshape(-1, dim), _ROWS)
        dims = self._dims(tensors)
        logits = torch.cat([self._head(self._one_location(part, dims)) for part in parts])
        return logits.view(batch, height, width, -1).permute(0, 3, 1, 2)

    def _linearised(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return `[B, C, H, W]` logits whose mean is the model's own: these, plus their change with each location.

        The change is the derivative of the model's own logits as all features (of locations and prefix tokens alike)
        move by how much those of the location differ from the mean over locations.
        """
        with _forward_mode(tensors[0].device):
            tensors = [tensor.float().clone() for tensor in tensors]  # inference tensors have no derivatives
            own = self._head(tensors)
            rows = self._rows(tensors)
            batch, height, width, dim = rows.shape
            changes = (rows - rows.mean((1, 2), keepdim=True)).reshape(-1, dim)
            pairs = zip(self.streams, tensors, strict=True)
            at = [stream.condense(tensor) for stream, tensor in pairs] if self._condensable else tensors
            size = max(1, _ROWS * dim // sum(tensor[0].numel() for tensor in at))  # as much memory as _ROWS locations
            image = torch.arange(batch, device=own.device).repeat_interleave(height * width)
            dims = self._dims(tensors)
            parts = [
                self._derivative([tensor[which] for tensor in at], torch.split(part, dims, dim=1))
                for part, which in zip(torch.split(changes, size), torch.split(image, size), strict=True)
            ]
            return (own[image] + torch.cat(parts)).view(batch, height, width, -1).permute(0, 3, 1, 2)

    def _derivative(self, at: Sequence[Tensor], changes: Sequence[Tensor]) -> Tensor:
        """Return `[N, C]`: the change of the logits of N images' features as they move by `changes`, `[N, D]` each."""
        tangents = tuple(
            stream.spread(change, stream.places(tensor)).contiguous()
            for stream, tensor, change in zip(self.streams, at, changes, strict=True)
        )
        change = torch.func.jvp(lambda *features: self._head(features), tuple(at), tangents)[1]
        assert isinstance(change, Tensor)
        return change

    def _rows(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return `[B, H, W, D]`, all streams side by side."""
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
        """Return `[B, C]`, the model's own logits of features."""
        logits = self._own_head(list(tensors) if self._several else tensors[0])
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise ValueError(f"{self.name} cannot annotate: its head does not pool features, see global_pool")
        return logits


def _load_derivatives() -> None:
    """Take some derivative: the first one makes torch load its rules, for which it warns of its own code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
        with _forward_mode(torch.device("cpu")):
            torch.func.jvp(torch.square, (torch.ones(()),), (torch.ones(()),))


@contextmanager
def _forward_mode(device: torch.device) -> Iterator[None]:
    """Let forward-mode derivatives be taken, in float32, within inference_mode and autocast."""
    # Fused attention has no forward-mode derivative; this concerns heads that pool by attention.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        sdpa_kernel(SDPBackend.MATH),
    ):
        yield
