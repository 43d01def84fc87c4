"""The annotator that made a config, made again from what its manifest says and the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .annotator import ModuleAnnotator
from .timm_annotator import TimmAnnotator


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
        ValueError: the weights are others than those that made the maps, or it is not a single model by name.
    """
    known = {key: description.get(key) for key in ("mean", "std", "interpolation", "dtype", "head")}
    options = {key: value for key, value in known.items() if value is not None}
    size = description.get("input_size") if input_size is None else input_size
    name, kind = description.get("name"), description.get("kind")
    annotator: ModuleAnnotator
    if kind == "timm":
        annotator = TimmAnnotator(
            str(name), pretrained=checkpoint is None, checkpoint=checkpoint, input_size=size, device=device, **options,
            **description.get("model_args", {}),
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
