"""The annotator that made a config, made again from what its manifest says and the same weights.

The manifest may be hostile: it may name a model of timm or of the Hub, and arguments of its architecture, but no file, no URL
and no code to load.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DatasetError
from .annotator import ModuleAnnotator
from .timm_annotator import TimmAnnotator

# A model of timm, `org/name` on the Hub, or `hf-hub:org/name@revision`; no path and no `local-dir:`.
_MODEL_NAME = re.compile(r"(hf-hub:|hf_hub:)?[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[A-Za-z0-9][\w.-]*)?", re.ASCII)
# Arguments of timm.create_model and its builder that say what to load, and from where.
_LOADING = frozenset(
    {
        "cache_dir", "checkpoint_path", "exportable", "no_jit", "pretrained_cfg", "pretrained_cfg_overlay",
        "pretrained_custom_load", "pretrained_filter_fn", "pretrained_model_args", "pretrained_strict", "scriptable",
    }
)  # fmt: skip


def remake_annotator(
    description: Mapping[str, Any],
    *,
    checkpoint: str | Path | None = None,
    input_size: int | Sequence[int] | None = None,
    device: str | None = None,
) -> ModuleAnnotator:
    """Return the annotator that a manifest describes.

    Args:
        description: the manifest's `annotator`.
        checkpoint: its weights. Default: those that timm or the Hub has under its name.
        input_size: (height, width) in pixels, or an int. Default: that of the maps.
        device: where to compute. Default: the current CUDA device, or the CPU where there is none.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        DatasetError: (a ValueError) The description names a path as the model, or arguments that load something.
        ValueError: The weights are not those that made the maps, or the annotator is not a single model by name.
    """
    known = {key: description.get(key) for key in ("mean", "std", "interpolation", "dtype", "head")}
    options = {key: value for key, value in known.items() if value is not None}
    size = description.get("input_size") if input_size is None else input_size
    name, kind = description.get("name"), description.get("kind")
    annotator: ModuleAnnotator
    if kind in ("timm", "transformers") and not (isinstance(name, str) and _MODEL_NAME.fullmatch(name)):
        raise DatasetError(f"the manifest's annotator name {name!r:.100} is no name of a model of timm or of the Hub")
    if kind == "timm":
        annotator = TimmAnnotator(
            str(name), pretrained=checkpoint is None, checkpoint=checkpoint, input_size=size, device=device, **options,
            **_model_args(description),
        )  # fmt: skip
    elif kind == "transformers" and checkpoint is None:
        from .hf_annotator import HFAnnotator

        annotator = HFAnnotator(str(name), input_size=size, device=device, **options)
    else:
        raise ValueError(
            f"an annotator of kind {kind!r} ({name}) cannot be made from its manifest: make it in Python, and give it to "
            "train_student(annotator=...)"
        )
    theirs, ours = description.get("weights_sha256"), annotator.describe()["weights_sha256"]
    if theirs != ours:
        raise ValueError(
            f"the weights of {name} are not those that made the label maps (SHA-256 {ours[:12]}..., the manifest says "
            f"{str(theirs)[:12]}...): give the file of its weights as the checkpoint"
        )
    return annotator


def _model_args(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest's arguments of `timm.create_model`.

    Raises:
        DatasetError: They are not arguments of an architecture.
    """
    given = description.get("model_args", {})
    if not isinstance(given, dict):
        raise DatasetError(f"the manifest's annotator model_args must be an object, got {type(given).__name__}")
    refused = sorted(given.keys() & (_LOADING | inspect.signature(TimmAnnotator.__init__).parameters.keys()))
    if refused:
        raise DatasetError(
            f"the manifest's annotator model_args has {', '.join(refused)}: only arguments of the architecture are allowed"
        )
    return given
