"""Annotators of a user's own: made by a function that is named on the command line."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from .annotator import Annotator, ModuleAnnotator


def load_annotator(spec: str, **options: Any) -> Annotator:
    """Return the annotator that a function makes: it returns one, or a torch module.

    Args:
        spec: `"package.module:function"`, importable, or `"path/to/file.py:function"`. The function is called without
            arguments.
        **options: of `ModuleAnnotator`, for a module that gives logits `[B, C, H, W]`: `input_size` and more. None of
            them for an annotator, which has its own.

    Raises:
        ValueError: there is no such module or function, it fails to return an annotator or a module, or the options do
            not fit what it returns.

    Example:
        >>> load_annotator("my_models.py:make_segmenter", input_size=448)
    """
    source, _, name = spec.rpartition(":")
    function = getattr(_import(source, spec), name, None)
    if not callable(function):
        raise ValueError(f"{source} has no function {name!r}: --annotator takes package.module:function")
    made = function()
    if isinstance(made, nn.Module):
        if options.get("input_size") is None:
            raise ValueError(f"{spec} returned a torch module, which does not tell its input size: give input_size")
        return ModuleAnnotator(made, **{"name": name, **options})
    lacking = [part for part in ("classes", "num_classes", "preprocess", "describe") if not hasattr(made, part)]
    if lacking or not callable(made):
        raise ValueError(
            f"{spec} must return an annotator or a torch module, got {type(made).__name__}"
            + (f" without {', '.join(lacking)}" if lacking else ", which cannot be called")
        )
    if options:
        raise ValueError(
            f"{spec} returned an annotator, so it decides for itself about {', '.join(sorted(options))}: leave the "
            "options out, or return a torch module"
        )
    annotator: Annotator = made
    return annotator


def _import(source: str, spec: str) -> ModuleType:
    if source.endswith(".py"):
        return _import_file(Path(source))
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"cannot import {source!r} of {spec!r} ({error}): give package.module:function of an installed package, or "
            "path/to/file.py:function"
        ) from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}: --annotator takes path/to/file.py:function")
    # A name of its own for each path, so that no installed module is hidden.
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    spec = importlib.util.spec_from_file_location(f"relabel_custom_{digest[:12]}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look there
    spec.loader.exec_module(module)
    return module
