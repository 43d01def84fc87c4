"""Fixture for tests of shards."""

from pathlib import Path

import pytest


@pytest.fixture
def colours(dataset_folder: Path) -> Path:
    """Folder of the config with images."""
    return dataset_folder / "colours"
