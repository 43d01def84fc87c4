"""Annotators from Hugging Face transformers: image classifiers whose last hidden states are a map.

Shapes: B images, C classes, H x W locations, D features per location, L tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch
from torch import Tensor, nn

from ..devices import find_device
from ..extras import check_extra
from ..storage.hub_check import check_reachable
from ..storage.hub_errors import HubItem, explaining_hub_errors
from ..storage.redaction import redacted_cause
from .annotator import IMAGENET_MEAN, IMAGENET_STD, ModuleAnnotator, check_size
from .heads import HEADS, DenseClassifier, Features, Stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MAX_PREFIX_TOKENS = 16  # class, distillation and registers
_TOLERANCE = 1e-4  # relative to the largest logit; a wrong pooling differs by far more


class HFAnnotator(ModuleAnnotator):
    """Annotator that applies the head of a transformers image classifier at every location.

    The code of the model pools and classifies: its forward pass runs with the base model (everything before the pooling)
    replaced by the features of one location. This supports ResNet, RegNet, ConvNeXt, Swin, ViT, DeiT, BEiT, DINOv2, MobileNet,
    EfficientNet and other models that can be split in this way. Other models are refused with the reason.

    Args:
        name_or_path: Model on the Hub, or folder with `config.json`, `preprocessor_config.json` and weights.
        revision: Branch, tag or commit of the model on the Hub. Default: the main branch.
        input_size: (height, width) in pixels that images are squashed to, or an int for both. Default: that of the image
            processor.
        mean: Mean of each RGB channel, in 0 .. 1. Default: that of the image processor.
        std: Standard deviation of each RGB channel, in 0 .. 1. Default: that of the image processor.
        interpolation: Interpolation of the resize, the lowercase name of a `PIL.Image.Resampling`. Default: that of the image
            processor.
        dtype: Precision of the forward pass: `"float32"`, `"float16"` or `"bfloat16"`, see `ModuleAnnotator`. Default:
            `"float32"`.
        device: Device of the forward pass. Default: the current CUDA device if available, else the CPU.
        channels_last: Whether to keep images and weights in the memory format that convolutions prefer. Default: True.
        compile: Whether to compile the forward pass, see `ModuleAnnotator`. A linearised head is not compiled. Default: None, on a GPU in
            large builds.
        head: Type of the map, `"local"` or `"linearised"`, see `TimmAnnotator`. Default: `"local"`.
        classes: Names of the C classes. Default: the labels of the config, as synsets if they are the classes of ImageNet.

    Attributes:
        linear_head: Whether the mean over a local map equals the logits of the model.

    Raises:
        MissingExtraError: (an ImportError) transformers is not installed.
        ValueError: The model has no feature map, no trained classifier, or does not support the input size.
        OSError: The model does not exist or cannot be downloaded.

    Example:
        >>> annotator = HFAnnotator("microsoft/resnet-50")
        >>> annotator(annotator.preprocess(image)[None]).shape
        torch.Size([1, 1000, 7, 7])
    """

    def __init__(
        self,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
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
    ) -> None:
        device = find_device(device)  # fail before a download
        if head not in HEADS:
            raise ValueError(f"head must be one of {list(HEADS)}, got {head!r}")
        name = str(name_or_path)
        model = _load_model(name, revision)
        given = {"input_size": input_size, "mean": mean, "std": std, "interpolation": interpolation}
        inputs: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        if len(inputs) < len(given):
            inputs = {**_processor_inputs(name, revision), **inputs}
        split = _SplitModel(model, name, check_size(inputs["input_size"]))
        dense = DenseClassifier(model, name, split.body, split.head, split.find_streams, head)
        super().__init__(
            dense,
            **inputs,
            classes=_labels(model) if classes is None else classes,
            dtype=dtype,
            device=device,
            channels_last=channels_last,
            compile=compile,
            name=name.rstrip("/").rpartition("/")[2] if Path(name).is_dir() else name,
        )
        self.head = head
        self.linear_head = dense.linear_head

    def describe(self) -> dict[str, Any]:
        """Describe everything that determines the maps.

        Returns:
            JSON values, including `head` and `linear_head`. Annotators that compute equal maps return equal descriptions.
        """
        return {**super().describe(), "kind": "transformers", "head": self.head, "linear_head": self.linear_head}


class _SplitModel:
    """Classifier of transformers, split into its base model and its head."""

    def __init__(self, model: PreTrainedModel, name: str, size: tuple[int, int]) -> None:
        self.model = model
        self.name = name
        self.base = _base_model(model, name)
        self._config = getattr(self.base, "config", model.config)
        self._pool: Callable[[Tensor], Tensor | None] | None = None
        self._output_type: type | None = None
        # Position embeddings are resized only on request.
        fit = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters and not _is_size(
            self._config, size
        )
        self._arguments = {"interpolate_pos_encoding": True} if fit else {}

    def body(self, images: Tensor) -> Tensor:
        """Return the last hidden state of the base model."""
        outputs = self.base(images, **self._arguments)
        features: Tensor = outputs.last_hidden_state
        return features

    def head(self, features: Tensor) -> Tensor:
        """Return logits `[B, C]` of last hidden states."""
        assert self._pool is not None
        return self._classify(features, self._pool(features))

    def find_streams(self, images: Tensor, features: Features) -> list[Stream]:
        """Determine the layout of the last hidden state and how the model pools it."""
        # Noise instead of the black image of the first pass: all poolings of equal locations are the same.
        images = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images)
        outputs = self.base(images, output_hidden_states=True, **self._arguments)
        self._output_type = type(outputs)
        hidden = outputs.last_hidden_state
        stream = self._find_stream(images, hidden, getattr(outputs, "reshaped_hidden_states", None))
        expected = self.model(images, **self._arguments).logits
        if not expected.any():
            raise ValueError(f"{self.name} cannot annotate: its logits are zero for every image")
        for pool in _poolings(self.base, stream):
            try:
                logits = self._classify(hidden, pool(hidden))
            except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError):
                continue  # the classifier rejects the shape of this pooling
            if logits.shape == expected.shape and (logits - expected).abs().max() <= _TOLERANCE * expected.abs().max():
                self._pool = pool
                return [stream]
        raise ValueError(
            f"{self.name} cannot annotate: {type(self.model).__name__} pools its last hidden state in an unsupported way"
        )

    def _find_stream(self, images: Tensor, hidden: Tensor, maps: Sequence[Tensor] | None) -> Stream:
        height, width = images.shape[2:]
        if maps:
            grid = (maps[-1].shape[2], maps[-1].shape[3])
        else:
            patch = getattr(self._config, "patch_size", None)
            sides = (patch, patch) if isinstance(patch, int) else patch
            grid = (height // sides[0], width // sides[1]) if sides and len(sides) == 2 else (0, 0)
        if hidden.ndim == 4:
            channels_last = maps is not None and hidden.shape[1:] == maps[-1].permute(0, 2, 3, 1).shape[1:]
            return Stream("NHWC", grid) if channels_last else Stream("NCHW", (hidden.shape[2], hidden.shape[3]))
        num_prefix_tokens = hidden.shape[1] - grid[0] * grid[1]
        if hidden.ndim != 3 or 0 in grid or not 0 <= num_prefix_tokens <= _MAX_PREFIX_TOKENS:
            raise ValueError(
                f"{self.name} cannot annotate: its last hidden state {list(hidden.shape)} is not a map, and does not match the "
                f"{grid[0]} x {grid[1]} patches of its config"
            )
        return Stream("NLC", grid, num_prefix_tokens)

    def _classify(self, features: Tensor, pooled: Tensor | None) -> Tensor:
        """Return the logits of the model for given outputs of its base model."""
        assert self._output_type is not None
        values = {"last_hidden_state": features, "pooler_output": pooled}
        outputs = self._output_type(**{key: value for key, value in values.items() if value is not None})
        dummy = features.new_zeros(len(features), 3, 1, 1)
        with _replaced_forward(self.base, lambda *_, **__: outputs):
            logits: Tensor = self.model(dummy).logits
        return logits


def _base_model(model: PreTrainedModel, name: str) -> nn.Module:
    """Return the part of a classifier that computes its last hidden state."""
    if model.base_model is not model:
        base: nn.Module = model.base_model
        return base
    parts = [part for part in model.children() if hasattr(part, "config")]  # such as those of CLIP and SigLIP
    if len(parts) != 1:
        raise ValueError(f"{name} cannot annotate: {type(model).__name__} has no base model separate from its head")
    return parts[0]


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward  # on the instance, which overrides that of its type
    try:
        yield
    finally:
        del module.forward


def _poolings(base: nn.Module, stream: Stream) -> Iterator[Callable[[Tensor], Tensor | None]]:
    """Yield functions from last hidden states to `pooler_output`, as base models compute it."""
    yield lambda _: None  # the classifier uses the hidden state directly
    yield stream.mean
    yield lambda features: stream.mean(features)[:, :, None, None]
    for name in ("layernorm", "norm"):
        norm = getattr(base, name, None)
        if isinstance(norm, nn.Module):
            yield lambda features, norm=norm: norm(stream.mean(features))  # type: ignore[misc]
    pooler = getattr(base, "pooler", None)
    if isinstance(pooler, nn.Module):
        yield pooler
        yield lambda features: pooler(features).flatten(1)


def _load_model(name: str, revision: str | None) -> PreTrainedModel:
    check_extra("hf", f"hf:{name}")
    from transformers import AutoModelForImageClassification  # slow import

    item = HubItem(name, revision, kind="model", instead="give the folder of a saved model")
    with explaining_hub_errors(item):
        if not Path(name).exists():
            check_reachable(item)
        model, info = AutoModelForImageClassification.from_pretrained(
            name, revision=revision, output_loading_info=True, trust_remote_code=False
        )
    missing = sorted(info["missing_keys"])
    if missing:  # transformers initializes them at random
        raise ValueError(
            f"{name} has no weights for {', '.join(missing[:3])}: choose a model that was trained to classify images"
        )
    loaded: PreTrainedModel = model
    return loaded


def _processor_inputs(name: str, revision: str | None) -> dict[str, Any]:
    """Return input_size, mean, std and interpolation of the image processor of a model."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(name, revision=revision, trust_remote_code=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} has no image processor: set input_size, mean, std and interpolation"
        ) from redacted_cause(error)
    if abs(float(getattr(processor, "rescale_factor", None) or 1 / 255) * 255 - 1) > 1e-3:
        raise ValueError(f"{name} scales pixels by {processor.rescale_factor}; only 1/255 is supported")
    normalize = getattr(processor, "do_normalize", True)
    inputs = {
        "mean": (processor.image_mean or IMAGENET_MEAN) if normalize else (0.0, 0.0, 0.0),
        "std": (processor.image_std or IMAGENET_STD) if normalize else (1.0, 1.0, 1.0),
        "interpolation": PIL.Image.Resampling(int(getattr(processor, "resample", None) or 2)).name.lower(),
    }
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = _side(crop) or _side(getattr(processor, "size", None))
    return inputs if size is None else {**inputs, "input_size": size}


def _side(size: Any) -> tuple[int, int] | None:
    """Return (height, width) of a size in any form that image processors use."""
    if isinstance(size, int):
        return size, size
    if size is None:
        return None
    values: Mapping[str, int] = size if isinstance(size, Mapping) else vars(size)
    edge = values.get("shortest_edge")
    height, width = values.get("height") or edge, values.get("width") or edge
    return (height, width) if height and width else None


def _is_size(config: Any, size: tuple[int, int]) -> bool:
    """Return whether this is the input size of a model, or the model has none."""
    expected = getattr(config, "image_size", None)
    return expected is None or size == ((expected, expected) if isinstance(expected, int) else tuple(expected))


def _labels(model: PreTrainedModel) -> tuple[str, ...] | None:
    """Return the classes of a config, as synsets if they are those of ImageNet, or None if the labels are only numbered."""
    config: Any = model.config  # its labels are typed loosely
    names = config.id2label or {}
    labels = [str(names.get(index, f"LABEL_{index}")) for index in range(config.num_labels)]
    if all(label == f"LABEL_{index}" for index, label in enumerate(labels)):
        return None
    if len(labels) == 1000:
        from timm.data.imagenet_info import ImageNetInfo

        info = ImageNetInfo("imagenet-1k")
        synsets: list[str] = info.label_names()  # type: ignore[no-untyped-call]
        first = [info.label_name_to_description(synset).partition(",")[0].casefold() for synset in synsets]
        same = sum(label.partition(",")[0].casefold() == word for label, word in zip(labels, first, strict=True))
        if same >= 900:  # spellings differ, and synsets are unique while two classes of ImageNet have the same name
            return tuple(synsets)
    return tuple(labels)
