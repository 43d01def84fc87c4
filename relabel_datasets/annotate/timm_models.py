"""timm's classifiers: making one, with its weights, for an input size; and how its features lie in the image.

Shapes: B images, H x W locations, D features at each, L tokens, P prefix tokens (class, distillation, registers).
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..storage.folders import local_path
from ..storage.hub_errors import HubItem, explaining_hub_errors
from .annotator import check_size
from .heads import DenseClassifier, Features, Stream

logger = logging.getLogger(__name__)

TimmModel = Any  # a nn.Module with attributes and methods that every timm model has


def create_model(
    name: str,
    pretrained: bool,
    checkpoint: str | Path | None,
    input_size: tuple[int, int] | None,
    model_kwargs: dict[str, Any],
) -> tuple[TimmModel, tuple[int, int]]:
    """Return the model, with its weights, and the input size that it is now made for.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: there is no such model, it has no classifier, cannot take the input size, or the checkpoint does not
            fit.
    """
    if checkpoint is not None and not local_path(checkpoint, "the checkpoint").is_file():
        raise FileNotFoundError(
            f"there is no checkpoint {str(checkpoint)!r} for {name}: check the path, or download it"
        )
    if pretrained and checkpoint is not None:
        raise ValueError(f"{name}: give pretrained=True or a checkpoint, not both")
    if not pretrained and checkpoint is None:
        logger.warning("%s has random weights: give pretrained=True or a checkpoint, unless this is a test", name)
    _check_name(name)
    model: TimmModel = _create(name, pretrained, model_kwargs)
    if model.num_classes < 1:
        raise ValueError(
            f"{name} has no classifier: choose weights that have one, or give num_classes and a checkpoint"
        )
    config = model.pretrained_cfg
    own_size = check_size(model_kwargs.get("img_size") or config["input_size"][1:])
    fixed = config.get("fixed_input_size", False) and not model_kwargs.get("dynamic_img_size", False)
    resize = fixed and input_size is not None and input_size != own_size
    if resize and not hasattr(model, "set_input_size"):
        # timm still fits its pretrained weights to the size, but a checkpoint must then have been made for it.
        try:
            model = _create(name, pretrained, {**model_kwargs, "img_size": input_size})
        except ValueError as error:
            raise ValueError(f"{name} cannot take input_size={input_size}, only {own_size}: {error}") from error
        resize = False
    if checkpoint is not None:
        _load_checkpoint(model, name, Path(checkpoint), model_kwargs)
    if resize:
        model.set_input_size(img_size=input_size)
    return model, input_size or own_size


def make_dense(model: TimmModel, name: str, mode: str) -> DenseClassifier:
    """Return a module that gives the classifier's logits at every location."""
    kind = model.__module__.rpartition(".")[2]
    body = partial(_BODIES[kind], model) if kind in _BODIES else model.forward_features
    streams = _STREAMS.get(kind, _streams_of_maps)
    return DenseClassifier(model, name, body, model.forward_head, partial(streams, model, name), mode)


def imagenet_classes(model: TimmModel) -> tuple[str, ...] | None:
    """Return the synsets of a model whose head is as its config has it, and of the size of an ImageNet's."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model)
    if subset is None or model.num_classes != model.pretrained_cfg["num_classes"]:
        return None
    return tuple(ImageNetInfo(subset).label_names())  # type: ignore[no-untyped-call]


def _create(name: str, pretrained: bool, model_kwargs: dict[str, Any]) -> TimmModel:
    """Return `timm.create_model(...)`.

    Raises:
        ValueError: The model does not accept the arguments.
        FileNotFoundError, RefusedError, DatasetError, OSError: Its weights cannot be downloaded, see `explain_hub_error`.
    """
    import timm

    with explaining_hub_errors(HubItem(_hub_name(name), kind="model")):
        try:
            return timm.create_model(name, pretrained=pretrained, **model_kwargs)
        except (TypeError, AssertionError, KeyError, AttributeError, RuntimeError, ValueError) as error:
            given = f"with the model arguments {model_kwargs}: check their names and values" if model_kwargs else ""
            raise ValueError(f"timm cannot create {name} {given} ({type(error).__name__}: {error})") from error


def _hub_name(name: str) -> str:
    """Return the repository on the Hub that timm takes the weights of a model from."""
    import timm

    config = None if ":" in name else timm.get_pretrained_cfg(name)
    return getattr(config, "hf_hub_id", None) or name.rpartition(":")[2]


def _check_name(name: str) -> None:
    import timm

    if ":" not in name and not timm.is_model(name):  # with a colon, it is of a model on the Hub or in a folder
        close = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=5)
        hint = f"close names are {close}" if close else "timm.list_models() lists them"
        raise ValueError(f"timm has no model {name!r}: {hint}")


def _load_checkpoint(model: TimmModel, name: str, path: Path, model_kwargs: dict[str, Any]) -> None:
    import timm.models

    try:
        timm.models.load_checkpoint(model, str(path))
    except (RuntimeError, ValueError, KeyError, AttributeError, EOFError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"checkpoint {str(path)!r} does not fit {name} with {model_kwargs}: give the model_kwargs it was made with "
            f"(num_classes, img_size, ...), or the right file. {reason[:500]}"
        ) from error


def _streams_of_maps(model: TimmModel, name: str, images: Tensor, features: Features) -> list[Stream]:
    """Return how features lie in the image: tokens as in the maps that the model gives when asked for maps."""
    tensors = [features] if isinstance(features, Tensor) else list(features)
    wrong = [tensor for tensor in tensors if not isinstance(tensor, Tensor) or tensor.ndim not in (3, 4)]
    if wrong or not tensors:
        got = " and ".join(f"a {t.ndim}-D tensor" if isinstance(t, Tensor) else f"a {type(t).__name__}" for t in wrong)
        raise ValueError(f"{name} cannot annotate: its features are {got or 'empty'}, not maps of locations")
    layout = getattr(model, "output_fmt", "NCHW")  # of features that are not tokens
    has_tokens = any(tensor.ndim == 3 for tensor in tensors)
    maps = _intermediate_maps(model, name, images, 1 if isinstance(features, Tensor) else None) if has_tokens else []
    return [_stream_of_tokens(model, name, t, maps) if t.ndim == 3 else _stream_of_map(t, layout) for t in tensors]


def _stream_of_map(features: Tensor, layout: str) -> Stream:
    height, width = features.shape[1:3] if layout == "NHWC" else features.shape[2:]
    return Stream(layout, (height, width))


def _stream_of_tokens(model: TimmModel, name: str, features: Tensor, maps: Sequence[Tensor]) -> Stream:
    """Return the layout of tokens `[B, L, D]`: prefix tokens and those of the last map `[B, D, H, W]` that they fit."""
    num_tokens = features.shape[1]
    for last in reversed(maps):
        height, width = last.shape[2:]
        num_prefix_tokens = num_tokens - height * width
        # VOLO and CoaT have a class token without saying so, PiT may have one for distillation, too.
        said = getattr(model, "num_prefix_tokens", min(max(num_prefix_tokens, 0), 2))
        if num_prefix_tokens == said and (len(maps) == 1 or last.shape[1] == features.shape[2]):
            return Stream("NLC", (height, width), num_prefix_tokens)
    grids = " or ".join(sorted({f"{height} x {width}" for height, width in (m.shape[2:] for m in maps)}))
    raise ValueError(
        f"{name} cannot annotate: its features are {num_tokens} tokens, which are no map of {grids} locations"
    )


def _intermediate_maps(model: TimmModel, name: str, images: Tensor, last: int | None) -> list[Tensor]:
    """Return the last maps `[B, D, H, W]` of the model, or all."""
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"{name} cannot annotate: it does not tell how its tokens lie in the image")
    maps: list[Tensor] = model.forward_intermediates(images, indices=last, output_fmt="NCHW", intermediates_only=True)
    return maps


def _pit_body(model: TimmModel, images: Tensor) -> Tensor:
    """Return PiT's class tokens, which are all that `forward_features` gives, and the tokens of its last map."""
    class_tokens, (last,) = model.forward_intermediates(images, indices=1)
    # The norm is trained on class tokens only; the head expects what has gone through it.
    return torch.cat([class_tokens, model.norm(last.flatten(2).transpose(1, 2))], dim=1)


def _efficientvim_streams(model: TimmModel, name: str, images: Tensor, features: Sequence[Tensor]) -> list[Stream]:
    """Return the layouts of EfficientViM: the states of each stage, which are nowhere, and the last stage's map."""
    (last,) = _intermediate_maps(model, name, images, 1)
    grid = (last.shape[2], last.shape[3])
    return [*(Stream("NCL", None) for _ in features[:-1]), Stream("NCL", grid)]


# The odd families, by timm's module: what their features are, and how these lie in the image.
_BODIES: dict[str, Callable[[TimmModel, Tensor], Features]] = {"pit": _pit_body}
_STREAMS: dict[str, Callable[..., list[Stream]]] = {"efficientvim": _efficientvim_streams}
