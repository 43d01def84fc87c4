"""Recreate the annotator of a config from its manifest and the same weights.

Manifests are untrusted. They may name a model of timm or of the Hub and arguments of its architecture, but no file, URL or code
to load.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DatasetError
from ..extras import check_extra
from ..schema import shown
from ..words import counted
from .annotator import Annotator, ModuleAnnotator
from .combine import Ensemble, FlipAveraged
from .timm_annotator import TimmAnnotator

Checkpoint = str | Path | None

# timm model, `org/name` on the Hub, or `hf-hub:org/name@revision`. Paths and `local-dir:` do not match.
_MODEL_NAME = re.compile(r"(hf-hub:|hf_hub:)?[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[A-Za-z0-9][\w.-]*)?", re.ASCII)
# Arguments of timm.create_model and its builder that control what is loaded, and from where.
_LOADING = frozenset(
    {
        "cache_dir", "checkpoint_path", "exportable", "no_jit", "pretrained_cfg", "pretrained_cfg_overlay",
        "pretrained_custom_load", "pretrained_filter_fn", "pretrained_model_args", "pretrained_strict", "scriptable",
    }
)  # fmt: skip


def remake_annotator(
    description: Mapping[str, Any],
    *,
    checkpoint: Checkpoint | Sequence[Checkpoint] = None,
    input_size: int | Sequence[int] | None = None,
    device: str | None = None,
) -> Annotator:
    """Create the annotator that a manifest describes: a named model, or an ensemble of named models.

    Args:
        description: Field `annotator` of the manifest.
        checkpoint: File with the weights. For an ensemble of several models, one file per model in the order of the manifest;
            members with equal weights, such as one model at several input sizes, count once. None stands for the weights of this
            name on timm or the Hub. Default: None for all models.
        input_size: (height, width) in pixels, or an int for both. Default: that of the label maps, for each member.
        device: Device of the forward pass. Default: the current CUDA device if available, else the CPU.

    Returns:
        The annotator, with the same weights as the one that made the label maps.

    Raises:
        FileNotFoundError: A checkpoint does not exist.
        DatasetError: The description contains a path as the name of a model, or arguments that load files.
        MissingExtraError: (an ImportError) The package of the annotator is not installed.
        ValueError: The weights differ from those that made the maps, the number of checkpoints is not that of the models, or the
            annotator does not consist of named models.
    """
    models = _models(description)
    weights = list(dict.fromkeys((str(model.get("name")), str(model.get("weights_sha256"))) for model in models))
    files = [checkpoint] if checkpoint is None or isinstance(checkpoint, (str, Path)) else list(checkpoint)
    if files == [None]:
        files *= len(weights)
    if len(files) != len(weights):
        raise ValueError(
            f"the label maps were made by {counted(len(weights), 'model')} ({', '.join(name for name, _ in weights)}), but "
            f"{counted(len(files), 'checkpoint')} {'was' if len(files) == 1 else 'were'} given: give checkpoint= once per model, "
            "in this order"
        )
    file_of = dict(zip(weights, files, strict=True))
    annotators = [
        _remake_model(model, file_of[str(model.get("name")), str(model.get("weights_sha256"))], input_size, device)
        for model in models
    ]
    return Ensemble(annotators) if description.get("kind") == "ensemble" else annotators[0]


def check_package(description: Mapping[str, Any]) -> None:
    """Raise an error if `remake_annotator` would need an extra that is not installed.

    Args:
        description: Field `annotator` of the manifest.

    Raises:
        DatasetError: The members of an ensemble are not a list of descriptions.
        MissingExtraError: (an ImportError) The package of the annotator is not installed.
    """
    for model in _models(description):
        if model.get("kind") == "transformers":
            check_extra("hf", f"the annotator {shown(model.get('name'))}")


def _models(description: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the description of each model, which for an ensemble are those of its members.

    Raises:
        DatasetError: The members of an ensemble are not a list of descriptions.
    """
    if description.get("kind") != "ensemble":
        return [description]
    members = description.get("annotators")
    if not isinstance(members, list) or not members or not all(isinstance(member, Mapping) for member in members):
        raise DatasetError(f"the ensemble in the manifest must have a list of annotators, got {members!r:.100}")
    if any("rows_sha256" in member for member in members):  # the order of the classes is known by its hash only
        raise ValueError(
            f"the ensemble {description.get('name')} cannot be recreated from its manifest, because its members have selected "
            "classes: create it in Python and pass it to train_student(annotator=...)"
        )
    return members


def _remake_model(
    description: Mapping[str, Any],
    checkpoint: Checkpoint,
    input_size: int | Sequence[int] | None,
    device: str | None,
) -> Annotator:
    """Create the annotator of a named model, and check its weights."""
    recorded = {key: description.get(key) for key in ("mean", "std", "interpolation", "dtype", "head")}
    options = {key: value for key, value in recorded.items() if value is not None}
    size = description.get("input_size") if input_size is None else input_size
    name, kind = description.get("name"), description.get("kind")
    annotator: ModuleAnnotator
    if kind in ("timm", "transformers") and not (isinstance(name, str) and _MODEL_NAME.fullmatch(name)):
        raise DatasetError(
            f"the annotator name {name!r:.100} in the manifest is not the name of a model of timm or of the Hub"
        )
    if kind == "timm":
        annotator = TimmAnnotator(
            str(name), pretrained=checkpoint is None, checkpoint=checkpoint, input_size=size, device=device, **options,
            **_model_kwargs(description),
        )  # fmt: skip
    elif kind == "transformers" and checkpoint is None:
        from .hf_annotator import HFAnnotator

        annotator = HFAnnotator(str(name), input_size=size, device=device, **options)
    else:
        raise ValueError(
            f"an annotator of kind {kind!r} ({name}) cannot be recreated from its manifest: create it in Python and pass it to "
            "train_student(annotator=...)"
        )
    expected, actual = description.get("weights_sha256"), annotator.describe()["weights_sha256"]
    if expected != actual:
        raise ValueError(
            f"the weights of {name} are not those that made the label maps (SHA-256 {actual[:12]}..., expected "
            f"{str(expected)[:12]}...): give the file with those weights, checkpoint="
        )
    return FlipAveraged(annotator) if description.get("flip_averaged") else annotator


def _model_kwargs(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `timm.create_model` in a manifest.

    Raises:
        DatasetError: An argument does not belong to the architecture.
    """
    model_kwargs = description.get("model_args", {})
    if not isinstance(model_kwargs, dict):
        raise DatasetError(
            f"the annotator model_args in the manifest must be an object, got {type(model_kwargs).__name__}"
        )
    refused = sorted(model_kwargs.keys() & (_LOADING | inspect.signature(TimmAnnotator.__init__).parameters.keys()))
    if refused:
        raise DatasetError(
            f"the annotator model_args in the manifest have {', '.join(refused)}: only arguments of the architecture are allowed"
        )
    return model_kwargs
