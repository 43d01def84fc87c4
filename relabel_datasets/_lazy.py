"""Import the public names of a package when they are first used (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any


def import_lazily(package: str, modules: Mapping[str, str], name: str) -> Any:
    """Return a public name of a package, and keep it there for the next use.

    Args:
        package: Full name of the package.
        modules: Public names and the modules that define them, relative to the package.
        name: Name that was asked for.

    Returns:
        The class, function or constant.

    Raises:
        AttributeError: The package has no such name.
    """
    if name not in modules:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    value = getattr(import_module(f".{modules[name]}", package), name)
    setattr(sys.modules[package], name, value)
    return value
