"""Import the public names of a package on first use (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any


def import_lazily(package: str, modules: Mapping[str, str], name: str) -> Any:
    """Return a public name of a package and store it in the package for the next use.

    Args:
        package: Full name of the package.
        modules: Mapping from public name to the module that defines it, relative to the package.
        name: Requested name.

    Returns:
        The class, function or constant.

    Raises:
        AttributeError: The name is not public in the package.
    """
    if name not in modules:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    value = getattr(import_module(f".{modules[name]}", package), name)
    setattr(sys.modules[package], name, value)
    return value
