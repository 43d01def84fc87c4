"""Fixture for tests of storage."""

from pathlib import Path

import pytest

from relabel_datasets.storage.cache import ShardCache


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    """A cache with a limit of 3.5 times the default length of `Content`."""
    return ShardCache(tmp_path / "shards", 3500)
