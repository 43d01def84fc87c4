from pathlib import Path

import pytest

from tests.report.pages import build_hostile


@pytest.fixture(scope="session")
def hostile_dataset(tmp_path_factory) -> Path:
    """A dataset whose keys and class names contain HTML."""
    return build_hostile(tmp_path_factory.mktemp("hostile") / "dataset")
