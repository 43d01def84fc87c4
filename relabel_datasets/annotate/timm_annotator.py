"""Annotators from timm: classifiers whose features before the head are a map.

Shapes: B images, C classes, H x W locations.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..devices import find_device
from .annotator import ModuleAnnotator, check_size
from .heads import HEADS
from .timm_models import create_model, imagenet_classes, make_dense


class TimmAnnotator(ModuleAnnotator):
    """Annotator that applies the head of a timm classifier to its features at every location.

    With a linear head (average pooling, then a linear layer) the mean over the map equals the logits of the model, and the
    map equals that of the 1x1 convolution in the paper. With other heads (a class token, a norm or an activation after
    pooling) the map is an approximation (`linear_head` is False) of one of two types:

    - `"local"`: Output of the head for each location, as if all locations had its features. Class and distillation tokens are
      replaced by the location as well. The mean over the map differs from the logits of the model.
    - `"linearised"`: `head(pool) + J (f(x) - mean of f)` at location x, where f are the features, `head(pool)` the logits of
      the model for the image, and J their derivative when all features move together. The mean over the map equals the logits
      of the model up to rounding. With average pooling, J is the Jacobian of the head at the mean feature. With a class token,
      it is the Jacobian at the class token, which moves by the difference between the location and the mean of the patch
      tokens. With two tokens, it is the mean over both heads. The cost is two to three times that of the head, in float32.

    Features of several scales (CoaT, CrossViT) are resampled to the coarsest by area, which preserves their means. Features
    without positions (the states of EfficientViM) are the same at every location.

    Args:
        name: Name of a timm model, such as `"mobilenetv2_100"`, `"resnet50.a1_in1k"` or `"hf-hub:timm/resnet50.a1_in1k"`.
        pretrained: Whether to load the pretrained weights of timm for this name. Default: False.
        checkpoint: File with weights to load instead. It must fit the model exactly. Default: none.
        input_size: (height, width) in pixels that images are squashed to, or an int for both. Default: that of the model.
        mean: Mean of each RGB channel, in 0 .. 1. Default: that of the model.
        std: Standard deviation of each RGB channel, in 0 .. 1. Default: that of the model.
        interpolation: Interpolation of the resize, the lowercase name of a `PIL.Image.Resampling`. Default: that of the model.
        dtype: Precision of the forward pass: `"float32"`, `"float16"` or `"bfloat16"`, see `ModuleAnnotator`. Default:
            `"float32"`.
        device: Device of the forward pass. Default: the current CUDA device if available, else the CPU.
        channels_last: Whether to keep images and weights in the memory format that convolutions prefer. Default: True.
        compile: Whether to compile the forward pass, see `ModuleAnnotator`. A linearised head is not compiled. Default: None, on a GPU in
            large builds.
        head: Type of the map, `"local"` or `"linearised"`. Both are the same for a linear head. Default: `"local"`.
        classes: Names of the C classes. Default: the synsets of ImageNet if the config of the model has its number of classes,
            else unknown. Required for a model that was trained on other classes.
        **model_kwargs: Arguments of `timm.create_model`, such as `num_classes` or `pad_type="same"`. The manifest stores them,
            so they must be JSON values. `img_size` is the size that the weights were trained for, if they require one.

    Attributes:
        linear_head: Whether the mean over a local map equals the logits of the model.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: The checkpoint does not fit the model, or the model has no feature map, no classifier, or does not support
            the input size.
        TypeError: `model_kwargs` are not JSON values.

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
        compile: bool | None = None,  # noqa: A002  see ModuleAnnotator
        head: str = "local",
        classes: Sequence[str] | None = None,
        **model_kwargs: Any,
    ) -> None:
        from timm.data.config import resolve_model_data_config  # slow import

        device = find_device(device)  # fail before a download
        if head not in HEADS:
            raise ValueError(f"head must be one of {list(HEADS)}, got {head!r}")
        try:
            self.model_kwargs: dict[str, Any] = json.loads(json.dumps(model_kwargs))
        except TypeError as error:
            raise TypeError(f"model_kwargs are stored in the manifest and must be JSON values: {error}") from error
        size = None if input_size is None else check_size(input_size)
        model, size = create_model(name, pretrained, checkpoint, size, model_kwargs)
        config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        dense = make_dense(model, name, head)
        super().__init__(
            dense,
            size,
            classes=imagenet_classes(model) if classes is None else classes,
            mean=config["mean"] if mean is None else mean,
            std=config["std"] if std is None else std,
            interpolation=config["interpolation"] if interpolation is None else interpolation,
            dtype=dtype,
            device=device,
            channels_last=channels_last,
            compile=compile,
            name=name,
        )
        self.head = head
        self.linear_head = dense.linear_head
        self.license = model.pretrained_cfg.get("license") if pretrained else None

    def describe(self) -> dict[str, Any]:
        """Describe everything that determines the maps.

        Returns:
            JSON values, including `head` and `linear_head`. Annotators that compute equal maps return equal descriptions.
        """
        own = {"kind": "timm", "model_args": self.model_kwargs, "head": self.head, "linear_head": self.linear_head}
        return {**super().describe(), **own, "license": self.license}
