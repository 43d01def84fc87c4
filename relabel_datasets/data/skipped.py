"""Images that a build leaves out of a dataset."""

from __future__ import annotations

from typing import NamedTuple


class Skipped(NamedTuple):
    """Image that was left out, as listed in the manifest."""

    key: str
    name: str  # location: a path, a tar and its member, or a row and its column
    error: str  # reason
