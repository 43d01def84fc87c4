"""Annotators from timm: any of its classifiers that keeps a map of features up to its head.

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
    """Annotator of a timm classifier, whose own head is applied to its features at every location.

    Where the head is linear (average pooling, then a linear layer) the mean over the map equals the model's own logits,
    and the map is what the paper's 1x1 convolution gives. Other heads (a class token, a norm or an activation after
    pooling) make the map an approximation, see `linear_head`, of one of two kinds:

    - `"local"`: the head's output for each location, as if the whole image had its features. A location stands for
      class and distillation tokens, too. The mean over the map is not the model's own output.
    - `"linearised"`: `head(pool) + J (f(x) - mean of f)` at location x, where f are the features, `head(pool)` the
      model's own logits of the image, and J their derivative as all features move together. So the mean over the map
      is the model's own logits, but for rounding. With average pooling J is the head's Jacobian at the mean feature,
      with a class token at the class token (which moves by what the location differs by from the mean of the patch
      tokens), with two tokens the mean of both heads'. It costs two to three times the head, in float32.

    Features at several scales (CoaT, CrossViT) are brought to the coarsest by area, which keeps their means. Those that
    are nowhere (the states of EfficientViM) count the same at every location.

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
        compile: run all but the head through `torch.compile`, as for `ModuleAnnotator`.
        head: `"local"` or `"linearised"`: what a map is where the head is not linear; else both are the same.
        classes: names of the C classes. Default: ImageNet's synsets where the model's config is for ImageNet's number
            of classes, else unknown. Give them for a model that was trained on other classes.
        **model_kwargs: of `timm.create_model`, such as `num_classes` or `pad_type="same"`. Plain values, since they are
            recorded. `img_size` is the size that the weights are made for, where they are made for one.

    Attributes:
        linear_head: whether the mean over a local map equals the model's own logits: it is exact, not approximate.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the checkpoint does not fit the model, the model has no map of features, no classifier, or cannot
            take the input size.
        TypeError: `model_kwargs` are not plain values.

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
        compile: bool = False,  # noqa: A002  see ModuleAnnotator
        head: str = "local",
        classes: Sequence[str] | None = None,
        **model_kwargs: Any,
    ) -> None:
        from timm.data.config import resolve_model_data_config  # timm takes seconds to import

        device = find_device(device)  # before a download
        if head not in HEADS:
            raise ValueError(f"head must be one of {list(HEADS)}, got {head!r}")
        try:
            self.model_kwargs: dict[str, Any] = json.loads(json.dumps(model_kwargs))
        except TypeError as error:
            raise TypeError(f"model_args are recorded, so they must be plain values: {error}") from error
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
        """Return what decides the maps, as JSON values; `linear_head` says whether local ones are exact."""
        own = {"kind": "timm", "model_args": self.model_kwargs, "head": self.head, "linear_head": self.linear_head}
        return {**super().describe(), **own, "license": self.license}
