"""Exclusion of functions from `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def eagerly(function: Callable[P, R]) -> Callable[P, R]:
    """Exclude a function from `torch.compile`, such as pooling: the NumPy that computes its weights cannot be traced."""
    eager: Callable[P, R] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return eager
