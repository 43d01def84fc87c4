"""Tests of what the oldest supported versions lack skip, with the installed version as the reason."""

import re
from importlib.metadata import version

import pytest
from torchvision import tv_tensors


def installed(package: str) -> tuple[int, ...]:
    """Return the numbers of the installed version, such as (0, 19, 0)."""
    return tuple(map(int, re.findall(r"\d+", version(package).partition("+")[0])))


def needs(package: str, *oldest: int) -> pytest.MarkDecorator:
    """Skip a test if an older version of the package is installed."""
    wanted = ".".join(map(str, oldest))
    return pytest.mark.skipif(installed(package) < oldest, reason=f"needs {package} {wanted}, not {version(package)}")


_FIRST_TIMM = {  # to give these a map
    "coat_tiny": (1, 0, 31),
    "crossvit_tiny_240": (1, 0, 31),
    "efficientvim_m1": (1, 0, 31),
    "test_maxvit": (1, 0, 31),
}


def skip_without_model(name: str) -> None:
    """Skip a test if the installed timm lacks a model, or what its map needs."""
    first = _FIRST_TIMM.get(name, ())
    if installed("timm") < first:
        pytest.skip(f"{name} needs timm {'.'.join(map(str, first))}, not {version('timm')}")


needs_wrap = pytest.mark.skipif(
    not hasattr(tv_tensors.TVTensor, "wrap"),
    reason=f"tv_tensors.wrap of torchvision {version('torchvision')} ignores subclasses",
)
