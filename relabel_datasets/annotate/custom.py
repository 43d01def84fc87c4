"""Custom annotators, created by a user's function that is named on the command line."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ..storage.redaction import redact_path
from .annotator import Annotator, ModuleAnnotator


def load_annotator(spec: str, **options: Any) -> Annotator:
    """Create an annotator by a user's function, which returns an annotator or a torch module.

    Args:
        spec: `"package.module:function"` of an importable module, or `"path/to/file.py:function"`. The function is called
            without arguments.
        **options: Arguments of `ModuleAnnotator`, at least `input_size`, if the function returns a torch module with logits
            `[B, C, H, W]`. An annotator has its own options and accepts none.

    Returns:
        The annotator.

    Raises:
        ValueError: The module or function does not exist, the function returns neither an annotator nor a torch module, or the
            options do not fit the returned object.

    Example:
        >>> load_annotator("my_models.py:make_segmenter", input_size=448)
    """
    source, _, name = spec.rpartition(":")
    function = getattr(_import(source, spec), name, None)
    if not callable(function):
        raise ValueError(f"{source} has no function {name!r}: --annotator must be package.module:function")
    result = function()
    if isinstance(result, nn.Module):
        if options.get("input_size") is None:
            raise ValueError(
                f"{spec} returned a torch module, whose input size is unknown: set input_size= (--input-size)"
            )
        return ModuleAnnotator(result, **{"name": name, **options})
    missing = [part for part in ("classes", "num_classes", "preprocess", "describe") if not hasattr(result, part)]
    if missing or not callable(result):
        raise ValueError(
            f"{spec} must return an annotator or a torch module, got {type(result).__name__}"
            + (f" without {', '.join(missing)}" if missing else ", which is not callable")
        )
    if options:
        raise ValueError(
            f"{spec} returned an annotator, which has its own {', '.join(sorted(options))}: leave these options out, or "
            "return a torch module"
        )
    annotator: Annotator = result
    return annotator


def _import(source: str, spec: str) -> ModuleType:
    if source.endswith(".py"):
        return _import_file(Path(source))
    if not all(part.isidentifier() for part in source.split(".")):  # such as a URL, which may have a password
        raise ValueError(
            f"{redact_path(spec)!r} is not package.module:function of an installed package or path/to/file.py:function"
        )
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"cannot import {source!r} of {spec!r} ({error}): use package.module:function of an installed package, or "
            "path/to/file.py:function"
        ) from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}: --annotator must be path/to/file.py:function")
    # One name per path, so that no installed module is hidden.
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    spec = importlib.util.spec_from_file_location(f"relabel_custom_{digest[:12]}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # needed by dataclasses and pickle
    spec.loader.exec_module(module)
    return module
