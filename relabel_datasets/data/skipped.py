"""Images that are left out of a dataset."""

from __future__ import annotations

from typing import NamedTuple


class Skipped(NamedTuple):
    """An image that was left out, as the manifest lists it."""

    key: str
    name: str  # where it is: a path, or tar and member, or row and column
    error: str  # why
