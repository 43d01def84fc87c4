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


needs_wrap = pytest.mark.skipif(
    not hasattr(tv_tensors.TVTensor, "wrap"),
    reason=f"tv_tensors.wrap of torchvision {version('torchvision')} ignores subclasses",
)
