"""Create timm classifiers for an input size, and determine the layout of their features.

Shapes: B images, H x W locations, D features per location, L tokens, P prefix tokens (class, distillation, registers).
"""

from __future__ import annotations

import difflib
import logging
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..storage.folders import local_path
from ..storage.hub_check import check_reachable
from ..storage.hub_errors import HubItem, explaining_hub_errors
from .annotator import check_size
from .heads import DenseClassifier, Features, Stream

logger = logging.getLogger(__name__)
_BAD_CHECKPOINT = (
    RuntimeError,
    ValueError,
    KeyError,
    AttributeError,
    EOFError,
    pickle.UnpicklingError,
    SafetensorError,
)
_SOURCES = {"cache_dir", "pretrained_cfg", "pretrained_cfg_overlay"}  # model arguments that may name local weights

TimmModel = Any  # an nn.Module with the attributes and methods of all timm models


def create_model(
    name: str,
    pretrained: bool,
    checkpoint: str | Path | None,
    input_size: tuple[int, int] | None,
    model_kwargs: dict[str, Any],
) -> tuple[TimmModel, tuple[int, int]]:
    """Create a classifier with its weights for an input size.

    Args:
        name: Name of the model.
        pretrained: Whether to load the pretrained weights of timm.
        checkpoint: File with weights to load instead, or None.
        input_size: (height, width) in pixels, or None for that of the model.
        model_kwargs: Arguments of `timm.create_model`.

    Returns:
        The model, and its input size as (height, width) in pixels.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: The model is unknown, has no classifier or does not support the input size, or the checkpoint does not fit.
    """
    if checkpoint is not None and not local_path(checkpoint, "the checkpoint").is_file():
        raise FileNotFoundError(
            f"there is no checkpoint {str(checkpoint)!r} for {name}: check the path, or download it"
        )
    if pretrained and checkpoint is not None:
        raise ValueError(f"{name}: use pretrained=True or a checkpoint, not both")
    if not pretrained and checkpoint is None:
        logger.warning("%s has random weights: use pretrained=True or a checkpoint, except in tests", name)
    _check_name(name)
    model: TimmModel = _create(name, pretrained, model_kwargs)
    if model.num_classes < 1:
        raise ValueError(
            f"{name} has no classifier: choose weights with a classifier, or set num_classes and a checkpoint"
        )
    config = model.pretrained_cfg
    own_size = check_size(model_kwargs.get("img_size") or config["input_size"][1:])
    fixed = config.get("fixed_input_size", False) and not model_kwargs.get("dynamic_img_size", False)
    resize = fixed and input_size is not None and input_size != own_size
    if resize and not hasattr(model, "set_input_size"):
        # timm adapts its pretrained weights to this size, but a checkpoint must have been made for it.
        try:
            model = _create(name, pretrained, {**model_kwargs, "img_size": input_size})
        except ValueError as error:
            raise ValueError(f"{name} does not support input_size={input_size}, only {own_size}: {error}") from error
        resize = False
    if checkpoint is not None:
        _load_checkpoint(model, name, Path(checkpoint), model_kwargs)
    if resize:
        model.set_input_size(img_size=input_size)
    return model, input_size or own_size


def make_dense(model: TimmModel, name: str, mode: str) -> DenseClassifier:
    """Wrap a classifier in a module that computes its logits at every location.

    Args:
        model: Classifier from `create_model`.
        name: Name of the model in messages.
        mode: `"local"` or `"linearised"`, see `TimmAnnotator`.

    Returns:
        The dense classifier.
    """
    family = model.__module__.rpartition(".")[2]
    body = partial(_BODIES[family], model) if family in _BODIES else model.forward_features
    streams = _STREAMS.get(family, _streams_of_maps)
    return DenseClassifier(model, name, body, model.forward_head, partial(streams, model, name), mode)


def imagenet_classes(model: TimmModel) -> tuple[str, ...] | None:
    """Return the synsets of an ImageNet classifier.

    Args:
        model: Classifier from `create_model`.

    Returns:
        Synsets in the order of the logits, or None if the number of classes is not that of the model's config or not that of an
        ImageNet variant.
    """
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model)
    if subset is None or model.num_classes != model.pretrained_cfg["num_classes"]:
        return None
    return tuple(ImageNetInfo(subset).label_names())  # type: ignore[no-untyped-call]


def _create(name: str, pretrained: bool, model_kwargs: dict[str, Any]) -> TimmModel:
    """Return `timm.create_model(...)`.

    Raises:
        ValueError: The model does not accept the arguments.
        FileNotFoundError, RefusedError, DatasetError, OSError: The weights cannot be downloaded, see `explain_hub_error`.
    """
    import timm

    repo_id, _, revision = _hub_name(name).partition("@")
    item = HubItem(repo_id, revision or None, kind="model", instead="give a file with checkpoint=")
    with explaining_hub_errors(item):
        if _is_on_hub(name, pretrained) and not _SOURCES & model_kwargs.keys():
            check_reachable(item)
        try:
            return timm.create_model(name, pretrained=pretrained, **model_kwargs)
        except (TypeError, AssertionError, KeyError, AttributeError, RuntimeError, ValueError) as error:
            given = f"with the model arguments {model_kwargs}: check their names and values" if model_kwargs else ""
            raise ValueError(f"timm cannot create {name} {given} ({type(error).__name__}: {error})") from error


def _is_on_hub(name: str, pretrained: bool) -> bool:
    """Return whether timm loads a file from the Hub to create a model."""
    import timm

    if ":" in name:
        return name.startswith(("hf-hub:", "hf_hub:"))
    return pretrained and bool(getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None))


def _hub_name(name: str) -> str:
    """Return the repository on the Hub from which timm downloads the weights of a model."""
    import timm

    config = None if ":" in name else timm.get_pretrained_cfg(name)
    return getattr(config, "hf_hub_id", None) or name.rpartition(":")[2]


def _check_name(name: str) -> None:
    import timm

    if ":" not in name and not timm.is_model(name):  # a name with a colon is on the Hub or in a folder
        close = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=5)
        hint = f"similar names are {close}" if close else "timm.list_models() lists all names"
        raise ValueError(f"timm has no model {name!r}: {hint}")


def _load_checkpoint(model: TimmModel, name: str, path: Path, model_kwargs: dict[str, Any]) -> None:
    import timm.models

    try:
        timm.models.load_checkpoint(model, str(path))
    except _BAD_CHECKPOINT as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"checkpoint {str(path)!r} does not fit {name} with {model_kwargs}: give the model_kwargs of its training "
            f"(num_classes, img_size, ...), or another file. {reason[:500]}"
        ) from error


def _streams_of_maps(model: TimmModel, name: str, images: Tensor, features: Features) -> list[Stream]:
    """Return the layouts of features. Tokens are compared with the intermediate maps of the model."""
    tensors = [features] if isinstance(features, Tensor) else list(features)
    wrong = [tensor for tensor in tensors if not isinstance(tensor, Tensor) or tensor.ndim not in (3, 4)]
    if wrong or not tensors:
        got = " and ".join(f"a {t.ndim}-D tensor" if isinstance(t, Tensor) else f"a {type(t).__name__}" for t in wrong)
        raise ValueError(f"{name} cannot annotate: its features are {got or 'empty'}, not maps of locations")
    layout = getattr(model, "output_fmt", "NCHW")  # layout of maps
    has_tokens = any(tensor.ndim == 3 for tensor in tensors)
    maps = _intermediate_maps(model, name, images, 1 if isinstance(features, Tensor) else None) if has_tokens else []
    return [_stream_of_tokens(model, name, t, maps) if t.ndim == 3 else _stream_of_map(t, layout) for t in tensors]


def _stream_of_map(features: Tensor, layout: str) -> Stream:
    height, width = features.shape[1:3] if layout == "NHWC" else features.shape[2:]
    return Stream(layout, (height, width))


def _stream_of_tokens(model: TimmModel, name: str, features: Tensor, maps: Sequence[Tensor]) -> Stream:
    """Return the layout of tokens `[B, L, D]`: prefix tokens, then the locations of the last map `[B, D, H, W]` that fits."""
    num_tokens = features.shape[1]
    for last in reversed(maps):
        height, width = last.shape[2:]
        num_prefix_tokens = num_tokens - height * width
        # VOLO and CoaT do not declare their class token, nor does PiT its class and distillation tokens.
        declared = getattr(model, "num_prefix_tokens", min(max(num_prefix_tokens, 0), 2))
        if num_prefix_tokens == declared and (len(maps) == 1 or last.shape[1] == features.shape[2]):
            return Stream("NLC", (height, width), num_prefix_tokens)
    grids = " or ".join(sorted({f"{height} x {width}" for height, width in (m.shape[2:] for m in maps)}))
    raise ValueError(
        f"{name} cannot annotate: its features are {num_tokens} tokens, which are not a map of {grids} locations"
    )


def _intermediate_maps(model: TimmModel, name: str, images: Tensor, last: int | None) -> list[Tensor]:
    """Return the `last` intermediate maps `[B, D, H, W]` of the model, or all if None."""
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"{name} cannot annotate: the positions of its tokens are unknown (no forward_intermediates)")
    maps: list[Tensor] = model.forward_intermediates(images, indices=last, output_fmt="NCHW", intermediates_only=True)
    return maps


def _pit_body(model: TimmModel, images: Tensor) -> Tensor:
    """Return the class tokens of PiT, the only result of its `forward_features`, and the tokens of its last map."""
    class_tokens, (last,) = model.forward_intermediates(images, indices=1)
    # The head expects normalized tokens, although this norm was trained on class tokens only.
    return torch.cat([class_tokens, model.norm(last.flatten(2).transpose(1, 2))], dim=1)


def _efficientvim_streams(model: TimmModel, name: str, images: Tensor, features: Sequence[Tensor]) -> list[Stream]:
    """Return the layouts of EfficientViM: the states of each stage, which have no positions, and the map of the last stage."""
    (last,) = _intermediate_maps(model, name, images, 1)
    grid = (last.shape[2], last.shape[3])
    return [*(Stream("NCL", None) for _ in features[:-1]), Stream("NCL", grid)]


# Bodies and layouts of families that need special handling, by timm module.
_BODIES: dict[str, Callable[[TimmModel, Tensor], Features]] = {"pit": _pit_body}
_STREAMS: dict[str, Callable[..., list[Stream]]] = {"efficientvim": _efficientvim_streams}
