"""Annotators from timm: any of its classifiers that keeps a map of features up to its head.

Shapes: B images, C classes, H x W locations, D features at each, N = B * H * W, P prefix tokens (class, distillation,
registers).
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .annotator import ModuleAnnotator, check_size

logger = logging.getLogger(__name__)

_TimmModel = Any  # a nn.Module with attributes and methods that every timm model has

_ROWS = 8192  # locations that go through the head at once: 180 MB for the widest features, 5504 floats


class TimmAnnotator(ModuleAnnotator):
    """Annotator of a timm classifier, whose own head is applied to its features at every location.

    Where the head is linear (average pooling, then a linear layer) the mean over the map equals the model's own logits,
    and the map is what the paper's 1x1 convolution gives. Other heads (a class token, a norm or an activation after
    pooling) make the map an approximation: see `linear_head`.

    Args:
        name: of a timm model, such as `"mobilenetv2_100"`, `"resnet50.a1_in1k"` or `"hf-hub:timm/resnet50.a1_in1k"`.
        pretrained: load the weights that timm knows for the name.
        checkpoint: path of weights to load instead. It must fit the model exactly.
        input_size: (height, width) in pixels that images are squashed to, or an int. Default: the model's own.
        mean: of each channel of RGB, in 0 .. 1. Default: the model's own, as for `std` and `interpolation`.
        std: of each channel of RGB, in 0 .. 1.
        interpolation: a name of `PIL.Image.Resampling` in small letters.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`, as for `ModuleAnnotator`.
        device: where to compute. Default: the current CUDA device, or the CPU where there is none.
        channels_last: hold images and weights in the order of memory that convolutions prefer.
        classes: names of the C classes. Default: ImageNet's synsets where the model's config is for ImageNet's number
            of classes, else unknown. Give them for a model that was trained on other classes.
        **model_args: of `timm.create_model`, such as `num_classes` or `pad_type="same"`. Plain values, since they are
            recorded. `img_size` is the size that the weights are made for, where they are made for one.

    Attributes:
        linear_head: whether the mean over a map equals the model's own logits: the map is exact, not approximate.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the checkpoint does not fit the model, the model has no map of features, no classifier, or cannot
            take the input size.
        TypeError: `model_args` are not plain values.

    Example:
        >>> annotator = TimmAnnotator("tf_efficientnet_l2.ns_jft_in1k_475", pretrained=True, dtype="bfloat16")
        >>> annotator(annotator.preprocess(image)[None]).shape
        torch.Size([1, 1000, 15, 15])

    Reference: Yun et al., "Re-labeling ImageNet", 2021, section 3.1.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        checkpoint: str | Path | None = None,
        input_size: int | Sequence[int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str | None = None,
        dtype: str = "float32",
        device: str | torch.device | None = None,
        channels_last: bool = True,
        classes: Sequence[str] | None = None,
        **model_args: Any,
    ) -> None:
        from timm.data.config import resolve_model_data_config  # timm takes seconds to import

        try:
            self.model_args: dict[str, Any] = json.loads(json.dumps(model_args))
        except TypeError as error:
            raise TypeError(f"model_args are recorded, so they must be plain values: {error}") from error
        size = None if input_size is None else check_size(input_size)
        model, size = _create_model(name, pretrained, checkpoint, size, model_args)
        config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        dense = _DenseModel(model, name)
        super().__init__(
            dense,
            size,
            classes=_imagenet_classes(model) if classes is None else classes,
            mean=config["mean"] if mean is None else mean,
            std=config["std"] if std is None else std,
            interpolation=config["interpolation"] if interpolation is None else interpolation,
            dtype=dtype,
            device=device,
            channels_last=channels_last,
            name=name,
        )
        self.linear_head = dense.has_linear_head()

    def describe(self) -> dict[str, Any]:
        """Return what decides the maps, as JSON values; `linear_head` says whether they are exact or approximate."""
        described = super().describe()
        return {**described, "kind": "timm", "model_args": self.model_args, "linear_head": self.linear_head}


def _create_model(
    name: str,
    pretrained: bool,
    checkpoint: str | Path | None,
    input_size: tuple[int, int] | None,
    model_args: dict[str, Any],
) -> tuple[_TimmModel, tuple[int, int]]:
    """Return the model, with its weights, and the input size that it is now made for."""
    import timm

    if checkpoint is not None and not Path(checkpoint).is_file():
        raise FileNotFoundError(
            f"there is no checkpoint {str(checkpoint)!r} for {name}: check the path, or download it"
        )
    if pretrained and checkpoint is not None:
        raise ValueError(f"{name}: give pretrained=True or a checkpoint, not both")
    if not pretrained and checkpoint is None:
        logger.warning("%s has random weights: give pretrained=True or a checkpoint, unless this is a test", name)
    _check_name(name)
    model: _TimmModel = timm.create_model(name, pretrained=pretrained, **model_args)
    if model.num_classes < 1:
        raise ValueError(
            f"{name} has no classifier: choose weights that have one, or give num_classes and a checkpoint"
        )
    config = model.pretrained_cfg
    own_size = check_size(model_args.get("img_size") or config["input_size"][1:])
    fixed = config.get("fixed_input_size", False) and not model_args.get("dynamic_img_size", False)
    resize = fixed and input_size is not None and input_size != own_size
    if resize and not hasattr(model, "set_input_size"):
        # timm still fits its pretrained weights to the size, but a checkpoint must then have been made for it.
        try:
            model = timm.create_model(name, pretrained=pretrained, **{**model_args, "img_size": input_size})
        except (TypeError, AssertionError) as error:
            raise ValueError(f"{name} cannot take input_size={input_size}, only {own_size}: {error!r}") from error
        resize = False
    if checkpoint is not None:
        _load_checkpoint(model, name, Path(checkpoint), model_args)
    if resize:
        model.set_input_size(img_size=input_size)
    return model, input_size or own_size


def _check_name(name: str) -> None:
    import timm

    if ":" not in name and not timm.is_model(name):  # with a colon, it is of a model on the Hub or in a folder
        close = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=5)
        hint = f"close names are {close}" if close else "timm.list_models() lists them"
        raise ValueError(f"timm has no model {name!r}: {hint}")


def _load_checkpoint(model: _TimmModel, name: str, path: Path, model_args: dict[str, Any]) -> None:
    import timm.models

    try:
        timm.models.load_checkpoint(model, str(path))
    except (RuntimeError, ValueError, KeyError, AttributeError, EOFError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"checkpoint {str(path)!r} does not fit {name} with {model_args}: give the model_args it was made with "
            f"(num_classes, img_size, ...), or the right file. {reason[:500]}"
        ) from error


def _imagenet_classes(model: _TimmModel) -> tuple[str, ...] | None:
    """Return the synsets of a model whose head is as its config has it, and of the size of an ImageNet's."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model)
    if subset is None or model.num_classes != model.pretrained_cfg["num_classes"]:
        return None
    return tuple(ImageNetInfo(subset).label_names())  # type: ignore[no-untyped-call]


class _DenseModel(nn.Module):
    """A timm classifier that gives logits at every location: `[B, 3, h, w]` -> `[B, C, H, W]`.

    It is for images of one size: what the first forward pass finds out about the features holds for all.
    """

    def __init__(self, model: _TimmModel, name: str) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.format = getattr(model, "output_fmt", "NCHW")  # of features that are not tokens; those are "NLC"
        self.grid = (0, 0)  # (H, W) of tokens
        self.num_prefix_tokens = 0
        self.features_shape: torch.Size | None = None

    def forward(self, images: Tensor) -> Tensor:
        features: object = self.model.forward_features(images)
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            got = f"a {features.ndim}-D tensor" if isinstance(features, Tensor) else f"a {type(features).__name__}"
            raise ValueError(f"{self.name} cannot annotate: its features are {got}, not one map of locations")
        if self.features_shape is None and features.ndim == 3:
            self._find_grid(images, features.shape[1])
        self.features_shape = features.shape
        return self.dense_head(features)

    def _find_grid(self, images: Tensor, num_tokens: int) -> None:
        """Find how tokens lie in the image: as in the feature maps that the model gives when asked for maps."""
        if not hasattr(self.model, "forward_intermediates"):
            raise ValueError(f"{self.name} cannot annotate: it does not tell how its tokens lie in the image")
        (last,) = self.model.forward_intermediates(images, indices=1, output_fmt="NCHW", intermediates_only=True)
        height, width = last.shape[2:]
        num_prefix_tokens = num_tokens - height * width
        # VOLO has a class token without saying so.
        if num_prefix_tokens != getattr(self.model, "num_prefix_tokens", min(max(num_prefix_tokens, 0), 1)):
            raise ValueError(
                f"{self.name} cannot annotate: its features are {num_tokens} tokens, which are no map of {height} x "
                f"{width} locations"
            )
        self.format, self.grid, self.num_prefix_tokens = "NLC", (height, width), num_prefix_tokens

    def dense_head(self, features: Tensor) -> Tensor:
        """Return `[B, C, H, W]` logits: the model's own head applied to the features of every location."""
        locations = self._locations(features)
        batch, height, width, dim = locations.shape
        # Where features are channels last this is a view, not a copy.
        rows = torch.split(locations.reshape(-1, dim), _ROWS)
        logits = torch.cat([self._head(chunk) for chunk in rows])
        return logits.view(batch, height, width, -1).permute(0, 3, 1, 2)

    def _locations(self, features: Tensor) -> Tensor:
        """Return `[B, H, W, D]`."""
        if self.format == "NLC":
            return features[:, self.num_prefix_tokens :].reshape(len(features), *self.grid, -1)
        return features if self.format == "NHWC" else features.permute(0, 2, 3, 1)

    def _head(self, rows: Tensor) -> Tensor:
        """Return `[N, C]` logits of N locations `[N, D]`, each given to the head as an image of one location."""
        if self.format == "NLC":
            # The location stands for the prefix tokens, too: whichever tokens a head pools, it pools this one.
            images = rows[:, None].expand(-1, 1 + self.num_prefix_tokens, -1)
        else:
            images = rows[:, None, None] if self.format == "NHWC" else rows[:, :, None, None]
        logits: Tensor = self.model.forward_head(images)
        if logits.ndim != 2:
            raise ValueError(f"{self.name} cannot annotate: its head does not pool features, see global_pool")
        return logits

    @torch.inference_mode()
    def has_linear_head(self) -> bool:
        """Return whether the mean over the map equals the model's own logits, as found on random features."""
        assert self.features_shape is not None
        device = next(self.model.parameters()).device
        features = torch.randn(self.features_shape, generator=torch.Generator().manual_seed(0)).to(device)
        dense = self.dense_head(features)
        own: Tensor = self.model.forward_head(features)
        mean = dense.mean((2, 3))
        # A linear head differs by rounding (1e-7 of the spread in float32, 1e-3 in TF32), others by 0.2 and more.
        spread = (dense - mean[:, :, None, None]).abs().max()
        return bool((mean - own).abs().max() <= 1e-2 * spread)
